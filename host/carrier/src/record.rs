//! Records what a carrier sends and receives: a pcap file with nanosecond times and whole IP packets.
//!
//! Headers are reconstructed, because a UDP socket shows none. Where the IPv4 identification is hidden, it is the one for which the
//! ICRC is right; a packet for which there is none is written with 0, and so shows as what it is. IPv6 flow labels of received
//! packets and UDP checksums are written as 0; the ICRC covers neither.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use hyv_roce::carrier::{Arrival, Carrier, Flow, Gid, Sent, UDP_PORT};
use hyv_roce::icrc::{self, solve_ident};
use hyv_roce::wire::{ip, udp};

use crate::limits;

/// Magic number of pcap with nanoseconds, in the writer's byte order.
const MAGIC: u32 = 0xa1b2_3c4d;
/// Link type of records that begin with the IP header.
const LINKTYPE_RAW: u32 = 101;
/// Bytes of the largest record: any IP packet.
const SNAPLEN: u32 = 65_575;
const RECORD_HEADER: usize = 16;

/// A carrier whose packets are recorded.
#[derive(Debug)]
pub struct Recorded<C> {
    inner: C,
    recorder: Recorder,
}

impl<C: Carrier> Recorded<C> {
    /// Records what `inner` sends and receives from now on to a new file; an existing one is overwritten. The file is complete
    /// when this is dropped, and at most a second behind before.
    ///
    /// # Errors
    /// When the file cannot be made. What goes wrong later is warned of once, and the traffic goes on.
    pub fn new(inner: C, path: &Path) -> io::Result<Recorded<C>> {
        let recorder = Recorder::create(path)?;
        Ok(Recorded { inner, recorder })
    }
}

impl<C: Carrier> Carrier for Recorded<C> {
    fn local(&self) -> Gid {
        self.inner.local()
    }

    fn link_mtu(&self) -> usize {
        self.inner.link_mtu()
    }

    fn burst(&self, flow: &Flow) -> (usize, usize) {
        self.inner.burst(flow)
    }

    fn source_ports(&self) -> (u16, u16) {
        self.inner.source_ports()
    }

    fn ident(&self, index: usize) -> u16 {
        self.inner.ident(index)
    }

    fn send(&mut self, flow: &Flow, segment_len: usize, payloads: &[u8]) -> Sent {
        // Taken first, so that no answer is recorded as older than its question.
        let when = now();
        let sent = self.inner.send(flow, segment_len, payloads);
        if sent == Sent::All {
            let src = self.inner.local();
            let mut pending = self.recorder.begin();
            for (index, payload) in payloads.chunks(segment_len.max(1)).enumerate() {
                pending.add(&Headers {
                    when,
                    src: &src,
                    dst: &flow.dst,
                    src_port: flow.src_port,
                    traffic_class: flow.traffic_class,
                    hop_limit: flow.hop_limit,
                    flow_label: flow.flow_label,
                    ident: self.inner.ident(index),
                    payload,
                });
            }
            self.recorder.end(pending);
        }
        sent
    }

    fn receive(&mut self, take: &mut dyn FnMut(&Arrival<'_>)) -> usize {
        let recorder = &self.recorder;
        self.inner.receive(&mut |arrival| {
            let mut pending = recorder.begin();
            pending.add(&Headers {
                when: now(),
                src: &arrival.src,
                dst: &arrival.dst,
                src_port: arrival.src_port,
                traffic_class: arrival.traffic_class,
                hop_limit: arrival.hop_limit,
                flow_label: 0,
                ident: arrival.ident.unwrap_or_else(|| find_ident(arrival)),
                payload: arrival.payload,
            });
            recorder.end(pending);
            take(arrival);
        })
    }

    fn cheap_poll(&self) -> bool {
        self.inner.cheap_poll()
    }

    fn takes_company(&self) -> bool {
        self.inner.takes_company()
    }
}

/// Seconds and nanoseconds since 1970.
fn now() -> (u32, u32) {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    (since.as_secs() as u32, since.subsec_nanos())
}

fn find_ident(arrival: &Arrival<'_>) -> u16 {
    let flow = icrc::Flow::new(&arrival.src, &arrival.dst, arrival.src_port);
    if !flow.is_v4() {
        return 0;
    }
    let residual = flow.residual(arrival.payload, 0);
    solve_ident(residual, arrival.payload.len()).unwrap_or(0)
}

struct Headers<'a> {
    when: (u32, u32),
    src: &'a Gid,
    dst: &'a Gid,
    src_port: u16,
    traffic_class: u8,
    hop_limit: u8,
    flow_label: u32,
    ident: u16,
    payload: &'a [u8],
}

/// Records that wait for the writer.
#[derive(Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    left_out: u64,
    ending: bool,
    /// Writing failed: nothing more is recorded.
    broken: bool,
}

impl Pending {
    fn add(&mut self, packet: &Headers<'_>) {
        if self.broken {
            return;
        }
        if self.bytes.len() >= limits::PCAP_PENDING {
            self.left_out += 1;
            return;
        }
        let v4 = ip::mapped_v4(packet.src).zip(ip::mapped_v4(packet.dst));
        let ip_len = if v4.is_some() { ip::V4_LEN } else { ip::V6_LEN };
        let udp_len = udp::LEN + packet.payload.len();
        let len = ip_len + udp_len;
        let mut head = [0; RECORD_HEADER + ip::V6_LEN + udp::LEN];
        let words = [packet.when.0, packet.when.1, len as u32, len as u32];
        for (place, word) in head.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        let rest = &mut head[RECORD_HEADER..];
        match v4 {
            Some((src, dst)) => ip::V4 {
                tos: packet.traffic_class,
                total_len: len as u16,
                ident: packet.ident,
                flags_fragment: ip::DONT_FRAGMENT,
                ttl: packet.hop_limit,
                protocol: ip::UDP,
                src,
                dst,
            }
            .emit(rest),
            None => ip::V6 {
                traffic_class: packet.traffic_class,
                flow_label: packet.flow_label,
                payload_len: udp_len as u16,
                next_header: ip::UDP,
                hop_limit: packet.hop_limit,
                src: *packet.src,
                dst: *packet.dst,
            }
            .emit(rest),
        }
        udp::Udp {
            src_port: packet.src_port,
            dst_port: UDP_PORT,
            len: udp_len as u16,
            checksum: 0,
        }
        .emit(&mut rest[ip_len..]);
        let head = &head[..RECORD_HEADER + ip_len + udp::LEN];
        self.bytes.extend_from_slice(head);
        self.bytes.extend_from_slice(packet.payload);
    }
}

#[derive(Debug, Default)]
struct Shared {
    pending: Mutex<Pending>,
    wake: Condvar,
    /// The writer has been woken and has not looked yet.
    woken: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Recorder {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

impl Recorder {
    fn create(path: &Path) -> io::Result<Recorder> {
        let mut file = File::create(path)?;
        let mut header = Vec::with_capacity(24);
        header.extend_from_slice(&MAGIC.to_ne_bytes());
        header.extend_from_slice(&2u16.to_ne_bytes());
        header.extend_from_slice(&4u16.to_ne_bytes());
        for word in [0, 0, SNAPLEN, LINKTYPE_RAW] {
            header.extend_from_slice(&word.to_ne_bytes());
        }
        file.write_all(&header)?;
        let shared = Arc::new(Shared::default());
        let writer = Writer {
            shared: shared.clone(),
            path: path.into(),
            good: header.len() as u64,
            file,
        };
        let writer = std::thread::Builder::new()
            .name("hyv-pcap".into())
            .spawn(move || drop(writer.run()))?;
        Ok(Recorder {
            shared,
            writer: Some(writer),
        })
    }

    fn begin(&self) -> MutexGuard<'_, Pending> {
        self.shared.lock()
    }

    fn end(&self, pending: MutexGuard<'_, Pending>) {
        let much = pending.bytes.len() >= limits::PCAP_CHUNK;
        drop(pending);
        if much && !self.shared.woken.swap(true, Ordering::Relaxed) {
            self.shared.wake.notify_one();
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.wake.notify_one();
        if let Some(writer) = self.writer.take() {
            // A panic there has been reported by its thread.
            let _ = writer.join();
        }
    }
}

struct Writer<W = File> {
    shared: Arc<Shared>,
    path: PathBuf,
    file: W,
    /// Bytes of the file that are whole records.
    good: u64,
}

/// What a recording goes to: a file, or in tests something that fills up.
trait Sink: Write {
    fn cut(&mut self, len: u64);
}

impl Sink for File {
    fn cut(&mut self, len: u64) {
        // Of no use on a pipe; and then there is nothing to be done.
        let _ = self.set_len(len);
    }
}

impl<W: Sink> Writer<W> {
    fn run(mut self) -> W {
        let mut chunk = Vec::new();
        loop {
            let mut pending = self.shared.lock();
            if pending.bytes.len() < limits::PCAP_CHUNK && !pending.ending {
                pending = self
                    .shared
                    .wake
                    .wait_timeout(pending, limits::PCAP_FLUSH)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
            self.shared.woken.store(false, Ordering::Relaxed);
            std::mem::swap(&mut chunk, &mut pending.bytes);
            let ending = pending.ending;
            let left_out = std::mem::take(&mut pending.left_out);
            drop(pending);
            if left_out > 0 {
                tracing::warn!(
                    "{}: {left_out} packets are left out, because the disk does not keep up",
                    self.path.display()
                );
            }
            if let Err(error) = self.file.write_all(&chunk) {
                self.give_up(&error);
                return self.file;
            }
            self.good += chunk.len() as u64;
            chunk.clear();
            if ending {
                return self.file;
            }
        }
    }

    fn give_up(&mut self, error: &io::Error) {
        // A record that was written in part would make the file unreadable.
        self.file.cut(self.good);
        let mut pending = self.shared.lock();
        pending.broken = true;
        pending.bytes = Vec::new();
        tracing::warn!(
            "recording to {} ends here: {error}; the traffic goes on",
            self.path.display()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sink with room for so many bytes.
    struct Small {
        bytes: Vec<u8>,
        room: usize,
    }

    impl Write for Small {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let room = self.room - self.bytes.len();
            if room == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let some = &bytes[..bytes.len().min(room)];
            self.bytes.extend_from_slice(some);
            Ok(some.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Sink for Small {
        fn cut(&mut self, len: u64) {
            self.bytes.truncate(len as usize);
        }
    }

    fn packet(payload: &[u8]) -> Headers<'_> {
        Headers {
            when: (1, 2),
            src: &[1; 16],
            dst: &[2; 16],
            src_port: 0xc000,
            traffic_class: 0,
            hop_limit: 64,
            flow_label: 0,
            ident: 0,
            payload,
        }
    }

    #[test]
    fn a_full_disk_ends_the_recording_and_keeps_what_was_whole() {
        let shared = Arc::new(Shared::default());
        let recorder = Recorder {
            shared: shared.clone(),
            writer: None,
        };
        let size = RECORD_HEADER + ip::V6_LEN + udp::LEN + 20;
        let mut small = Small {
            bytes: Vec::new(),
            room: size * 3 / 2,
        };
        for _ in 0..2 {
            // Each ends one run of the writer, after one record.
            let mut pending = recorder.begin();
            pending.add(&packet(&[5; 20]));
            pending.ending = true;
            recorder.end(pending);
            let writer = Writer {
                shared: shared.clone(),
                path: "test".into(),
                good: small.bytes.len() as u64,
                file: small,
            };
            small = writer.run();
        }
        assert_eq!(small.bytes.len(), size);
        // Nothing more is kept for it.
        let mut pending = recorder.begin();
        assert!(pending.broken);
        pending.add(&packet(&[5; 20]));
        assert!(pending.bytes.is_empty());
    }

    #[test]
    fn what_waits_for_the_disk_is_bounded() {
        let mut pending = Pending::default();
        let payload = vec![0; 60_000];
        let many = limits::PCAP_PENDING / payload.len() + 10;
        for _ in 0..many {
            pending.add(&packet(&payload));
        }
        assert!(pending.bytes.len() < limits::PCAP_PENDING + 2 * payload.len());
        assert!(pending.left_out > 0);
    }
}
