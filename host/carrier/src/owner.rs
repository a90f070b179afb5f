//! Who has a UDP port, as far as /proc tells.

use std::fs;
use std::net::IpAddr;

/// Names the process that has, in the calling thread's network namespace, UDP port `port` of `ip` or of the wildcard, or says what is known.
#[must_use]
pub fn of_udp_port(ip: IpAddr, port: u16) -> String {
    let mut inodes = Vec::new();
    for table in ["/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"] {
        let text = fs::read_to_string(table).unwrap_or_default();
        inodes.extend(
            text.lines()
                .skip(1)
                .filter_map(|line| entry(line, ip, port)),
        );
    }
    if inodes.is_empty() {
        return "a process that /proc does not show".into();
    }
    for inode in inodes {
        if inode == 0 {
            return "the kernel itself (rdma_rxe?)".into();
        }
        if let Some(process) = holder(inode) {
            return process;
        }
    }
    "another user's process".into()
}

/// The inode of a line of /proc/net/udp{,6}, if it has the port and the address or the wildcard.
fn entry(line: &str, ip: IpAddr, port: u16) -> Option<u64> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let (address, its_port) = fields.get(1)?.split_once(':')?;
    if u16::from_str_radix(its_port, 16).ok()? != port {
        return None;
    }
    // Words of 32 bits in the machine's order, each printed as a number.
    let wanted: String = match ip {
        IpAddr::V4(ip) => words(&ip.octets()),
        IpAddr::V6(ip) => words(&ip.octets()),
    };
    let wildcard = address.bytes().all(|digit| digit == b'0');
    (wildcard || address == wanted).then(|| fields.get(9)?.parse().ok())?
}

fn words(octets: &[u8]) -> String {
    octets
        .chunks_exact(4)
        .map(|word| {
            let word = u32::from_ne_bytes([word[0], word[1], word[2], word[3]]);
            format!("{word:08X}")
        })
        .collect()
}

/// The process that holds a socket: `name (pid 123)`.
fn holder(inode: u64) -> Option<String> {
    let target = format!("socket:[{inode}]");
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().filter(|name| name.parse::<u32>().is_ok()) else {
            continue;
        };
        // Other users' processes and those that just ended are passed over.
        let Ok(fds) = fs::read_dir(process.path().join("fd")) else {
            continue;
        };
        let has = fds
            .flatten()
            .any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == target.as_str()));
        if has {
            let comm = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("{} (pid {pid})", comm.trim()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn a_port_of_this_process_is_found() {
        for ip in ["127.0.0.1", "::1"] {
            let ip: IpAddr = ip.parse().unwrap();
            let Ok(socket) = UdpSocket::bind((ip, 0)) else {
                eprintln!("skipped for {ip}: the machine does not have it");
                continue;
            };
            let port = socket.local_addr().unwrap().port();
            let owner = of_udp_port(ip, port);
            let pid = format!("(pid {})", std::process::id());
            assert!(owner.contains(&pid), "{owner}");
        }
    }
}
