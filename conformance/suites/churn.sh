#!/usr/bin/env bash
# about: configuration changes under load: no failed request, no closed connection, no answer that asks to close
# budget: 400
# long: 10,000 changes instead of 300
# long-budget: 1500
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
need_namespaces
oracle_program
cairn
rig churn
changes=300
[[ ${CONFORMANCE_LONG:-false} == true ]] && changes=10000
"$oracle" churn "${rig_options[@]}" --changes "$changes" --proxy-cmd "$waypoint" 2>&1 | tee "$work/out" | sed -E 's/^([0-9]+ changes in|an old|a new stream obeys)/note: \1/'
