//! Two devices on a network: every verb between them as between QPs of one host.

mod common;

use common::net::*;
use common::*;

const LEN: u64 = 1 << 20;

#[test]
fn a_send_and_a_write_cross() {
    let mut p = WirePair::new(LEN);
    p.a.fill(
        0,
        b"over the wire, not in memory, and longer than a completion",
    );
    p.b.qp.post_recv(7, &[p.b.mr.sge(100, 200)]);
    p.a.qp
        .post(&Wr::new(WrOpcode::Send, 1).sge(p.a.mr.sge(0, 58)));
    p.a.qp.post(
        &Wr::new(WrOpcode::Write, 2)
            .sge(p.a.mr.sge(0, 13))
            .to(&p.b.mr, 1000),
    );
    p.pump();
    let done = p.a.scq.drain();
    assert_eq!(
        done.iter()
            .map(|c| (c.wr_id, status(c)))
            .collect::<Vec<_>>(),
        [(1, WcStatus::Success), (2, WcStatus::Success)]
    );
    let r = p.b.rcq.one();
    assert_eq!((r.wr_id, r.status, r.byte_len), (7, 0, 58));
    assert_eq!(p.b.data(100, 58), p.a.data(0, 58));
    assert_eq!(p.b.data(1000, 14), *b"over the wire\0");
}
