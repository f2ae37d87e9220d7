#!/usr/bin/env bash
# about: the described requests of 29 scenarios of istiod 1.31 and 9 of 1.27: Cairn does what Envoy did, but for what DIFFERENCES.md and PENDING.md list
# budget: 1500
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
need_namespaces
oracle_program
cairn
code=0
# The two versions run side by side, in networks of their own: most of the time is spent waiting.
rig oracle-27
"$oracle" compare "${rig_options[@]}" --work "$work/rig-27" --istio istio-1.27.9 --proxy-cmd "$waypoint" >"$work/out-27" 2>&1 &
older=$!
at_exit "kill $older 2>/dev/null && wait $older 2>/dev/null"
rig oracle-31
"$oracle" compare "${rig_options[@]}" --work "$work/rig-31" --istio istio-1.31.0-20260827 --proxy-cmd "$waypoint" >"$work/out-31" 2>&1 || code=$?
wait "$older" || code=$?
cat "$work/out-31" "$work/out-27" | tee "$work/out"
for version in 1.31 1.27; do
	# 812 cases, 790 equal, 14 differences listed, 0 not listed, 0 minor, 0 complaints
	note "istio-$version: $(grep -E '^[0-9]+ cases, ' "$work/out-${version#1.}" | tail -1)"
done
cases=$(awk '/^[0-9]+ cases, /{ n += $1 } END { print n + 0 }' "$work/out")
different=$({ grep -E '^([a-z0-9.-]+/)?[0-9]{2}-[a-z0-9-]+ \| ' "$work/out" || true; } | awk -F' [|] ' '{ print $1, $2 }' | sort -u | wc -l)
broken=$(grep -cE '^[0-9]{2}-[a-z0-9-]+: ' "$work/out" || true) # scenarios that did not run
bad=$((different + broken))
((code == 0 || bad > 0)) || bad=1
counts $((cases > different ? cases - different : 0)) "$bad"
exit "$code"
