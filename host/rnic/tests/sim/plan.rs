//! What a seed stands for.

use hyv_abi::types::QpType;

use crate::common::Rng;
use crate::net::Faults;

/// A world and what happens in it.
#[derive(Clone, Debug)]
pub struct Plan {
    pub hosts: usize,
    /// How many users each host has.
    pub users: usize,
    pub links: Vec<Link>,
    /// Users with a datagram QP.
    pub datagrams: bool,
    pub faults: Faults,
    /// One way, ns.
    pub delay: u64,
    pub per_byte: u64,
    pub burst: (usize, usize),
    pub cheap: bool,
    pub actions: u32,
    /// What goes wrong beside the network, in thousandths of the actions.
    pub trouble: u64,
    /// The link between two hosts fails for a while, in thousandths of the actions.
    pub parting: u64,
    /// Most time between two actions, ns.
    pub pace: u64,
}

/// A connection.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    pub ty: QpType,
    /// Users, over all hosts.
    pub users: (usize, usize),
    pub mtu: u32,
    /// First PSNs in both directions.
    pub psn: (u32, u32),
    pub rd_atomic: u32,
    pub timeout: u32,
    pub retry_cnt: u32,
    pub rnr_retry: u32,
    pub min_rnr_timer: u32,
    pub sq_log2: u32,
    pub rq_log2: u32,
    /// Receives come from the users' SRQs.
    pub shared: bool,
    pub sig_all: bool,
    /// Most bytes of a message.
    pub cell: u64,
    pub cells: usize,
}

impl Plan {
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let hosts = rng.pick(&[2, 2, 2, 3, 3, 4, 4, 5, 6, 8]);
        let users = rng.pick(&[1, 1, 1, 2, 3]);
        let total = hosts * users;
        let heavy = rng.below(4) == 0;
        let faults = match rng.below(8) {
            0 => Faults::default(),
            n => {
                let most = if n < 5 { 20 } else { 100 };
                // Each seed has its own few kinds.
                let mut some = |most: u64| {
                    if rng.below(2) == 0 {
                        rng.below(most + 1)
                    } else {
                        0
                    }
                };
                Faults {
                    loss: some(most),
                    double: some(most),
                    late: some(most),
                    lateness: some(4) * some(500_000) + 10_000,
                    flip: some(most / 2),
                    cut: some(most / 4),
                    busy: some(200),
                    refused: some(most / 4),
                    queue: if some(5) > 2 {
                        8 + some(60) as usize
                    } else {
                        0
                    },
                }
            }
        };
        let mut links = Vec::new();
        let everybody = rng.below(4) == 0 && total <= 8 && !heavy;
        if everybody {
            for a in 0..total {
                for b in 0..a {
                    links.push((a, b));
                }
            }
        } else {
            let most = if heavy { 2 } else { 4 + total as u64 / 2 };
            for _ in 0..=rng.below(most) {
                let a = rng.below(total as u64) as usize;
                let b = (a + 1 + rng.below(total as u64 - 1) as usize) % total;
                links.push((a, b));
            }
        }
        let links: Vec<Link> = links
            .into_iter()
            .map(|users| Link::new(&mut rng, users, heavy, everybody))
            .collect();
        Self {
            hosts,
            users,
            datagrams: rng.below(3) == 0,
            faults,
            delay: rng.pick(&[500, 1_000, 3_000, 20_000, 100_000]),
            per_byte: rng.pick(&[0, 0, 80, 800]),
            burst: rng.pick(&[
                (1, 60_000),
                (2, 60_000),
                (16, 60_000),
                (64, 60_000),
                (64, 9_000),
            ]),
            cheap: rng.below(2) == 0,
            actions: 40 + rng.below(if heavy { 60 } else { 400 }) as u32,
            trouble: rng.pick(&[0, 0, 0, 5, 30]),
            parting: rng.pick(&[0, 0, 0, 10]),
            pace: rng.pick(&[0, 1_000, 5_000, 30_000]),
            links,
        }
    }
}

impl Link {
    fn new(rng: &mut Rng, users: (usize, usize), heavy: bool, many: bool) -> Self {
        let psn = |rng: &mut Rng| {
            if rng.below(3) == 0 {
                rng.below(1 << 24) as u32
            } else {
                (0x100_0000 - rng.below(300) as u32) & 0xff_ffff
            }
        };
        Self {
            ty: rng.pick(&[QpType::Rc, QpType::Rc, QpType::Rc, QpType::Rc, QpType::Uc]),
            users,
            mtu: 256 << rng.below(5),
            psn: (psn(rng), psn(rng)),
            rd_atomic: rng.pick(&[1, 2, 4, 16, 128]),
            timeout: rng.pick(&[12, 13, 14]),
            retry_cnt: rng.pick(&[7, 7, 7, 5, 1, 0]),
            rnr_retry: rng.pick(&[7, 7, 7, 3]),
            min_rnr_timer: rng.pick(&[1, 4, 8, 10, 14]),
            sq_log2: rng.pick(&[1, 2, 3, 4, 6]),
            rq_log2: if heavy {
                rng.below(2) as u32
            } else {
                rng.pick(&[0, 1, 2, 4])
            },
            shared: rng.below(3) == 0,
            sig_all: rng.below(6) == 0,
            cell: match (heavy, many) {
                (true, _) => rng.pick(&[9_000, 70_000, 200_000]),
                (_, true) => rng.pick(&[64, 300, 1_500]),
                _ => rng.pick(&[64, 300, 1_500, 9_000, 20_000]),
            },
            cells: if heavy { 3 } else { rng.pick(&[3, 6, 10]) },
        }
    }
}
