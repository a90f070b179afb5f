//! How much a requester keeps on its way, and how it asks a peer that is silent.

use hyv_roce::transport::*;
use hyv_roce::wire::NakCode;

const MTU: u32 = 1024;
const TIMEOUT: u64 = 100_000_000;
const RTT: u64 = 10_000;
/// Time that a packet takes on the link, ns.
const GAP: u64 = 500;
/// Packets that fill the path: the first one's acknowledgement comes as the next would leave.
const FILL: u32 = (RTT / GAP) as u32;

fn requester() -> Requester {
    of_qp(1)
}

fn of_qp(qpn: u32) -> Requester {
    let mut q = Requester::new(RequesterConfig {
        qpn,
        psn: Psn::new(0),
        mtu: MTU,
        retry_cnt: 7,
        rnr_retry: 7,
        timeout_ns: Some(TIMEOUT),
        max_rd_atomic: 1,
        reliable: true,
    });
    for _ in 0..100 {
        q.push(Message {
            kind: MessageKind::Write(Remote::default()),
            len: 1 << 20,
            fence: false,
        });
    }
    q
}

/// Sends for `ns` over a link that loses nothing, answering what asks for it. Gives the time.
fn run(q: &mut Requester, mut now: u64, ns: u64) -> u64 {
    let end = now + ns;
    let mut free = now;
    let mut acks: Vec<(u64, Psn)> = Vec::new();
    while now < end {
        while let Some(s) = q.next(now) {
            free = free.max(now) + GAP;
            if s.ack_req {
                acks.push((free + RTT, s.psn));
            }
        }
        now += GAP;
        acks.retain(|&(at, psn)| {
            if at <= now {
                q.on_reply(&Reply::Ack { psn }, now);
            }
            at > now
        });
        q.on_timer(now);
    }
    // The rest arrives.
    for (at, psn) in acks {
        now = now.max(at);
        q.on_reply(&Reply::Ack { psn }, now);
    }
    now
}

#[test]
fn a_loss_shrinks_the_window_to_what_the_path_holds() {
    let mut q = requester();
    let mut now = run(&mut q, 0, 300_000);
    let wide = q.window();
    assert!(wide > 3 * FILL, "nothing was lost: {wide}");
    for round in 0..60 {
        let Some(first) = q.next(now) else {
            panic!("nothing to send")
        };
        while q.next(now).is_some() {}
        now += RTT;
        let nak = Reply::Nak {
            psn: first.psn,
            code: NakCode::PsnSequence,
        };
        assert_eq!(q.on_reply(&nak, now), Effect::None);
        assert!(
            q.window() >= FILL,
            "round {round}: {} is less than fills the path",
            q.window()
        );
        now = run(&mut q, now, 40_000);
    }
    let narrow = q.window();
    assert!(
        narrow < 2 * FILL,
        "losses by chance: {narrow} on a path of {FILL}"
    );
}

#[test]
fn a_window_asks_for_several_acknowledgements() {
    let mut q = requester();
    let mut asked = 0;
    let mut sent = 0;
    while let Some(s) = q.next(0) {
        asked += u32::from(s.ack_req);
        sent += 1;
    }
    assert_eq!(sent, q.window());
    assert!((4..=8).contains(&asked), "{asked} of {sent}");
}

#[test]
fn a_silent_peer_is_asked_with_one_packet_first() {
    let mut q = requester();
    let now = run(&mut q, 0, 100_000);
    let mut sent = Vec::new();
    while let Some(s) = q.next(now) {
        sent.push(s);
    }
    let (first, window) = (sent[0], q.window());
    let at = q.deadline().expect("a probe");
    assert!(at < now + 200_000, "long before the ACK timeout");
    assert_eq!(q.on_timer(at), Effect::None);
    let mark = q.mark();
    let asks = q.next(at).expect("the oldest packet");
    assert_eq!(
        (asks.psn, asks.offset, asks.len),
        (first.psn, first.offset, first.len)
    );
    assert!(asks.again && asks.ack_req);
    assert_eq!(q.next(at), None, "one is enough");
    // Nothing was sent after all: it is asked again.
    q.rewind(&mark);
    assert_eq!(q.next(at), Some(asks));
    assert_eq!(q.window(), window, "asking costs nothing");
}

#[test]
fn a_lost_acknowledgement_sends_nothing_else_again() {
    let mut q = requester();
    let now = run(&mut q, 0, 100_000);
    let mut sent = Vec::new();
    while let Some(s) = q.next(now) {
        sent.push(s);
    }
    let at = q.deadline().expect("a probe");
    q.on_timer(at);
    assert_eq!(q.next(at).map(|s| s.psn), Some(sent[0].psn));
    let last = sent[sent.len() - 1].psn;
    q.on_reply(&Reply::Ack { psn: last }, at + RTT);
    let next = q.next(at + RTT).expect("new packets");
    assert_eq!((next.psn, next.again), (last.add(1), false));
}

#[test]
fn who_stays_silent_gets_all_again_and_then_time_is_up() {
    let mut q = requester();
    let mut sent = 0;
    while q.next(0).is_some() {
        sent += 1;
    }
    let mut again = Vec::new();
    let mut failed = None;
    for _ in 0..2_000 {
        let Some(at) = q.deadline() else { break };
        if let Effect::Fail { status, .. } = q.on_timer(at) {
            failed = Some((at, status));
            break;
        }
        let mut n = 0;
        while q.next(at).is_some() {
            n += 1;
        }
        again.push(n);
    }
    assert_eq!(again[0], 1, "it is asked");
    assert!(again[1] > 1 && again[1] < sent, "a few packets after that");
    let (at, status) = failed.expect("the ACK timeout counts, whatever is asked");
    assert_eq!(status, hyv_abi::queue::WcStatus::RetryExcErr);
    assert!(
        (8 * TIMEOUT..=10 * TIMEOUT).contains(&at),
        "after 8 time-outs: {at}"
    );
}

/// When something is sent again to a peer that stays silent, to the end, and why.
fn repeats(qpn: u32) -> Vec<(u64, Effect)> {
    let mut q = of_qp(qpn);
    while q.next(0).is_some() {}
    let mut repeats = Vec::new();
    while let Some(at) = q.deadline() {
        let effect = q.on_timer(at);
        while q.next(at).is_some() {}
        repeats.push((at, effect));
        if matches!(effect, Effect::Fail { .. }) {
            break;
        }
    }
    repeats
}

#[test]
fn what_many_lose_at_one_moment_they_repeat_at_different_ones() {
    const QPS: u32 = 1_000;
    // Numbers as a device gives them, one after the other.
    let all: Vec<_> = (256..256 + QPS).map(repeats).collect();
    // The first two are for losses that hit one alone: they ask at once.
    for round in 2..all[0].len() {
        let mut at: Vec<u64> = all.iter().map(|r| r[round].0).collect();
        at.sort_unstable();
        let (first, last) = (at[0], at[at.len() - 1]);
        assert!(
            last - first > first / 10,
            "round {round}: {first} to {last}"
        );
        let gap = (last - first) / u64::from(QPS) / 10;
        let close = at.windows(2).filter(|w| w[1] - w[0] < gap).count();
        assert_eq!(close, 0, "round {round}: so many come together");
    }
    // The specification's time-out is between once and four times what is asked for.
    for (i, repeats) in all.iter().enumerate() {
        let out = |e: &Effect| matches!(e, Effect::TimedOut | Effect::Fail { .. });
        let times: Vec<u64> = repeats
            .iter()
            .filter(|(_, e)| out(e))
            .map(|(at, _)| *at)
            .collect();
        assert_eq!(times.len(), 8, "QP {i}");
        let mut before = 0;
        for at in times {
            let waited = at - before;
            assert!(
                (TIMEOUT..=4 * TIMEOUT).contains(&waited),
                "QP {i}: {waited}"
            );
            before = at;
        }
    }
}
