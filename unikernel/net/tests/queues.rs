//! The driver's queues against rust-vmm's device side, and against devices that break the rules.

mod world;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

use hyv_net::Nic;
use hyv_net::card::{self, Card, RX, TX};
use hyv_net::limits::{RX_BUFFERS, TX_BUFFERS};
use hyv_net::virtq::{Broken, Direction, Layout, Queue, Shared};
use proptest::prelude::*;
use virtio_queue::{Queue as DeviceQueue, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileMemory,
};
use world::Random;

/// Not zero: what the device is told is not what the driver uses.
const BASE: u64 = 0x4000_0000;

/// A driver's piece of a guest's memory.
#[derive(Clone, Debug)]
struct Piece {
    memory: Arc<GuestMemoryMmap<()>>,
    start: usize,
}

impl Piece {
    fn new(len: usize) -> Self {
        let ranges = [(GuestAddress(BASE), len.next_multiple_of(4096))];
        Self {
            memory: Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap()),
            start: 0,
        }
    }

    fn mapping(&self) -> &impl VolatileMemory {
        let region = self.memory.iter().next().unwrap();
        assert_eq!(region.start_addr(), GuestAddress(BASE));
        &**region
    }
}

impl Shared for Piece {
    fn u16_at(&self, at: usize) -> &AtomicU16 {
        self.mapping().get_atomic_ref(self.start + at).unwrap()
    }

    fn u32_at(&self, at: usize) -> &AtomicU32 {
        self.mapping().get_atomic_ref(self.start + at).unwrap()
    }

    fn u64_at(&self, at: usize) -> &AtomicU64 {
        self.mapping().get_atomic_ref(self.start + at).unwrap()
    }

    fn read(&self, at: usize, to: &mut [u8]) {
        let address = GuestAddress(self.address(at));
        self.memory.read_slice(to, address).unwrap();
    }

    fn write(&self, at: usize, from: &[u8]) {
        let address = GuestAddress(self.address(at));
        self.memory.write_slice(from, address).unwrap();
    }

    fn address(&self, at: usize) -> u64 {
        BASE + (self.start + at) as u64
    }
}

/// The device's side of a driver's queue.
fn device(queue: &Queue<Piece>) -> DeviceQueue {
    let mut device = DeviceQueue::new(1024).unwrap();
    device.set_size(queue.layout().size());
    let [desc, avail, used] = queue.addresses();
    let halves = |a: u64| (Some(a as u32), Some((a >> 32) as u32));
    let (low, high) = halves(desc);
    device.set_desc_table_address(low, high);
    let (low, high) = halves(avail);
    device.set_avail_ring_address(low, high);
    let (low, high) = halves(used);
    device.set_used_ring_address(low, high);
    device.set_ready(true);
    assert!(
        device.is_valid(&*queue.memory().memory),
        "alignment or place"
    );
    device
}

/// What a device finds in a queue: head, address, length, whether it may write.
fn pop(queue: &mut DeviceQueue, memory: &GuestMemoryMmap<()>) -> Option<(u16, u64, u32, bool)> {
    let mut chain = queue.pop_descriptor_chain(memory)?;
    let head = chain.head_index();
    let desc = chain.next().unwrap();
    assert!(chain.next().is_none(), "a chain of more than one");
    Some((head, desc.addr().0, desc.len(), desc.is_write_only()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Every order of offering, publishing, using and taking, far enough for the 16-bit indices to wrap.
    #[test]
    fn a_queue_against_rust_vmm(seed: u64) {
        const SIZE: u16 = 8;
        const LEN: usize = 32;
        let mut random = Random::new(seed);
        let piece = Piece::new(Layout::new(SIZE).end() + usize::from(SIZE) * LEN);
        let memory = Arc::clone(&piece.memory);
        let mut driver = Queue::new(piece, SIZE);
        let mut device = device(&driver);
        let buffers = driver.layout().end();
        let mut free: Vec<u16> = (0..SIZE).collect();
        let (mut offered, mut held, mut used) = (VecDeque::new(), Vec::new(), VecDeque::new());
        let mut unpublished = 0;
        let mut rounds = 0_u32;
        while rounds < 70_000 {
            match random.below(4) {
                0 if !free.is_empty() => {
                    let id = free.swap_remove(random.below(free.len() as u64) as usize);
                    let at = buffers + usize::from(id) * LEN;
                    let direction = if random.below(2) == 0 { Direction::In } else { Direction::Out };
                    let len = 1 + random.below(LEN as u64) as u32;
                    driver.offer(id, at, len, direction);
                    offered.push_back((id, BASE + at as u64, len, direction == Direction::In));
                    unpublished += 1;
                    prop_assert!(driver.is_lent(id));
                }
                1 => {
                    prop_assert_eq!(driver.publish(), unpublished > 0);
                    unpublished = 0;
                }
                2 => {
                    let seen = pop(&mut device, &memory);
                    if offered.len() > unpublished {
                        prop_assert_eq!(seen, offered.pop_front());
                        held.extend(seen);
                    } else {
                        prop_assert_eq!(seen, None);
                    }
                }
                _ if !held.is_empty() && random.below(2) == 0 => {
                    // In any order.
                    let (id, _, len, write) = held.swap_remove(random.below(held.len() as u64) as usize);
                    let written = if write { random.below(u64::from(len) + 1) as u32 } else { 0 };
                    device.add_used(&*memory, id, written).unwrap();
                    used.push_back((id, written));
                }
                _ => {
                    prop_assert_eq!(driver.has_used(), !used.is_empty());
                    let taken = driver.take();
                    prop_assert_eq!(taken, Ok(used.pop_front()));
                    if let Ok(Some((id, _))) = taken {
                        free.push(id);
                        rounds += 1;
                    }
                }
            }
        }
    }

    /// A device that writes anything into the used ring: no panic, and no buffer comes back that was not lent.
    #[test]
    fn a_device_that_writes_nonsense(ids in prop::collection::vec(any::<(u32, u32, u16)>(), 1..40)) {
        let piece = Piece::new(Layout::new(4).end() + 4 * 64);
        let [.., used] = Layout::new(4).parts();
        let mut driver = Queue::new(piece.clone(), 4);
        let buffers = driver.layout().end();
        for id in 0..3 {
            driver.offer(id, buffers + 64 * usize::from(id), 64, Direction::In);
        }
        driver.publish();
        let mut lent = 3;
        for (id, len, index) in ids {
            for slot in 0..4 {
                piece.write(used + 4 + 8 * slot, &(id % 6).to_le_bytes());
                piece.write(used + 8 + 8 * slot, &(len % 80).to_le_bytes());
            }
            piece.write(used + 2, &index.to_le_bytes());
            match driver.take() {
                Ok(None) => {}
                Ok(Some((id, len))) => {
                    prop_assert!(id < 3 && len <= 64);
                    lent -= 1;
                }
                Err(Broken(_)) => break,
            }
        }
        prop_assert!((0..=3).contains(&lent));
    }
}

#[test]
fn flags_of_both_sides() {
    let piece = Piece::new(Layout::new(4).end() + 64);
    let memory = Arc::clone(&piece.memory);
    let mut driver = Queue::new(piece, 4);
    let mut device = device(&driver);
    let at = driver.layout().end();
    let [_, avail, _] = driver.addresses();
    let suppressed = || memory.read_obj::<u16>(GuestAddress(avail)).unwrap() == 1;
    // From the start the driver polls.
    assert!(suppressed());
    assert!(!driver.interrupts(true) && !suppressed());
    device.disable_notification(&*memory).unwrap();
    driver.offer(0, at, 64, Direction::In);
    assert!(
        !driver.publish(),
        "the device said that it needs no telling"
    );
    device.enable_notification(&*memory).unwrap();
    driver.offer(1, at, 64, Direction::In);
    assert!(driver.publish());
    assert!(!driver.publish(), "nothing new");
    let (head, ..) = pop(&mut device, &memory).unwrap();
    device.add_used(&*memory, head, 5).unwrap();
    assert!(
        driver.interrupts(true),
        "what came before the request is said"
    );
    assert!(driver.interrupts(false) && suppressed());
    assert_eq!(driver.take(), Ok(Some((0, 5))));
    assert!(!driver.is_lent(0) && driver.is_lent(1));
}

/// A card with its device.
struct Rig {
    card: Card<Piece>,
    memory: [Arc<GuestMemoryMmap<()>>; 2],
    device: [DeviceQueue; 2],
    kicks: Rc<RefCell<Vec<u16>>>,
}

const HEADER: usize = 12;

impl Rig {
    fn new(mtu: u16) -> Self {
        let pieces = [RX, TX].map(|q| Piece::new(card::memory(q, mtu)));
        let memory = pieces.each_ref().map(|p| Arc::clone(&p.memory));
        let [rx, tx] = pieces;
        let kicks = Rc::new(RefCell::new(Vec::new()));
        let noted = Rc::clone(&kicks);
        let kick = Box::new(move |q| noted.borrow_mut().push(q));
        let card = Card::new(rx, tx, [2, 0, 0, 0, 0, 1], mtu, kick);
        let device = card.queues().map(device);
        Self {
            card,
            memory,
            device,
            kicks,
        }
    }

    /// The device delivers a frame; false if it has no buffer.
    fn deliver(&mut self, frame: &[u8]) -> bool {
        let Some((head, at, len, write)) = pop(&mut self.device[0], &self.memory[0]) else {
            return false;
        };
        assert!(write && len as usize >= HEADER + frame.len());
        let at = GuestAddress(at + HEADER as u64);
        self.memory[0].write_slice(frame, at).unwrap();
        let len = (HEADER + frame.len()) as u32;
        self.device[0]
            .add_used(&*self.memory[0], head, len)
            .unwrap();
        true
    }

    /// The device sends a frame off.
    fn collect(&mut self) -> Option<Vec<u8>> {
        let (head, at, len, write) = pop(&mut self.device[1], &self.memory[1])?;
        assert!(!write);
        let mut bytes = vec![0; len as usize];
        self.memory[1]
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        self.device[1].add_used(&*self.memory[1], head, 0).unwrap();
        let frame = bytes.split_off(HEADER);
        assert_eq!(bytes, [0; HEADER], "no offload is asked for");
        Some(frame)
    }
}

#[test]
fn frames_go_both_ways() {
    for mtu in [1280, 1500, 9000] {
        let mut rig = Rig::new(mtu);
        let frame = usize::from(mtu) + 14;
        let mut into = vec![0; frame];
        rig.card.flush();
        assert_eq!(*rig.kicks.borrow(), [RX], "the first buffers");
        let mut random = Random::new(mtu.into());
        for round in 0..1000_u64 {
            let len = if round % 7 == 0 {
                frame
            } else {
                14 + random.below(frame as u64 - 13) as usize
            };
            let mut bytes = vec![0; len];
            random.fill(&mut bytes);
            assert!(rig.deliver(&bytes));
            assert_eq!(rig.card.receive(&mut into), Some(len));
            assert!(into[..len] == bytes);
            assert_eq!(rig.card.receive(&mut into), None);
            assert!(rig.card.can_send());
            rig.card.send(&bytes);
            rig.card.flush();
            assert!(rig.collect().as_deref() == Some(&bytes[..]));
        }
        let counters = rig.card.counters();
        assert_eq!(
            (counters.received, counters.sent, counters.dropped),
            (1000, 1000, 0)
        );
        assert_eq!(counters.kicks, rig.kicks.borrow().len() as u64);
    }
}

#[test]
fn full_queues_wait() {
    let mut rig = Rig::new(1500);
    let mut into = vec![0; 1514];
    rig.card.flush();
    for _ in 0..RX_BUFFERS {
        assert!(rig.deliver(&[1; 60]));
    }
    assert!(
        !rig.deliver(&[1; 60]),
        "the driver gave more buffers than it has"
    );
    for _ in 0..RX_BUFFERS {
        assert_eq!(rig.card.receive(&mut into), Some(60));
    }
    assert_eq!(rig.card.receive(&mut into), None);
    for i in 0..TX_BUFFERS {
        assert!(!rig.card.arm(), "{i}");
        assert!(rig.card.can_send());
        rig.card.send(&[2; 60]);
    }
    assert!(!rig.card.can_send());
    rig.card.send(&[3; 60]);
    assert_eq!(rig.card.counters().dropped, 1);
    rig.card.flush();
    assert!(!rig.card.arm());
    assert!(rig.deliver(&[1; 60]));
    assert!(
        !rig.card.arm(),
        "a frame that cannot be answered is no reason to stay awake"
    );
    assert_eq!(rig.collect(), Some(vec![2; 60]));
    assert!(rig.card.arm(), "room is");
    assert!(rig.card.can_send(), "what is out makes room");
    assert_eq!(rig.card.receive(&mut into), Some(60));
}

#[test]
fn what_arrives_while_it_is_asked_for_wake_ups_is_noticed() {
    let mut rig = Rig::new(1500);
    rig.card.flush();
    assert!(!rig.card.arm());
    assert!(rig.deliver(&[1; 60]));
    assert!(rig.card.arm());
    rig.card.disarm();
}

#[test]
fn frames_that_are_none_are_dropped_and_their_buffers_come_back() {
    let mut rig = Rig::new(1500);
    let mut into = vec![0; 1514];
    for _ in 0..10 {
        rig.card.flush();
        for len in [0, 1, 13] {
            assert!(rig.deliver(&vec![9; len]));
        }
        // Not even a header.
        let (head, ..) = pop(&mut rig.device[0], &rig.memory[0]).unwrap();
        rig.device[0].add_used(&*rig.memory[0], head, 3).unwrap();
        // Longer than the MTU, and still in the buffer.
        let (head, _, len, _) = pop(&mut rig.device[0], &rig.memory[0]).unwrap();
        rig.device[0].add_used(&*rig.memory[0], head, len).unwrap();
        assert!(rig.deliver(&[1; 60]));
        assert_eq!(rig.card.receive(&mut into), Some(60));
        assert_eq!(rig.card.receive(&mut into), None);
    }
    assert_eq!(rig.card.counters().dropped, 50);
}

/// Whatever a broken device does later, the card stays off, and nothing hangs or panics.
#[test]
fn a_card_that_breaks_the_rules_is_given_up() {
    let mut rig = Rig::new(1500);
    let mut into = vec![0; 1514];
    rig.card.flush();
    rig.device[0].add_used(&*rig.memory[0], 5, 60).unwrap();
    rig.device[0].add_used(&*rig.memory[0], 6, 60_000).unwrap();
    rig.device[0].add_used(&*rig.memory[0], 7, 60).unwrap();
    assert_eq!(rig.card.receive(&mut into), Some(48));
    assert_eq!(rig.card.receive(&mut into), None);
    assert!(!rig.card.can_send() && !rig.card.arm());
    rig.card.send(&[1; 60]);
    rig.card.flush();
    assert_eq!(rig.collect(), None);
}

#[test]
fn an_mtu_is_checked() {
    assert_eq!(card::mtu(None), Ok(1500));
    assert_eq!(card::mtu(Some(1280)), Ok(1280));
    assert_eq!(card::mtu(Some(u16::MAX)), Ok(9216));
    assert!(card::mtu(Some(1279)).is_err());
}
