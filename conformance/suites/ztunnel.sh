#!/usr/bin/env bash
# about: the node's proxy under a live istiod: workloads, services and policies of every scenario, a certificate, a restart of istiod
# budget: 600
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
need_namespaces
need_tool curl curl
need_tool jq jq
istiod_lab
ztunnel=${CAIRN_ZTUNNEL_BINARY:-}
if [[ -z $ztunnel ]]; then
	(cd "$repo" && cargo build --locked -p cairn-ztunnel) || { echo "the build fails"; exit 1; }
	ztunnel=${CARGO_TARGET_DIR:-$repo/target}/debug/cairn-ztunnel
	[[ $ztunnel == /* ]] || ztunnel=$repo/$ztunnel
fi
cd "$work"
space=cairn-zt-$$
ip netns add "$space"
at_exit "ip netns del $space"
ip -n "$space" link set lo up
inside() { ip netns exec "$space" "$@"; }
ask() { inside curl -sS --max-time 10 "localhost:$1"; }
passed=0 failed=0
# check NAME COMMAND...: tries for ten seconds.
check() {
	local name=$1 try
	shift
	for try in {1..50}; do
		if "$@" >/dev/null 2>"$work/check.err"; then
			note "$name"
			passed=$((passed + 1))
			return
		fi
		sleep 0.2
	done
	echo "FAILED $name: $(tail -1 "$work/check.err")"
	failed=$((failed + 1))
}
dump() { ask 15000/config_dump | jq -e "$1"; }

# An istiod whose authority outlives its restart.
scenarios=$conformance/fixtures/scenarios
istiod() {
	ip netns exec "$space" "$istiod_lab" serve -f "$scenarios/01-http-basic.yaml" --listen 127.0.0.1:15010 --tls-listen 127.0.0.1:15012 \
		--root-cert root-cert.pem --admin 127.0.0.1:15081 >>istiod.log 2>&1 &
	istiod=$!
}
istiod
at_exit 'kill $istiod'
base64url() { base64 -w0 | tr '+/' '-_' | tr -d =; }
printf '%s.%s.x' "$(printf '{"alg":"none"}' | base64url)" \
	"$(printf '{"sub":"system:serviceaccount:istio-system:ztunnel","aud":["istio-ca"],"exp":4102444800}' | base64url)" >token
PROXY_MODE=dedicated PROXY_WORKLOAD_INFO=istio-system/ztunnel/ztunnel CLUSTER_ID=Kubernetes \
	XDS_ADDRESS=https://localhost:15012 CA_ADDRESS=https://localhost:15012 XDS_ROOT_CA=root-cert.pem CA_ROOT_CA=root-cert.pem \
	AUTH_TOKEN=token POD_NAME=ztunnel-x POD_NAMESPACE=istio-system INSTANCE_IP=10.0.0.9 SERVICE_ACCOUNT=ztunnel \
	RUST_LOG=info,cairn_xds=debug ip netns exec "$space" "$ztunnel" proxy ztunnel >ztunnel.log 2>&1 &
ztunnel_pid=$!
at_exit 'kill $ztunnel_pid'

check "ready, with istiod's policies and workloads" bash -c "ip netns exec $space curl -sSf localhost:15021/healthz/ready"
check "a certificate of istiod's authority" dump '.certificates[0] | .identity == "spiffe://cluster.local/ns/istio-system/sa/ztunnel" and .state == "Available"'
check "a service, its endpoints and its waypoint" dump '.services[] | select(.hostname == "web.app.svc.cluster.local") | (.endpoints | length) == 2 and .waypoint.destination == "app/waypoint.app.svc.cluster.local"'
check "pods that speak HBONE" dump '[.workloads[] | select(.name | startswith("web")) | .protocol] == ["HBONE", "HBONE"]'
for scenario in "$scenarios"/*.yaml; do
	# Those that change istiod's own settings are refused while it runs.
	inside curl -sS -o /dev/null -X POST --data-binary "@$scenario" localhost:15081/apply
done
cat >policies.yaml <<'YAML'
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: every-field, namespace: app}
spec:
  action: DENY
  rules:
  - from:
    - source: {notPrincipals: ["cluster.local/ns/app/sa/*"], notNamespaces: ["x*"], ipBlocks: ["10.0.0.0/8", "fd00::/16"]}
    to:
    - operation: {ports: ["80", "81"], notPorts: ["82"]}
    when:
    - {key: destination.ip, notValues: ["10.1.0.0/16"]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: app}
spec: {mtls: {mode: STRICT}}
YAML
inside curl -sS -o /dev/null -X POST --data-binary @policies.yaml localhost:15081/apply
check "a policy with every field" dump '.policies[] | select(.name == "every-field") | .rules[0] | any(.[]; .[0].sourceIps == ["10.0.0.0/8", "fd00::/16"]) and any(.[]; .[0].notDestinationPorts == [82])'
check "STRICT as the policy that istiod makes of it" dump 'any(.policies[]; .rules[0][0][0].notPrincipals == [{"Presence": {}}])'
check "the pods name it" dump 'any(.workloads[]; any(.authorizationPolicies[]; endswith("istio_converted_static_strict")))'
check "no policy that cannot be read" dump 'all(.policies[]; .unreadable == false)'
before=$(ask 15000/config_dump | jq '.workloads | length')
kill "$istiod" && wait "$istiod" 2>/dev/null || true
check "ready without istiod, with all it knew" dump "(.workloads | length) == $before"
istiod
check "with istiod again, only what it knows now" dump "(.workloads | length) < $before"
check "nothing that istiod sent was refused" bash -c '! grep -q "answer refused" ztunnel.log'
counts "$passed" "$failed"
((failed == 0))
