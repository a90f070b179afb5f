//! virtio-net over modern PCI (virtio 1.2, sections 4.1 and 5.1): finds the card, assigns its BARs, negotiates, and hands its queues
//! to [`hyv_net::card`].
//!
//! A register access costs up to 50 us where KVM has no hardware under it, so there are few: some 24 of configuration space and 45 of the
//! device. [`accesses`] counts them.
#![allow(
    unsafe_code,
    reason = "device registers are memory at fixed addresses; queues are memory that the device shares"
)]

use alloc::boxed::Box;
use alloc::rc::Rc;
use core::cell::Cell;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

use hyv_net::card::{self, Card, FEATURES, RX, TX};
use hyv_net::virtq::{Queue, Shared};
use pci_types::PciAddress;
use pci_types::capability::PciCapabilityAddress;
use virtio_spec::net::{Config, ConfigVolatileFieldAccess, F};
use virtio_spec::pci::{
    CapCfgType, CapData, CommonCfg, CommonCfgVolatileFieldAccess, CommonCfgVolatileWideFieldAccess,
};
use virtio_spec::{DeviceStatus, le16, le32, le64, le128};
use volatile::VolatilePtr;
use volatile::access::{ReadOnly, Readable, Writable};

use crate::pci::{self, BAR, CAPABILITIES, COMMAND, ConfigPorts, MEMORY_AND_MASTER};
use crate::{layout, memory, paging};

/// Vendor 1af4, device 1041: a modern network card.
const ID: u32 = 0x1041_1af4;
/// Where hyv-host puts the card; looked at first.
const USUAL_SLOT: u8 = 5;

const CAP_MSIX: u8 = 0x11;
const CAP_VENDOR: u8 = 0x09;
/// Capabilities that fit into configuration space: a list that is longer runs in a circle.
const MAX_CAPABILITIES: usize = 48;
/// In MSI-X's message control, the upper half of its first register.
const MSIX_ENABLE: u32 = 1 << 31;
/// In a BAR: the I/O space bit, and the type's bits with their value for 64 bits.
const BAR_IO: u32 = 1;
const BAR_TYPE: u32 = 6;
const BAR_64: u32 = 4;
/// The MSI-X entry of both queues, and the vector of what nobody wants to hear of.
const VECTOR: u16 = 0;
const NO_VECTOR: u16 = 0xffff;
/// Bytes of the common configuration up to the addresses of a queue, and of the card's own up to its MTU.
const COMMON_USED: usize = 56;
const CONFIG_USED: usize = 12;
/// Polls of the status register until a reset is over. Each takes at least 0.1 us.
const RESET_POLLS: u32 = 10_000;

static ACCESSES: AtomicU32 = AtomicU32::new(0);

/// Accesses to the card's registers so far, doorbells among them.
pub(crate) fn accesses() -> u32 {
    ACCESSES.load(Relaxed)
}

fn count() {
    ACCESSES.store(accesses() + 1, Relaxed);
}

fn get<T: Copy, A: Readable>(register: VolatilePtr<'_, T, A>) -> T {
    count();
    register.read()
}

fn set<T: Copy, A: Writable>(register: VolatilePtr<'_, T, A>, value: T) {
    count();
    register.write(value);
}

/// A piece of RAM that the card reads and writes, for good.
pub(crate) struct Dma {
    start: NonNull<u8>,
    len: usize,
    address: u64,
}

impl Dma {
    fn new(memory: &'static mut [u8]) -> Option<Self> {
        let len = memory.len();
        let start = NonNull::from(memory).cast::<u8>();
        let address = paging::device_address(start.addr().get() as u64, len as u64)?;
        Some(Self {
            start,
            len,
            address,
        })
    }

    fn check(&self, at: usize, len: usize) {
        assert!(
            at <= self.len && len <= self.len - at,
            "outside of a queue's memory"
        );
    }

    fn word<T>(&self, at: usize) -> *mut T {
        self.check(at, size_of::<T>());
        assert!(at.is_multiple_of(align_of::<T>()));
        // SAFETY: inside (checked).
        unsafe { self.start.add(at) }.as_ptr().cast()
    }
}

impl Shared for Dma {
    fn u16_at(&self, at: usize) -> &AtomicU16 {
        // SAFETY: inside and aligned (checked, and the start is aligned to a cache line); words of rings are only reached as
        // atomics; the memory is there for good.
        unsafe { AtomicU16::from_ptr(self.word(at)) }
    }

    fn u32_at(&self, at: usize) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(self.word(at)) }
    }

    fn u64_at(&self, at: usize) -> &AtomicU64 {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(self.word(at)) }
    }

    fn read(&self, at: usize, to: &mut [u8]) {
        self.check(at, to.len());
        // SAFETY: inside (checked); the queue reads a buffer only while the device does not have it.
        unsafe {
            self.start
                .add(at)
                .copy_to_nonoverlapping(NonNull::from(&mut *to).cast(), to.len())
        };
    }

    fn write(&self, at: usize, from: &[u8]) {
        self.check(at, from.len());
        // SAFETY: inside (checked); the queue writes a buffer only while the device does not have it.
        unsafe {
            self.start
                .add(at)
                .copy_from_nonoverlapping(NonNull::from(from).cast(), from.len())
        };
    }

    fn address(&self, at: usize) -> u64 {
        self.address + at as u64
    }
}

/// What the capabilities say: a place in a BAR.
#[derive(Clone, Copy)]
struct Place {
    bar: u8,
    offset: u64,
    len: u64,
}

impl Place {
    fn new(cap: &CapData) -> Self {
        Self {
            bar: cap.bar,
            offset: cap.offset.to_ne(),
            len: cap.length.to_ne(),
        }
    }

    /// Its virtual address, if `len` bytes of it fit into what is mapped for a BAR.
    fn address(self, len: usize) -> Result<u64, &'static str> {
        let fits = self.len >= len as u64
            && self.offset.is_multiple_of(4)
            && self
                .offset
                .checked_add(len as u64)
                .is_some_and(|end| end <= layout::NET_BAR);
        if fits && self.bar < 6 {
            Ok(layout::NET + u64::from(self.bar) * layout::NET_BAR + self.offset)
        } else {
            Err("the network card's registers are not where they can be mapped")
        }
    }
}

/// The card's capabilities.
struct Capabilities {
    common: Place,
    notify: Place,
    multiplier: u32,
    device: Place,
    /// Where the MSI-X capability is, and its table.
    msix: (u16, Place),
}

impl Capabilities {
    fn read(at: PciAddress) -> Result<Self, &'static str> {
        let (mut common, mut notify, mut device, mut msix) = (None, None, None, None);
        let mut multiplier = 0;
        let mut offset = pci::read(at, CAPABILITIES) as u8 & 0xfc;
        for _ in 0..MAX_CAPABILITIES {
            if offset == 0 {
                break;
            }
            let here = u16::from(offset);
            let [id, next, _, kind] = pci::read(at, here).to_le_bytes();
            offset = next & 0xfc;
            if id == CAP_MSIX {
                let table = pci::read(at, here + 4);
                let place = Place {
                    bar: (table & 7) as u8,
                    offset: u64::from(table & !7),
                    len: 16,
                };
                msix = Some((here, place));
            }
            let kind = CapCfgType::from(kind);
            let wanted = [CapCfgType::Common, CapCfgType::Notify, CapCfgType::Device];
            if id != CAP_VENDOR || !wanted.contains(&kind) {
                continue;
            }
            let address = PciCapabilityAddress {
                address: at,
                offset: here,
            };
            let Some(cap) = CapData::read(address, ConfigPorts) else {
                continue;
            };
            // The first of a kind is the one that the device prefers.
            let place = match kind {
                CapCfgType::Common => &mut common,
                CapCfgType::Device => &mut device,
                _ => {
                    if notify.is_none() {
                        multiplier = cap.notify_off_multiplier.map_or(0, |m| m.to_ne());
                    }
                    &mut notify
                }
            };
            place.get_or_insert(Place::new(&cap));
        }
        let lacks = "the network card is no modern virtio device";
        Ok(Self {
            common: common.ok_or(lacks)?,
            notify: notify.ok_or(lacks)?,
            multiplier,
            device: device.ok_or(lacks)?,
            msix: msix.ok_or("the network card has no MSI-X")?,
        })
    }

    /// Gives each BAR that is used its address.
    fn assign(&self, at: PciAddress) -> Result<(), &'static str> {
        let mut done = 0_u8;
        for place in [self.common, self.notify, self.device, self.msix.1] {
            if place.bar >= 6 {
                return Err("the network card names a BAR that does not exist");
            }
            if done & 1 << place.bar != 0 {
                continue;
            }
            done |= 1 << place.bar;
            let register = BAR + 4 * u16::from(place.bar);
            let address = (layout::NET_PHYS + u64::from(place.bar) * layout::NET_BAR) as u32;
            pci::write(at, register, address);
            let reads = pci::read(at, register);
            // A BAR larger than its alignment here would have dropped address bits.
            if reads & BAR_IO != 0 || reads & !0xf != address {
                return Err("a BAR of the network card is too large, or not memory");
            }
            if reads & BAR_TYPE == BAR_64 {
                pci::write(at, register + 4, 0);
            }
        }
        pci::write(at, COMMAND, MEMORY_AND_MASTER);
        Ok(())
    }

    /// Lets the first MSI-X entry wake this guest.
    fn interrupt(&self, at: PciAddress) -> Result<(), &'static str> {
        let (cap, table) = self.msix;
        pci::route(table.address(16)?);
        let control = pci::read(at, cap);
        pci::write(at, cap, control | MSIX_ENABLE);
        Ok(())
    }
}

/// Registers of type `T` at a place, of which the first `used` bytes must be there: a device may know less than the newest `T`.
fn registers<T>(place: Place, used: usize) -> Result<VolatilePtr<'static, T>, &'static str> {
    let at = place.address(used)?;
    let at = NonNull::new(at as *mut T).ok_or("a BAR is at zero")?;
    // SAFETY: in the device GiB, where the card's BAR is mapped uncached for good; all bit patterns are values of the registers' types.
    Ok(unsafe { VolatilePtr::new(at) })
}

/// Finds the card and makes it run.
pub(crate) fn open() -> Result<Card<Dma>, &'static str> {
    let at =
        pci::find(ID, USUAL_SLOT).ok_or("this guest has no network card: start it with --net")?;
    let caps = Capabilities::read(at)?;
    caps.assign(at)?;
    let common = registers::<CommonCfg>(caps.common, COMMON_USED)?;
    caps.interrupt(at)?;
    start(&caps, common).inspect_err(|_| set(common.device_status(), DeviceStatus::FAILED))
}

/// The order of virtio 1.2, section 3.1.1.
fn start(
    caps: &Capabilities,
    common: VolatilePtr<'static, CommonCfg>,
) -> Result<Card<Dma>, &'static str> {
    let status = common.device_status();
    set(status, DeviceStatus::empty());
    if !(0..RESET_POLLS).any(|_| get(status).is_empty()) {
        return Err("the network card does not reset");
    }
    // One write for both: nothing happens between them.
    let known = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
    set(status, known);

    let mut offered = 0_u128;
    for half in [0, 1] {
        set(common.device_feature_select(), le32::from_ne(half));
        offered |= u128::from(get(common.device_feature()).to_ne()) << (32 * half);
    }
    let offered = F::from_bits_retain(le128::from_ne(offered));
    if !offered.contains(F::VERSION_1) {
        return Err("the network card is older than virtio 1.0");
    }
    let taken = offered & FEATURES;
    for half in [0, 1] {
        set(common.driver_feature_select(), le32::from_ne(half));
        let bits = (taken.bits().to_ne() >> (32 * half)) as u32;
        set(common.driver_feature(), le32::from_ne(bits));
    }
    let agreed = known | DeviceStatus::FEATURES_OK;
    set(status, agreed);
    if !get(status).contains(DeviceStatus::FEATURES_OK) {
        return Err("the network card refuses the features that this driver needs");
    }

    let config = registers::<Config>(caps.device, CONFIG_USED)?.restrict::<ReadOnly>();
    if !taken.contains(F::MAC) {
        return Err("the network card has no address of its own");
    }
    let mac = get(config.mac());
    let mtu = taken.contains(F::MTU).then(|| get(config.mtu()).to_ne());
    let mtu = card::mtu(mtu)?;
    let [rx, tx] = memory(mtu)?;

    // Filled in when the queues are known; nothing kicks before.
    let bells = Rc::new(Cell::new([None; 2]));
    let kick = {
        let bells = Rc::clone(&bells);
        Box::new(move |number: u16| {
            if let Some(Some(bell)) = bells.get().get(usize::from(number)) {
                set::<le16, _>(*bell, le16::from_ne(number));
            }
        })
    };
    let card = Card::new(rx, tx, mac, mtu, kick);
    set(common.config_msix_vector(), le16::from_ne(NO_VECTOR));
    let [rx, tx] = card.queues();
    bells.set([
        Some(enable(caps, common, RX, rx)?),
        Some(enable(caps, common, TX, tx)?),
    ]);
    set(status, agreed | DeviceStatus::DRIVER_OK);
    Ok(card)
}

/// Memory for both queues. RAM that nobody touched: zero, and contiguous.
fn memory(mtu: u16) -> Result<[Dma; 2], &'static str> {
    let lens = [RX, TX].map(|q| card::memory(q, mtu).next_multiple_of(4096));
    let memory = memory::take(lens[0] + lens[1])
        .ok_or("too little RAM is left for its buffers: bring it up before all is taken, or give more (--memory)")?;
    let (rx, tx) = memory.split_at_mut(lens[0]);
    let lost = "RAM is not contiguous where it should be";
    Ok([Dma::new(rx).ok_or(lost)?, Dma::new(tx).ok_or(lost)?])
}

/// A queue's doorbell.
type Bell = VolatilePtr<'static, le16>;

fn enable(
    caps: &Capabilities,
    common: VolatilePtr<'static, CommonCfg>,
    number: u16,
    queue: &Queue<Dma>,
) -> Result<Bell, &'static str> {
    set(common.queue_select(), le16::from_ne(number));
    let size = queue.layout().size();
    if get(common.queue_size()).to_ne() < size {
        return Err("the network card's queues are too short");
    }
    set(common.queue_size(), le16::from_ne(size));
    set(common.queue_msix_vector(), le16::from_ne(VECTOR));
    if get(common.queue_msix_vector()).to_ne() != VECTOR {
        return Err("the network card has no interrupt to give");
    }
    let [desc, driver, device] = queue.addresses().map(le64::from_ne);
    for (register, address) in [
        (common.queue_desc(), desc),
        (common.queue_driver(), driver),
        (common.queue_device(), device),
    ] {
        count();
        count();
        register.write(address);
    }
    let off = u64::from(get(common.queue_notify_off()).to_ne());
    let mut place = caps.notify;
    let skip = off * u64::from(caps.multiplier);
    place.offset += skip;
    place.len = place.len.saturating_sub(skip);
    let bell = registers::<le16>(place, size_of::<le16>())?;
    set(common.queue_enable(), le16::from_ne(1));
    Ok(bell)
}
