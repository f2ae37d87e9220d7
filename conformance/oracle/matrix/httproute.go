package matrix

import (
	"fmt"
	"strings"

	"oracle/golden"
)

func (m *maker) httpRoute() {
	u := m.unit("hr", web)
	var rules []object
	for n := range 3 + m.IntN(3) {
		conditions := []match{m.newMatch(true)}
		if m.chance(30) {
			conditions = append(conditions, m.newMatch(true))
		}
		does := m.gatewayAction(u, &conditions)
		var matches []object
		for _, c := range conditions {
			matches = append(matches, c.gateway())
		}
		rule := object{"name": fmt.Sprintf("rule-%d", n), "matches": matches}
		does.add(rule)
		rules = append(rules, rule)
		m.probe(u, does, conditions)
	}
	if m.chance(60) { // otherwise what no rule meets is 404
		rules = append(rules, object{"backendRefs": []object{backend(u.Name)}})
	}
	u.add(object{
		"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": object{"name": u.Name, "namespace": "app"},
		"spec": object{"parentRefs": []object{{"group": "", "kind": "Service", "name": u.Name}}, "rules": rules},
	})
}

func backend(name string) object { return object{"name": name, "port": 80} }

func (m *maker) headerFilter(kind, key string, names []string) object {
	change := object{}
	for _, verb := range some(m, 1, 3, "set", "add", "remove") {
		chosen := some(m, 1, 2, names...)
		if verb == "add" {
			chosen = withoutSlots(chosen)
		}
		if verb == "remove" {
			change[verb] = chosen
			continue
		}
		var pairs []object
		for _, name := range chosen {
			pairs = append(pairs, object{"name": name, "value": pick(m, "plain", "a, b", "100%%")})
		}
		change[verb] = pairs
	}
	return object{"type": kind, key: change}
}

// gatewayPath replaces a path, whole or its matched prefix.
func (m *maker) gatewayPath(conditions *[]match) object {
	if m.chance(50) {
		return object{"type": "ReplaceFullPath", "replaceFullPath": pick(m, "/new", "/new/", "/new?x=1", "/")}
	}
	// Only a rule with one prefix may replace it.
	one := m.newMatch(true)
	word := "/" + pick(m, "items", "api", "static")
	one.path = &text{kind: "prefix", value: word, hits: []string{word, word + "/", word + "/more", word + "/a/b?x=1", word + "?y"}, misses: []string{word + "more", "/" + word, strings.ToUpper(word)}}
	*conditions = []match{one}
	return object{"type": "ReplacePrefixMatch", "replacePrefixMatch": pick(m, "/new", "/new/", "/", "")}
}

func (m *maker) gatewayAction(u *Unit, conditions *[]match) action {
	filtered := func(kind string, shape func(c *golden.Case), filters ...object) action {
		return action{kind: kind, shape: shape, add: func(rule object) {
			rule["filters"] = filters
			rule["backendRefs"] = []object{backend(u.Name)}
		}}
	}
	request := func() object {
		return m.headerFilter("RequestHeaderModifier", "requestHeaderModifier", []string{"x-tenant", "x-version", "x-new", "user-agent"})
	}
	response := func() object {
		return m.headerFilter("ResponseHeaderModifier", "responseHeaderModifier", []string{"x-answer", "x-internal", "x-new"})
	}
	switch m.IntN(10) {
	case 0:
		return action{kind: "route", add: func(rule object) { rule["backendRefs"] = []object{backend(pick(m, u.Name, "web-v2"))} }}
	case 1:
		return filtered("headers", answering, some(m, 1, 2, request(), response())...)
	case 2:
		ref := backend("web-v2")
		ref["filters"] = some(m, 1, 2, request(), response())
		outer := response()
		both := m.chance(50)
		return action{kind: "backend-headers", shape: answering, add: func(rule object) {
			rule["backendRefs"] = []object{ref}
			if both {
				rule["filters"] = []object{outer}
			}
		}}
	case 3, 4:
		redirect := object{}
		for _, what := range some(m, 1, 4, "scheme", "hostname", "path", "port", "statusCode") {
			switch what {
			case "scheme":
				redirect[what] = pick(m, "http", "https")
			case "hostname":
				redirect[what] = "elsewhere.example.com"
			case "path":
				redirect[what] = m.gatewayPath(conditions)
			case "port":
				redirect[what] = pick(m, 80, 443, 8443)
			case "statusCode":
				redirect[what] = pick(m, 301, 302, 303, 307, 308)
			}
		}
		return action{kind: "redirect", add: func(rule object) {
			rule["filters"] = []object{{"type": "RequestRedirect", "requestRedirect": redirect}}
		}}
	case 5:
		rewrite := object{}
		for _, what := range some(m, 1, 2, "hostname", "path") {
			if what == "hostname" {
				rewrite[what] = "inner.example.com"
			} else {
				rewrite[what] = m.gatewayPath(conditions)
			}
		}
		return filtered("rewrite", nil, object{"type": "URLRewrite", "urlRewrite": rewrite})
	case 6:
		one, two := backend("web-v1"), backend("web-v2")
		one["weight"], two["weight"] = 0, pick(m, 1, 2)
		return action{kind: "weights", add: func(rule object) { rule["backendRefs"] = []object{one, two} }}
	case 7:
		timeouts := object{pick(m, "request", "backendRequest"): pick(m, "150ms", "0s", "400ms")}
		return action{kind: "timeout", add: func(rule object) {
			rule["timeouts"], rule["backendRefs"] = timeouts, []object{backend(u.Name)}
		}, shape: func(c *golden.Case) { c.Script = pick(m, "delay=1100ms", "delay=10ms", "200") }}
	case 8:
		retry := object{"codes": some(m, 1, 3, 500, 503, 429), "attempts": pick(m, 1, 2, 3), "backoff": "5ms"}
		return action{kind: "retry", add: func(rule object) {
			rule["retry"], rule["backendRefs"] = retry, []object{backend(u.Name)}
		}, shape: func(c *golden.Case) {
			c.Script = pick(m, "503,200", "500,500,200", "429,200", "502,200", "close,200", "reset,200", "501,200")
		}}
	default:
		cors := object{"allowOrigins": some(m, 1, 2, "https://a.example.com", "https://*.b.example.com")}
		for _, what := range some(m, 1, 4, "allowMethods", "allowHeaders", "exposeHeaders", "maxAge", "allowCredentials") {
			cors[what] = map[string]any{
				"allowMethods": some(m, 1, 2, "GET", "POST"), "allowHeaders": some(m, 1, 2, "x-a", "x-b"), "exposeHeaders": []string{"x-c"},
				"maxAge": pick(m, 60, 3600), "allowCredentials": m.chance(50),
			}[what]
		}
		return filtered("cors", m.crossOrigin, object{"type": "CORS", "cors": cors})
	}
}
