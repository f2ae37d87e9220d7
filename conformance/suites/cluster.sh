#!/usr/bin/env bash
# about: a real Kubernetes and istiod: the waypoint Deployment that istiod makes runs Cairn, swapped in by the Gateway's annotation; Gateway API's weight tests pass
# budget: 3600
# long: the whole MESH-HTTP and MESH-GRPC profiles
# long-budget: 5400
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
need_namespaces
need_tool nft nftables
need_tool envsubst gettext-base
need_tool nsenter util-linux
lab=$conformance/k8slab
programs=$work/bin
k8slab_programs "$programs"
cairn

export K8SLAB_DIR=$work/lab K8SLAB_BIN=$programs K8SLAB_CAIRN=$cairn
chmod 755 "$work" # containers run as other users
! ip netns list | grep -q '^k8slab\b' || { echo "another k8slab is up: end it with k8slab.sh down"; exit 1; }
at_exit "'$lab/k8slab.sh' down"
at_exit "keep_logs"
keep_logs() { # what a failed run leaves to look at
	mkdir -p "$CAIRN_CACHE/logs/cluster"
	cp "$K8SLAB_DIR"/run/*.log "$CAIRN_CACHE/logs/cluster/" 2>/dev/null || true
	local dir
	for dir in "$K8SLAB_DIR"/pods/*/; do
		[[ -d $dir/log ]] && cp -r "$dir/log" "$CAIRN_CACHE/logs/cluster/$(basename "$dir")" 2>/dev/null
	done
	return 0
}
rm -rf "$CAIRN_CACHE/logs/cluster"
"$lab/k8slab.sh" up
"$lab/k8slab.sh" istio
export KUBECONFIG=$K8SLAB_DIR/pki/admin.kubeconfig
kubectl() { "$programs/k8s" kubectl "$@"; }
good=0 bad=0
ok() {
	echo "ok     $*"
	good=$((good + 1))
}
failed() {
	note "failed: $*"
	bad=$((bad + 1))
	counts "$good" "$bad"
}

# running NAMESPACE GATEWAY: the programs that run as the Gateway's waypoint, by the files they were started from.
running() {
	local pod uid pid
	for pod in $(kubectl -n "$1" get pods -l "gateway.networking.k8s.io/gateway-name=$2" --field-selector status.phase=Running -o name); do
		uid=$(kubectl -n "$1" get "$pod" -o 'jsonpath={.metadata.uid}')
		for pid in $(ip netns pids "$(ip netns list | awk -v u="$uid" 'index($1, "k8slab-") == 1 && index(u, substr($1, 8)) == 1 { print $1 }')" 2>/dev/null); do
			tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null
			echo
		done
	done
}
# wait_until SECONDS COMMAND...
wait_until() {
	local until=$((SECONDS + $1))
	shift
	until "$@"; do
		((SECONDS < until)) || return 1
		sleep 0.5
	done
}
runs_program() { running "$1" "$2" | grep -q "/entrypoint/$3 "; }
runs_no_program() { ! runs_program "$@"; }

# The swap, on a Gateway of its own.
kubectl create namespace swap
gateway() { # gateway [ANNOTATIONS]
	kubectl apply -f - <<-YAML
		apiVersion: gateway.networking.k8s.io/v1
		kind: Gateway
		metadata: {name: waypoint, namespace: swap, ${1:-}labels: {istio.io/waypoint-for: service}}
		spec:
		  gatewayClassName: istio-waypoint
		  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
	YAML
}
gateway
if wait_until 60 runs_program swap waypoint no-waypoint.sh; then
	ok "without the annotation the image of the installation runs: $(running swap waypoint | grep entrypoint | head -1)"
else
	failed "without the annotation the image of the installation does not run"
fi
gateway 'annotations: {sidecar.istio.io/proxyImage: "example.com/cairn:dev"}, '
if wait_until 60 runs_program swap waypoint "$(basename "$cairn")"; then
	ok "with the annotation Cairn runs: $(running swap waypoint | grep "/entrypoint/$(basename "$cairn") " | head -1)"
else
	failed "with the annotation Cairn does not run"
fi
if kubectl -n swap rollout status deployment/waypoint --timeout 90s && wait_until 60 runs_no_program swap waypoint no-waypoint.sh; then
	ok "istiod's own Deployment with Cairn is Ready, the other program is gone"
	kubectl -n swap get pods -l gateway.networking.k8s.io/gateway-name=waypoint \
		-o 'jsonpath={range .items[*]}{.metadata.name}{" image "}{.spec.containers[0].image}{" uid "}{.spec.containers[0].securityContext.runAsUser}{" ready "}{.status.containerStatuses[0].ready}{"\n"}{end}'
else
	failed "istiod's own Deployment with Cairn is not Ready"
	kubectl -n swap get pods -o wide || true
	kubectl -n swap logs deployment/waypoint --tail 30 || true
fi
if kubectl -n swap wait --for condition=Programmed gateway/waypoint --timeout 30s; then
	ok "istiod reports the Gateway as Programmed"
else
	failed "the Gateway is not Programmed"
fi

# The unmodified suite, through a waypoint whose image the annotation names.
export K8SLAB_PROXY_IMAGE=example.com/cairn:dev
expected=(MeshHTTPRouteWeight MeshGRPCRouteWeight)
if [[ ${CONFORMANCE_LONG:-false} == true ]]; then
	"$lab/k8slab.sh" conformance | tee "$work/suite" || true
else
	: >"$work/suite"
	for test in "${expected[@]}"; do
		"$lab/k8slab.sh" conformance --run-test="$test" | tee -a "$work/suite" || true
	done
fi
while read -r verdict test; do
	case $verdict in
	PASS) ok "$test" ;;
	FAIL) failed "$test" ;;
	esac
done < <(sed -nE 's#^ +--- (PASS|FAIL): TestConformance/([A-Za-z0-9]+) .*#\1 \2#p' "$work/suite" | sort -u)
for test in "${expected[@]}"; do
	grep -qE -- "--- (PASS|FAIL): TestConformance/$test " "$work/suite" || failed "$test did not run"
done
counts "$good" "$bad"
((bad == 0))
