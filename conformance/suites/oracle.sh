#!/usr/bin/env bash
# about: the described requests of 31 scenarios: Cairn does what Envoy did, but for what DIFFERENCES.md and PENDING.md list
# budget: 1500
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
need_namespaces
oracle_program
cairn
rig oracle
code=0
"$oracle" compare "${rig_options[@]}" --proxy-cmd "$waypoint" 2>&1 | tee "$work/out" || code=$?
# 812 cases, 790 equal, 14 differences listed, 0 not listed, 0 minor, 0 complaints
read -r cases equal listed unlisted minor complaints < <(grep -E '^[0-9]+ cases, ' "$work/out" | tail -1 | sed 's/[^0-9 ]//g')
[[ -n ${cases:-} ]] || exit 1
note "$cases cases, $equal equal, $listed differences listed, $unlisted not listed, $complaints complaints"
different=$(grep -E '^[0-9]{2}-[a-z0-9-]+ \| ' "$work/out" | awk -F' [|] ' '{ print $1, $2 }' | sort -u | wc -l)
broken=$(grep -cE '^[0-9]{2}-[a-z0-9-]+: ' "$work/out" || true) # scenarios that did not run
bad=$((different + broken))
((code == 0 || bad > 0)) || bad=1
counts $((cases > bad ? cases - bad : 0)) "$bad"
exit "$code"
