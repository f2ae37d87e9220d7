// Command istiod-lab runs Istio's own discovery server without Kubernetes.
//
// It feeds the server from plain manifest files and either serves xDS (and the
// Istio CA) to a proxy under test, or connects to itself as a waypoint and
// records everything that the server sends.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"istio.io/istio/pkg/log"
	"istio.io/istio/pkg/test"
)

type stringList []string

func (s *stringList) String() string     { return strings.Join(*s, ",") }
func (s *stringList) Set(v string) error { *s = append(*s, v); return nil }

const usage = `usage:
  istiod-lab serve   -f FILE|DIR ... [--listen ADDR] [--tls-listen ADDR] [--admin ADDR] [--root-cert FILE] [--ca-cert FILE --ca-key FILE]
  istiod-lab capture -f FILE|DIR ... --out DIR [--waypoint NS/NAME ...] [--istio-version V]
  istiod-lab watch   -f FILE|DIR ... [--waypoint NS/NAME] [--address ADDR]
`

func main() {
	if len(os.Args) < 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	var err error
	switch os.Args[1] {
	case "serve":
		err = runServe(os.Args[2:])
	case "capture":
		err = runCapture(os.Args[2:])
	case "watch":
		err = runWatch(os.Args[2:])
	default:
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "istiod-lab:", err)
		os.Exit(1)
	}
}

func runServe(args []string) error {
	flags := flag.NewFlagSet("serve", flag.ExitOnError)
	var files stringList
	flags.Var(&files, "f", "manifest file or directory (repeatable)")
	opts := serveOptions{}
	flags.StringVar(&opts.listen, "listen", "127.0.0.1:15010", "plaintext xDS address")
	flags.StringVar(&opts.tlsListen, "tls-listen", "", "TLS address for xDS and the CA (empty: off)")
	flags.StringVar(&opts.admin, "admin", "127.0.0.1:15080", "HTTP address for live changes and debug pages")
	flags.StringVar(&opts.rootCert, "root-cert", "root-cert.pem", "where to write the CA's root certificate")
	flags.StringVar(&opts.caCert, "ca-cert", "", "sign with this self-signed CA certificate instead of a new one")
	flags.StringVar(&opts.caKey, "ca-key", "", "the key of --ca-cert")
	flags.DurationVar(&opts.debounce, "debounce", 100*time.Millisecond, "how long changes are collected before a push")
	flags.DurationVar(&opts.certTTL, "cert-ttl", 24*time.Hour, "lifetime of workload certificates")
	flags.Parse(args)

	manifests, err := loadManifests(files)
	if err != nil {
		return err
	}
	if err := applyIstiodEnv(manifests); err != nil {
		return err
	}
	quietLogs()
	return test.Wrap(func(t test.Failer) { serve(t, manifests, opts) })
}

func runCapture(args []string) error {
	flags := flag.NewFlagSet("capture", flag.ExitOnError)
	var files, waypoints stringList
	flags.Var(&files, "f", "manifest file or directory (repeatable)")
	flags.Var(&waypoints, "waypoint", "NAMESPACE/NAME of a Gateway (repeatable; default: every waypoint found)")
	opts := captureOptions{}
	flags.StringVar(&opts.out, "out", "", "output directory")
	flags.StringVar(&opts.proxyVersion, "istio-version", defaultProxyVersion, "version that the proxy claims")
	flags.BoolVar(&opts.json, "json", true, "also write readable JSON")
	flags.BoolVar(&opts.configDump, "config-dump", false, "also write a config_dump document")
	flags.BoolVar(&opts.compress, "gzip", false, "compress the output files")
	flags.Parse(args)
	if opts.out == "" {
		return fmt.Errorf("--out is required")
	}

	manifests, err := loadManifests(files)
	if err != nil {
		return err
	}
	// The capturing proxy proves its identity with a token, as secrets need it, but
	// has no use for TLS.
	if err := applyIstiodEnv(manifests, "XDS_AUTH_PLAINTEXT=true"); err != nil {
		return err
	}
	quietLogs()
	var captureErr error
	labErr := test.Wrap(func(t test.Failer) { captureErr = capture(t, manifests, waypoints, opts) })
	if captureErr != nil {
		return captureErr
	}
	return labErr
}

func runWatch(args []string) error {
	flags := flag.NewFlagSet("watch", flag.ExitOnError)
	var files, waypoints stringList
	flags.Var(&files, "f", "the manifests that the server was started with (repeatable)")
	flags.Var(&waypoints, "waypoint", "NAMESPACE/NAME of the Gateway to connect as (default: the first)")
	address := flags.String("address", "127.0.0.1:15010", "plaintext xDS address")
	proxyVersion := flags.String("istio-version", defaultProxyVersion, "version that the proxy claims")
	flags.Parse(args)

	manifests, err := loadManifests(files)
	if err != nil {
		return err
	}
	quietLogs()
	found, err := manifests.waypoints(waypoints)
	if err != nil {
		return err
	}
	mesh, err := buildMeshConfig(manifests)
	if err != nil {
		return err
	}
	node, err := manifests.node(found[0], mesh, *proxyVersion)
	if err != nil {
		return err
	}
	return watch(*address, node, printResponse)
}

// printResponse writes one line of JSON per answer, for scripts that time pushes.
func printResponse(response *discovery.DeltaDiscoveryResponse) {
	names := []string{}
	for _, resource := range response.Resources {
		names = append(names, resource.Name)
	}
	line, _ := json.Marshal(map[string]any{
		"at": time.Now().UTC().Format(time.RFC3339Nano), "type": shortOf(response.TypeUrl), "bytes": proto.Size(response),
		"resources": names, "removed": response.RemovedResources, "version": response.SystemVersionInfo,
	})
	fmt.Println(string(line))
}

// envApplied marks a process that already runs with the scenario's environment.
const envApplied = "ISTIOD_LAB_ENV_APPLIED"

// applyIstiodEnv restarts the program with the environment that the manifests
// ask for: istiod reads its feature flags once, while packages initialise.
func applyIstiodEnv(m *manifests, extra ...string) error {
	if os.Getenv(envApplied) != "" {
		return nil
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	env := append(os.Environ(), envApplied+"=1", "PILOT_ENABLE_AMBIENT=true")
	env = append(env, extra...)
	for k, v := range m.istiodEnv() {
		env = append(env, k+"="+v)
	}
	return syscall.Exec(self, os.Args, env)
}

func quietLogs() {
	o := log.DefaultOptions()
	level := os.Getenv("ISTIOD_LAB_LOG")
	if level == "" {
		level = "all:error"
	}
	for _, scope := range strings.Split(level, ",") {
		name, lvl, _ := strings.Cut(scope, ":")
		o.SetDefaultOutputLevel(name, map[string]log.Level{
			"debug": log.DebugLevel, "info": log.InfoLevel, "warn": log.WarnLevel, "error": log.ErrorLevel, "none": log.NoneLevel,
		}[lvl])
	}
	_ = log.Configure(o)
}
