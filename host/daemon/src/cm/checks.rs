//! What holds whatever peers send and in whatever order: the fuzz target `conversation` and the tests over its corpus call
//! the same function.

use hyv_abi::control::{
    CmAccept, CmBindAddr, CmConnect, CmEventKind, CmListen, CmParam, CmReject, CmResolveAddr,
    CmResolveRoute, PRIVATE_LEN, PortSpace,
};
use hyv_roce::mad::{
    Drep, Dreq, Mad as Cmd, Message as Body, Mra, Rejected, Rep, Rtu, SidrRep, SidrStatus,
};

use super::{Cm, CmConfig, CmWire, Effect, Gid, Mad, UserKey, limits};

/// Port of the listeners; 7174 as in the captures.
const PORT: u32 = 7174;
/// Identifiers of the user: few, so that their end is reached.
const MAX_IDS: usize = 12;
/// Messages of ours that an input can answer.
const REMEMBERED: usize = 8;
/// Steps of one input: more find nothing new and only take time.
const MAX_STEPS: usize = 512;

const US: Gid = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 77, 0, 2];
const PEER: Gid = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 77, 0, 1];
const STRANGER: Gid = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 77, 0, 3];

/// The rest of an input.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// A MAD: as many bytes as there are, the rest zeros.
    fn mad(&mut self) -> Box<Mad> {
        let mut mad = Box::new([0; 256]);
        let n = self.0.len().min(mad.len());
        mad[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        mad
    }

    /// Changes some bytes.
    fn damage(&mut self, mad: &mut Mad) {
        for _ in 0..self.byte().unwrap_or(0) % 4 {
            let (Some(at), Some(value)) = (self.byte(), self.byte()) else {
                return;
            };
            mad[usize::from(at)] = value;
        }
    }
}

/// What a peer that means well could say to one of our messages; `choice` picks among them.
fn answer(mad: &Mad, choice: u8) -> Option<Body> {
    let theirs = 0x1000 | u32::from(choice >> 4);
    Some(match (Cmd::parse(mad).ok()?.message, choice & 3) {
        (Body::Req(m), 0) => Body::Mra(Mra {
            local_comm_id: theirs,
            remote_comm_id: m.local_comm_id,
            message: Rejected::Req,
            service_timeout: choice >> 3,
            private: [0; Mra::PRIVATE],
        }),
        (Body::Req(m), 1) => {
            Body::Rej(super::wire::rejection(0, m.local_comm_id, Rejected::Req, 8))
        }
        (Body::Req(m), _) => Body::Rep(Rep {
            local_comm_id: theirs,
            remote_comm_id: m.local_comm_id,
            local_qkey: 0,
            local_qpn: 0x50 | u32::from(choice >> 4),
            local_eecn: 0,
            starting_psn: 7,
            responder_resources: choice,
            initiator_depth: choice,
            target_ack_delay: 0,
            failover: 0,
            flow_control: false,
            rnr_retry_count: 7,
            srq: false,
            local_ca_guid: 1,
            private: [choice; Rep::PRIVATE],
        }),
        (Body::Rep(m), 0) => Body::Mra(Mra {
            local_comm_id: m.remote_comm_id,
            remote_comm_id: m.local_comm_id,
            message: Rejected::Rep,
            service_timeout: choice >> 3,
            private: [0; Mra::PRIVATE],
        }),
        (Body::Rep(m), 1) => Body::Rej(super::wire::rejection(
            m.remote_comm_id,
            m.local_comm_id,
            Rejected::Rep,
            28,
        )),
        (Body::Rep(m), 2) => Body::Dreq(Dreq {
            local_comm_id: m.remote_comm_id,
            remote_comm_id: m.local_comm_id,
            remote_qpn: m.local_qpn,
            private: [0; Dreq::PRIVATE],
        }),
        (Body::Rep(m), _) => Body::Rtu(Rtu {
            local_comm_id: m.remote_comm_id,
            remote_comm_id: m.local_comm_id,
            private: [0; Rtu::PRIVATE],
        }),
        (Body::Dreq(m), _) => Body::Drep(Drep {
            local_comm_id: m.remote_comm_id,
            remote_comm_id: m.local_comm_id,
            private: [0; Drep::PRIVATE],
        }),
        (Body::SidrReq(m), status) => Body::SidrRep(SidrRep {
            request_id: m.request_id,
            status: SidrStatus(status),
            info_len: 0,
            qpn: 0x60,
            service_id: m.service_id,
            qkey: 1,
            info: [0; SidrRep::INFO],
            private: [choice; SidrRep::PRIVATE],
        }),
        // The same once more, from the other side.
        (other, _) => other,
    })
}

/// A host and what it said last.
struct Host {
    cm: Cm,
    user: UserKey,
    now_ns: u64,
    said: Vec<Mad>,
    ids: Vec<u32>,
    next_qpn: u32,
}

impl Host {
    fn new() -> Self {
        let config = CmConfig {
            max_ids: MAX_IDS,
            ..CmConfig::default()
        };
        let mut cm = Cm::new(config, vec![US]);
        cm.set_wire(CmWire {
            ca_guid: 1,
            path_mtu: 1024,
            traffic_class: 0,
            seed: 1,
        });
        let user = UserKey(1);
        cm.add_user(user);
        for space in [PortSpace::Tcp, PortSpace::Udp] {
            let id = cm
                .create_id(user, space as u32)
                .expect("there is room for two");
            let bind = CmBindAddr {
                id,
                port: PORT,
                gid: [0; 16],
            };
            cm.bind_addr(user, &bind).expect("the port is free");
            cm.listen(user, &CmListen { id, backlog: 4 })
                .expect("it is bound");
        }
        Self {
            cm,
            user,
            now_ns: 0,
            said: Vec::new(),
            ids: Vec::new(),
            next_qpn: 100,
        }
    }

    fn param(&mut self) -> CmParam {
        self.next_qpn += 1;
        CmParam {
            qpn: self.next_qpn,
            ..CmParam::EMPTY
        }
    }

    /// The application calls somebody.
    fn call(&mut self, space: PortSpace) {
        let Ok(id) = self.cm.create_id(self.user, space as u32) else {
            return;
        };
        let verb = CmResolveAddr {
            id,
            port: PORT,
            gid: PEER,
            timeout_ms: 1,
            reserved: 0,
        };
        let param = self.param();
        let resolved = self.cm.resolve_addr(self.user, &verb, |_, _| true);
        let route = CmResolveRoute { id, timeout_ms: 1 };
        let called = resolved
            .and_then(|()| self.cm.resolve_route(self.user, &route))
            .and_then(|()| {
                let verb = CmConnect { id, param };
                self.cm.connect(self.user, &verb, self.now_ns, |_| true)
            });
        assert_eq!(called, Ok(()), "a new identifier may connect");
        self.ids.push(id);
    }

    /// The application does something with one of its identifiers.
    fn act(&mut self, what: u8) {
        if let Ok(event) = self.cm.get_event(self.user)
            && event.event == CmEventKind::ConnectRequest as u32
        {
            self.ids.push(event.id);
        }
        let Some(id) = self.ids.get(usize::from(what >> 3)).copied() else {
            return;
        };
        // Whether it may is for connection management to say.
        let _ = match what & 7 {
            0 => self.cm.disconnect(self.user, id),
            1 => self.cm.establish(self.user, id),
            2 => {
                let verb = CmReject {
                    id,
                    private_len: 0,
                    private: [0; PRIVATE_LEN],
                };
                self.cm.reject(self.user, &verb)
            }
            3 => {
                self.ids.retain(|i| *i != id);
                self.cm.destroy_id(self.user, id)
            }
            _ => {
                let param = self.param();
                let verb = CmAccept { id, param };
                self.cm.accept(self.user, &verb, self.now_ns, |_| true)
            }
        };
    }

    fn pass(&mut self, ns: u64) {
        self.now_ns += ns;
        if self.cm.next_timeout().is_some_and(|at| at <= self.now_ns) {
            self.cm.handle_timeout(self.now_ns);
            let next = self.cm.next_timeout();
            assert!(next.is_none_or(|at| at > self.now_ns), "a timeout is left");
        }
    }

    fn listen_in(&mut self) {
        for effect in self.cm.take_effects() {
            if let Effect::SendMad { src, dst, mad } = effect {
                assert_eq!(src, US);
                assert!(dst != US);
                let parsed = Cmd::parse(&*mad).expect("a MAD of ours parses");
                assert_eq!(parsed.to_bytes(), *mad);
                self.said.insert(0, *mad);
                self.said.truncate(REMEMBERED);
            }
        }
    }
}

/// Peers say what `bytes` tell them to; an application takes part. Nothing grows without bound, what is sent is well formed,
/// and when all is over nothing is left.
///
/// # Panics
/// If that is not so.
pub fn conversation(bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut host = Host::new();
    for _ in 0..MAX_STEPS {
        let Some(op) = input.byte() else { break };
        let from = if op & 0x80 == 0 { PEER } else { STRANGER };
        match op & 7 {
            0 => {
                let mad = input.mad();
                host.cm.handle_mad(&from, &mad, host.now_ns);
            }
            1 | 2 => {
                let (pick, choice) = (input.byte().unwrap_or(0), input.byte().unwrap_or(0));
                let said = host.said.get(usize::from(pick) % REMEMBERED);
                if let Some(body) = said.and_then(|mad| answer(mad, choice)) {
                    let mut mad = Cmd::new(9, body).to_bytes();
                    input.damage(&mut mad);
                    host.cm.handle_mad(&from, &mad, host.now_ns);
                }
            }
            3 => host.call(PortSpace::Tcp),
            4 => host.call(PortSpace::Udp),
            5 => host.pass(u64::from(op >> 3) * 100_000_000),
            _ => host.act(input.byte().unwrap_or(0)),
        }
        host.listen_in();
        assert!(host.cm.ids(host.user) <= MAX_IDS);
        assert!(host.cm.links.len() <= MAX_IDS + 2 * limits::MAX_LINGERING);
    }
    host.cm.remove_user(host.user);
    for _ in 0..2 {
        host.pass(u64::from(u32::MAX) << 12);
        host.listen_in();
    }
    while let Some(at) = host.cm.next_timeout() {
        host.pass(at.saturating_sub(host.now_ns));
        host.listen_in();
    }
    assert_eq!(host.cm.links.len(), 0, "conversations are left");
    assert!(host.cm.qps.is_empty(), "queue pairs are left");
}
