//! Free TCP ports on loopback.

use std::hash::{BuildHasher, RandomState};
use std::net::TcpListener;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};

/// Below the range from which the kernel takes the ports of outgoing connections (32768 and up),
/// and not `bind(0)`, which picks from that range: a client that keeps reconnecting to a stopped
/// server on such a port sooner or later gets that very port as its own, connects to itself, and
/// the server cannot come back.
const FIRST_PORT: u16 = 20_000;
const PORTS: u16 = 12_000;

/// A port on which nobody listens at this moment, and which this process is not given again for
/// long. Another process may still take it first, so who starts a server tries again with another
/// port.
pub(crate) fn free_port() -> u16 {
    static NEXT: OnceLock<AtomicU16> = OnceLock::new();
    // Somewhere else in every process, so that tests side by side do not run after the same ports.
    let next =
        NEXT.get_or_init(|| AtomicU16::new(RandomState::new().hash_one(std::process::id()) as u16));
    for _ in 0..PORTS {
        let port = FIRST_PORT + next.fetch_add(1, Ordering::Relaxed) % PORTS;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!(
        "no free TCP port on 127.0.0.1 between {FIRST_PORT} and {}",
        FIRST_PORT + PORTS
    );
}
