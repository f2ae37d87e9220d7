package live

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"oracle/control"
	"oracle/golden"
	"oracle/load"
	"oracle/wire"
)

// Options of a run.
type Options struct {
	Lab     string // the istiod-lab binary
	Runner  golden.Runner
	Changes int      // live changes under load
	Steps   []string // only these; all when empty
}

// Where the services of mesh.yaml are.
const (
	client    = "app/client"
	clientIP  = "10.244.0.200"
	webVIP    = "10.96.1.10:80"
	otherVIP  = "10.96.1.20:80"
	dbVIP     = "10.96.1.30:5432"
	webHost   = "web.app.svc.cluster.local"
	otherHost = "other.app.svc.cluster.local"
)

// step is one thing to prove; it returns what was measured.
type step struct {
	name  string
	proxy bool // needs another proxy than Envoy
	run   func(*run) (string, error)
}

// run is a mesh that is up.
type run struct {
	options Options
	session *golden.Session
	lab     *lab
}

// groups of steps that share one mesh, in order. The first step of each brings istiod and the proxy up.
var groups = [][]step{
	{
		{name: "cold-start", run: coldStart},
		{name: "proxy-status", run: proxyStatus},
		{name: "address-type", run: addressType},
		{name: "weight-change", run: weightChange},
		{name: "service-added", run: serviceAdded},
		{name: "every-address", proxy: true, run: everyAddress},
		{name: "changes-under-load", run: changesUnderLoad},
		{name: "istiod-restart-under-load", run: restartUnderLoad},
	},
	{{name: "istiod-comes-late", run: istiodComesLate}},
	{{name: "token-comes-late", proxy: true, run: tokenComesLate}},
}

// Names lists the steps.
func Names() []string {
	var out []string
	for _, group := range groups {
		for _, s := range group {
			out = append(out, s.name)
		}
	}
	return out
}

// Run runs the steps and reports each on a line.
func Run(o Options) error {
	for _, wanted := range o.Steps {
		if !slices.Contains(Names(), wanted) {
			return fmt.Errorf("no step %q; there are %s", wanted, strings.Join(Names(), ", "))
		}
	}
	captured := filepath.Join(o.Runner.Work, "live-capture")
	manifests, err := captureMesh(o.Lab, captured)
	if err != nil {
		return err
	}
	passed, failed := 0, 0
	for _, group := range groups {
		last := -1
		for i, s := range group {
			if len(o.Steps) == 0 || slices.Contains(o.Steps, s.name) {
				last = i
			}
		}
		if last < 0 || group[0].proxy && o.Runner.Command == "" {
			continue
		}
		p, f := runGroup(o, group, manifests, captured)
		passed, failed = passed+p, failed+f
	}
	fmt.Printf("%d of %d steps passed\n", passed, passed+failed)
	if failed > 0 {
		return fmt.Errorf("%d steps failed", failed)
	}
	return nil
}

func runGroup(o Options, group []step, manifests, captured string) (passed, failed int) {
	r, down := open(o, group[0].name, manifests, captured)
	if r != nil {
		defer r.close()
	}
	for i, s := range group {
		chosen := len(o.Steps) == 0 || slices.Contains(o.Steps, s.name) || i == 0 // the first brings the mesh up
		if !chosen || s.proxy && o.Runner.Command == "" {
			continue
		}
		measured, err := "", down
		if err == nil {
			measured, err = s.run(r)
		}
		if err == nil {
			fmt.Printf("ok     %-26s %s\n", s.name, measured)
			passed++
			continue
		}
		failed++
		fmt.Printf("FAILED %-26s %v\n", s.name, err)
		if measured != "" {
			fmt.Println(measured)
		}
		if i == 0 && down == nil { // without a mesh no other step can work
			down = errors.New("not run: the mesh did not come up")
		}
	}
	return passed, failed
}

func open(o Options, name, manifests, captured string) (*run, error) {
	r := &run{options: o}
	runner := o.Runner
	runner.Concurrency = 2
	runner.Token = token("app", "waypoint")
	if name == "token-comes-late" {
		runner.Token = golden.NoToken
	}
	runner.ControlPlane = func(s *golden.Session) (func(), error) {
		var err error
		if r.lab, err = newLab(o.Lab, s); err != nil {
			return nil, err
		}
		if runner.Command != "" {
			return r.lab.stop, nil
		}
		l, err := s.Network.ListenWaypoint("unix", s.Socket())
		if err != nil {
			return nil, err
		}
		relay, err := control.StartRelay(l, func(context.Context, string) (net.Conn, error) {
			return s.Network.DialWaypoint(plainAddress, 5*time.Second)
		}, s.Authorities, s.World.Identity)
		if err != nil {
			return nil, err
		}
		return func() { relay.Stop(); r.lab.stop() }, nil
	}
	file := &golden.File{
		Scenario: "live-" + name, Cases: []golden.Case{{Request: golden.Request{From: clientIP}}},
		Hosts: []golden.ExtraHost{{Name: outsideName, IP: outsideIP}},
	}
	var err error
	r.session, err = runner.Open(file, manifests, captured)
	if r.session != nil && r.session.Backend != nil {
		r.session.Backend.Discard()
	}
	return r, err
}

func (r *run) close() {
	if r.session != nil {
		r.session.Close()
	}
}

func (r *run) dial() (*wire.H2, error) { return r.session.Dial(client, clientIP) }

// request sends one request on a tunnel stream of its own and returns the answering pod.
func (r *run) request(h2 *wire.H2, to, host string) (string, error) {
	stream, err := golden.OpenStream(h2, to)
	if err != nil {
		return "", err
	}
	defer golden.Leave(stream)
	return ask(stream, bufio.NewReader(stream), host)
}

func ask(stream *wire.Stream, reader *bufio.Reader, host string) (string, error) {
	stream.SetReadDeadline(time.Now().Add(load.Patience))
	if _, err := fmt.Fprintf(stream, "GET / HTTP/1.1\r\nhost: %s\r\n\r\n", host); err != nil {
		return "", err
	}
	m, err := wire.ReadResponse(reader, "GET")
	if err != nil {
		return "", err
	}
	if m.Status() != 200 {
		return "", fmt.Errorf("status %d", m.Status())
	}
	var report struct {
		Pod string `json:"pod"`
	}
	if err := json.Unmarshal(m.Body, &report); err != nil {
		return "", fmt.Errorf("not the application's answer: %w", err)
	}
	return report.Pod, nil
}

// works sends a few requests to a fresh tunnel.
func (r *run) works() error {
	h2, err := r.dial()
	if err != nil {
		return err
	}
	defer h2.Close()
	for range 10 {
		if _, err := r.request(h2, webVIP, webHost); err != nil {
			return err
		}
	}
	return nil
}

// coldStart measures from the start of the process to ready with istiod there, and to the first answer.
func coldStart(r *run) (string, error) {
	begun := time.Now()
	if err := r.lab.start(); err != nil {
		return "", err
	}
	istiod := time.Since(begun)
	begun = time.Now()
	if err := r.session.LaunchProxy(); err != nil {
		return "", err
	}
	if err := r.session.Proxy.WaitReady(r.session.Network, r.session.Probe(), r.options.Runner.ReadyLimit); err != nil {
		return "", err
	}
	ready := time.Since(begun)
	err := r.works()
	return fmt.Sprintf("istiod up in %v; from the start of the proxy to ready %v, to ten answers %v",
		istiod.Round(time.Millisecond), ready.Round(time.Millisecond), time.Since(begun).Round(time.Millisecond)), err
}

// synced waits until istiod shows our proxy as SYNCED.
func (r *run) synced(limit time.Duration) (status, error) {
	required := []string{"Cluster", "Listener", "ClusterLoadAssignment"}
	var last error
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		all, err := r.lab.status()
		if err != nil {
			last = err
			continue
		}
		if len(all) == 0 {
			last = errors.New("istiod knows no proxy")
			continue
		}
		for _, s := range all {
			if last = s.synced(required...); last == nil {
				return s, nil
			}
		}
	}
	return status{}, fmt.Errorf("not SYNCED within %v: %w", limit, last)
}

func proxyStatus(r *run) (string, error) {
	s, err := r.synced(10 * time.Second)
	if err != nil {
		return "", err
	}
	// The node is TYPE~ADDRESS~NAME~DOMAIN; istiod goes by the name.
	if parts := strings.Split(r.session.Set.Node.GetId(), "~"); len(parts) != 4 || s.Proxy != parts[2] {
		want := r.session.Set.Node.GetId()
		err = fmt.Errorf("istiod calls the proxy %q, not %q", s.Proxy, want)
	}
	var types []string
	for url := range s.Resources {
		types = append(types, url[strings.LastIndex(url, ".")+1:])
	}
	slices.Sort(types)
	return fmt.Sprintf("%s, version %s: SYNCED for %s", s.Proxy, s.Version, strings.Join(types, ", ")), err
}

// addressType shows that a waypoint is served istio.workload.Address by wildcard: workloads and services,
// kept up to date, and that the status stays right.
func addressType(r *run) (string, error) {
	o, err := observe(r.session.Network, r.session.Set.Node, clusterURL, listenerURL, addressURL)
	if err != nil {
		return "", err
	}
	defer o.close()
	workloads, services := o.count()
	if workloads == 0 || services == 0 {
		return "", fmt.Errorf("%d workloads and %d services were served", workloads, services)
	}
	if err := r.lab.apply(extraService(0)); err != nil {
		return "", err
	}
	defer r.lab.remove(extraKey(0))
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, now := o.count(); now == services+1 {
			break
		}
		if time.Now().After(deadline) {
			return "", errors.New("a new service was not pushed as an Address")
		}
	}
	var last error
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		all, err := r.lab.status()
		if err != nil {
			return "", err
		}
		last = errors.New("istiod shows no proxy that asked for Address")
		for _, s := range all {
			if _, asked := s.Resources[addressURL]; asked {
				if last = s.synced("Cluster", "Listener", "Address"); last != nil {
					break
				}
			}
		}
		if last == nil {
			return fmt.Sprintf("%d workloads and %d services by wildcard, a new service is pushed, the status is SYNCED", workloads, services), nil
		}
	}
	return "", last
}

func weights(v1, v2 int) string {
	return fmt.Sprintf(`apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: app}
spec:
  parentRefs: [{group: "", kind: Service, name: web, port: 80}]
  rules:
  - backendRefs:
    - {name: web-v1, port: 80, weight: %d}
    - {name: web-v2, port: 80, weight: %d}
`, v1, v2)
}

// weightChange moves the whole weight of an HTTPRoute and measures from istiod's push to the first request that obeys.
func weightChange(r *run) (string, error) {
	const rounds, limit = 10, 10 * time.Second
	o, err := observe(r.session.Network, r.session.Set.Node, clusterURL, listenerURL)
	if err != nil {
		return "", err
	}
	defer o.close()
	h2, err := r.dial()
	if err != nil {
		return "", err
	}
	defer h2.Close()
	old, err := golden.OpenStream(h2, webVIP)
	if err != nil {
		return "", err
	}
	defer old.Close()
	oldReader := bufio.NewReader(old)
	var fresh, kept []time.Duration
	for round := range rounds {
		want, yaml := "web-v2", weights(0, 100)
		if round%2 == 1 {
			want, yaml = "web-v1", weights(100, 0)
		}
		before := time.Now()
		if err := r.lab.apply(yaml); err != nil {
			return "", err
		}
		freshAt, oldAt := time.Time{}, time.Time{}
		for freshAt.IsZero() || oldAt.IsZero() {
			if time.Since(before) > limit {
				return "", fmt.Errorf("round %d: %v after the change requests still go elsewhere than to %s", round+1, limit, want)
			}
			pod, err := r.request(h2, webVIP, webHost)
			if err != nil {
				return "", fmt.Errorf("round %d, a new stream: %w", round+1, err)
			}
			if freshAt.IsZero() && strings.HasPrefix(pod, want) {
				freshAt = time.Now()
			}
			if pod, err = ask(old, oldReader, webHost); err != nil {
				if r.options.Runner.Command != "" {
					return "", fmt.Errorf("round %d, an old connection: %s", round+1, golden.Ending(err))
				}
				if old, err = golden.OpenStream(h2, webVIP); err != nil { // Envoy closes it
					return "", err
				}
				oldReader = bufio.NewReader(old)
				continue
			}
			if oldAt.IsZero() && strings.HasPrefix(pod, want) {
				oldAt = time.Now()
			}
		}
		pushed, err := o.pushed(listenerURL, before, limit)
		if err != nil {
			return "", err
		}
		fresh, kept = append(fresh, freshAt.Sub(pushed)), append(kept, oldAt.Sub(pushed))
	}
	round := func(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }
	return fmt.Sprintf("from the push to obedience, %d rounds: a new stream p50 %v, longest %v; an old connection p50 %v, longest %v", rounds,
		round(load.Quantile(fresh, 0.5)), round(load.Quantile(fresh, 1)), round(load.Quantile(kept, 0.5)), round(load.Quantile(kept, 1))), nil
}

// extraService is a service with a port number that no other service has.
func extraService(i int) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: extra-%[1]d, namespace: app}
spec:
  clusterIP: 10.96.9.%[2]d
  clusterIPs: [10.96.9.%[2]d]
  selector: {app: other}
  ports: [{name: http, port: %[3]d, targetPort: 8080}]
`, i, i%250+1, 17000+i)
}

func extraKey(i int) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: extra-%d, namespace: app}\n", i)
}

// serviceAdded adds a service on a new port number and takes it away again.
func serviceAdded(r *run) (string, error) {
	const limit, number = 10 * time.Second, 7
	to, host := fmt.Sprintf("10.96.9.%d:%d", number+1, 17000+number), fmt.Sprintf("extra-%d.app.svc.cluster.local", number)
	h2, err := r.dial()
	if err != nil {
		return "", err
	}
	defer h2.Close()
	begun := time.Now()
	if err := r.lab.apply(extraService(number)); err != nil {
		return "", err
	}
	for {
		_, err := r.request(h2, to, host)
		if err == nil {
			break
		}
		if time.Since(begun) > limit {
			return "", fmt.Errorf("a new service is not served after %v: %w", limit, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
	served := time.Since(begun)
	begun = time.Now()
	if err := r.lab.remove(extraKey(number)); err != nil {
		return "", err
	}
	for {
		if _, err := r.request(h2, to, host); err != nil {
			return fmt.Sprintf("a new service on a new port number answers %v after it was applied; removed, it stops after %v",
				served.Round(time.Millisecond), time.Since(begun).Round(time.Millisecond)), nil
		}
		if time.Since(begun) > limit {
			return "", fmt.Errorf("a removed service still answers after %v", limit)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// The destination outside the mesh that everyAddress brings in.
const (
	outsideName = "outside"
	outsideIP   = "192.0.2.10"
	outsideHost = "inline.example.com"
)

// outsideAddresses are the addresses of its ServiceEntry. istiod puts one of them into the matcher and takes
// which from a map, so that only a proxy that goes by the addresses of the service serves all.
var outsideAddresses = []string{"240.240.1.1", "240.240.1.2"}

func outsideEntry() string {
	return fmt.Sprintf(`apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: inline, namespace: app}
spec:
  hosts: [%s]
  addresses: [%s]
  ports:
  - {number: 80, name: http, protocol: HTTP, targetPort: 8080}
  resolution: STATIC
  endpoints:
  - {address: %s}
`, outsideHost, strings.Join(outsideAddresses, ", "), outsideIP)
}

const outsideKey = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: inline, namespace: app}\n"

// everyAddress adds a ServiceEntry with two addresses; a request to each is answered by its endpoint.
func everyAddress(r *run) (string, error) {
	const limit = 10 * time.Second
	h2, err := r.dial()
	if err != nil {
		return "", err
	}
	defer h2.Close()
	begun := time.Now()
	if err := r.lab.apply(outsideEntry()); err != nil {
		return "", err
	}
	defer r.lab.remove(outsideKey)
	var answers []string
	for _, address := range outsideAddresses {
		for {
			pod, err := r.request(h2, net.JoinHostPort(address, "80"), outsideHost)
			if err == nil && pod == outsideName {
				break
			}
			if err == nil {
				return "", fmt.Errorf("%s is answered by %q, not by the endpoint %q", address, pod, outsideName)
			}
			if time.Since(begun) > limit {
				return "", fmt.Errorf("the address %s of a ServiceEntry is not served after %v: %w", address, limit, err)
			}
			time.Sleep(2 * time.Millisecond)
		}
		answers = append(answers, fmt.Sprintf("%s after %v", address, time.Since(begun).Round(time.Millisecond)))
	}
	return "each address of a ServiceEntry is answered 200 by its endpoint: " + strings.Join(answers, ", "), nil
}

// underLoad starts every kind of exchange.
func (r *run) underLoad(lasts time.Duration) (*load.Load, error) {
	l := load.New(r.dial)
	web := load.Target{Authority: webVIP, Host: webHost, Path: "/"}
	other := load.Target{Authority: otherVIP, Host: otherHost, Path: "/"}
	l.KeepAlive("HTTP/1.1 keep-alive, routed", web, nil)
	l.KeepAlive("HTTP/1.1 keep-alive, other", other, nil)
	l.Fresh("a new stream for each request", web, nil)
	l.HTTP2("HTTP/2 inside", web)
	l.WebSocket("WebSocket, routed", web)
	l.WebSocket("WebSocket, other", other)
	l.TCP("TCP", dbVIP)
	l.LongResponse("responses of 3 s", web, 3*time.Second)
	l.LongResponse("a response as long as the run", other, lasts)
	if err := l.WaitOpen(); err != nil {
		l.Stop()
		return nil, err
	}
	time.Sleep(300 * time.Millisecond) // the long responses are under way
	return l, nil
}

func finish(l *load.Load, err error) (string, error) {
	l.Stop()
	text := ""
	if failure := errors.Join(err, l.Err()); failure != nil {
		return "  " + strings.Join(l.Report(), "\n  "), failure
	}
	t := l.Totals()
	text = fmt.Sprintf("%d exchanges, 0 failed, 0 connections closed, 0 asked to close", t.Exchanges)
	return text, nil
}

const podTwo = `apiVersion: v1
kind: Pod
metadata:
  name: web-v2-1
  namespace: app
  annotations: {ambient.istio.io/redirection: enabled}
  labels: {app: web, version: v2}
spec: {serviceAccountName: web, nodeName: node-a}
status: {podIP: 10.244.0.13}
`

const podTwoKey = "apiVersion: v1\nkind: Pod\nmetadata: {name: web-v2-1, namespace: app}\n"

func timeoutRule(i int) string {
	return fmt.Sprintf(`apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: other, namespace: app}
spec:
  host: other.app.svc.cluster.local
  trafficPolicy: {connectionPool: {tcp: {connectTimeout: %dms}}}
`, 5000+i)
}

// changesUnderLoad makes live changes of several kinds while every kind of exchange goes on.
func changesUnderLoad(r *run) (string, error) {
	const every = 50 * time.Millisecond
	changes := r.options.Changes
	l, err := r.underLoad(time.Duration(changes)*every + 2*time.Second)
	if err != nil {
		return "", err
	}
	begun := time.Now()
	next := begun
	for i := range changes {
		var err error
		switch i % 6 {
		case 0, 3:
			err = r.lab.apply(weights(i%101, 100-i%101))
		case 1:
			err = r.lab.apply(extraService(i))
		case 2:
			err = r.lab.apply(timeoutRule(i))
		case 4:
			if (i/6)%2 == 0 {
				err = r.lab.remove(podTwoKey)
			} else {
				err = r.lab.apply(podTwo)
			}
		case 5:
			err = r.lab.remove(extraKey(i - 4))
		}
		if err != nil {
			return finish(l, fmt.Errorf("change %d: %w", i, err))
		}
		next = next.Add(every)
		time.Sleep(time.Until(next))
	}
	took := time.Since(begun)
	if err := r.lab.apply(podTwo); err != nil {
		return finish(l, err)
	}
	time.Sleep(500 * time.Millisecond)
	text, err := finish(l, nil)
	if err == nil {
		_, err = r.synced(10 * time.Second)
	}
	return fmt.Sprintf("%d changes in %.1f s; %s", changes, took.Seconds(), text), err
}

// restartUnderLoad kills istiod while traffic flows, starts it again and changes something.
func restartUnderLoad(r *run) (string, error) {
	l, err := r.underLoad(6 * time.Second)
	if err != nil {
		return "", err
	}
	r.lab.kill()
	time.Sleep(3 * time.Second)
	if err := r.lab.start(); err != nil {
		return finish(l, err)
	}
	begun := time.Now()
	if _, err := r.synced(60 * time.Second); err != nil {
		return finish(l, err)
	}
	back := time.Since(begun)
	if err := r.lab.apply(weights(0, 100)); err != nil {
		return finish(l, err)
	}
	if err := r.obeys("web-v2", 10*time.Second); err != nil {
		return finish(l, err)
	}
	text, err := finish(l, nil)
	return fmt.Sprintf("killed for 3 s; SYNCED again %v after it served; %s", back.Round(10*time.Millisecond), text), err
}

// obeys waits until requests go to a workload.
func (r *run) obeys(workload string, limit time.Duration) error {
	h2, err := r.dial()
	if err != nil {
		return err
	}
	defer h2.Close()
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		pod, err := r.request(h2, webVIP, webHost)
		if err == nil && strings.HasPrefix(pod, workload) {
			return nil
		}
		if time.Since(begun) > limit {
			return fmt.Errorf("requests do not go to %s after %v: %s %v", workload, limit, pod, err)
		}
	}
}

// notReady checks that a proxy without what it needs waits: it neither claims to be ready nor exits.
func (r *run) notReady(lasts time.Duration) error {
	for begun := time.Now(); time.Since(begun) < lasts; time.Sleep(100 * time.Millisecond) {
		if !r.session.Proxy.Running() {
			return fmt.Errorf("the proxy exited instead of waiting:\n%s", r.session.Proxy.Tail(2000))
		}
		if r.session.Network.Ready(r.session.Probe()) == nil {
			return errors.New("the proxy says that it is ready")
		}
	}
	return nil
}

// comesReady measures how soon after a moment the proxy is ready and answers.
func (r *run) comesReady(limit time.Duration) (time.Duration, error) {
	begun := time.Now()
	if err := r.session.Proxy.WaitReady(r.session.Network, r.session.Probe(), limit); err != nil {
		return 0, err
	}
	took := time.Since(begun)
	return took, r.works()
}

// istiodComesLate starts the proxy first.
func istiodComesLate(r *run) (string, error) {
	if err := r.session.LaunchProxy(); err != nil {
		return "", err
	}
	if err := r.notReady(5 * time.Second); err != nil {
		return "", err
	}
	if err := r.lab.start(); err != nil {
		return "", err
	}
	took, err := r.comesReady(60 * time.Second)
	return fmt.Sprintf("absent for 5 s; ready %v after istiod serves", took.Round(10*time.Millisecond)), err
}

// tokenComesLate starts the proxy without its token.
func tokenComesLate(r *run) (string, error) {
	if err := r.lab.start(); err != nil {
		return "", err
	}
	if err := r.session.LaunchProxy(); err != nil {
		return "", err
	}
	if err := r.notReady(3 * time.Second); err != nil {
		return "", err
	}
	if err := os.WriteFile(r.session.TokenPath(), []byte(token("app", "waypoint")), 0o600); err != nil {
		return "", err
	}
	took, err := r.comesReady(60 * time.Second)
	return fmt.Sprintf("missing for 3 s; ready %v after it appeared", took.Round(10*time.Millisecond)), err
}
