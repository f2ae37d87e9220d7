// Command oracle asks a stock Envoy what a waypoint must do.
//
// It serves captured xDS to Envoy, drives described requests through it and
// writes down what the client got and what the backend saw. Later the same
// requests go through another proxy and the answers are compared.
package main

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"time"

	"oracle/capture"
	"oracle/control"
	"oracle/golden"
)

const usage = `usage:
  oracle record     [--scenario NAME,…] [--only CASE]                    write golden files from Envoy
  oracle compare    [--scenario NAME,…] [--proxy-cmd CMD]                run another proxy against the golden files
  oracle churn      --changes N [--proxy-cmd CMD]                        change the configuration under load
  oracle scale      [--pushes N] [--proxy-cmd CMD]                       one changed chain among 2,000 services, under load
  oracle live       --lab ISTIOD-LAB [--proxy-cmd CMD] [--step NAME,…]   run against a real istiod
  oracle echo       --client BIN --server BIN [--proxy-cmd CMD]          Istio's echo programs through the proxy
  oracle services   --ratelimit BIN --redis BIN --extauthz BIN           a rate limit service and an authorizer that are not ours
  oracle matrix     make|compare|fuzz|show                               made-up configuration and requests
  oracle serve-xds  --dir CAPTURE --listen ADDR [--no-strip]             serve a capture to a proxy of your own
  oracle up         --scenario NAME                                      bring a scenario up and wait
  oracle strip      --dir CAPTURE                                        report what stock Envoy would not accept
  oracle token      --key PEM --kid ID --claims JSON                     sign a JWT
  oracle experiment NAME                                                 see experiments.go
`

func main() {
	if len(os.Args) < 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	commands := map[string]func([]string) error{
		"record": record, "compare": compare, "serve-xds": serveXDS, "up": up, "strip": strip, "token": token, "experiment": experiment,
		"churn": churn, "scale": scale, "live": runLive, "echo": runEcho, "matrix": runMatrix, "services": runServices,
	}
	command := commands[os.Args[1]]
	if command == nil {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	if err := command(os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "oracle:", err)
		os.Exit(1)
	}
}

// places are the folders of a fixture tree.
type places struct {
	root, istio, scenarios string
	runner                 golden.Runner
}

func flags(name string) (*flag.FlagSet, *places) {
	set := flag.NewFlagSet(name, flag.ExitOnError)
	p := &places{}
	set.StringVar(&p.root, "fixtures", defaultFixtures(), "folder with scenarios, xds, requests and golden (or $ORACLE_FIXTURES)")
	set.StringVar(&p.istio, "istio", recordedIstio, "which captures, a folder under xds")
	set.StringVar(&p.scenarios, "scenario", "", "comma-separated scenario names or prefixes (default: all with a requests file)")
	set.StringVar(&p.runner.Prefix, "name", "oracle", "prefix of the network namespaces")
	set.StringVar(&p.runner.Work, "work", "/tmp/oracle/run", "scratch directory")
	set.StringVar(&p.runner.Envoy, "envoy", os.Getenv("ENVOY"), "path of the stock Envoy (or $ENVOY)")
	set.IntVar(&p.runner.Concurrency, "concurrency", 1, "Envoy's worker threads")
	set.DurationVar(&p.runner.ReadyLimit, "ready", 20*time.Second, "how long the proxy may take to listen")
	set.StringVar(&p.runner.Only, "only", "", "only cases whose name contains this")
	set.BoolVar(&p.runner.TunnelsOnly, "tunnels-only", false, "the proxy has no readiness probe on 15021: it is ready when it accepts tunnels")
	set.BoolVar(&p.runner.Verbose, "v", false, "log what is served")
	return set, p
}

// defaultFixtures finds conformance/fixtures in the working directory or above it.
func defaultFixtures() string {
	if named := os.Getenv("ORACLE_FIXTURES"); named != "" {
		return named
	}
	dir, err := os.Getwd()
	if err != nil {
		return "fixtures"
	}
	for {
		for _, candidate := range []string{filepath.Join(dir, "fixtures"), filepath.Join(dir, "conformance", "fixtures")} {
			if _, err := os.Stat(filepath.Join(candidate, "golden")); err == nil {
				return candidate
			}
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "fixtures"
		}
		dir = parent
	}
}

// recordedIstio is the version whose records stand in golden itself; those of others are in folders of their name.
const recordedIstio = "istio-1.31.0-20260827"

func (p *places) goldenPath(name string) string {
	if p.istio == recordedIstio {
		return filepath.Join(p.root, "golden", name+".json")
	}
	return filepath.Join(p.root, "golden", p.istio, name+".json")
}

// label is what the tables of exceptions call a scenario.
func (p *places) label(name string) string {
	if p.istio == recordedIstio {
		return name
	}
	return p.istio + "/" + name
}

// each calls f for every chosen scenario.
func (p *places) each(f func(file *golden.File, manifests, captureDir, goldenPath string) error) error {
	root := p.root
	all, err := filepath.Glob(filepath.Join(root, "requests", "*.yaml"))
	if err != nil {
		return err
	}
	sort.Strings(all)
	var failures []string
	for _, path := range all {
		name := strings.TrimSuffix(filepath.Base(path), ".yaml")
		if !p.chosen(name) {
			continue
		}
		file, err := golden.ReadFile(path)
		if err == nil {
			err = f(file, filepath.Join(root, "scenarios", name+".yaml"), p.captureDir(root, name), p.goldenPath(name))
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
			failures = append(failures, name)
		}
	}
	if failures != nil {
		return errors.New("failed: " + strings.Join(failures, ", "))
	}
	return nil
}

func (p *places) captureDir(root, name string) string { return p.captureIn("xds", root, name) }

// captureIn finds a capture in a tree of captures, xds or scale.
func (p *places) captureIn(tree, root, name string) string {
	if absolute, err := filepath.Abs(root); err == nil { // the proxy runs in another directory
		root = absolute
	}
	dir := filepath.Join(root, tree, p.istio, name)
	if _, err := os.Stat(filepath.Join(dir, "capture.json")); err == nil {
		return dir
	}
	several, _ := filepath.Glob(filepath.Join(dir, "*", "capture.json")) // one folder for each waypoint
	for _, index := range several {
		if strings.Contains(index, "app.waypoint/") {
			return filepath.Dir(index)
		}
	}
	if len(several) > 0 {
		return filepath.Dir(several[0])
	}
	return dir
}

func (p *places) chosen(name string) bool {
	if p.scenarios == "" {
		return true
	}
	for _, wanted := range strings.Split(p.scenarios, ",") {
		if strings.HasPrefix(name, wanted) {
			return true
		}
	}
	return false
}

func record(args []string) error {
	set, p := flags("record")
	set.Parse(args)
	return p.each(func(file *golden.File, manifests, captureDir, goldenPath string) error {
		g, err := p.runner.Record(file, manifests, captureDir)
		if err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(goldenPath), 0o755); err != nil {
			return err
		}
		fmt.Printf("%-32s %3d cases, %d NACKs\n", file.Scenario, len(g.Cases), len(g.Refused))
		if p.runner.Only != "" { // a look, not a recording
			goldenPath = filepath.Join(p.runner.Work, file.Scenario+".json")
			fmt.Println(goldenPath)
		}
		return g.Write(goldenPath)
	})
}

func up(args []string) error {
	set, p := flags("up")
	set.StringVar(&p.runner.Command, "proxy-cmd", "", "shell command that runs another proxy")
	set.Parse(args)
	return p.each(func(file *golden.File, manifests, captureDir, _ string) error {
		s, err := p.runner.Open(file, manifests, captureDir)
		if err != nil {
			return err
		}
		defer s.Close()
		fmt.Printf("%s is up in %s; interrupt to stop\n", file.Scenario, s.Network.Waypoint())
		wait()
		return nil
	})
}

func wait() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	<-stop
}

func strip(args []string) error {
	set := flag.NewFlagSet("strip", flag.ExitOnError)
	dir := set.String("dir", "", "capture directory")
	set.Parse(args)
	c, err := capture.Load(*dir)
	if err != nil {
		return err
	}
	report, err := c.Strip()
	for _, line := range report.Lines() {
		fmt.Println(line)
	}
	return err
}

func serveXDS(args []string) error {
	set := flag.NewFlagSet("serve-xds", flag.ExitOnError)
	dir := set.String("dir", "", "capture directory")
	listen := set.String("listen", "127.0.0.1:15010", "plaintext address, or unix:PATH")
	secure := set.String("tls-listen", "", "TLS address with the certificate service (empty: off)")
	noStrip := set.Bool("no-strip", false, "serve the resources exactly as istiod sent them")
	accessLog := set.String("access-log", "", "add a JSON access log at this path to every proxy")
	identity := set.String("identity", "spiffe://cluster.local/ns/app/sa/waypoint", "identity of the waypoint")
	certs := set.String("certs", "", "write the lab's certificates into this directory")
	verbose := set.Bool("v", false, "log what is served")
	set.Parse(args)
	resources, err := capture.Load(*dir)
	if err != nil {
		return err
	}
	if !*noStrip {
		report, err := resources.Strip()
		if err != nil {
			return err
		}
		for _, line := range report.Lines() {
			fmt.Println("changed:", line)
		}
	}
	if *accessLog != "" {
		if err := resources.Observe(*accessLog); err != nil {
			return err
		}
	}
	authorities, err := control.NewAuthorities()
	if err != nil {
		return err
	}
	if *certs != "" {
		if err := authorities.WriteFiles(*certs, *identity); err != nil {
			return err
		}
	}
	server := control.New(resources, authorities, *identity, *verbose)
	for address, overTLS := range map[string]bool{*listen: false, *secure: true} {
		if address == "" {
			continue
		}
		network := "tcp"
		if path, ok := strings.CutPrefix(address, "unix:"); ok {
			network, address = "unix", path
		}
		l, err := net.Listen(network, address)
		if err != nil {
			return err
		}
		if err := server.Serve(l, overTLS); err != nil {
			return err
		}
	}
	fmt.Println("serving", *dir, "on", *listen, *secure)
	wait()
	server.Stop()
	return nil
}
