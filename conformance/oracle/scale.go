package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"oracle/backend"
	"oracle/capture"
	"oracle/golden"
	"oracle/load"
	"oracle/wire"
)

// The scenario of the scale: 2,000 services from many-services.py, of which one is under load.
const (
	scaleScenario  = "41-many-services-2000"
	scaleManifests = "01-http-basic" // what many-services.py starts from
	scaleHost      = "svc-0001.app.svc.cluster.local"
	scaleChain     = "inbound-vip|80|http|" + scaleHost
	scaleVIP       = "10.97.0.2:80"
	scaleIdentity  = "spiffe://cluster.local/ns/app/sa/svc-0001"
)

var scalePods = []golden.ExtraHost{
	{Name: "svc-0001-0", IP: "10.245.0.2", HBONE: scaleIdentity},
	{Name: "svc-0001-1", IP: "10.246.0.2", HBONE: scaleIdentity},
}

// scaleBlocks is how often a time with pushes follows one without, so that a slow moment of the machine meets both.
const scaleBlocks = 3

// scale changes one chain among those of 2,000 services by sending every listener again, and measures from
// the last byte written to the first answer that obeys, and what the pushes cost other requests.
func scale(args []string) error {
	set, p := flags("scale")
	pushes := set.Int("pushes", 30, "how many pushes")
	every := set.Duration("every", 250*time.Millisecond, "the time between two pushes")
	connections := set.Int("connections", 4, "HTTP/1.1 connections of the steady load")
	limit := set.Duration("limit", 20*time.Millisecond, "the longest median from the last byte to obedience")
	set.StringVar(&p.runner.Command, "proxy-cmd", "", "shell command that runs the proxy under test (default: Envoy)")
	set.Parse(args)
	if *pushes < scaleBlocks || *connections < 1 || *every <= 0 {
		return fmt.Errorf("at least %d pushes, one connection and some time between two pushes", scaleBlocks)
	}
	p.runner.Concurrency = 2
	p.runner.Unobserved = true
	played := map[string]bool{}
	for _, pod := range scalePods {
		played[pod.IP] = true
	}
	p.runner.Plays = func(h backend.Host) bool { return played[h.IP] }
	const clientIP = "10.244.0.200"
	file := &golden.File{Scenario: scaleScenario, Hosts: scalePods, Cases: []golden.Case{{Request: golden.Request{From: clientIP}}}}
	s, err := p.runner.Open(file, filepath.Join(p.root, "scenarios", scaleManifests+".yaml"), p.captureIn("scale", p.root, scaleScenario))
	if s != nil {
		defer s.Close()
	}
	if err != nil {
		return err
	}
	s.Backend.Discard()
	bodies, err := preparePushes(s, *pushes)
	if err != nil {
		return err
	}
	m := &scaleMeasure{first: map[string]map[int]time.Time{"old": {}, "fresh": {}}}
	l := load.New(func() (*wire.H2, error) { return s.Dial("app/client", clientIP) })
	l.Answered = m.answered
	target := load.Target{Authority: scaleVIP, Host: scaleHost, Path: "/"}
	for i := range *connections {
		l.KeepAlive(fmt.Sprintf("HTTP/1.1 keep-alive, connection %d", i+1), target, m.saw("old"))
	}
	l.Fresh("a new stream for each request", target, m.saw("fresh"))
	if err := l.WaitOpen(); err != nil {
		l.Stop()
		return err
	}
	time.Sleep(time.Second) // connections and caches are warm
	err = m.run(s, bodies, *every)
	l.Stop()
	for _, line := range l.Report() {
		fmt.Println(line)
	}
	if refused := s.Control.Discovery.NACKs(); refused != nil {
		err = errors.Join(err, fmt.Errorf("%d updates were refused, first: %s", len(refused), refused[0]))
	}
	if !s.Proxy.Running() {
		err = errors.Join(err, errors.New("the proxy exited"))
	}
	return errors.Join(err, l.Err(), m.judge(*limit, listenerBytes(s)))
}

// preparePushes prepares main_internal once for each push, so that the pushes cost the machine little else.
func preparePushes(s *golden.Session, pushes int) ([]*anypb.Any, error) {
	internal, err := mainInternal(s.Set)
	if err != nil {
		return nil, err
	}
	var bodies []*anypb.Any
	for i := range pushes {
		if err := editChain(internal, scaleChain, generation(strconv.Itoa(i+1))); err != nil {
			return nil, err
		}
		body, err := anypb.New(internal)
		if err != nil {
			return nil, err
		}
		bodies = append(bodies, body)
	}
	return bodies, nil
}

func listenerBytes(s *golden.Session) int {
	sum := 0
	for _, r := range s.Set.Types[capture.Listener] {
		sum += proto.Size(r.Body)
	}
	return sum
}

// scaleMeasure is what the load saw.
type scaleMeasure struct {
	mu               sync.Mutex
	pushing          bool
	settling         bool // neither one nor the other
	quiet, disturbed []time.Duration
	first            map[string]map[int]time.Time // by kind of exchange, the first answer of a generation
	old, fresh       []time.Duration              // from the last byte to the first answer that obeys
}

func (m *scaleMeasure) answered(_ time.Time, took time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.settling:
	case m.pushing:
		m.disturbed = append(m.disturbed, took)
	default:
		m.quiet = append(m.quiet, took)
	}
}

func (m *scaleMeasure) saw(kind string) func(*wire.Message) {
	return func(message *wire.Message) {
		n, err := strconv.Atoi(wire.Get(message.Header, "x-generation"))
		if err != nil {
			return
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.first[kind][n].IsZero() {
			m.first[kind][n] = time.Now()
		}
	}
}

func (m *scaleMeasure) phase(pushing, settling bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pushing, m.settling = pushing, settling
}

// obeyed tells when a generation was first seen by both kinds of exchange.
func (m *scaleMeasure) obeyed(n int) (old, fresh time.Time, both bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	old, fresh = m.first["old"][n], m.first["fresh"][n]
	return old, fresh, !old.IsZero() && !fresh.IsZero()
}

// run pushes in blocks, each after a time of the same length without pushes.
func (m *scaleMeasure) run(s *golden.Session, bodies []*anypb.Any, every time.Duration) error {
	const patience = 10 * time.Second
	each := (len(bodies) + scaleBlocks - 1) / scaleBlocks
	m.phase(false, false)
	for i, body := range bodies {
		if i%each == 0 {
			m.phase(false, true)
			time.Sleep(every)
			m.phase(false, false)
			time.Sleep(time.Duration(each) * every)
			m.phase(true, false)
		}
		begun := time.Now()
		if err := s.Control.Discovery.ReplaceInFull(capture.Listener, "main_internal", body); err != nil {
			return err
		}
		for {
			old, fresh, both := m.obeyed(i + 1)
			if both {
				last := s.Control.LastData()
				m.old, m.fresh = append(m.old, old.Sub(last)), append(m.fresh, fresh.Sub(last))
				break
			}
			if time.Since(begun) > patience {
				return fmt.Errorf("push %d is not obeyed after %v", i+1, patience)
			}
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Until(begun.Add(every)))
	}
	m.phase(false, true)
	return nil
}

// judge prints the figures and holds them against the limits: the median, and twice the latency and 5 ms without pushes.
func (m *scaleMeasure) judge(limit time.Duration, size int) error {
	const factor, grace = 2, 5 * time.Millisecond
	round := func(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }
	var err error
	fmt.Printf("%d pushes of %.1f MB, one chain changed\n", len(m.old), float64(size)/1e6)
	for _, v := range []struct {
		name string
		lags []time.Duration
	}{{"an old connection", m.old}, {"a new stream", m.fresh}} {
		median, longest := load.Quantile(v.lags, 0.5), load.Quantile(v.lags, 1)
		fmt.Printf("%s obeys after the last byte: median %v, longest %v\n", v.name, round(median), round(longest))
		if median > limit {
			err = errors.Join(err, fmt.Errorf("%s obeys %v after the last byte (median; longest %v), later than %v", v.name, round(median), round(longest), limit))
		}
	}
	quiet, disturbed := load.Quantile(m.quiet, 0.99), load.Quantile(m.disturbed, 0.99)
	fmt.Printf("latency without pushes: p50 %v, p99 %v (%d answers); with: p50 %v, p99 %v, longest %v (%d answers)\n",
		round(load.Quantile(m.quiet, 0.5)), round(quiet), len(m.quiet),
		round(load.Quantile(m.disturbed, 0.5)), round(disturbed), round(load.Quantile(m.disturbed, 1)), len(m.disturbed))
	if disturbed > factor*quiet+grace {
		err = errors.Join(err, fmt.Errorf("p99 %v while pushes arrive is more than twice %v and %v", round(disturbed), round(quiet), grace))
	}
	return err
}
