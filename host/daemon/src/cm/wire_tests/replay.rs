//! What Linux said in the captures: our side in the place of one of its hosts says the same, numbers aside.

use hyv_roce::mad::{DATA_LEN, HEADER_LEN, Message as Body};
use hyv_roce::wire::{ethernet, ip, udp};

use super::*;

/// A MAD of a capture: from, to, bytes.
struct Seen {
    src: Gid,
    dst: Gid,
    mad: Box<Mad>,
}

impl Seen {
    fn body(&self) -> Body {
        Cmd::parse(&*self.mad).unwrap().message
    }
}

fn capture(name: &str) -> Vec<Seen> {
    let path = format!(
        "{}/../roce/tests/captures/{name}",
        env!("CARGO_MANIFEST_DIR")
    );
    let file = std::fs::read(path).unwrap();
    let mut seen = Vec::new();
    // Classic pcap: 24 bytes, then records with 16 bytes of header, their length at 8.
    let mut at = 24;
    while at < file.len() {
        let len = u32::from_le_bytes(file[at + 8..at + 12].try_into().unwrap()) as usize;
        let frame = &file[at + 16..at + 16 + len];
        at += 16 + len;
        let (eth, rest) = ethernet::Ethernet::parse(frame).unwrap();
        if eth.ethertype != ethernet::IPV4 || frame[23] != ip::UDP {
            continue;
        }
        let (v4, rest) = ip::V4::parse(rest).unwrap();
        let (udp, bytes) = udp::Udp::parse(rest).unwrap();
        // BTH, DETH, MAD, ICRC; to queue pair 1.
        if udp.dst_port == 4791 && bytes.len() == 12 + 8 + 256 + 4 && bytes[5..8] == [0, 0, 1] {
            seen.push(Seen {
                src: ip::map_v4(v4.src),
                dst: ip::map_v4(v4.dst),
                mad: Box::new(bytes[20..276].try_into().unwrap()),
            });
        }
    }
    seen
}

/// Everything but what each side numbers for itself, says of its own hardware, or times for itself.
fn essence(mad: &Mad) -> ([u8; HEADER_LEN], [u8; DATA_LEN]) {
    let mut header: [u8; HEADER_LEN] = mad[..HEADER_LEN].try_into().unwrap();
    header[8..16].fill(0);
    let mut cmd = Cmd::parse(mad).unwrap();
    match &mut cmd.message {
        Body::Req(m) => {
            (m.local_comm_id, m.local_ca_guid) = (0, 0);
            (m.remote_cm_timeout, m.local_cm_timeout) = (0, 0);
            // Linux derives it from the queue pairs, to vary its UDP source port.
            m.primary.flow_label = 0;
        }
        Body::Rep(m) => {
            (m.local_comm_id, m.remote_comm_id, m.local_ca_guid) = (0, 0, 0);
            m.target_ack_delay = 0;
        }
        Body::Rtu(m) => (m.local_comm_id, m.remote_comm_id) = (0, 0),
        Body::Rej(m) => (m.local_comm_id, m.remote_comm_id) = (0, 0),
        Body::Dreq(m) => (m.local_comm_id, m.remote_comm_id) = (0, 0),
        Body::Drep(m) => (m.local_comm_id, m.remote_comm_id) = (0, 0),
        Body::SidrReq(m) => m.request_id = 0,
        Body::SidrRep(m) => m.request_id = 0,
        Body::Mra(_) | Body::Other { .. } => {}
    }
    (header, cmd.to_bytes()[HEADER_LEN..].try_into().unwrap())
}

/// Gives the numbers of a captured message to the conversation that we have: ours where Linux's was, and the other way round.
fn renumber(mad: &Mad, numbers: &std::collections::HashMap<u32, u32>) -> Box<Mad> {
    let mut cmd = Cmd::parse(mad).unwrap();
    let map = |id: &mut u32| *id = numbers.get(id).copied().unwrap_or(*id);
    match &mut cmd.message {
        Body::Req(m) => map(&mut m.local_comm_id),
        Body::Rep(m) => (map(&mut m.local_comm_id), map(&mut m.remote_comm_id)).0,
        Body::Rtu(m) => (map(&mut m.local_comm_id), map(&mut m.remote_comm_id)).0,
        Body::Rej(m) => (map(&mut m.local_comm_id), map(&mut m.remote_comm_id)).0,
        Body::Dreq(m) => (map(&mut m.local_comm_id), map(&mut m.remote_comm_id)).0,
        Body::Drep(m) => (map(&mut m.local_comm_id), map(&mut m.remote_comm_id)).0,
        Body::SidrReq(m) => map(&mut m.request_id),
        Body::SidrRep(m) => map(&mut m.request_id),
        Body::Mra(_) | Body::Other { .. } => {}
    }
    Box::new(cmd.to_bytes())
}

/// The number that a message's sender has for its conversation.
fn number(body: &Body) -> u32 {
    match body {
        Body::Req(m) => m.local_comm_id,
        Body::Rep(m) => m.local_comm_id,
        Body::Dreq(m) => m.local_comm_id,
        Body::SidrReq(m) => m.request_id,
        _ => 0,
    }
}

/// We are `us`: what Linux sent to it comes in, the application does what Linux's did, and what we send is compared.
fn replay(name: &str, us: Gid) -> usize {
    let mut cm = Cm::new(CmConfig::default(), vec![us]);
    cm.set_wire(CmWire {
        ca_guid: 1,
        path_mtu: 1024,
        traffic_class: 0,
        seed: 5,
    });
    cm.add_user(U);
    // Linux's numbers for our conversations, and ours.
    let mut numbers = std::collections::HashMap::new();
    // Our identifiers by Linux's number of our side.
    let mut ids: BTreeMap<u32, u32> = BTreeMap::new();
    let mut listeners = HashSet::new();
    let messages = capture(name);
    let mut compared = 0;
    for (i, m) in messages.iter().enumerate() {
        let at = format!("message {i} of {name}, a {}", m.body().name());
        if m.dst == us {
            // Somebody listens where Linux accepted.
            let accepted = |tid: &[u8]| {
                messages[i..].iter().any(|a| {
                    a.src == us
                        && a.mad[8..16] == *tid
                        && match a.body() {
                            Body::Rep(_) => true,
                            Body::SidrRep(r) => r.status.0 == 0,
                            _ => false,
                        }
                })
            };
            let service = match m.body() {
                Body::Req(r) => Some((PortSpace::Tcp, r.service_id)),
                Body::SidrReq(r) => Some((PortSpace::Udp, r.service_id)),
                _ => None,
            };
            if let Some((space, service)) = service
                && accepted(&m.mad[8..16])
                && listeners.insert(service)
            {
                let id = cm.create_id(U, space as u32).unwrap();
                let bind = CmBindAddr {
                    id,
                    port: (service & 0xffff) as u32,
                    gid: [0; 16],
                };
                cm.bind_addr(U, &bind).unwrap();
                cm.listen(U, &CmListen { id, backlog: 4 }).unwrap();
            }
            cm.handle_mad(&m.src, &renumber(&m.mad, &numbers), 0);
            continue;
        }
        assert_eq!(m.src, us, "{at}");
        // The application does what makes Linux send this.
        let event = |cm: &mut Cm, kind: CmEventKind| {
            loop {
                // Ends of earlier connections are of no interest here.
                let e = cm
                    .get_event(U)
                    .unwrap_or_else(|e| panic!("{at}: no {kind:?}: {e}"));
                if CmEventKind::from_u32(e.event) == Some(kind) {
                    return e;
                }
            }
        };
        let body = m.body();
        match &body {
            Body::Req(_) | Body::SidrReq(_) => {
                let (space, service, private) = match &body {
                    Body::Req(r) => (PortSpace::Tcp, r.service_id, &r.private[..]),
                    Body::SidrReq(r) => (PortSpace::Udp, r.service_id, &r.private[..]),
                    _ => unreachable!(),
                };
                let (header, user) = hyv_roce::mad::rdma_cm::Header::parse(private).unwrap();
                let id = cm.create_id(U, space as u32).unwrap();
                let bind = CmBindAddr {
                    id,
                    port: header.src_port.into(),
                    gid: us,
                };
                cm.bind_addr(U, &bind).unwrap();
                let verb = CmResolveAddr {
                    id,
                    port: (service & 0xffff) as u32,
                    gid: m.dst,
                    timeout_ms: 1,
                    reserved: 0,
                };
                cm.resolve_addr(U, &verb, |_, _| true).unwrap();
                event(&mut cm, CmEventKind::AddrResolved);
                let verb = CmResolveRoute { id, timeout_ms: 1 };
                cm.resolve_route(U, &verb).unwrap();
                event(&mut cm, CmEventKind::RouteResolved);
                let mut p = CmParam {
                    private_len: user.len() as u32,
                    ..CmParam::EMPTY
                };
                p.private[..user.len()].copy_from_slice(user);
                if let Body::Req(r) = &body {
                    (p.qpn, p.psn) = (r.local_qpn, r.starting_psn);
                    (p.responder_resources, p.initiator_depth) =
                        (r.responder_resources, r.initiator_depth);
                    (p.retry_count, p.rnr_retry_count) = (r.retry_count, r.rnr_retry_count);
                    p.ack_timeout = r.primary.local_ack_timeout.into();
                }
                cm.connect(U, &CmConnect { id, param: p }, 0, |_| true)
                    .unwrap();
                ids.insert(number(&body), id);
            }
            Body::Rep(r) => {
                let e = event(&mut cm, CmEventKind::ConnectRequest);
                let mut p = CmParam {
                    qpn: r.local_qpn,
                    psn: r.starting_psn,
                    responder_resources: r.responder_resources,
                    initiator_depth: r.initiator_depth,
                    rnr_retry_count: r.rnr_retry_count,
                    private_len: r.private.len() as u32,
                    ..CmParam::EMPTY
                };
                p.private[..r.private.len()].copy_from_slice(&r.private);
                let verb = CmAccept { id: e.id, param: p };
                cm.accept(U, &verb, 0, |_| true).unwrap();
                ids.insert(number(&body), e.id);
            }
            Body::SidrRep(r) if r.status.0 == 0 => {
                let e = event(&mut cm, CmEventKind::ConnectRequest);
                let mut p = CmParam {
                    qpn: r.qpn,
                    qkey: r.qkey,
                    private_len: r.private.len() as u32,
                    ..CmParam::EMPTY
                };
                p.private[..r.private.len()].copy_from_slice(&r.private);
                let verb = CmAccept { id: e.id, param: p };
                cm.accept(U, &verb, 0, |_| true).unwrap();
            }
            Body::Rtu(r) => {
                let e = event(&mut cm, CmEventKind::ConnectResponse);
                assert_eq!(e.id, ids[&r.local_comm_id], "{at}");
                cm.establish(U, e.id).unwrap();
                event(&mut cm, CmEventKind::Established);
            }
            Body::Dreq(r) => {
                // What else happened meanwhile is of no interest here.
                while cm.get_event(U).is_ok() {}
                // We agree to the peer's end at once, before our own application hears of it; Linux's may still say DREQ itself.
                if cm.state(U, ids[&r.local_comm_id]) == Ok(State::Disconnected) {
                    continue;
                }
                cm.disconnect(U, ids[&r.local_comm_id]).unwrap();
            }
            // Answers that no application has a part in.
            _ => {}
        }
        let mut sent: Vec<Box<Mad>> = Vec::new();
        for effect in cm.take_effects() {
            if let Effect::SendMad { src, dst, mad } = effect {
                assert_eq!((src, dst), (us, m.dst), "{at}");
                sent.push(mad);
            }
        }
        // A DREP may have gone out before a DREQ of ours that Linux sent first.
        let wanted = body.attribute();
        let ours = sent
            .iter()
            .find(|s| Cmd::parse(&***s).unwrap().message.attribute() == wanted);
        let Some(ours) = ours else {
            assert!(matches!(body, Body::Drep(_)), "{at} was not sent");
            continue;
        };
        assert_eq!(essence(ours), essence(&m.mad), "{at}");
        compared += 1;
        let our_body = Cmd::parse(&**ours).unwrap().message;
        if number(&body) != 0 {
            numbers.insert(number(&body), number(&our_body));
        }
    }
    compared
}

#[test]
fn each_side_of_the_captures_is_played_as_linux_played_it() {
    let host = |n| {
        std::net::Ipv4Addr::new(10, 77, 0, n)
            .to_ipv6_mapped()
            .octets()
    };
    for name in ["cm.pcap", "pingpong.pcap"] {
        for n in [1, 2] {
            let compared = replay(name, host(n));
            let sent = capture(name).iter().filter(|m| m.src == host(n)).count();
            // Crossing DREQs are the only thing that the two may order otherwise.
            assert!(
                compared * 2 > sent,
                "{name} as host {n}: {compared} of {sent} messages"
            );
            println!("{name} as host {n}: {compared} of {sent} messages are the same");
        }
    }
}
