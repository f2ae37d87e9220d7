#!/usr/bin/env bash
# about: 2,000 services, 30 pushes of all 10 MB of listeners with one chain changed: obeyed within 20 ms of the last byte, other requests not slower meanwhile
# budget: 120
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
need_namespaces
oracle_program
cairn
rig scale
"$oracle" scale "${rig_options[@]}" --proxy-cmd "$waypoint" 2>&1 | tee "$work/out" | cut -c1-2000 | sed -E 's/^([0-9]+ pushes of|an old connection obeys after|a new stream obeys after|latency without)/note: \1/'
