//! A network of a test's own: namespaces, joined by a switch.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use super::{Skip, require};
use crate::limits::NODES;

/// How the names of all our namespaces begin; the process's id follows.
const PREFIX: &str = "hyv-e2e-";

/// Where iproute2 keeps namespaces that have names.
const NAMESPACES: &str = "/run/netns";

/// A network of a test's own: a bridge in a namespace, to which [`Host`]s and [`Peer`](super::Peer)s are connected. Nothing
/// of it is seen outside, so its addresses are always the same. It goes when the last of those that use it does; if the
/// process is killed, with the next network that is made.
#[derive(Clone, Debug)]
pub struct Net {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    mtu: u32,
    nodes: AtomicU8,
}

/// Addresses of one node, and what tells its interface from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    number: u8,
}

impl Node {
    /// IPv4, with a prefix of 24 bits.
    #[must_use]
    pub fn v4(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, self.number)
    }

    /// IPv6, with a prefix of 64 bits.
    #[must_use]
    pub fn v6(self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, self.number.into())
    }

    /// The one of `family`.
    #[must_use]
    pub fn ip(self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4().into(),
            Family::V6 => self.v6().into(),
        }
    }

    /// Ethernet address.
    #[must_use]
    pub fn mac(self) -> String {
        format!("52:54:00:77:00:{:02x}", self.number)
    }
}

/// Which IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

impl Net {
    /// A network without nodes. `mtu`: of its links, bytes of an IP packet.
    ///
    /// # Errors
    /// Not root, or no right to make namespaces, bridges and taps.
    pub fn new(mtu: u32) -> Result<Self, Skip> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        require("ip", "iproute2")?;
        if !rustix::process::geteuid().is_root() {
            return Err(Skip::Network("not root".into()));
        }
        sweep();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let shared = Shared {
            name: format!("{PREFIX}{}-{count}", std::process::id()),
            mtu,
            nodes: AtomicU8::new(0),
        };
        let net = Self {
            shared: Arc::new(shared),
        };
        let switch = net.switch();
        ip(&["netns", "add", &switch])?;
        // Nothing but what tests send: no spanning tree, no multicast queries, no address of the switch's own.
        quiet(&switch, "default")?;
        let mtu = mtu.to_string();
        let bridge = ["link", "add", "br0", "mtu", &mtu, "type", "bridge"];
        let still = [
            "stp_state",
            "0",
            "forward_delay",
            "0",
            "mcast_snooping",
            "0",
        ];
        ip_in(&switch, &[&bridge[..], &still].concat())?;
        ip_in(&switch, &["link", "set", "br0", "up"])?;
        Ok(net)
    }

    /// Of its links, bytes of an IP packet.
    #[must_use]
    pub fn mtu(&self) -> u32 {
        self.shared.mtu
    }

    /// The namespace of the bridge, where taps are and a machine that uses one has to be started.
    pub(super) fn switch(&self) -> String {
        format!("{}-switch", self.shared.name)
    }

    fn node(&self) -> Node {
        let number = self.shared.nodes.fetch_add(1, Ordering::Relaxed) + 1;
        assert!(number <= NODES, "no more than {NODES} nodes in a network");
        Node { number }
    }

    /// Another computer as far as the network is concerned: a namespace with an interface `eth0`, where commands of this
    /// machine run.
    ///
    /// # Errors
    /// As [`Net::new`].
    pub fn host(&self) -> Result<Host, Skip> {
        let node = self.node();
        let host = Host {
            name: format!("{}-{}", self.shared.name, node.number),
            node,
            net: self.clone(),
        };
        let (switch, port) = (self.switch(), format!("veth{}", node.number));
        let mtu = self.mtu().to_string();
        ip(&["netns", "add", &host.name])?;
        quiet(&host.name, "default")?;
        let port_words = ["link", "add", &port, "mtu", &mtu, "type", "veth"];
        let mac = node.mac();
        let peer = ["peer", "name", "eth0", "mtu", &mtu, "address", &mac];
        ip_in(
            &switch,
            &[&port_words[..], &peer, &["netns", &host.name]].concat(),
        )?;
        ip_in(&switch, &["link", "set", &port, "master", "br0", "up"])?;
        let (v4, v6) = (format!("{}/24", node.v4()), format!("{}/64", node.v6()));
        ip_in(&host.name, &["link", "set", "lo", "up"])?;
        ip_in(&host.name, &["addr", "add", &v4, "dev", "eth0"])?;
        ip_in(&host.name, &["addr", "add", &v6, "dev", "eth0", "nodad"])?;
        ip_in(&host.name, &["link", "set", "eth0", "up"])?;
        Ok(host)
    }

    /// A port for a virtual machine: the name of a tap in the switch's namespace.
    ///
    /// # Errors
    /// As [`Net::new`].
    pub(super) fn tap(&self) -> Result<(Node, String), Skip> {
        let (node, switch) = (self.node(), self.switch());
        let tap = format!("tap{}", node.number);
        let mtu = self.mtu().to_string();
        ip_in(&switch, &["tuntap", "add", "dev", &tap, "mode", "tap"])?;
        ip_in(
            &switch,
            &["link", "set", &tap, "mtu", &mtu, "master", "br0", "up"],
        )?;
        Ok((node, tap))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        remove(|name| {
            name.strip_prefix(&self.name)
                .is_some_and(|rest| rest.starts_with('-'))
        });
    }
}

/// A namespace with an interface `eth0` on a [`Net`]: another computer as far as the network is concerned, with this one's
/// files and programs.
#[derive(Debug)]
pub struct Host {
    name: String,
    node: Node,
    net: Net,
}

impl Host {
    /// The namespace's name, as `ip netns exec` takes it.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.name
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

    /// `program` as a command that runs here, with an empty standard input.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.enter(&Command::new(program))
    }

    /// `command` (its program, arguments, folder and environment), but here. Its standard input is empty. The process is
    /// the program's own: a signal to its id reaches it.
    #[must_use]
    pub fn enter(&self, command: &Command) -> Command {
        let mut entered = Command::new("ip");
        entered
            .args(["netns", "exec", &self.name])
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(Stdio::null());
        if let Some(folder) = command.get_current_dir() {
            entered.current_dir(folder);
        }
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => entered.env(name, value),
                None => entered.env_remove(name),
            };
        }
        entered
    }

    /// Loses this percentage of the RoCEv2 packets (UDP 4791) that are sent to it, from now on; all others pass. 0 loses
    /// none. A packet that the sender's kernel has not cut into segments yet is lost as a whole.
    ///
    /// Linux has netem for that, but not every host's; a queue without room and a filter that draws lots do as well.
    ///
    /// # Errors
    /// This kernel has no HTB or no filters in BPF.
    ///
    /// # Panics
    /// When `percent` is above 100.
    pub fn loss(&self, percent: f64) -> Result<(), Skip> {
        assert!((0.0..=100.0).contains(&percent), "{percent}% of loss");
        let port = self.port();
        let _ = self.tc(&format!("qdisc del dev {port} root"));
        if percent == 0.0 {
            return Ok(());
        }
        self.tc(&format!(
            "qdisc add dev {port} root handle 1: htb default 10"
        ))?;
        for class in ["1:10", "1:20"] {
            self.tc(&format!(
                "class add dev {port} parent 1: classid {class} htb rate 100gbit quantum 60000"
            ))?;
        }
        self.tc(&format!("qdisc add dev {port} parent 1:20 pfifo limit 0"))?;
        self.tc(&format!(
            "filter add dev {port} parent 1: bpf bytecode {} classid 1:20",
            lots(percent)
        ))?;
        Ok(())
    }

    /// How many packets [`Self::loss`] has lost since it was called.
    ///
    /// # Panics
    /// When Linux does not tell.
    #[must_use]
    pub fn lost(&self) -> u64 {
        let told = self.tc(&format!("-s qdisc show dev {} parent 1:20", self.port()));
        let told = told.unwrap_or_else(|e| panic!("{e}"));
        let count = told.split_once("(dropped ").map(|(_, rest)| rest);
        let count = count.and_then(|rest| rest.split(',').next()?.parse().ok());
        count.unwrap_or_else(|| panic!("no count of losses in: {told}"))
    }

    /// Its port of the switch.
    fn port(&self) -> String {
        format!("veth{}", self.node.number)
    }

    /// Runs `tc WORDS` on the switch. The byte code of a filter is one word, with `_` in place of blanks.
    fn tc(&self, words: &str) -> Result<String, Skip> {
        let words: Vec<String> = words.split(' ').map(|w| w.replace('_', " ")).collect();
        let switch = self.net.switch();
        let line = [
            &["netns", "exec", &switch, "tc"][..],
            &words.iter().map(String::as_str).collect::<Vec<_>>(),
        ]
        .concat();
        ip(&line)
    }

    /// Runs `ip WORDS` on it, for further addresses, routes and links.
    ///
    /// # Panics
    /// When it fails.
    pub fn ip(&self, words: &[&str]) -> String {
        ip_in(&self.name, words).unwrap_or_else(|e| panic!("{e}"))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        remove(|name| name == self.name);
    }
}

/// A filter in classic BPF, as `tc` takes it with `_` in place of blanks, that matches `percent` of the UDP packets to port
/// 4791, over IPv4 without options and over IPv6 without further headers.
fn lots(percent: f64) -> String {
    // Saturates at 100%, of which one in 2^32 passes.
    let least = (percent / 100.0 * 4_294_967_296.0) as u32;
    let program = [
        "40_0_0_12".to_owned(),         // 0: the Ethernet type
        "21_0_2_2048".to_owned(),       // 1: IPv4? else 4
        "40_0_0_36".to_owned(),         // 2: its destination port
        "5_0_0_2".to_owned(),           // 3: to 6
        "21_0_5_34525".to_owned(),      // 4: IPv6? else 10
        "40_0_0_56".to_owned(),         // 5: its destination port
        "21_0_3_4791".to_owned(),       // 6: RoCEv2? else 10
        "32_0_0_4294963256".to_owned(), // 7: a random word (SKF_AD_RANDOM)
        format!("53_1_0_{least}"),      // 8: at least this? then 10
        "6_0_0_4294967295".to_owned(),  // 9: matches
        "6_0_0_0".to_owned(),           // 10: does not
    ];
    format!("{},{}", program.len(), program.join(","))
}

/// New interfaces have no IPv6 address of their own making in `namespace`, and find no routers.
fn quiet(namespace: &str, interface: &str) -> Result<(), Skip> {
    let folder = format!("/proc/sys/net/ipv6/conf/{interface}");
    let script = format!("echo 0 >{folder}/accept_ra; echo 0 >{folder}/accept_dad");
    ip(&["netns", "exec", namespace, "sh", "-c", &script])?;
    Ok(())
}

fn ip_in(namespace: &str, words: &[&str]) -> Result<String, Skip> {
    ip(&[&["-n", namespace], words].concat())
}

fn ip(words: &[&str]) -> Result<String, Skip> {
    let line = format!("ip {}", words.join(" "));
    let output = Command::new("ip")
        .args(words)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| Skip::Network(format!("{line}: {e}")))?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        return Err(Skip::Network(format!("{line}: {}", error.trim())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Removes the namespaces that `which` chooses, as far as that is possible.
fn remove(which: impl Fn(&str) -> bool) {
    for entry in fs::read_dir(NAMESPACES).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if which(name)
            && let Err(why) = ip(&["netns", "del", name])
        {
            eprintln!("{why}");
        }
    }
}

/// Removes what processes left that were killed.
fn sweep() {
    remove(|name| {
        let owner = name.strip_prefix(PREFIX).and_then(|r| r.split('-').next());
        let owner: Option<u32> = owner.and_then(|pid| pid.parse().ok());
        owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    });
}
