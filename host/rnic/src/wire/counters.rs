//! What is counted: by QP, and when a QP goes, added to its user and to the device. Packets that belong to no QP are the device's.

use hyv_abi::control::{CounterScope, Counters, QueryCounters};
use hyv_abi::types::{Errno, Reason, VerbError};
use zerocopy::FromZeros;

use crate::engine::Engine;
use crate::objects::UserId;

/// Nothing counted.
pub(crate) fn zeroed() -> Counters {
    Counters::new_zeroed()
}

macro_rules! add {
    ($to:ident, $from:ident: $($field:ident)*) => { $($to.$field += $from.$field;)* };
}

/// Adds each count of `from` to `to`.
pub(crate) fn add(to: &mut Counters, from: &Counters) {
    add!(to, from:
        work_requests bytes errors rnr_waits tx_packets tx_bytes rx_packets rx_bytes retransmissions timeouts tx_dropped
        duplicates ghosts rnr_naks_sent rnr_naks_received sequence_naks_sent sequence_naks_received invalid_naks_sent
        invalid_naks_received access_naks_sent access_naks_received operational_naks_sent operational_naks_received
        icrc_errors drops_malformed drops_no_qp drops_state drops_source drops_pkey drops_qkey drops_receive drops_order);
}

impl Engine {
    /// What happened on the device, to a user or to one of its QPs.
    ///
    /// # Errors
    /// For a scope or QP that does not exist.
    pub fn query_counters(&self, id: UserId, req: &QueryCounters) -> Result<Counters, VerbError> {
        let user = self
            .users
            .get(id.slot as usize)
            .and_then(Option::as_ref)
            .filter(|u| u.generation == id.generation)
            .ok_or(VerbError::new(Errno::NoEnt, Reason::BadHandle))?;
        match CounterScope::from_u32(req.scope) {
            Some(CounterScope::Device) => Ok(self.device_counters()),
            Some(CounterScope::User) => {
                let mut sum = user.past;
                for (_, &slot) in user.qps.iter() {
                    add(&mut sum, &self.qp(slot).counters);
                }
                Ok(sum)
            }
            Some(CounterScope::Qp) => {
                let slot = user
                    .qps
                    .get(req.handle)
                    .ok_or(VerbError::new(Errno::NoEnt, Reason::BadHandle))?;
                Ok(self.qp(*slot).counters)
            }
            None => Err(VerbError::new(Errno::Inval, Reason::BadFlags)),
        }
    }

    /// What happened on the device since it was made.
    #[must_use]
    pub fn device_counters(&self) -> Counters {
        let mut sum = self.past;
        if let Some(w) = &self.wire {
            add(&mut sum, &w.counters);
        }
        for qp in self.qps.iter().flatten() {
            add(&mut sum, &qp.counters);
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::{FromBytes, IntoBytes};

    #[test]
    fn every_count_is_added() {
        let ones: Vec<u64> = vec![1; size_of::<Counters>() / 8];
        let from = Counters::read_from_bytes(ones.as_bytes()).unwrap();
        let mut to = from;
        add(&mut to, &from);
        let words = <[u64; size_of::<Counters>() / 8]>::read_from_bytes(to.as_bytes()).unwrap();
        assert!(words.iter().all(|&w| w == 2));
    }
}
