package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"oracle/backend"
	"oracle/golden"
	"oracle/rig"
)

// Where the programs listen, in the namespace of the destinations: the addresses of their pods lead there.
const (
	rateLimitPort = "8081"
	authzGRPCPort = "9000"
	authzHTTPPort = "8000"
	redisAddress  = "127.0.0.1:6379"
	// The rate limit service's own pages; its standard ports are the applications'.
	rateLimitHTTP  = "18080"
	rateLimitDebug = "16070"

	servicesClient = "10.244.0.200"
	limitedClient  = "10.244.7.7" // whom the rate limit service knows by address
)

// Addresses of the services in conformance/services/mesh.yaml.
var serviceAddress = map[string]string{
	"limited": "10.96.1.10:80", "lenient": "10.96.1.11:80", "by-grpc": "10.96.1.12:80", "by-grpc-open": "10.96.1.13:80", "by-http": "10.96.1.14:80",
}

// services are the programs that take part, and the session through which they are asked.
type services struct {
	*golden.Session
	ratelimit, redis, extauthz string // programs
	config                     string
	ours                       bool // the proxy is not Envoy
	running                    map[string]*rig.Proxy
	starts                     int
}

// runServices puts the reference rate limit service, on a real Redis, and Istio's sample authorizer behind the proxy.
func runServices(args []string) error {
	set, p := flags("services")
	x := &services{running: map[string]*rig.Proxy{}}
	set.StringVar(&x.ratelimit, "ratelimit", "", "the reference rate limit service (conformance/services)")
	set.StringVar(&x.redis, "redis", "redis-server", "Redis")
	set.StringVar(&x.extauthz, "extauthz", "", "Istio's sample authorizer (istio.io/istio/samples/extauthz/cmd/extauthz)")
	set.StringVar(&p.runner.Command, "proxy-cmd", "", "shell command that runs the proxy under test (default: Envoy)")
	set.Parse(args)
	if x.ratelimit == "" || x.extauthz == "" {
		return errors.New("--ratelimit and --extauthz are required: see conformance/suites/services.sh")
	}
	folder, err := filepath.Abs(filepath.Join(filepath.Dir(filepath.Clean(p.root)), "services"))
	if err != nil {
		return err
	}
	x.config, x.ours = filepath.Join(folder, "ratelimit"), p.runner.Command != ""
	p.runner.Leaves = []int{8081, 9000, 8000}
	p.runner.Unobserved = true
	file := &golden.File{Scenario: "services", Cases: []golden.Case{
		{Name: "a", Request: golden.Request{From: servicesClient}}, {Name: "b", Request: golden.Request{From: limitedClient}},
	}}
	x.Session, err = p.runner.Open(file, filepath.Join(folder, "mesh.yaml"), filepath.Join(folder, "capture"))
	if x.Session != nil {
		defer x.Close()
	}
	if err != nil {
		return err
	}
	defer func() {
		for _, process := range x.running {
			process.Stop()
		}
	}()
	if err := errors.Join(x.startRedis(), x.startRateLimit(), x.startAuthz()); err != nil {
		return err
	}
	failed := 0
	for _, step := range serviceSteps {
		if err := step.do(x); err != nil {
			fmt.Printf("FAILED %s: %v\n", step.name, err)
			failed++
			continue
		}
		fmt.Printf("ok     %s\n", step.name)
	}
	fmt.Printf("%d of %d steps passed\n", len(serviceSteps)-failed, len(serviceSteps))
	if failed > 0 {
		return fmt.Errorf("%d steps failed", failed)
	}
	return nil
}

// start runs a program and waits until it listens.
func (x *services) start(name, address string, argv []string, environment ...string) error {
	x.starts++
	process, err := x.Network.StartDest(argv, append(environment, "HOME="+x.Dir()), x.Dir(), filepath.Join(x.Dir(), fmt.Sprintf("%s-%d.log", name, x.starts)))
	if err != nil {
		return err
	}
	x.running[name] = process
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := x.Network.DialDest(address, time.Second)
		switch {
		case err == nil:
			conn.Close()
			return nil
		case !process.Running() || time.Now().After(deadline):
			return fmt.Errorf("%s does not listen on %s: %v\n%s", name, address, err, process.Tail(2000))
		}
	}
}

func (x *services) startRedis() error {
	return x.start("redis", redisAddress, []string{x.redis, "--port", "6379", "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", x.Dir()})
}

func (x *services) startRateLimit() error {
	return x.start("ratelimit", "127.0.0.1:"+rateLimitPort, []string{x.ratelimit},
		"USE_STATSD=false", "USE_PROMETHEUS=false", "LOG_LEVEL=info", "REDIS_SOCKET_TYPE=tcp", "REDIS_URL="+redisAddress, "RUNTIME_ROOT="+filepath.Dir(x.config),
		"RUNTIME_SUBDIRECTORY="+filepath.Base(x.config), "RUNTIME_WATCH_ROOT=false", "GRPC_PORT="+rateLimitPort, "PORT="+rateLimitHTTP, "DEBUG_PORT="+rateLimitDebug)
}

func (x *services) startAuthz() error {
	return x.start("extauthz", "127.0.0.1:"+authzGRPCPort, []string{x.extauthz, "-http", authzHTTPPort, "-grpc", authzGRPCPort, "-allow_service_account", "trusted"})
}

// end stops a program without a goodbye.
func (x *services) end(name string) error {
	x.running[name].Kill()
	delete(x.running, name)
	return nil
}

// ask sends one request to a service.
func (x *services) ask(service, path string, headers ...string) (golden.Response, []backend.Arrival) {
	return x.Ask(golden.Case{Name: service, Request: golden.Request{
		To: serviceAddress[service], Authority: service + ".app.svc.cluster.local", Path: path, Headers: headers, From: servicesClient,
	}})
}

// want is what an answer must have: a status, and header lines or parts of them.
func want(status int, lines ...string) func(golden.Response) error {
	return func(r golden.Response) error {
		if r.Status != status {
			return fmt.Errorf("status %d instead of %d (%s%s)", r.Status, status, r.Body, r.End)
		}
		for _, line := range lines {
			if !slices.ContainsFunc(r.Headers, func(h string) bool { return strings.HasPrefix(h, line) }) {
				return fmt.Errorf("no header %q among %q", line, r.Headers)
			}
		}
		return nil
	}
}

// each sends the same request once for each expectation.
func each(service, path string, headers []string, expect ...func(golden.Response) error) func(*services) error {
	return func(x *services) error {
		for i, check := range expect {
			answer, _ := x.ask(service, path, headers...)
			if err := check(answer); err != nil {
				return fmt.Errorf("request %d to %s%s: %w", i+1, service, path, err)
			}
		}
		return nil
	}
}

// eventually repeats a request until it is answered so: a proxy may leave an endpoint that failed alone for a moment.
func eventually(service, path string, expect func(golden.Response) error) func(*services) error {
	return func(x *services) error {
		for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(100 * time.Millisecond) {
			answer, _ := x.ask(service, path)
			err := expect(answer)
			if err == nil || time.Now().After(deadline) {
				return err
			}
		}
	}
}

func steps(all ...func(*services) error) func(*services) error {
	return func(x *services) error {
		for _, do := range all {
			if err := do(x); err != nil {
				return err
			}
		}
		return nil
	}
}

// arrives checks a request that is let in: what its application receives.
func arrives(service, path string, headers []string, lines ...string) func(*services) error {
	return func(x *services) error {
		answer, arrivals := x.ask(service, path, headers...)
		if err := want(200)(answer); err != nil {
			return err
		}
		if len(arrivals) != 1 {
			return fmt.Errorf("%d requests arrived", len(arrivals))
		}
		for _, line := range lines {
			name, value, _ := strings.Cut(line, ": ")
			found := false
			for _, f := range arrivals[0].Header {
				found = found || strings.EqualFold(f.Name, name) && strings.Contains(f.Value, value)
			}
			if !found {
				return fmt.Errorf("no header %q among %v", line, arrivals[0].Header)
			}
		}
		return nil
	}
}

// refused checks a request that is not let in: its answer, and that nothing arrived.
func refused(service, path string, headers []string, body string, expect func(golden.Response) error) func(*services) error {
	return func(x *services) error {
		answer, arrivals := x.ask(service, path, headers...)
		if err := expect(answer); err != nil {
			return err
		}
		if !strings.Contains(answer.Body, body) {
			return fmt.Errorf("the body is %q", answer.Body)
		}
		if len(arrivals) > 0 {
			return fmt.Errorf("%d requests arrived", len(arrivals))
		}
		return nil
	}
}

const deniedBody = "denied by ext_authz for not found header"

var (
	allow = []string{"x-ext-authz: allow"}
	deny  = []string{"x-ext-authz: deny"}
)

var serviceSteps = []struct {
	name string
	do   func(*services) error
}{
	{"rate limit: three pass, the fourth is refused, and the answers count down", each("limited", "/three", nil,
		want(200, "x-ratelimit-limit: 3, 3;w=86400", "x-ratelimit-remaining: 2", "x-ratelimit-reset: "), want(200, "x-ratelimit-remaining: 1"),
		want(200, "x-ratelimit-remaining: 0"), want(429, "x-envoy-ratelimited: true", "x-ratelimit-limit: 3, 3;w=86400", "x-ratelimit-remaining: 0"))},
	{"rate limit: another service with the same descriptors shares the count", each("lenient", "/three", nil, want(429, "x-envoy-ratelimited: true"))},
	{"rate limit: a path without a rule is not counted", each("limited", "/free", nil, want(200), want(200), want(200), want(200))},
	{"rate limit: each tenant has a count of its own", steps(
		each("limited", "/tenants", []string{"x-tenant: red"}, want(200, "x-ratelimit-limit: 2, 2;w=86400"), want(200), want(429)),
		each("limited", "/tenants", []string{"x-tenant: blue"}, want(200), want(200), want(429)))},
	{"rate limit: an unlimited tenant passes", each("limited", "/tenants", []string{"x-tenant: gold"}, want(200), want(200), want(200), want(200))},
	{"rate limit: without the header there is no such descriptor", each("limited", "/tenants", nil, want(200), want(200), want(200))},
	{"rate limit: shadow mode counts and lets pass", each("limited", "/shadow", nil, want(200), want(200), want(200))},
	{"rate limit: by the client's address", func(x *services) error {
		for i, status := range []int{200, 429} {
			answer, _ := x.Ask(golden.Case{Name: "by-address", Request: golden.Request{To: serviceAddress["limited"], Authority: "limited.app.svc.cluster.local", Path: "/any", From: limitedClient}})
			if err := want(status)(answer); err != nil {
				return fmt.Errorf("request %d: %w", i+1, err)
			}
		}
		return each("limited", "/any", nil, want(200), want(200))(x)
	}},
	{"rate limit: Redis gone: the service fails, closed answers 500, open lets pass", steps(
		func(x *services) error { return x.end("redis") },
		each("limited", "/after", nil, want(500)), each("lenient", "/after", nil, want(200)))},
	{"rate limit: Redis back: counted again", steps((*services).startRedis, eventually("limited", "/after", want(200, "x-ratelimit-limit: 2")))},
	{"rate limit: service gone: closed answers 500, open lets pass", steps(
		func(x *services) error { return x.end("ratelimit") },
		each("limited", "/gone", nil, want(500), want(500)), each("lenient", "/gone", nil, want(200), want(200)))},
	{"rate limit: service back: counts go on where they were", steps((*services).startRateLimit,
		eventually("limited", "/free", want(200)), each("limited", "/after", nil, want(200, "x-ratelimit-remaining: 0"), want(429)))},

	{"ext_authz over gRPC: allowed, with the headers of the answer", arrives("by-grpc", "/x", append(allow, "x-ext-authz-additional-header-override: spoofed"),
		"x-ext-authz-check-result: allowed", "x-ext-authz-check-received: /x", "x-ext-authz-additional-header-override: grpc-additional-header-override-value")},
	{"ext_authz over gRPC: denied, with body and headers of the answer", refused("by-grpc", "/x", deny, deniedBody, want(403, "x-ext-authz-check-result: denied", "x-ext-authz-additional-header-override: grpc-"))},
	{"ext_authz over gRPC: denied without the header", refused("by-grpc", "/x", nil, deniedBody, want(403))},
	{"ext_authz over gRPC: a path that no rule names is not asked about", arrives("by-grpc", "/free", deny)},
	{"ext_authz over gRPC: the client's identity is told (Envoy tells none)", func(x *services) error {
		answer, _ := x.Ask(golden.Case{Name: "by-account", Request: golden.Request{To: serviceAddress["by-grpc"], Authority: "by-grpc.app.svc.cluster.local", Path: "/x", From: servicesClient, As: "app/trusted"}})
		if x.ours {
			return want(200)(answer)
		}
		return want(403)(answer)
	}},
	{"ext_authz over gRPC: a body goes along and on", func(x *services) error {
		answer, arrivals := x.Ask(golden.Case{Name: "body", Request: golden.Request{
			To: serviceAddress["by-grpc"], Authority: "by-grpc.app.svc.cluster.local", Method: "POST", Path: "/x", From: servicesClient, Headers: allow, Body: strings.Repeat("body ", 200),
		}})
		if err := want(200)(answer); err != nil {
			return err
		}
		if len(arrivals) != 1 || arrivals[0].BodySize != 1000 {
			return fmt.Errorf("the application got %v", arrivals)
		}
		for _, f := range arrivals[0].Header {
			if f.Name == "x-ext-authz-check-received" && strings.Contains(f.Value, "body body") {
				return nil
			}
		}
		return errors.New("the authorizer was not told the body")
	}},
	{"ext_authz over HTTP: allowed, with the chosen headers of the answer", arrives("by-http", "/x?q=1", allow,
		"x-ext-authz-check-result: allowed", "x-ext-authz-additional-header-override: some-value")},
	{"ext_authz over HTTP: denied, with body and the chosen headers", refused("by-http", "/x", deny, deniedBody, want(403, "x-ext-authz-check-result: denied"))},
	{"ext_authz over HTTP: denied without the header", refused("by-http", "/x", nil, deniedBody, want(403))},
	{"ext_authz: authorizer gone: 403 over gRPC, the configured status over HTTP, open lets pass", steps(
		func(x *services) error { return x.end("extauthz") },
		each("by-grpc", "/x", allow, want(403), want(403)), each("by-http", "/x", allow, want(503)), each("by-grpc-open", "/x", deny, want(200)))},
	{"ext_authz: authorizer back: asked again", steps((*services).startAuthz, func(x *services) error {
		for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(100 * time.Millisecond) {
			err := errors.Join(each("by-grpc", "/x", allow, want(200))(x), each("by-http", "/x", allow, want(200))(x), each("by-grpc-open", "/x", deny, want(403))(x))
			if err == nil || time.Now().After(deadline) {
				return err
			}
		}
	})},
}
