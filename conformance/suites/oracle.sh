#!/usr/bin/env bash
# about: the described requests of 29 scenarios of istiod 1.31 and 9 of 1.27: Cairn does what Envoy did, but for what DIFFERENCES.md and PENDING.md list
# budget: 1500
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
need_namespaces
oracle_program
cairn
rig oracle
code=0
compare() { # compare ISTIO
	local exit=0
	"$oracle" compare "${rig_options[@]}" --istio "$1" --proxy-cmd "$waypoint" 2>&1 | tee -a "$work/out" || exit=$?
	# 812 cases, 790 equal, 14 differences listed, 0 not listed, 0 minor, 0 complaints
	note "$1: $(grep -E '^[0-9]+ cases, ' "$work/out" | tail -1)"
	((exit == 0)) || code=$exit
}
compare istio-1.31.0-20260827
compare istio-1.27.9
cases=$(awk '/^[0-9]+ cases, /{ n += $1 } END { print n + 0 }' "$work/out")
different=$({ grep -E '^([a-z0-9.-]+/)?[0-9]{2}-[a-z0-9-]+ \| ' "$work/out" || true; } | awk -F' [|] ' '{ print $1, $2 }' | sort -u | wc -l)
broken=$(grep -cE '^[0-9]{2}-[a-z0-9-]+: ' "$work/out" || true) # scenarios that did not run
bad=$((different + broken))
((code == 0 || bad > 0)) || bad=1
counts $((cases > different ? cases - different : 0)) "$bad"
exit "$code"
