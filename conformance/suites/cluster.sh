#!/usr/bin/env bash
# about: a real Kubernetes and istiod: the waypoint Deployment that istiod makes runs Cairn, swapped in by the Gateway's annotation; the whole Gateway API mesh suite passes, and its report is the committed one
# budget: 3600
# long: ten runs of the Gateway API suite
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
[[ ! -e /run/netns/k8slab ]] || { echo "another k8slab is up: end it with k8slab.sh down"; exit 1; }
at_exit "'$lab/k8slab.sh' down"
keep_pod_logs() { # k8slab keeps them without a suffix, and takes them away with the pods
	local dir
	for dir in "$K8SLAB_DIR"/pods/*/log; do
		[[ -d $dir ]] && (cd "$dir" && for f in *; do cp "$f" "$work/$(basename "$(dirname "$dir")")-$f.log"; done)
	done
	return 0
}
"$lab/k8slab.sh" up
"$lab/k8slab.sh" istio
export KUBECONFIG=$K8SLAB_DIR/pki/admin.kubeconfig
kubectl() { "$programs/k8s" kubectl "$@"; }
good=0 bad=0
ok() {
	note "ok: $*"
	good=$((good + 1))
}
failed() {
	note "failed: $*"
	bad=$((bad + 1))
	counts "$good" "$bad"
}

# processes NAMESPACE GATEWAY: their ids, of the Gateway's waypoint pods.
processes() {
	local pod uid
	for pod in $(kubectl -n "$1" get pods -l "gateway.networking.k8s.io/gateway-name=$2" --field-selector status.phase=Running -o name); do
		uid=$(kubectl -n "$1" get "$pod" -o 'jsonpath={.metadata.uid}')
		ip netns pids "$(ip netns list | awk -v u="$uid" 'index($1, "k8slab-") == 1 && index(u, substr($1, 8)) == 1 { print $1 }')" 2>/dev/null || true
	done
}
# running NAMESPACE GATEWAY: their command lines, which begin with the file of the image.
running() {
	local pid
	for pid in $(processes "$@"); do
		tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null
		echo
	done
}
# confined PID: as the pod spec says, whoever the pod's kubelet is.
confined() {
	awk '/^Uid:/ && $2 == 1337 { ok++ } /^Cap(Prm|Eff|Bnd):/ && $2 ~ /^0+$/ { ok++ } /^NoNewPrivs:/ && $2 == 1 { ok++ } END { exit ok != 5 }' "/proc/$1/status" &&
		awk '$5 == "/" && $6 ~ /^ro/ { ok = 1 } END { exit !ok }' "/proc/$1/mountinfo"
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
runs_program() { [[ $(running "$1" "$2") == *"/entrypoint/$3 "* ]]; } # no pipe: grep -q would end it early
runs_no_program() { ! runs_program "$@"; }
program() { running "$1" "$2" | sed -n "s#.*\(/entrypoint/$3 .*\)#\1#p" | sed -n 1p; }

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
	ok "without the annotation the image of the installation runs: $(program swap waypoint no-waypoint.sh)"
else
	failed "without the annotation the image of the installation does not run"
fi
gateway 'annotations: {sidecar.istio.io/proxyImage: "example.com/cairn:dev"}, '
if wait_until 60 runs_program swap waypoint "$(basename "$cairn")"; then
	ok "with the annotation Cairn runs: $(program swap waypoint "$(basename "$cairn")")"
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
unconfined=0 seen=0
for pid in $(processes swap waypoint); do
	seen=$((seen + 1))
	confined "$pid" || { unconfined=$((unconfined + 1)); grep -E '^(Uid|Cap|NoNewPrivs)' "/proc/$pid/status" || true; }
done
if ((seen && !unconfined)) && runs_program swap waypoint "$(basename "$cairn")"; then
	ok "it runs as uid 1337, without capabilities, on a read-only root"
else
	failed "it does not run, or $unconfined of $seen processes of its pod are not confined as the spec says"
fi
if kubectl -n swap wait --for condition=Programmed gateway/waypoint --timeout 30s; then
	ok "istiod reports the Gateway as Programmed"
else
	failed "the Gateway is not Programmed"
fi

# The unmodified suite, through a waypoint whose image the annotation names: all that counts in the two mesh profiles, and what runs
# beside them. MeshConsumerRoute is not among them: istiod sends a waypoint no routes of other namespaces than its services'.
export K8SLAB_PROXY_IMAGE=example.com/cairn:dev K8SLAB_PROJECT=cairn
expected=(
	MeshBasic MeshTrafficSplit MeshHTTPRouteMatching MeshHTTPRouteRedirectHostAndStatus MeshHTTPRouteRequestHeaderModifier
	MeshHTTPRouteSimpleSameNamespace MeshHTTPRouteWeight MeshGRPCRouteWeight
	MeshHTTPRouteBackendRequestHeaderModifier MeshHTTPRouteQueryParamMatching MeshHTTPRouteRedirectPath MeshHTTPRouteRedirectPort
	MeshHTTPRouteSchemeRedirect MeshHTTPRouteRewritePath MeshHTTPRouteNamedRule MeshFrontend MeshFrontendHostname MeshPorts
	MeshHTTPRoute303Redirect MeshHTTPRoute307Redirect MeshHTTPRoute308Redirect
)
runs=1
[[ ${CONFORMANCE_LONG:-false} == true ]] && runs=10
: >"$work/suite"
for ((run = 1; run <= runs; run++)); do
	"$lab/k8slab.sh" conformance >"$work/suite-$run.log" || true
	"$lab/k8slab.sh" redirect307 >>"$work/suite-$run.log" || true
	cat "$work/suite-$run.log" | tee -a "$work/suite"
	for test in "${expected[@]}"; do
		grep -qE -- "--- (PASS|FAIL): TestConformance/$test " "$work/suite-$run.log" || failed "$test did not run"
	done
done
# The committed report is what this makes, but for dates and versions.
report() { sed -E '/^(date|  version):/d' "$1"; }
if diff <(report "$conformance/gateway-api-report.yaml") <(report "$K8SLAB_DIR/run/report.yaml"); then
	ok "the Gateway API report is as committed: $(grep -c 'result: success' "$K8SLAB_DIR/run/report.yaml") parts of its profiles succeed"
else
	failed "conformance/gateway-api-report.yaml is not what the suite reports: see the difference above"
fi
cp "$K8SLAB_DIR/run/report.yaml" "$CAIRN_CACHE/logs/gateway-api-report.yaml" || true
while read -r verdict test; do
	case $verdict in
	PASS) ok "$test" ;;
	FAIL) failed "$test" ;;
	esac
done < <(sed -nE 's#^ +--- (PASS|FAIL): TestConformance/([A-Za-z0-9]+) .*#\1 \2#p' "$work/suite" | sort -u)
counts "$good" "$bad"
((bad == 0)) || { keep_pod_logs; exit 1; }
