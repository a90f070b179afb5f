//! The QP state machine: which transitions exist, and which attributes each needs and allows
//! (InfiniBand Architecture 1.4, section 11.2.5.2, table 95 and following).

use hyv_abi::types::{Errno, QpAttrMask as M, QpState as S, QpType as T, Reason, VerbError};

/// Attributes that a transition requires and allows beyond `STATE` and `CUR_STATE`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Masks {
    /// Must be named.
    pub required: M,
    /// May be named.
    pub optional: M,
}

/// The masks of a transition, or `None` if it does not exist.
#[must_use]
pub fn transition(ty: T, from: S, to: S) -> Option<Masks> {
    let none = M::empty();
    let rd = M::ACCESS_FLAGS | M::PKEY_INDEX;
    let (required, optional) = match (from, to) {
        (_, S::Reset | S::Err) => (none, none),
        (S::Reset, S::Init) | (S::Init, S::Init) => {
            let all = match ty {
                T::Rc | T::Uc => M::PKEY_INDEX | M::PORT | M::ACCESS_FLAGS,
                T::Ud => M::PKEY_INDEX | M::PORT | M::QKEY,
            };
            if from == S::Reset {
                (all, none)
            } else {
                (none, all)
            }
        }
        (S::Init, S::Rtr) => match ty {
            T::Rc => (
                M::AV
                    | M::PATH_MTU
                    | M::DEST_QPN
                    | M::RQ_PSN
                    | M::MAX_DEST_RD_ATOMIC
                    | M::MIN_RNR_TIMER,
                rd,
            ),
            T::Uc => (M::AV | M::PATH_MTU | M::DEST_QPN | M::RQ_PSN, rd),
            T::Ud => (none, M::PKEY_INDEX | M::QKEY),
        },
        (S::Rtr, S::Rts) => match ty {
            T::Rc => (
                M::SQ_PSN | M::TIMEOUT | M::RETRY_CNT | M::RNR_RETRY | M::MAX_QP_RD_ATOMIC,
                M::ACCESS_FLAGS | M::MIN_RNR_TIMER,
            ),
            T::Uc => (M::SQ_PSN, M::ACCESS_FLAGS),
            T::Ud => (M::SQ_PSN, M::QKEY),
        },
        (S::Rts, S::Rts) | (S::Sqd, S::Rts) => match ty {
            T::Rc => (none, M::ACCESS_FLAGS | M::MIN_RNR_TIMER),
            T::Uc => (none, M::ACCESS_FLAGS),
            T::Ud => (none, M::QKEY),
        },
        (S::Sqe, S::Rts) if ty != T::Rc => (
            none,
            if ty == T::Ud {
                M::QKEY
            } else {
                M::ACCESS_FLAGS
            },
        ),
        (S::Rts, S::Sqd) => (none, M::EN_SQD_ASYNC_NOTIFY),
        (S::Sqd, S::Sqd) => match ty {
            T::Rc => (
                none,
                M::AV
                    | M::PORT
                    | M::PKEY_INDEX
                    | M::ACCESS_FLAGS
                    | M::TIMEOUT
                    | M::RETRY_CNT
                    | M::RNR_RETRY
                    | M::MAX_QP_RD_ATOMIC
                    | M::MAX_DEST_RD_ATOMIC
                    | M::MIN_RNR_TIMER,
            ),
            T::Uc => (none, M::AV | M::PKEY_INDEX | M::ACCESS_FLAGS),
            T::Ud => (none, M::PKEY_INDEX | M::QKEY),
        },
        _ => return None,
    };
    Some(Masks { required, optional })
}

/// Checks a `modify_qp` of a QP in state `now`; gives the state it goes to.
pub fn check(ty: T, now: S, mask: M, to: u32, cur: u32) -> Result<S, VerbError> {
    let err = |reason| Err(VerbError::new(Errno::Inval, reason));
    let to = if mask.contains(M::STATE) {
        match S::from_u32(to) {
            Some(s) => s,
            None => return err(Reason::BadAttr),
        }
    } else {
        now
    };
    if mask.contains(M::CUR_STATE) && S::from_u32(cur) != Some(now) {
        return err(Reason::CurrentState);
    }
    let Some(masks) = transition(ty, now, to) else {
        return err(Reason::BadTransition);
    };
    let named = mask - (M::STATE | M::CUR_STATE);
    if !named.contains(masks.required) {
        return err(Reason::MissingAttr);
    }
    if !(masks.required | masks.optional).contains(named) {
        return err(Reason::ExtraAttr);
    }
    Ok(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The specification's table of transitions (IBA 1.4, figure 124), written out: rows from, columns to, in the order of `S::ALL`.
    const RC: [&str; 7] = [
        // RESET INIT RTR RTS SQD SQE ERR
        "yy....y", // RESET
        "yyy...y", // INIT
        "y..y..y", // RTR
        "y..yy.y", // RTS
        "y..yy.y", // SQD
        "y.....y", // SQE: RC never is there
        "y.....y", // ERR
    ];

    #[test]
    fn transitions_are_the_specifications() {
        for (i, from) in S::ALL.into_iter().enumerate() {
            for (j, to) in S::ALL.into_iter().enumerate() {
                let want = RC[i].as_bytes()[j] == b'y';
                assert_eq!(
                    transition(T::Rc, from, to).is_some(),
                    want,
                    "RC {from:?} -> {to:?}"
                );
                let want = want || (from == S::Sqe && to == S::Rts);
                assert_eq!(
                    transition(T::Ud, from, to).is_some(),
                    want,
                    "UD {from:?} -> {to:?}"
                );
                assert_eq!(
                    transition(T::Uc, from, to).is_some(),
                    want,
                    "UC {from:?} -> {to:?}"
                );
            }
        }
    }

    #[test]
    fn every_required_attribute_is_missed_and_every_other_refused() {
        for ty in [T::Rc, T::Uc, T::Ud] {
            for from in S::ALL {
                for to in S::ALL {
                    let Some(m) = transition(ty, from, to) else {
                        let e = check(ty, from, M::STATE, to as u32, 0).unwrap_err();
                        assert_eq!(e.reason, Reason::BadTransition);
                        continue;
                    };
                    let full = M::STATE | m.required | m.optional;
                    assert_eq!(check(ty, from, full, to as u32, 0), Ok(to));
                    assert_eq!(check(ty, from, M::STATE | m.required, to as u32, 0), Ok(to));
                    for bit in M::all().iter() {
                        if m.required.contains(bit) {
                            let e = check(ty, from, full - bit, to as u32, 0).unwrap_err();
                            assert_eq!(
                                e.reason,
                                Reason::MissingAttr,
                                "{ty:?} {from:?} {to:?} {bit:?}"
                            );
                        } else if !full.contains(bit) && bit != M::CUR_STATE {
                            let e = check(ty, from, full | bit, to as u32, 0).unwrap_err();
                            assert_eq!(
                                e.reason,
                                Reason::ExtraAttr,
                                "{ty:?} {from:?} {to:?} {bit:?}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn current_state_and_nonsense() {
        assert_eq!(
            check(T::Rc, S::Rts, M::CUR_STATE, 0, S::Rtr as u32)
                .unwrap_err()
                .reason,
            Reason::CurrentState
        );
        assert_eq!(
            check(T::Rc, S::Rts, M::STATE, 99, 0).unwrap_err().reason,
            Reason::BadAttr
        );
        assert_eq!(
            check(T::Rc, S::Rts, M::CUR_STATE, 0, S::Rts as u32),
            Ok(S::Rts)
        );
    }
}
