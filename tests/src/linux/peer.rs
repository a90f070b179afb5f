//! A Linux with a RoCE device, in QEMU.

use std::fs;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use hyv_host::accel::{AccelRequest, probe};
use rustix::process::{Pid, Signal, kill_process};

use super::channel::{Channel, Ended, Id, Silence};
use super::{Capture, Kit, Net, Node, Skip};
use crate::limits::{PEER_BOOT, PEER_LIFE, PEER_MEMORY_MIB};
use crate::run::Running;

/// A Linux with a RoCE device `rxe0` on `eth0`, in QEMU under TCG. Dropped, it is gone.
#[derive(Debug)]
pub struct Peer {
    // Ends before the network does.
    machine: Running,
    channel: Channel,
    node: Node,
    capture: PathBuf,
    console: PathBuf,
    _end: Deadline,
    _folder: tempfile::TempDir,
    net: Net,
}

/// A peer that has been started. Several boot at the same time: start all, then ask each for [`Booting::ready`].
#[derive(Debug)]
pub struct Booting(Peer);

impl Booting {
    /// The peer, when its RoCE device is up.
    ///
    /// # Panics
    /// When it does not come up; with what its console said.
    #[must_use]
    pub fn ready(self) -> Peer {
        if let Err(silence) = self.0.channel.ready(PEER_BOOT) {
            let why = match silence {
                Silence::Gone => "QEMU has ended".to_owned(),
                Silence::Late => format!("not within {PEER_BOOT:?}"),
            };
            panic!(
                "the Linux peer did not boot: {why}\n{}\n{}",
                self.0.machine.err(),
                self.0.console()
            );
        }
        self.0
    }
}

impl Peer {
    /// Starts a peer on `net` and waits until its RoCE device is up (12 s or more).
    ///
    /// # Errors
    /// No QEMU, no tap.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn boot(kit: &Kit, net: &Net) -> Result<Self, Skip> {
        Ok(Self::start(kit, net)?.ready())
    }

    /// Starts a peer on `net`.
    ///
    /// # Errors
    /// No QEMU, no tap.
    ///
    /// # Panics
    /// When QEMU ends at once.
    pub fn start(kit: &Kit, net: &Net) -> Result<Booting, Skip> {
        let (qemu, _) = probe(AccelRequest::Tcg, None).map_err(|e| Skip::Qemu(e.to_string()))?;
        let (node, tap) = net.tap()?;
        let folder = tempfile::Builder::new().prefix("hyv-linux-").tempdir();
        let folder = folder.expect("a temporary folder can be made");
        let file = |name: &str| folder.path().join(name);
        let (port, console, capture) = (file("port"), file("console"), file("capture"));
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &net.switch()]);
        command.arg(&qemu.path).args(machine(&port, &console));
        command.arg("-kernel").arg(kit.kernel());
        command.arg("-initrd").arg(kit.initrd());
        command.args(["-append", &kernel_line(node, net.mtu())]);
        // Frames as they are on the wire: no offload headers, which the capture would have in it.
        let netdev = format!("tap,id=net,ifname={tap},script=no,downscript=no,vnet_hdr=off");
        let device = format!("virtio-net-pci,netdev=net,mac={},romfile=", node.mac());
        let dump = format!("filter-dump,id=dump,netdev=net,file={}", capture.display());
        command.args(["-netdev", &netdev, "-device", &device, "-object", &dump]);
        let mut machine = Running::start(command, folder.path(), "qemu");
        let port = connect(&port, &mut machine);
        let channel = Channel::new(port).expect("a thread can be started");
        Ok(Booting(Self {
            _end: Deadline::new(machine.pid(), PEER_LIFE),
            machine,
            channel,
            node,
            capture,
            console,
            _folder: folder,
            net: net.clone(),
        }))
    }

    /// Its addresses.
    #[must_use]
    pub fn node(&self) -> Node {
        self.node
    }

    /// Its network.
    #[must_use]
    pub fn net(&self) -> &Net {
        &self.net
    }

    /// The id of its QEMU.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.machine.pid()
    }

    /// What its kernel and first process have said.
    #[must_use]
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    /// Starts `command`, a line or several of shell, and does not wait for it.
    ///
    /// # Panics
    /// When the peer does not take it.
    #[must_use]
    pub fn spawn(&self, command: &str) -> Job<'_> {
        let id = self.channel.start(command).unwrap_or_else(|silence| {
            panic!(
                "{command}: the Linux peer takes no command ({silence:?})\n{}",
                self.console()
            )
        });
        Job {
            peer: self,
            id,
            command: command.to_owned(),
            over: false,
        }
    }

    /// Runs `command`, a line or several of shell.
    ///
    /// # Panics
    /// When it does not end within `limit`.
    pub fn run(&self, command: &str, limit: Duration) -> Output {
        self.spawn(command).wait(limit)
    }

    /// Runs shell commands that take no time and succeed; gives what they print.
    ///
    /// # Panics
    /// When they fail.
    pub fn sh(&self, command: &str) -> String {
        self.run(command, crate::PATIENCE).ok().text
    }

    /// Waits until the shell command `condition` succeeds.
    ///
    /// # Panics
    /// When it does not within [`crate::PATIENCE`].
    pub fn until(&self, condition: &str) {
        let script = format!("until {condition}; do sleep 0.1; done >/dev/null 2>&1");
        let _ = self.run(&script, crate::PATIENCE).ok();
    }

    /// Waits until something listens on TCP `port`, of whichever family.
    ///
    /// # Panics
    /// When nothing does within [`crate::PATIENCE`].
    pub fn until_tcp(&self, port: u16) {
        // Local address and port, remote address and port, state 0A.
        self.until(&format!(
            "grep -Eqs '^ *[0-9]+: [0-9A-F]+:{port:04X} [0-9A-F]+:0000 0A' /proc/net/tcp /proc/net/tcp6"
        ));
    }

    /// Waits until something listens on `port` of RDMA connection management.
    ///
    /// # Panics
    /// When nothing does within [`crate::PATIENCE`].
    pub fn until_cm(&self, port: u16) {
        self.until(&format!(
            "rdma resource show cm_id | grep -Eq 'state LISTEN.*:{port} '"
        ));
    }

    /// Index of the GID that has the address `ip`, as `ibv_rc_pingpong -g` and perftest's `-x` take it. An IPv4 address is
    /// mapped into IPv6.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn gid_index(&self, ip: IpAddr) -> u32 {
        let v6 = match ip {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        let table = self
            .sh("cd /sys/class/infiniband/rxe0/ports/1/gids && grep -Hv :0000:0000:0000:0000$ *");
        let text = v6.segments().map(|s| format!("{s:04x}")).join(":");
        let line = table.lines().find_map(|l| l.strip_suffix(&text));
        let index = line.and_then(|l| l.strip_suffix(':')?.parse().ok());
        index.unwrap_or_else(|| panic!("the Linux peer has no GID for {ip}:\n{table}"))
    }

    /// Loses this percentage of RoCEv2 packets (UDP 4791), each way, from now on; all others pass. 0 loses none. Those that
    /// come in are lost with a probability of one in a whole number: 4% is 1 in 25, 3% is 1 in 33.
    ///
    /// # Panics
    /// When `percent` is above 100, or Linux refuses.
    pub fn loss(&self, percent: f64) {
        assert!((0.0..=100.0).contains(&percent), "{percent}% of loss");
        if percent == 0.0 {
            self.faults("");
            return;
        }
        self.faults(&format!("loss {percent}%"));
        let one_in = (100.0 / percent).round() as u32;
        let action = match one_in {
            1 => "drop".to_owned(),
            n => format!("pass random netrand drop {n}"),
        };
        self.sh(&format!(
            "tc qdisc add dev eth0 clsact && {}",
            each_family(&format!("dev eth0 ingress {ROCE} action {action}"))
        ));
    }

    /// How many packets have been lost since [`Self::loss`] or [`Self::faults`] was called, both ways.
    ///
    /// # Panics
    /// When Linux does not tell.
    #[must_use]
    pub fn lost(&self) -> u64 {
        let table = self.sh(
            "tc -s qdisc show dev eth0 | grep -A1 '^qdisc netem'; tc -s filter show dev eth0 ingress",
        );
        // "Sent 8 bytes 1 pkt (dropped 2, overlimits 0 requeues 0)"
        let counts = table.split("(dropped ").skip(1);
        let counts = counts.filter_map(|rest| rest.split(',').next()?.parse::<u64>().ok());
        counts.sum()
    }

    /// Sets the MTU of its link, bytes of an IP packet, up to the network's: 1500 makes the RoCE device's active MTU 1024,
    /// 4300 makes it 4096.
    ///
    /// # Panics
    /// When Linux refuses.
    pub fn link_mtu(&self, mtu: u32) {
        self.sh(&format!("ip link set eth0 mtu {mtu}"));
    }

    /// Sends RoCEv2 packets (UDP 4791) through `tc netem WORDS` from now on ("duplicate 2%", "delay 5ms reorder 50%"), in
    /// place of what was set before; "" for nothing. Other packets pass, and so does what comes in.
    ///
    /// # Panics
    /// When Linux refuses.
    pub fn faults(&self, netem: &str) {
        self.sh("tc qdisc del dev eth0 root 2>/dev/null; tc qdisc del dev eth0 clsact 2>/dev/null; true");
        if netem.is_empty() {
            return;
        }
        // The fourth band takes only what the filter sends there.
        self.sh(&format!(
            "tc qdisc add dev eth0 root handle 1: prio bands 4 && \
             tc qdisc add dev eth0 parent 1:4 handle 40: netem {netem} && {}",
            each_family(&format!("dev eth0 parent 1: {ROCE} classid 1:4"))
        ));
    }

    /// Every frame that it has sent or received so far.
    ///
    /// # Panics
    /// When QEMU's file is none.
    #[must_use]
    pub fn capture(&self) -> Capture {
        Capture::read(&self.capture).unwrap_or_else(|e| panic!("{e}"))
    }

    /// The same as a file (pcap, Ethernet), which goes when the peer does.
    #[must_use]
    pub fn capture_file(&self) -> &Path {
        &self.capture
    }
}

/// What RoCEv2 is to tc's `flower`.
const ROCE: &str = "flower ip_proto udp dst_port 4791";

/// `tc filter add` for IPv4 and IPv6: `rest` begins with where it goes.
fn each_family(rest: &str) -> String {
    let (place, what) = rest.split_once(" flower ").unwrap_or((rest, ""));
    ["ip", "ipv6"]
        .map(|family| {
            let preference = if family == "ip" { 1 } else { 2 };
            format!("tc filter add {place} protocol {family} pref {preference} flower {what}")
        })
        .join(" && ")
}

/// Arguments of QEMU: the machine without its network.
fn machine(port: &Path, console: &Path) -> Vec<String> {
    let memory = PEER_MEMORY_MIB.to_string();
    let words = [
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-machine",
        "q35",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "max",
        "-m",
        &memory,
    ];
    let mut words: Vec<String> = words.map(str::to_owned).into();
    words.extend(["-serial".into(), format!("file:{}", console.display())]);
    let socket = format!("socket,id=port,path={},server=on,wait=off", port.display());
    words.extend(["-chardev".into(), socket]);
    words.extend(["-serial".into(), "chardev:port".into()]);
    words
}

/// The kernel's command line. What has no dot and is none of its own comes to the first process as a variable.
fn kernel_line(node: Node, mtu: u32) -> String {
    format!(
        "console=ttyS0 quiet panic=-1 mitigations=off v4={}/24 v6={}/64 mtu={mtu} life={}",
        node.v4(),
        node.v6(),
        PEER_LIFE.as_secs()
    )
}

/// Connects to QEMU's socket, which is there before the guest runs.
fn connect(path: &Path, machine: &mut Running) -> UnixStream {
    let start = Instant::now();
    loop {
        if let Ok(stream) = UnixStream::connect(path) {
            return stream;
        }
        let late = start.elapsed() > crate::PATIENCE;
        assert!(
            machine.runs() && !late,
            "QEMU opens no port for commands\n{}",
            machine.err()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Kills a process when its time is over, unless dropped before.
#[derive(Debug)]
struct Deadline {
    _over: Sender<()>,
}

impl Deadline {
    fn new(pid: u32, limit: Duration) -> Self {
        let (over, end) = channel::<()>();
        std::thread::spawn(move || {
            if end.recv_timeout(limit) == Err(RecvTimeoutError::Timeout)
                && let Some(pid) = Pid::from_raw(pid.cast_signed())
            {
                eprintln!("the Linux peer's time is over");
                let _ = kill_process(pid, Signal::KILL);
            }
        });
        Self { _over: over }
    }
}

/// A command that runs in a [`Peer`]. Dropped while it runs, it is killed.
#[derive(Debug)]
pub struct Job<'a> {
    peer: &'a Peer,
    id: Id,
    command: String,
    over: bool,
}

impl Job<'_> {
    /// Whether it still runs.
    #[must_use]
    pub fn runs(&self) -> bool {
        !self.peer.channel.ended(self.id)
    }

    /// What it has printed so far.
    ///
    /// # Panics
    /// When the peer does not answer.
    #[must_use]
    pub fn text(&self) -> String {
        self.peer.sh(&format!("cat /jobs/{}.out", self.id))
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end within `limit`; with what it has printed.
    pub fn wait(mut self, limit: Duration) -> Output {
        match self.peer.channel.wait(self.id, limit) {
            Ok(ended) => {
                self.over = true;
                self.output(&ended)
            }
            Err(Silence::Late) => panic!(
                "in the Linux peer `{}` did not end within {limit:?}\n{}",
                self.command,
                self.text()
            ),
            Err(Silence::Gone) => panic!(
                "the Linux peer went during `{}`\n{}",
                self.command,
                self.peer.console()
            ),
        }
    }

    /// Kills it, and gives what it had printed.
    ///
    /// # Panics
    /// When the peer does not answer.
    pub fn kill(self) -> Output {
        let _ = self.peer.channel.kill(self.id);
        self.wait(crate::PATIENCE)
    }

    fn output(&self, ended: &Ended) -> Output {
        Output {
            command: self.command.clone(),
            status: ended.status,
            text: String::from_utf8_lossy(&ended.out).into_owned(),
        }
    }
}

impl Drop for Job<'_> {
    fn drop(&mut self) {
        if !self.over {
            let _ = self.peer.channel.kill(self.id);
        }
    }
}

/// A command that has ended in a [`Peer`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// What was run.
    pub command: String,
    /// Its exit status, as a shell has it: 128 and the number of a signal that ended it.
    pub status: i32,
    /// What it printed, standard output and standard error together.
    pub text: String,
}

impl Output {
    /// It ended with 0.
    ///
    /// # Panics
    /// When it did not.
    #[track_caller]
    #[must_use]
    pub fn ok(self) -> Self {
        assert!(
            self.status == 0,
            "in the Linux peer `{}` ended with {}\n{}",
            self.command,
            self.status,
            self.text
        );
        self
    }
}
