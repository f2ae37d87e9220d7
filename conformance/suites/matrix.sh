#!/usr/bin/env bash
# about: made-up configuration, translated by istiod, and requests aimed at it: 620 about traffic, 2,162 about policies, 864 about tokens; Cairn's answers, arrivals, and what it logs of each are Envoy's, but for what DIFFERENCES.md lists
# budget: 600
# long: new seeds through a live istiod, Envoy and Cairn for ten minutes
# long-budget: 2400
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
need_namespaces
envoy
oracle_program
cairn
rig matrix
code=0
# The record cannot rot: Envoy still does so.
"$oracle" matrix compare "${rig_options[@]}" --sample 7 2>&1 | tee "$work/self" || code=$?
note "Envoy again: $(grep -E '^[0-9]+ cases, ' "$work/self" | tail -1)"
"$oracle" matrix compare "${rig_options[@]}" --proxy-cmd "$waypoint" 2>&1 | tee "$work/out" || code=$?
note "Cairn: $(grep -E '^[0-9]+ cases, ' "$work/out" | tail -1)"
if [[ ${CONFORMANCE_LONG:-false} == true ]]; then
	istiod_lab
	"$oracle" matrix fuzz "${rig_options[@]}" --lab "$istiod_lab" --minutes 10 --proxy-cmd "$waypoint" 2>&1 | tee "$work/fuzz" || code=$?
	note "new seeds: $(tail -1 "$work/fuzz")"
fi
cases=$(cat "$work/self" "$work/out" | awk '/^[0-9]+ cases, /{ n += $1 } END { print n + 0 }')
different=$({ cat "$work"/* 2>/dev/null | grep -aE '^matrix/[a-z]+ \| ' || true; } | awk -F' [|] ' '{ print $1, $2 }' | sort -u | wc -l)
((code == 0 || different > 0)) || different=1
counts $((cases > different ? cases - different : 0)) "$different"
exit "$code"
