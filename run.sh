#!/bin/sh
# Finds cargo and a C linker, without which nothing typed can run, and hands over to xtask/.
set -eu
root=$(dirname -- "$(readlink -f -- "$0")")
PATH=$PATH:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin

if ! command -v cargo >/dev/null; then
    echo "error: Rust is missing. Debian 13, Ubuntu 24.04 and newer: apt install rustup && rustup default stable" >&2
    echo "       Elsewhere: https://rustup.rs; then run this again." >&2
    exit 1
fi
if ! command -v cc >/dev/null; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "error: a C linker (cc) is missing; run this line, then this command again:" >&2
        echo "    sudo apt-get update && sudo apt-get install --no-install-recommends qemu-system-x86 gcc libc6-dev" >&2
        exit 1
    fi
    { apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev; } >&2
fi

# xtask keeps the caller's folder, so that file arguments mean what they say; only cargo runs in ours.
CARGO_TARGET_DIR=$(realpath -m -- "${CARGO_TARGET_DIR:-$root/target}")
export PATH CARGO_TARGET_DIR
xtask=$CARGO_TARGET_DIR/debug/xtask
quiet=
if [ -x "$xtask" ]; then quiet=-q; fi
(cd -- "$root" && cargo build $quiet -p xtask </dev/null >&2) || {
    echo "error: building the project's own tool failed. It needs Rust 1.95 or newer; you have $(cargo --version)." >&2
    echo "       Too old? rustup update stable (a distribution's own cargo is: use rustup in its place)" >&2
    exit 1
}
exec "$xtask" "$@"
