package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	rbac "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"oracle/capture"
	"oracle/golden"
	"oracle/wire"
)

// experiments answer questions about Envoy that no single request answers.
var experiments = map[string]struct {
	scenario    string
	concurrency int
	run         func(*golden.Session) error
}{
	"no-chain":            {"01-http-basic", 1, noChain},
	"hostname-port-deny":  {"27-multi-network", 1, hostnamePort},
	"hostname-port-allow": {"27-multi-network", 1, hostnamePort},
	"chain-update":        {"12-virtualservice", 2, func(s *golden.Session) error { return updates(s, changeWebChain) }},
	"chain-added":         {"12-virtualservice", 2, func(s *golden.Session) error { return updates(s, addChain) }},
	"listener-update":     {"12-virtualservice", 2, func(s *golden.Session) error { return updates(s, changeInspector) }},
	"obedience":           {"12-virtualservice", 2, obedience},
	"cpu-spread":          {"01-http-basic", 2, cpuSpread},
}

func experiment(args []string) error {
	if len(args) == 0 || strings.HasPrefix(args[0], "-") {
		var names []string
		for name := range experiments {
			names = append(names, name)
		}
		sort.Strings(names)
		return errors.New("name one of " + strings.Join(names, ", "))
	}
	e, ok := experiments[args[0]]
	if !ok {
		return errors.New("no experiment " + args[0])
	}
	set, p := flags("experiment")
	set.Parse(args[1:])
	p.runner.Concurrency = e.concurrency
	switch args[0] {
	case "hostname-port-deny":
		p.runner.Alter = func(set *capture.Set) error { return rulePort80(set, rbacv3.RBAC_DENY) }
	case "hostname-port-allow":
		p.runner.Alter = func(set *capture.Set) error { return rulePort80(set, rbacv3.RBAC_ALLOW) }
	}
	root := p.root
	file := &golden.File{Scenario: e.scenario}
	if known, err := golden.ReadFile(filepath.Join(root, "requests", e.scenario+".yaml")); err == nil {
		file = known
	}
	if len(file.Cases) == 0 {
		file.Cases = []golden.Case{{Request: golden.Request{From: "10.244.0.200"}}}
	}
	s, err := p.runner.Open(file, filepath.Join(root, "scenarios", e.scenario+".yaml"), p.captureDir(root, e.scenario))
	if err != nil {
		return err
	}
	defer s.Close()
	return e.run(s)
}

// noChain shows what a tunnel client sees for authorities that no chain serves.
func noChain(s *golden.Session) error {
	h2, err := s.Dial("app/client", "10.244.0.200")
	if err != nil {
		return err
	}
	defer h2.Close()
	for _, to := range []string{"10.96.1.10:80", "10.96.99.99:80", "10.96.99.99:12345", "10.96.1.10:81", "10.244.0.10:8080", "web.app.svc.cluster.local:80", "10.96.1.10", "nonsense"} {
		for what, send := range map[string][]byte{"silent": nil, "HTTP request": []byte("GET / HTTP/1.1\r\nhost: a\r\n\r\n"), "other bytes": []byte("\x01\x02\x03 hello\r\n")} {
			a := s.Try(h2, to, send, 18*time.Second)
			fmt.Printf("%-28s %-13s CONNECT %d after %v, then %q after %v, %d bytes\n", to, what, a.Status, a.Answered.Round(100*time.Microsecond), a.End, a.Ended.Round(time.Millisecond), a.Bytes)
		}
	}
	return nil
}

// editChain changes the connection manager of one chain of main_internal.
func editChain(l *listener.Listener, chain string, edit func(*hcm.HttpConnectionManager)) error {
	for _, c := range l.FilterChains {
		if c.Name != chain {
			continue
		}
		for _, f := range c.Filters {
			m := &hcm.HttpConnectionManager{}
			if f.GetTypedConfig().UnmarshalTo(m) != nil {
				continue
			}
			edit(m)
			packed, err := anypb.New(m)
			if err != nil {
				return err
			}
			f.ConfigType = &listener.Filter_TypedConfig{TypedConfig: packed}
			return nil
		}
	}
	return fmt.Errorf("no HTTP chain %q", chain)
}

func mainInternal(set *capture.Set) (*listener.Listener, error) {
	r := set.Find(capture.Listener, "main_internal")
	if r == nil {
		return nil, errors.New("the capture has no main_internal")
	}
	l := &listener.Listener{}
	return l, r.Body.UnmarshalTo(l)
}

// rulePort80 puts a rule on destination port 80 into every HTTP chain.
func rulePort80(set *capture.Set, action rbacv3.RBAC_Action) error {
	l, err := mainInternal(set)
	if err != nil {
		return err
	}
	rules, err := anypb.New(&rbac.RBAC{Rules: &rbacv3.RBAC{Action: action, Policies: map[string]*rbacv3.Policy{"port-80": {
		Permissions: []*rbacv3.Permission{{Rule: &rbacv3.Permission_DestinationPort{DestinationPort: 80}}},
		Principals:  []*rbacv3.Principal{{Identifier: &rbacv3.Principal_Any{Any: true}}},
	}}}})
	if err != nil {
		return err
	}
	for _, c := range l.FilterChains {
		_ = editChain(l, c.Name, func(m *hcm.HttpConnectionManager) {
			m.HttpFilters = append([]*hcm.HttpFilter{{Name: "envoy.filters.http.rbac", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: rules}}}, m.HttpFilters...)
		})
	}
	body, err := anypb.New(l)
	set.Find(capture.Listener, "main_internal").Body = body
	return err
}

func hostnamePort(s *golden.Session) error {
	h2, err := s.Dial("app/client", "10.244.0.200")
	if err != nil {
		return err
	}
	defer h2.Close()
	for _, to := range append(strings.Fields(os.Getenv("TARGETS")), "10.96.1.10:80", "web.app.svc.cluster.local:80") {
		a := s.Try(h2, to, []byte("GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"), 2*time.Second)
		fmt.Printf("%-36s CONNECT %d, %d bytes, %q\n", to, a.Status, a.Bytes, a.End)
	}
	time.Sleep(300 * time.Millisecond)
	log, _ := os.ReadFile(s.LogPath())
	for _, line := range strings.Split(string(log), "\n") {
		if strings.Contains(line, `"main_internal"`) {
			fmt.Println(line)
		}
	}
	return nil
}

// watched is one long-lived exchange during an update.
type watched struct {
	name  string
	ended time.Duration
	how   string
}

// updates opens exchanges of several kinds on two services, changes the configuration and watches.
func updates(s *golden.Session, change func(*listener.Listener) error) error {
	const watch = 70 * time.Second
	h2, err := s.Dial("app/client", "10.244.0.200")
	if err != nil {
		return err
	}
	defer h2.Close()
	services := map[string]string{"changed service": "10.96.1.10:80", "other service": "10.96.1.11:80"}
	var mu sync.Mutex
	var results []*watched
	var group sync.WaitGroup
	var begun time.Time
	start := make(chan struct{})
	keep := func(name, to string, open func(io.ReadWriter, *bufio.Reader) error, beat func(io.ReadWriter, *bufio.Reader) error) error {
		stream, err := golden.OpenStream(h2, to)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		reader := bufio.NewReader(stream)
		if open != nil {
			if err := open(stream, reader); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		w := &watched{name: name}
		results = append(results, w)
		group.Go(func() {
			<-start
			for time.Since(begun) < watch {
				stream.SetReadDeadline(time.Now().Add(10 * time.Second))
				if err := beat(stream, reader); err != nil {
					mu.Lock()
					w.ended, w.how = time.Since(begun), err.Error()
					mu.Unlock()
					return
				}
				time.Sleep(100 * time.Millisecond)
			}
			stream.Close()
		})
		return nil
	}
	for name, to := range services {
		websocket := func(rw io.ReadWriter, r *bufio.Reader) error {
			fmt.Fprintf(rw, "GET /once HTTP/1.1\r\nhost: web\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
			m, err := wire.ReadResponse(r, "GET")
			if err == nil && m.Status() != 101 {
				err = fmt.Errorf("status %d", m.Status())
			}
			return err
		}
		message := func(rw io.ReadWriter, r *bufio.Reader) error {
			if err := wire.WriteWebSocketFrame(rw, wire.WebSocketText, []byte("beat"), true); err != nil {
				return errors.New(golden.Ending(err))
			}
			_, _, err := wire.ReadWebSocketFrame(r)
			if err != nil {
				return errors.New(golden.Ending(err))
			}
			return nil
		}
		if err := keep(name+": WebSocket", to, websocket, message); err != nil {
			return err
		}
		generation := ""
		request := func(rw io.ReadWriter, r *bufio.Reader) error {
			fmt.Fprintf(rw, "GET /once HTTP/1.1\r\nhost: web\r\n\r\n")
			m, err := wire.ReadResponse(r, "GET")
			if err != nil {
				return errors.New(golden.Ending(err))
			}
			if g := wire.Get(m.Header, "x-generation"); g != generation {
				fmt.Printf("%6.2fs  %s: HTTP/1.1 keep-alive connection shows generation %q\n", time.Since(begun).Seconds(), name, g)
				generation = g
			}
			if strings.EqualFold(wire.Get(m.Header, "connection"), "close") {
				return errors.New("answered with connection: close")
			}
			return nil
		}
		if err := keep(name+": HTTP/1.1 keep-alive with requests", to, request, request); err != nil {
			return err
		}
		slow := func(rw io.ReadWriter, r *bufio.Reader) error {
			fmt.Fprintf(rw, "GET /once HTTP/1.1\r\nhost: web\r\nx-echo-script: 200+body=1000+bodydelay=60s\r\n\r\n")
			return nil
		}
		finish := func(rw io.ReadWriter, r *bufio.Reader) error {
			rw.(*wire.Stream).SetReadDeadline(time.Now().Add(watch))
			m, err := wire.ReadResponse(r, "GET")
			if err != nil {
				return errors.New("cut: " + golden.Ending(err))
			}
			return fmt.Errorf("complete with %d bytes", len(m.Body))
		}
		if err := keep(name+": one response that takes 60 s", to, slow, finish); err != nil {
			return err
		}
	}
	echo := func(rw io.ReadWriter, r *bufio.Reader) error {
		fmt.Fprint(rw, "beat")
		if _, err := io.ReadFull(r, make([]byte, 4)); err != nil {
			return errors.New(golden.Ending(err))
		}
		return nil
	}
	if err := keep("other service: TCP", "10.96.1.30:5432", nil, echo); err != nil {
		return err
	}
	time.Sleep(time.Second)
	l, err := mainInternal(s.Set)
	if err != nil {
		return err
	}
	if err := change(l); err != nil {
		return err
	}
	begun = time.Now()
	close(start)
	if err := s.Control.Discovery.Replace(capture.Listener, "main_internal", l); err != nil {
		return err
	}
	group.Wait()
	sort.Slice(results, func(i, j int) bool { return results[i].name < results[j].name })
	for _, w := range results {
		how := w.how
		if how == "" {
			how = fmt.Sprintf("untouched for %v", watch)
		} else {
			how = fmt.Sprintf("%s after %.2f s", how, w.ended.Seconds())
		}
		fmt.Printf("%-52s %s\n", w.name, how)
	}
	fmt.Println("refused updates:", s.Control.Discovery.NACKs())
	return nil
}

func generation(n string) func(*hcm.HttpConnectionManager) {
	return func(m *hcm.HttpConnectionManager) {
		m.GetRouteConfig().ResponseHeadersToAdd = []*core.HeaderValueOption{{Header: &core.HeaderValue{Key: "x-generation", Value: n}}}
	}
}

const webChain = "inbound-vip|80|http|web.app.svc.cluster.local"

func changeWebChain(l *listener.Listener) error { return editChain(l, webChain, generation("2")) }

// addChain adds a chain that nothing selects, as a new service would.
func addChain(l *listener.Listener) error {
	for _, c := range l.FilterChains {
		if c.Name == webChain {
			added := proto.Clone(c).(*listener.FilterChain)
			added.Name = "inbound-vip|80|http|added.app.svc.cluster.local"
			l.FilterChains = append(l.FilterChains, added)
			return nil
		}
	}
	return errors.New("no web chain")
}

// changeInspector excludes one more port from protocol inspection, as istiod does when
// any service of the waypoint gets a port number that was not declared before.
func changeInspector(l *listener.Listener) error {
	for _, f := range l.ListenerFilters {
		if f.FilterDisabled == nil {
			continue
		}
		another := &listener.ListenerFilterChainMatchPredicate{Rule: &listener.ListenerFilterChainMatchPredicate_DestinationPortRange{
			DestinationPortRange: &typev3.Int32Range{Start: 9999, End: 10000},
		}}
		f.FilterDisabled = &listener.ListenerFilterChainMatchPredicate{Rule: &listener.ListenerFilterChainMatchPredicate_OrMatch{
			OrMatch: &listener.ListenerFilterChainMatchPredicate_MatchSet{Rules: []*listener.ListenerFilterChainMatchPredicate{f.FilterDisabled, another}},
		}}
		return nil
	}
	return errors.New("nothing is inspected")
}

// obedience measures how soon requests obey a change: on new streams of an old tunnel
// connection, and on an old inner connection.
func obedience(s *golden.Session) error {
	h2, err := s.Dial("app/client", "10.244.0.200")
	if err != nil {
		return err
	}
	defer h2.Close()
	ask := func(stream *wire.Stream, r *bufio.Reader) (string, bool, error) {
		fmt.Fprint(stream, "GET /once HTTP/1.1\r\nhost: web\r\n\r\n")
		stream.SetReadDeadline(time.Now().Add(2 * time.Second))
		m, err := wire.ReadResponse(r, "GET")
		if err != nil {
			return "", false, err
		}
		return wire.Get(m.Header, "x-generation"), strings.EqualFold(wire.Get(m.Header, "connection"), "close"), nil
	}
	for round := 1; round <= 5; round++ {
		want := fmt.Sprint(round)
		old, err := golden.OpenStream(h2, "10.96.1.10:80")
		if err != nil {
			return err
		}
		oldReader := bufio.NewReader(old)
		if _, _, err := ask(old, oldReader); err != nil {
			return err
		}
		l, err := mainInternal(s.Set)
		if err != nil {
			return err
		}
		if err := editChain(l, webChain, generation(want)); err != nil {
			return err
		}
		begun := time.Now()
		if err := s.Control.Discovery.Replace(capture.Listener, "main_internal", l); err != nil {
			return err
		}
		fresh, oldEnd := time.Duration(0), ""
		for time.Since(begun) < 10*time.Second && (fresh == 0 || oldEnd == "") {
			if fresh == 0 {
				stream, err := golden.OpenStream(h2, "10.96.1.10:80")
				if err == nil {
					if g, _, err := ask(stream, bufio.NewReader(stream)); err == nil && g == want {
						fresh = time.Since(begun)
					}
					stream.Close()
				}
			}
			if oldEnd == "" {
				g, closing, err := ask(old, oldReader)
				switch {
				case err != nil:
					oldEnd = fmt.Sprintf("ended (%s) after %v", golden.Ending(err), time.Since(begun).Round(time.Millisecond))
				case g == want:
					oldEnd = fmt.Sprintf("obeyed after %v", time.Since(begun).Round(time.Millisecond))
				case closing:
					oldEnd = fmt.Sprintf("old answer with connection: close after %v", time.Since(begun).Round(time.Millisecond))
				}
			}
		}
		if oldEnd == "" {
			oldEnd = "still the old configuration after 10 s"
		}
		fmt.Printf("round %d: new stream obeyed after %v; old inner connection: %s\n", round, fresh.Round(100*time.Microsecond), oldEnd)
		old.Close()
	}
	return nil
}

// cpuSpread loads one tunnel connection with 100 streams and shows the workers' CPU, then several connections.
func cpuSpread(s *golden.Session) error {
	for _, tunnels := range []int{1, 2, 8} {
		before, err := s.Proxy.CPU()
		if err != nil {
			return err
		}
		var requests atomic.Int64
		deadline := time.Now().Add(8 * time.Second)
		var group sync.WaitGroup
		for t := range tunnels {
			h2, err := s.Dial("app/client", "10.244.0.200")
			if err != nil {
				return err
			}
			defer h2.Close()
			for range 100 / tunnels {
				group.Go(func() {
					stream, err := golden.OpenStream(h2, "10.96.1.10:80")
					if err != nil {
						fmt.Println("tunnel", t, err)
						return
					}
					r := bufio.NewReader(stream)
					for time.Now().Before(deadline) {
						fmt.Fprint(stream, "GET / HTTP/1.1\r\nhost: web\r\nx-echo-script: 200+body=2\r\n\r\n")
						if _, err := wire.ReadResponse(r, "GET"); err != nil {
							return
						}
						requests.Add(1)
					}
					stream.Close()
				})
			}
		}
		group.Wait()
		after, err := s.Proxy.CPU()
		if err != nil {
			return err
		}
		fmt.Printf("%d tunnel connections, %d streams: %d requests;", tunnels, 100/tunnels*tunnels, requests.Load())
		var names []string
		for name := range after {
			if strings.HasPrefix(name, "wrk:worker") {
				names = append(names, name)
			}
		}
		sort.Strings(names)
		for _, name := range names {
			worker, _, _ := strings.Cut(name, "/")
			fmt.Printf(" %s %.2f s", worker, after[name]-before[name])
		}
		fmt.Println()
	}
	return nil
}
