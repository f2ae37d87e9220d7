#!/usr/bin/env bash
# about: the rig tells right from wrong: Envoy equals its own record, and a spoiled or changing Envoy does not pass
# budget: 600
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
need_namespaces
envoy
oracle_program
rig self
"$oracle" compare "${rig_options[@]}" --scenario 01,11
must_fail() { # must_fail WHAT EXPECTED COMMAND...
	local what=$1 expected=$2
	shift 2
	if "$@" >"$work/out" 2>&1; then
		cat "$work/out"
		echo "$what was not noticed"
		exit 1
	fi
	grep -q "$expected" "$work/out" || { cat "$work/out"; echo "$what: failed for another reason"; exit 1; }
	tail -1 "$work/out"
}
must_fail "a header that was added to every answer" "the proxies differ" "$oracle" compare "${rig_options[@]}" --scenario 01 --alter headers --summary
must_fail "a route table without routes" "the proxies differ" "$oracle" compare "${rig_options[@]}" --scenario 01 --alter status --summary
must_fail "connections that Envoy asks to close at a change" "answers that ask to close" "$oracle" churn "${rig_options[@]}" --changes 40
must_fail "policies that were taken out, among made-up ones" "the proxies differ" "$oracle" matrix compare "${rig_options[@]}" --kind authorization --sample 20 --alter authz
counts 5 0
