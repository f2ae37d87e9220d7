package matrix

import (
	"fmt"
	"time"

	"oracle/golden"
)

func (u *Unit) destinationRule(policy object) {
	u.add(object{
		"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": object{"name": u.Name, "namespace": "app"},
		"spec": object{"host": u.host(), "trafficPolicy": policy},
	})
}

// hashing makes a service whose endpoint depends on the request: the endpoint itself is compared.
func (m *maker) hashing() {
	u := m.unit("hash", object{"app": "hash"})
	hash := object{}
	var shape func(c *golden.Case)
	key := func() string { return fmt.Sprintf("key-%d", m.IntN(1000)) }
	switch m.IntN(4) {
	case 0:
		hash["httpHeaderName"] = "x-user"
		shape = func(c *golden.Case) { c.Headers = append(c.Headers, "x-user: "+key()) }
	case 1:
		hash["httpQueryParameterName"] = "user"
		shape = func(c *golden.Case) { c.Path = m.withQuery("/", "user", key()) }
	case 2:
		hash["httpCookie"] = object{"name": "session", "ttl": pick(m, "0s", "60s")}
		shape = func(c *golden.Case) { c.Headers = append(c.Headers, "cookie: a=b; session="+key()) }
	default:
		hash["useSourceIp"] = true
		shape = func(c *golden.Case) { c.From = fmt.Sprintf("10.244.8.%d", 1+m.IntN(20)) }
	}
	switch m.IntN(3) {
	case 0:
		hash["ringHash"] = object{"minimumRingSize": pick(m, 16, 1024)}
	case 1:
		hash["maglev"] = object{"tableSize": pick(m, 101, 65537)}
	}
	u.destinationRule(object{"loadBalancer": object{"consistentHash": hash}})
	for range 12 {
		c := golden.Case{Pods: "exact", Request: golden.Request{Path: "/"}}
		shape(&c)
		u.send("hash", c)
	}
}

// split makes a service whose requests are divided by chance: how many went where is compared.
func (m *maker) split() {
	u := m.unit("split", web)
	hosts := []string{"web-v1", "web-v2"}
	first := pick(m, 20, 50, 75)
	if m.chance(50) {
		var routes []object
		for i, weight := range []int{first, 100 - first} {
			routes = append(routes, object{"destination": object{"host": hosts[i]}, "weight": weight})
		}
		u.add(object{
			"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": object{"name": u.Name, "namespace": "app"},
			"spec": object{"hosts": []string{u.host()}, "http": []object{{"route": routes}}},
		})
	} else {
		one, two := backend(hosts[0]), backend(hosts[1])
		one["weight"], two["weight"] = first, 100-first
		u.add(object{
			"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": object{"name": u.Name, "namespace": "app"},
			"spec": object{"parentRefs": []object{{"group": "", "kind": "Service", "name": u.Name}}, "rules": []object{{"backendRefs": []object{one, two}}}},
		})
	}
	u.send("weights", golden.Case{Repeat: 150, Tolerance: 0.25, CountBy: "workload"})
}

// limits makes a service with one endpoint and a bound: on requests, or on failures.
func (m *maker) limits() {
	if m.chance(30) {
		m.split()
		return
	}
	u := m.unit("dr", object{"app": "one"})
	milliseconds := func(n int) golden.Duration { return golden.Duration(time.Duration(n) * time.Millisecond) }
	switch m.IntN(5) {
	case 0: // more at once than may be
		most := 1 + m.IntN(3)
		u.destinationRule(object{"connectionPool": object{"http": object{"http2MaxRequests": most}}})
		u.send("max-requests", golden.Case{Request: golden.Request{Script: "delay=700ms"}, Parallel: most + 4})
	case 1: // failures until the endpoint is left alone
		of := pick(m, "consecutive5xxErrors", "consecutiveGatewayErrors")
		failures := 2 + m.IntN(3)
		ejection := object{of: failures, "interval": "60s", "baseEjectionTime": "60s", "maxEjectionPercent": 100}
		if of != "consecutive5xxErrors" {
			ejection["consecutive5xxErrors"] = 0
		}
		u.destinationRule(object{"outlierDetection": ejection})
		u.add(object{
			"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": object{"name": u.Name, "namespace": "app"},
			"spec": object{"hosts": []string{u.host()}, "http": []object{{"retries": object{"attempts": 0}, "route": []object{{"destination": object{"host": u.host()}}}}}},
		})
		u.send("ejection", golden.Case{Request: golden.Request{Script: pick(m, "500", "503", "502")}, Repeat: failures + 4})
	case 2: // HTTP/2 to the endpoint
		u.destinationRule(object{"connectionPool": object{"http": object{"h2UpgradePolicy": "UPGRADE"}}})
		for range 4 {
			c := golden.Case{Request: m.request(match{}, true)}
			u.send("h2-upgrade", c)
		}
	case 3:
		u.destinationRule(object{"connectionPool": object{"http": object{"useClientProtocol": true}}})
		for range 4 {
			u.send("client-protocol", golden.Case{Request: m.request(match{}, true)})
		}
	default:
		u.destinationRule(object{"connectionPool": object{"http": object{"maxRequestsPerConnection": 1}, "tcp": object{"connectTimeout": "200ms"}}})
		for range 3 {
			c := golden.Case{Request: golden.Request{Path: "/a"}, Then: []golden.Request{{Path: "/b"}}}
			c.Timing = []golden.Duration{0, milliseconds(900)}
			u.send("one-request", c)
		}
	}
}
