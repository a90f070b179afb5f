//! COM1: for failures before the window is there, and for the last words of a guest. Each access to the
//! port can cost
//! 50 us, so nothing else goes here.

use core::fmt;

use crate::{limits, port};

const DATA: u16 = 0x3f8;
const FIFO: u16 = DATA + 2;
const STATUS: u16 = DATA + 5;
const FIFO_LEN: usize = 16;

/// Writes bytes, a carriage return before each line feed. Gives up when nobody takes them.
pub(crate) fn write(bytes: &[u8]) {
    // FIFO on and empty: the transmitter is asked once for sixteen bytes.
    port::write8(FIFO, 0x07);
    let mut room = 0;
    for &b in bytes {
        let pair = [b'\r', b];
        for &b in if b == b'\n' { &pair[..] } else { &pair[1..] } {
            if room == 0 {
                if !wait_for_room() {
                    return;
                }
                room = FIFO_LEN;
            }
            room -= 1;
            port::write8(DATA, b);
        }
    }
}

fn wait_for_room() -> bool {
    (0..limits::COM1_POLLS).any(|_| port::read8(STATUS) & 0x20 != 0)
}

/// COM1 as a target of formatting.
pub(crate) struct Com1;

impl fmt::Write for Com1 {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        write(s.as_bytes());
        Ok(())
    }
}
