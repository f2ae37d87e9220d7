package matrix

import (
	"fmt"
	"slices"
	"time"

	"oracle/golden"
)

// Traffic makes services with VirtualServices, HTTPRoutes and DestinationRules, and requests that meet their rules or nearly do.
func Traffic(seed uint64, units int) (*Suite, error) {
	m := newMaker("traffic", seed)
	for i := range units {
		switch i % 8 {
		case 0, 2, 4:
			m.virtualService()
		case 1, 3, 5:
			m.httpRoute()
		case 6:
			m.hashing()
		default:
			m.limits()
		}
	}
	m.odd()
	return m.finish()
}

// odd is what this proxy decides otherwise on purpose, kept out of all other services so that the list of it stays short.
func (m *maker) odd() {
	u := m.unit("odd", web)
	u.add(object{
		"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": object{"name": u.Name, "namespace": "app"},
		"spec": object{"hosts": []string{u.host()}, "http": []object{
			{"match": []object{{"headers": object{"user-agent": object{"exact": "blue"}}}}, "directResponse": object{"status": 418}},
			{"match": []object{{"uri": object{"exact": "/direct"}}}, "directResponse": object{"status": 404}, "headers": object{"response": object{"set": object{"x-direct": "%RESPONSE_CODE%"}}}},
			{"match": []object{{"uri": object{"exact": "/late"}}}, "route": []object{{"destination": object{"host": u.Name}}}, "fault": object{
				"abort": object{"httpStatus": 400, "percentage": object{"value": 100}}, "delay": object{"fixedDelay": "30ms", "percentage": object{"value": 100}}}},
			{"match": []object{{"uri": object{"exact": "/twice"}}}, "headers": object{"response": object{"add": object{"content-type": "text/plain"}}}, "route": []object{{"destination": object{"host": u.Name}}}},
			{"match": []object{{"uri": object{"prefix": "/known"}}}, "route": []object{{"destination": object{"host": u.Name}}}},
		}},
	})
	u.send("two-user-agents", golden.Case{Request: golden.Request{Path: "/known", Headers: []string{"user-agent: blue", "user-agent: green"}}})
	u.send("two-user-agents", golden.Case{Request: golden.Request{Path: "/known", Headers: []string{"user-agent: red", "user-agent: green"}}})
	u.send("direct-status", golden.Case{Request: golden.Request{Path: "/direct"}})
	u.send("two-content-types", golden.Case{Request: golden.Request{Path: "/twice"}})
	u.send("delayed-abort", golden.Case{Request: golden.Request{Path: "/late"}})
	u.send("head-without-route", golden.Case{Request: golden.Request{Method: "HEAD", Path: "/unknown"}})
	u.send("head", golden.Case{Request: golden.Request{Method: "HEAD", Path: "/known"}})
}

var web = object{"app": "web", "version": "v1"}

// action is what a rule does with a request.
type action struct {
	kind string
	add  func(rule object)
	// shape prepares a request that is to meet the rule.
	shape func(c *golden.Case)
}

func (m *maker) virtualService() {
	u := m.unit("vs", object{"app": "web"})
	u.add(object{
		"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": object{"name": u.Name, "namespace": "app"},
		"spec": object{"host": u.Name, "subsets": []object{{"name": "v1", "labels": object{"version": "v1"}}, {"name": "v2", "labels": object{"version": "v2"}}}},
	})
	var rules []object
	for n := range 4 + m.IntN(3) {
		conditions := []match{m.newMatch(false)}
		if m.chance(30) {
			conditions = append(conditions, m.newMatch(false))
		}
		var matches []object
		for _, c := range conditions {
			matches = append(matches, c.istio())
		}
		rule := object{"name": fmt.Sprintf("rule-%d", n), "match": matches}
		does := m.istioAction(u)
		does.add(rule)
		rules = append(rules, rule)
		m.probe(u, does, conditions)
	}
	last := object{"name": "last", "route": []object{{"destination": object{"host": u.Name, "subset": "v1"}}}}
	if m.chance(30) {
		last["headers"] = m.istioHeaders()
	}
	u.add(object{
		"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": object{"name": u.Name, "namespace": "app"},
		"spec": object{"hosts": []string{u.host()}, "http": append(rules, last)},
	})
}

// probe sends requests at a rule: some that meet it, some that nearly do.
func (m *maker) probe(u *Unit, does action, conditions []match) {
	for i := range 4 {
		meet := i < 2 || m.chance(30)
		c := golden.Case{Request: m.request(pick(m, conditions...), meet)}
		if meet && does.shape != nil {
			does.shape(&c)
		}
		u.send(does.kind, c)
	}
}

func (m *maker) istioHeaders() object {
	values := []string{"plain", "%REQ(x-case)%", "%PROTOCOL%", "50%%", "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", "%REQ(:authority)% via", "a, b"}
	responses := []string{"plain", "%RESPONSE_CODE%", "%REQ(x-case)%", "%UPSTREAM_CLUSTER%", "a, b"}
	half := func(names, values []string) object {
		out := object{}
		for _, verb := range some(m, 1, 3, "set", "add", "remove") {
			chosen := some(m, 1, 2, names...)
			if verb == "add" {
				chosen = withoutSlots(chosen)
			}
			if verb == "remove" {
				out[verb] = chosen
				continue
			}
			pairs := object{}
			for _, name := range chosen {
				pairs[name] = pick(m, values...)
			}
			out[verb] = pairs
		}
		return out
	}
	out := object{}
	if m.chance(80) {
		out["request"] = half([]string{"x-tenant", "x-version", "x-new", "user-agent", "x-debug"}, values)
	}
	if m.chance(60) || len(out) == 0 {
		out["response"] = half([]string{"x-answer", "x-internal", "content-type", "x-new"}, responses)
	}
	return out
}

// withoutSlots leaves out headers of which Envoy keeps one field only: what that means has a service of its own (odd).
func withoutSlots(names []string) []string {
	kept := slices.DeleteFunc(slices.Clone(names), func(name string) bool { return name == "user-agent" || name == "content-type" })
	if len(kept) == 0 {
		return []string{"x-new"}
	}
	return kept
}

func (m *maker) istioRoute(u *Unit) []object {
	if m.chance(20) {
		return []object{{"destination": object{"host": pick(m, "web-v1", "web-v2.app.svc.cluster.local"), "port": object{"number": 80}}}}
	}
	return []object{{"destination": object{"host": u.Name, "subset": pick(m, "v1", "v2")}}}
}

// answering makes the backend answer with headers that rules may change.
func answering(c *golden.Case) { c.Script = "200+h:x-internal=secret+h:x-answer=backend" }

func (m *maker) istioAction(u *Unit) action {
	route := m.istioRoute(u)
	routed := func(kind string, fill func(rule object), shape func(c *golden.Case)) action {
		return action{kind: kind, shape: shape, add: func(rule object) {
			rule["route"] = route
			fill(rule)
		}}
	}
	switch m.IntN(13) {
	case 0:
		return routed("route", func(object) {}, nil)
	case 1:
		headers, nested := m.istioHeaders(), m.istioHeaders()
		deep := m.chance(40)
		return routed("headers", func(rule object) {
			rule["headers"] = headers
			if deep {
				route[0]["headers"] = nested
			}
		}, answering)
	case 2:
		redirect := m.istioRedirect()
		return action{kind: "redirect", add: func(rule object) { rule["redirect"] = redirect }}
	case 3:
		answer := object{"status": pick(m, 200, 204, 404, 418, 503)}
		if m.chance(70) {
			answer["body"] = object{"string": pick(m, "short and stout", `{"a": 1}`, "")}
		}
		headers := object{"response": object{"set": object{"x-direct": "%REQ(x-case)%"}}}
		with := m.chance(40)
		return action{kind: "direct", add: func(rule object) {
			rule["directResponse"] = answer
			if with {
				rule["headers"] = headers
			}
		}}
	case 4:
		rewrite := object{}
		for _, what := range some(m, 1, 2, "uri", "authority") {
			rewrite[what] = map[string]string{"uri": pick(m, "/", "/new", "/new/", "/new?x=1"), "authority": pick(m, "inner.example.com", "inner:8080")}[what]
		}
		return routed("rewrite", func(rule object) { rule["rewrite"] = rewrite }, nil)
	case 5:
		rewrite := object{"uriRegexRewrite": pick(m,
			object{"match": "^/([^/]+)/(.*)$", "rewrite": "/\\2/\\1"}, object{"match": "[aeiou]", "rewrite": "_"},
			object{"match": "/v([0-9])", "rewrite": "/version/\\1\\0"}, object{"match": "$", "rewrite": "/end"})}
		return routed("regex-rewrite", func(rule object) { rule["rewrite"] = rewrite }, nil)
	case 6:
		fault := object{"abort": pick(m, object{"httpStatus": pick(m, 400, 418, 503, 555)}, object{"grpcStatus": pick(m, "UNAVAILABLE", "NOT_FOUND")})}
		fault["abort"].(object)["percentage"] = object{"value": 100}
		grpc := m.chance(50)
		return routed("abort", func(rule object) { rule["fault"] = fault }, func(c *golden.Case) {
			if grpc && c.Protocol == "h2" {
				c.Protocol, c.Messages, c.Body = "grpc", []string{"x"}, ""
			}
		})
	case 7:
		fault := object{"delay": object{"fixedDelay": "300ms", "percentage": object{"value": 100}}}
		return routed("delay", func(rule object) { rule["fault"] = fault }, func(c *golden.Case) {
			c.Timing = []golden.Duration{golden.Duration(250 * time.Millisecond), golden.Duration(3 * time.Second)}
		})
	case 8:
		cors := m.istioCORS()
		return routed("cors", func(rule object) { rule["corsPolicy"] = cors }, m.crossOrigin)
	case 9, 10:
		retries := object{"attempts": pick(m, 0, 1, 2, 3)}
		if retries["attempts"] != 0 {
			retries["backoff"] = "5ms"
		}
		if retries["attempts"] != 0 && m.chance(80) {
			retries["retryOn"] = pick(m, "5xx", "gateway-error", "503,429", "retriable-4xx", "reset,connect-failure", "refused-stream", "gateway-error,connect-failure,refused-stream", "retriable-status-codes,501", "reset-before-request")
		}
		return routed("retry", func(rule object) { rule["retries"] = retries }, func(c *golden.Case) {
			c.Script = pick(m, "503,200", "500,502,200", "429,200", "409,200", "504,504,504,504,200", "close,200", "reset,200", "501,200", "502+h:x-internal=1,503,200")
		})
	case 11:
		timeout := pick(m, "150ms", "400ms")
		return routed("timeout", func(rule object) { rule["timeout"] = timeout }, func(c *golden.Case) {
			c.Script = pick(m, "delay=1100ms", "bodydelay=1100ms", "delay=10ms", "200")
		})
	default:
		// All or nothing: what is split by chance has services of its own.
		split := []object{
			{"destination": object{"host": u.Name, "subset": "v1"}, "weight": pick(m, 0, 100)},
			{"destination": object{"host": u.Name, "subset": "v2"}},
		}
		split[1]["weight"] = 100 - split[0]["weight"].(int)
		return action{kind: "weights", add: func(rule object) { rule["route"] = split }}
	}
}

func (m *maker) istioRedirect() object {
	out := object{}
	for _, what := range some(m, 1, 4, "uri", "authority", "scheme", "port", "redirectCode") {
		switch what {
		case "uri":
			out["uri"] = pick(m, "/gone", "/gone?x=1", "%PREFIX()%/moved", "/")
		case "authority":
			out["authority"] = pick(m, "elsewhere.example.com", "elsewhere.example.com:81")
		case "scheme":
			out["scheme"] = pick(m, "https", "http")
		case "port":
			if m.chance(50) {
				out["port"] = pick(m, 8443, 443, 80)
			} else {
				out["derivePort"] = pick(m, "FROM_REQUEST_PORT", "FROM_PROTOCOL_DEFAULT")
			}
		case "redirectCode":
			out["redirectCode"] = pick(m, 301, 302, 303, 307, 308)
		}
	}
	if out["uri"] == "%PREFIX()%/moved" {
		out["uri"] = "/moved"
	}
	return out
}

func (m *maker) istioCORS() object {
	out := object{"allowOrigins": some(m, 1, 3,
		object{"exact": "https://a.example.com"}, object{"prefix": "https://c."}, object{"regex": "https://.*[.]b[.]example[.]com"})}
	for _, what := range some(m, 1, 5, "allowMethods", "allowHeaders", "exposeHeaders", "maxAge", "allowCredentials", "unmatchedPreflights") {
		out[what] = map[string]any{
			"allowMethods": some(m, 1, 3, "GET", "POST", "DELETE"), "allowHeaders": some(m, 1, 2, "x-a", "x-b"), "exposeHeaders": some(m, 1, 2, "x-c", "x-d"),
			"maxAge": pick(m, "1h", "10s"), "allowCredentials": m.chance(50), "unmatchedPreflights": pick(m, "IGNORE", "FORWARD"),
		}[what]
	}
	return out
}

func (m *maker) crossOrigin(c *golden.Case) {
	origin := pick(m, "https://a.example.com", "https://c.x", "https://y.b.example.com", "https://evil.example.com", "HTTPS://a.example.com", "null")
	c.Headers = append(c.Headers, "origin: "+origin)
	if m.chance(60) {
		c.Method, c.Body = "OPTIONS", ""
		if m.chance(85) {
			c.Headers = append(c.Headers, "access-control-request-method: "+pick(m, "GET", "POST", "PATCH"))
		}
		if m.chance(30) {
			c.Headers = append(c.Headers, "access-control-request-headers: x-a")
		}
	}
}
