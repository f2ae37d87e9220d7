#!/usr/bin/env bash
# about: the demonstration comes up on loopback addresses and every answer in it is right
# budget: 900
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
cairn
cd "$repo"
cargo run --release --locked -- demo --check
