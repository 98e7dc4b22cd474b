#!/bin/sh
# Installs the Debian packages of packages.txt that are missing. Says what it does; does nothing twice.
set -eu
list=$(sed 's/#.*//' "$(dirname "$0")/packages.txt")
missing=
for package in $list; do
    dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing="$missing $package"
done
if ! command -v cargo >/dev/null; then
    echo "setup: no Rust tool chain" >&2
    echo "  help: install one from https://rustup.rs (1.88 or newer), then run this again" >&2
    exit 1
fi
wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(dirname "$0")/../Cargo.toml")
present=$(rustc --version | cut -d' ' -f2)
if [ "$(printf '%s\n' "$wanted" "$present" | sort -V | head -n1)" != "$wanted" ]; then
    echo "setup: Rust $present is too old" >&2
    echo "  help: install $wanted or newer from https://rustup.rs, then run this again" >&2
    exit 1
fi
# A tool chain can lack both; rustup leaves stand-ins for them that only say so.
for tool in rustfmt cargo-clippy; do
    "$tool" --version >/dev/null 2>&1 && continue
    echo "setup: the Rust tool chain has no $tool" >&2
    echo "  help: rustup component add rustfmt clippy" >&2
    exit 1
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" -ne 0 ]; then
    echo "setup: these packages are missing:$missing" >&2
    echo "  help: run as root: apt-get install$missing" >&2
    exit 1
fi
echo "setup: installing$missing"
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
# shellcheck disable=SC2086 # a list of words
apt-get install -q -y --no-install-recommends $missing
