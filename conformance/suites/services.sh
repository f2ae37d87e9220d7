#!/usr/bin/env bash
# about: the reference rate limit service on a real Redis, and Istio's sample external authorizer over gRPC and HTTP, behind Envoy and behind Cairn: counts, headers, verdicts, and what happens when they die and come back
# budget: 900
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
need_namespaces
need_tool redis-server redis-server
envoy
oracle_program
service_programs
cairn
rig services
code=0
through() { # through NAME OPTIONS...: the steps with one proxy
	local name=$1
	shift
	"$oracle" services "${rig_options[@]}" --ratelimit "$ratelimit" --extauthz "$extauthz" "$@" 2>&1 | tee "$work/out-$name" || code=$?
	note "$name: $(tail -1 "$work/out-$name")"
}
through envoy
through cairn --proxy-cmd "$waypoint"
counts "$(cat "$work"/out-* | grep -c '^ok ' || true)" "$(cat "$work"/out-* | grep -c '^FAILED ' || true)"
exit "$code"
