package matrix

import (
	"fmt"

	"oracle/golden"
)

// casesOfUnit is how many requests a service with policies gets.
const casesOfUnit = 36

var policedPorts = []object{
	{"name": "http", "port": 80, "targetPort": 8080}, {"name": "http-two", "port": 81, "targetPort": 8080}, {"name": "tcp", "port": 9000, "targetPort": 9000},
}

// Authorization makes services with AuthorizationPolicies, and requests that meet their rules, nearly do, or have nothing to do with them.
func Authorization(seed uint64, units int) (*Suite, error) {
	m := newMaker("authorization", seed)
	m.suite.File.Verdicts = true
	for i := range units {
		kind, sources, keys := "az", sourceFields, conditionKeys
		if i%5 == 4 {
			kind, sources, keys = "ip", addressFields, addressKeys
		}
		u := m.unit(kind, web, policedPorts...)
		var meets [][]func(a *asked)
		for n := range 1 + m.IntN(3) {
			policy, more := m.policy(u, fmt.Sprintf("%s-%d", u.Name, n), sources, operationFields, keys)
			u.add(policy)
			meets = append(meets, more...)
		}
		m.ask(u, meets, kind != "ip")
	}
	m.overall()
	m.peer()
	return m.finish()
}

// PeerPolicy is part of the names of policies about where a connection comes from that Envoy gets as istiod wrote them.
// All others it gets with the client's address in the peer's place: see capture.ReadPeerAsClient.
const PeerPolicy = "peer"

// peer shows what Envoy does with such a policy.
func (m *maker) peer() {
	u := m.unit("peer", web)
	u.add(policyObject("peer-deny", "app", "DENY", []object{{"from": []object{{"source": object{"ipBlocks": []string{"192.0.2.0/24"}}}}}},
		object{"targetRefs": []object{{"kind": "Service", "group": "", "name": u.Name}}}))
	for _, from := range []string{"192.0.2.7", "10.244.0.200"} {
		u.send("verdict", golden.Case{Request: golden.Request{From: from}})
	}
}

// overall adds the policies of the waypoint and of its class, and one that concerns neither.
func (m *maker) overall() {
	u := m.suite.Units[len(m.suite.Units)-1]
	u.add(policyObject("gateway-deny", "app", "DENY", []object{{"to": []object{{"operation": object{"paths": []string{"/prefix/secrets/*"}, "ports": []string{"80", "81"}}}}}},
		object{"targetRefs": []object{{"kind": "Gateway", "group": "gateway.networking.k8s.io", "name": "waypoint"}}}))
	u.add(policyObject("class-deny", "istio-system", "DENY", []object{{"from": []object{{"source": object{"namespaces": []string{"team-b"}}}}, "to": []object{{"operation": object{"methods": []string{"PUT"}}}}}},
		object{"targetRefs": []object{{"kind": "GatewayClass", "group": "gateway.networking.k8s.io", "name": "istio-waypoint"}}}))
	u.add(policyObject("selector", "app", "DENY", []object{{}}, object{"selector": object{"matchLabels": object{"app": "web"}}}))
}

func policyObject(name, namespace, action string, rules []object, target object) object {
	spec := object{"action": action}
	for key, value := range target {
		spec[key] = value
	}
	if rules != nil {
		spec["rules"] = rules
	}
	return object{"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": object{"name": name, "namespace": namespace}, "spec": spec}
}

// policy makes one policy of a service, and for each of its rules what a request does to meet it.
func (m *maker) policy(u *Unit, name string, sources, operations, conditions []field) (object, [][]func(a *asked)) {
	var rules []object
	var meets [][]func(a *asked)
	for range 1 + m.IntN(3) {
		rule, meet := m.rule(sources, operations, conditions)
		rules, meets = append(rules, rule), append(meets, meet)
	}
	action := pick(m, "ALLOW", "ALLOW", "DENY", "DENY", "AUDIT")
	switch {
	case m.chance(4): // nothing, or everything
		rules = pick(m, nil, []object{{}})
	}
	if rules == nil {
		action = "ALLOW" // only that may be without rules
	}
	policy := policyObject(name, "app", action, rules, object{"targetRefs": []object{{"kind": "Service", "group": "", "name": u.Name}}})
	if m.chance(6) && action != "AUDIT" {
		policy["metadata"].(object)["annotations"] = object{"istio.io/dry-run": "true"}
	}
	return policy, meets
}

// ask sends requests of chance; most of them then do what one rule wants, or all of it but one thing.
func (m *maker) ask(u *Unit, meets [][]func(a *asked), forwarded bool) {
	for range casesOfUnit {
		a := m.draw()
		if len(meets) > 0 && m.chance(75) {
			for _, meet := range pick(m, meets...) {
				if !m.chance(12) {
					meet(a)
				}
			}
		}
		if !forwarded {
			a.remote = ""
		}
		u.send("verdict", m.write(u, a))
	}
}
