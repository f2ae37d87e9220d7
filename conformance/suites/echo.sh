#!/usr/bin/env bash
# about: Istio's echo client and server, which bring their own HBONE: HTTP/1.1, HTTP/2, gRPC, WebSocket, TCP
# budget: 900
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
need_namespaces
oracle_program
echo_programs
cairn
rig echo
code=0
"$oracle" echo "${rig_options[@]}" --client "$echo_client" --server "$echo_server" --proxy-cmd "$waypoint" 2>&1 | tee "$work/out" || code=$?
counts "$(grep -c '^ok ' "$work/out" || true)" "$(grep -c '^FAILED ' "$work/out" || true)"
exit "$code"
