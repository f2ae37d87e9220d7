package golden

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"oracle/backend"
	"oracle/wire"
)

// batchLog is what both proxies' access logs must say alike about a request of a batch.
var batchLog = []string{"code", "flags", "details", "attempts", "route", "cluster"}

// batchSettle is how long late arrivals, such as mirrors and given up attempts, may take; batchLogLimit is how
// long the last lines of a log may take to be flushed.
const (
	batchSettle   = 400 * time.Millisecond
	batchLogLimit = 4 * time.Second
)

// RecordBatch runs all cases of a scenario over one start of the proxy, many at once. Arrivals and log lines
// find their case by the x-case header, so a case needs nothing from those beside it.
func (r *Runner) RecordBatch(f *File, manifests, captureDir string, workers int) (*Golden, error) {
	s, err := r.Open(f, manifests, captureDir)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	g := &Golden{Scenario: f.Scenario, Istio: s.Set.Istio, Changed: s.Report.Lines(), Proxy: "envoy 1.40.0"}
	if r.Command != "" {
		g.Proxy = "other"
	}
	cases := slices.DeleteFunc(slices.Clone(f.Cases), func(c Case) bool { return !strings.Contains(c.Name, r.Only) })
	outcomes := make([][]Outcome, len(cases))
	shared := &sharedTunnels{open: map[string]*wire.H2{}}
	defer shared.close()
	work := make(chan int)
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			for i := range work {
				outcomes[i] = s.batchCase(cases[i], shared)
			}
		})
	}
	for i := range cases {
		work <- i
	}
	close(work)
	group.Wait()
	time.Sleep(batchSettle)
	arrivals := map[string][]backend.Arrival{}
	for _, a := range s.Backend.Arrivals(0) {
		name, _, _ := strings.Cut(a.Case, "#")
		arrivals[name] = append(arrivals[name], a)
	}
	log := s.batchLogs(len(cases))
	for i, c := range cases {
		result := Result{Name: c.Name, Tolerance: c.Tolerance}
		if times := max(c.Repeat, c.Parallel, 1); times > 1 {
			result.Distribution, result.Of = s.count(c, outcomes[i], arrivals[c.Name]), times
			result.Backend = []ArrivalView{}
		} else {
			outcome := outcomes[i][0]
			outcome.Timing = timing(outcome.elapsed, c.Timing)
			if _, window, missed := strings.Cut(outcome.Timing, ", "); missed { // by how much is chance
				outcome.Timing = window
			}
			s.World.normaliseOutcome(&outcome, arrivals[c.Name], c)
			for _, r := range outcome.Responses {
				for i, line := range r.Headers {
					if r.End != "" && strings.HasPrefix(line, "content-length:") { // of a report that was cut: its number has digits
						r.Headers[i] = "content-length: <cut>"
					}
				}
			}
			result.Client, result.Backend, result.Log = &outcome, s.World.view(arrivals[c.Name], c), log[c.Name]
			if f.Verdicts {
				result = verdict(c, result)
			}
		}
		g.Cases = append(g.Cases, result)
	}
	g.Refused = s.Control.Discovery.NACKs()
	return g, nil
}

func (s *Session) batchCase(c Case, shared *sharedTunnels) []Outcome {
	if times := max(c.Repeat, c.Parallel, 1); times > 1 {
		return s.many(c, times)
	}
	if !s.File.Verdicts || c.As == "none" || c.As == "untrusted" {
		return []Outcome{s.once(c, c.Name)}
	}
	h2, err := shared.get(s.client, c.Request)
	if err != nil {
		return []Outcome{{TLS: err.Error()}}
	}
	return []Outcome{s.client.run(h2, c.Name, append([]Request{c.Request}, c.Then...))}
}

// sharedTunnels keeps one tunnel connection for each identity and address.
type sharedTunnels struct {
	mu   sync.Mutex
	open map[string]*wire.H2
}

func (t *sharedTunnels) get(c *client, r Request) (*wire.H2, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	key := r.As + " " + r.From
	if h2 := t.open[key]; h2 != nil && h2.Err() == nil {
		return h2, nil
	}
	h2, err := c.tunnels(r)
	if err == nil {
		t.open[key] = h2
	}
	return h2, err
}

func (t *sharedTunnels) close() {
	for _, h2 := range t.open {
		h2.Close()
	}
}

// batchLogs reads the access log once it has as many lines as there were requests, or no more come.
func (s *Session) batchLogs(expected int) map[string][]map[string]string {
	var out map[string][]map[string]string
	for deadline := time.Now().Add(batchLogLimit); ; time.Sleep(100 * time.Millisecond) {
		lines := 0
		out, lines = s.parseBatchLog()
		if lines >= expected || time.Now().After(deadline) {
			return out
		}
	}
}

func (s *Session) parseBatchLog() (map[string][]map[string]string, int) {
	out := map[string][]map[string]string{}
	data, err := os.ReadFile(s.logPath)
	if err != nil {
		return out, 0
	}
	lines := 0
	for _, line := range strings.Split(string(data), "\n") {
		var raw map[string]any
		if json.Unmarshal([]byte(line), &raw) != nil {
			continue
		}
		name, _ := raw["case"].(string)
		if name == "" || strings.Contains(name, "#") {
			continue
		}
		lines++
		entry := map[string]string{}
		for _, key := range batchLog {
			if text := fmt.Sprint(raw[key]); raw[key] != nil && text != "" && text != "-" {
				entry[key] = text
			}
		}
		out[name] = append(out[name], entry)
	}
	return out, lines
}

// verdict keeps of a result who was let in, and why not.
func verdict(c Case, r Result) Result {
	short := Result{Name: r.Name, Client: &Outcome{TLS: r.Client.TLS}, Backend: []ArrivalView{}}
	if c.Protocol == "tcp" { // when the client is told, and how, is not the question
		kept := Response{End: "denied"}
		if rs := r.Client.Responses; len(rs) > 0 && rs[0].Body == c.Body {
			kept = Response{Body: "echoed"}
		}
		short.Client.Responses = []Response{kept}
		return short
	}
	if t := r.Client.Tunnel; t != nil {
		short.Client.Tunnel = &Response{Status: t.Status, End: t.End}
	}
	for _, response := range r.Client.Responses {
		kept := Response{Status: response.Status, End: response.End}
		if response.Status != 200 {
			kept.Body = response.Body
		}
		short.Client.Responses = append(short.Client.Responses, kept)
	}
	for _, a := range r.Backend {
		short.Backend = append(short.Backend, ArrivalView{Arrival: backend.Arrival{Pod: a.Pod, Protocol: a.Protocol, Path: a.Path}})
	}
	for _, line := range r.Log {
		kept := map[string]string{}
		for _, key := range []string{"details", "flags"} {
			if line[key] != "" {
				kept[key] = line[key]
			}
		}
		short.Log = append(short.Log, kept)
	}
	return short
}

// WriteLines stores a recording with one case a line.
func (g *Golden) WriteLines(path string) error {
	var out strings.Builder
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	head := *g
	head.Cases = nil
	if err := encoder.Encode(head); err != nil {
		return err
	}
	for _, c := range g.Cases {
		if err := encoder.Encode(c); err != nil {
			return err
		}
	}
	return os.WriteFile(path, []byte(out.String()), 0o644)
}

// ReadLines loads what WriteLines stored.
func ReadLines(path string) (*Golden, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	decoder := json.NewDecoder(f)
	g := &Golden{}
	if err := decoder.Decode(g); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for decoder.More() {
		var r Result
		if err := decoder.Decode(&r); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		g.Cases = append(g.Cases, r)
	}
	return g, nil
}
