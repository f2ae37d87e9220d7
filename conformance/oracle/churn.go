package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"oracle/capture"
	"oracle/golden"
	"oracle/load"
	"oracle/wire"
)

// The scenario of the churn: one service with two HTTP ports, a gRPC and a TCP port, on five endpoints.
const (
	churnScenario = "06-multi-port"
	churnChain    = "inbound-vip|80|http|shop.app.svc.cluster.local"
	churnHost     = "shop.app.svc.cluster.local"
	churnHTTP     = "10.96.1.50:80"
	churnOther    = "10.96.1.50:81"
	churnTCP      = "10.96.1.50:83"
)

// churn changes the configuration many times under load and counts what the load notices.
func churn(args []string) error {
	set, p := flags("churn")
	changes := set.Int("changes", 300, "how many changes")
	every := set.Duration("every", 30*time.Millisecond, "the time between two changes")
	lagLimit := set.Duration("lag-limit", 2*time.Second, "how soon an old connection must obey a changed route table")
	set.StringVar(&p.runner.Command, "proxy-cmd", "", "shell command that runs the proxy under test (default: Envoy)")
	set.Parse(args)
	p.runner.Concurrency = 2
	file, err := golden.ReadFile(filepath.Join(p.root, "requests", churnScenario+".yaml"))
	if err != nil {
		return err
	}
	s, err := p.runner.Open(file, filepath.Join(p.root, "scenarios", churnScenario+".yaml"), p.captureDir(p.root, churnScenario))
	if s != nil {
		defer s.Close()
	}
	if err != nil {
		return err
	}
	s.Backend.Discard()
	seen := newGenerations()
	planned := time.Duration(*changes) * *every
	l := load.New(func() (*wire.H2, error) { return s.Dial("app/client", "10.244.0.200") })
	web := load.Target{Authority: churnHTTP, Host: churnHost, Path: "/"}
	other := load.Target{Authority: churnOther, Host: churnHost, Path: "/"}
	l.KeepAlive("HTTP/1.1 keep-alive, changed port", web, seen.old.saw)
	l.KeepAlive("HTTP/1.1 keep-alive, other port", other, nil)
	l.Fresh("a new stream for each request", web, seen.fresh.saw)
	l.HTTP2("HTTP/2 inside, changed port", web)
	l.WebSocket("WebSocket, changed port", web)
	l.WebSocket("WebSocket, other port", other)
	l.TCP("TCP", churnTCP)
	l.LongResponse("responses of 3 s", web, 3*time.Second)
	l.LongResponse("a response as long as the run", other, planned+time.Second)
	if err := l.WaitOpen(); err != nil {
		l.Stop()
		return err
	}
	time.Sleep(300 * time.Millisecond) // the long responses are under way
	begun := time.Now()
	err = applyChanges(s, *changes, *every, seen)
	took := time.Since(begun)
	if err == nil {
		err = seen.settled(*lagLimit)
	}
	time.Sleep(500 * time.Millisecond)
	l.Stop()
	for _, line := range l.Report() {
		fmt.Println(line)
	}
	fmt.Printf("%d changes in %.1f s\n", *changes, took.Seconds())
	for _, v := range []*views{&seen.old, &seen.fresh} {
		lags := v.lags()
		fmt.Printf("%s obeys after: p50 %v, p99 %v, longest %v (%d measured)\n", v.name, load.Quantile(lags, 0.5).Round(100*time.Microsecond),
			load.Quantile(lags, 0.99).Round(100*time.Microsecond), load.Quantile(lags, 1).Round(100*time.Microsecond), len(lags))
	}
	if refused := s.Control.Discovery.NACKs(); refused != nil {
		err = errors.Join(err, fmt.Errorf("%d updates were refused, first: %s", len(refused), refused[0]))
	}
	if !s.Proxy.Running() {
		err = errors.Join(err, errors.New("the proxy exited"))
	}
	return errors.Join(err, l.Err())
}

// generations notes when a changed route table was pushed and when it was first obeyed.
type generations struct {
	mu         sync.Mutex
	last       int
	pushed     map[int]time.Time
	old, fresh views
}

type views struct {
	name string
	g    *generations
	last int
	took []time.Duration
}

func newGenerations() *generations {
	g := &generations{pushed: map[int]time.Time{}}
	g.old = views{name: "an old connection", g: g}
	g.fresh = views{name: "a new stream", g: g}
	return g
}

func (g *generations) push(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.last, g.pushed[n] = n, time.Now()
}

// saw reads the generation of an answer.
func (v *views) saw(m *wire.Message) {
	n, err := strconv.Atoi(wire.Get(m.Header, "x-generation"))
	if err != nil {
		return
	}
	v.g.mu.Lock()
	defer v.g.mu.Unlock()
	for i := v.last + 1; i <= n; i++ { // a generation that was overtaken was obeyed no later than this one
		if at, ok := v.g.pushed[i]; ok {
			v.took = append(v.took, time.Since(at))
			delete(v.g.pushed, i-64) // both views are long past it
		}
	}
	v.last = max(v.last, n)
}

func (v *views) lags() []time.Duration {
	v.g.mu.Lock()
	defer v.g.mu.Unlock()
	return v.took
}

// settled waits until both views have seen the last generation.
func (g *generations) settled(limit time.Duration) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		g.mu.Lock()
		last, old, fresh := g.last, g.old.last, g.fresh.last
		g.mu.Unlock()
		if old == last && fresh == last {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%v after the last change requests do not obey it: generation %d, an old connection shows %d, a new stream %d", limit, last, old, fresh)
		}
	}
}

// churnState is the configuration as it stands between two changes.
type churnState struct {
	s        *golden.Session
	internal *listener.Listener
	ports    int
	seen     *generations
	full     *endpoint.ClusterLoadAssignment
	turn     int
}

// applyChanges runs through the kinds of change in turn.
func applyChanges(s *golden.Session, n int, every time.Duration, seen *generations) error {
	internal, err := mainInternal(s.Set)
	if err != nil {
		return err
	}
	state := &churnState{s: s, internal: internal, seen: seen}
	kinds := []func(*churnState, int) error{
		(*churnState).chainChanged, (*churnState).chainAdded, (*churnState).portAdded, (*churnState).routeAdded,
		(*churnState).endpointsChanged, (*churnState).clusterChanged, (*churnState).everythingAgain, (*churnState).chainChanged,
	}
	next := time.Now()
	for i := range n {
		if err := kinds[i%len(kinds)](state, i); err != nil {
			return fmt.Errorf("change %d: %w", i, err)
		}
		next = next.Add(every)
		time.Sleep(time.Until(next))
	}
	return nil
}

func (c *churnState) push() error {
	return c.s.Control.Discovery.Replace(capture.Listener, "main_internal", c.internal)
}

// chainChanged gives the route table of one chain a new response header.
func (c *churnState) chainChanged(int) error {
	c.turn++
	if err := editChain(c.internal, churnChain, generation(strconv.Itoa(c.turn))); err != nil {
		return err
	}
	c.seen.push(c.turn)
	return c.push()
}

// chainAdded adds the chain of another service, or takes it away again.
func (c *churnState) chainAdded(i int) error {
	const added = "inbound-vip|80|http|added.app.svc.cluster.local"
	kept := c.internal.FilterChains[:0:0]
	for _, chain := range c.internal.FilterChains {
		if chain.Name != added {
			kept = append(kept, chain)
		}
	}
	if len(kept) == len(c.internal.FilterChains) {
		for _, chain := range kept {
			if chain.Name == churnChain {
				another := proto.Clone(chain).(*listener.FilterChain)
				another.Name = added
				kept = append(kept, another)
				break
			}
		}
	}
	c.internal.FilterChains = kept
	return c.push()
}

// portAdded excludes one more port number from protocol inspection, as istiod does when any service
// of the waypoint declares a port number for the first time. After 50 the list starts again.
func (c *churnState) portAdded(int) error {
	const base, most = 20000, 50
	for _, f := range c.internal.ListenerFilters {
		rules := f.GetFilterDisabled().GetOrMatch()
		if rules == nil {
			continue
		}
		if c.ports%most == 0 && c.ports > 0 {
			rules.Rules = rules.Rules[:len(rules.Rules)-most]
		}
		port := int32(base + c.ports%most)
		rules.Rules = append(rules.Rules, &listener.ListenerFilterChainMatchPredicate{
			Rule: &listener.ListenerFilterChainMatchPredicate_DestinationPortRange{DestinationPortRange: &typev3.Int32Range{Start: port, End: port + 1}},
		})
		c.ports++
		return c.push()
	}
	return errors.New("no listener filter excludes ports from inspection")
}

// routeAdded puts a route before the others, in place of the one that it put there before.
func (c *churnState) routeAdded(i int) error {
	const name = "churned"
	err := editChain(c.internal, churnChain, func(m *hcm.HttpConnectionManager) {
		for _, host := range m.GetRouteConfig().GetVirtualHosts() {
			routes := host.Routes
			if len(routes) > 0 && routes[0].Name == name {
				routes = routes[1:]
			}
			if len(routes) == 0 {
				continue
			}
			added := proto.Clone(routes[len(routes)-1]).(*route.Route)
			added.Name = name
			added.Match = &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: fmt.Sprintf("/churned-%d", i)}}
			host.Routes = append([]*route.Route{added}, routes...)
		}
	})
	if err != nil {
		return err
	}
	return c.push()
}

// endpointsChanged takes one endpoint of the changed port away, another one each time.
func (c *churnState) endpointsChanged(i int) error {
	if c.full == nil {
		r := c.s.Set.Find(capture.Endpoint, churnChain)
		if r == nil {
			return errors.New("no endpoints of " + churnChain)
		}
		c.full = &endpoint.ClusterLoadAssignment{}
		if err := r.Body.UnmarshalTo(c.full); err != nil {
			return err
		}
	}
	all := 0
	for _, locality := range c.full.Endpoints {
		all += len(locality.LbEndpoints)
	}
	gone := (i / 8) % (all + 1) // one round in between without a loss
	fewer := proto.Clone(c.full).(*endpoint.ClusterLoadAssignment)
	at := 0
	for _, locality := range fewer.Endpoints {
		kept := locality.LbEndpoints[:0:0]
		for _, e := range locality.LbEndpoints {
			if at != gone {
				kept = append(kept, e)
			}
			at++
		}
		locality.LbEndpoints = kept
	}
	return c.s.Control.Discovery.Replace(capture.Endpoint, churnChain, fewer)
}

// clusterChanged changes the connect timeout of the changed port's cluster.
func (c *churnState) clusterChanged(i int) error {
	r := c.s.Set.Find(capture.Cluster, churnChain)
	if r == nil {
		return errors.New("no cluster " + churnChain)
	}
	changed := &cluster.Cluster{}
	if err := r.Body.UnmarshalTo(changed); err != nil {
		return err
	}
	changed.ConnectTimeout = durationpb.New(10*time.Second + time.Duration(i%100)*time.Millisecond)
	return c.s.Control.Discovery.Replace(capture.Cluster, churnChain, changed)
}

// everythingAgain sends every cluster and listener again, unchanged, as istiod does on nearly every change.
func (c *churnState) everythingAgain(int) error {
	for _, url := range []string{capture.Cluster, capture.Listener} {
		if err := c.s.Control.Discovery.Resend(url); err != nil {
			return err
		}
	}
	return nil
}
