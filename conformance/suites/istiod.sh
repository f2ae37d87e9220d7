#!/usr/bin/env bash
# about: a live istiod: start, proxy-status, changes and a restart of istiod under load, istiod and token that come late
# budget: 1500
# long: 3,000 live changes instead of 300
# long-budget: 2400
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
need_namespaces
oracle_program
istiod_lab
cairn
rig istiod
changes=300
[[ ${CONFORMANCE_LONG:-false} == true ]] && changes=3000
code=0
"$oracle" live "${rig_options[@]}" --lab "$istiod_lab" --changes "$changes" --proxy-cmd "$waypoint" 2>&1 | tee "$work/out" || code=$?
sed -n 's/^ok     /note: /p' "$work/out"
counts "$(grep -c '^ok ' "$work/out" || true)" "$(grep -c '^FAILED ' "$work/out" || true)"
exit "$code"
