//! A real RoCEv2 peer for tests: Linux with its `rdma_rxe` and the stock libibverbs, in a QEMU guest, on a network of the
//! test's own. It is the other implementation, to which nothing in this project can tune itself.
//!
//! | piece | what it is |
//! | --- | --- |
//! | [`Kit`] | kernel and first file system, made once of Debian's packages |
//! | [`Net`], [`Host`] | a switch in a namespace; a namespace on it where programs of this machine run |
//! | [`Peer`], [`Job`] | such a Linux, and the commands that run in it |
//! | [`Capture`] | what a peer sent and received |
//! | [`Ours`] | our programs on a [`Host`], natively or in a guest, as an end of exchanges |
//! | [`matrix`] | a table of exchanges between an end of ours and a peer |
//! | [`Skip`], [`or_skip!`](crate::or_skip) | why there can be none here |
//!
//! Under TCG a peer boots in some 12 s, so a test function boots as few as it can and does much with them:
//!
//! ```no_run
//! # use hyv_e2e::{linux::{Family, Kit, Net, Peer}, or_skip, PATIENCE};
//! # fn test() {
//! const WHAT: &str = "pingpong with Linux";
//! let net = or_skip!(Net::new(1500), WHAT);
//! let host = or_skip!(net.host(), WHAT);
//! let kit = or_skip!(Kit::get(), WHAT);
//! let peer = or_skip!(Peer::boot(&kit, &net), WHAT);
//!
//! let gid = peer.gid_index(peer.node().ip(Family::V4));
//! let server = peer.spawn(&format!("ibv_rc_pingpong -g {gid}"));
//! peer.until_tcp(18515);
//! let mut client = host.command("my-pingpong");
//! assert!(client.arg(peer.node().v4().to_string()).status().unwrap().success());
//! println!("{}", server.wait(PATIENCE).ok().text);
//! assert!(peer.capture().packets.iter().all(|p| p.icrc_is_right));
//! # }
//! ```

mod capture;
mod channel;
mod cpio;
mod kit;
pub mod matrix;
mod net;
mod ours;
mod packages;
mod peer;
mod skip;

pub use capture::{Capture, Packet};
pub use kit::Kit;
pub use net::{Family, Host, Net, Node};
pub use ours::{Ours, Side};
pub use peer::{Booting, Job, Output, Peer};
pub use skip::Skip;

/// `program` can be found by PATH.
fn require(program: &'static str, package: &'static str) -> Result<(), Skip> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|folder| folder.join(program).is_file()) {
        Ok(())
    } else {
        Err(Skip::Program { program, package })
    }
}
