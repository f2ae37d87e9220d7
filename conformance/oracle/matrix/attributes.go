package matrix

import (
	"fmt"
	"strings"

	"oracle/golden"
)

// value is one value that a policy may name, and values of a request that it covers.
type value struct {
	text   string
	covers []string
}

func exactly(texts ...string) []value {
	var out []value
	for _, t := range texts {
		out = append(out, value{t, []string{t}})
	}
	return out
}

// What policies name. A request's attributes are drawn from what these cover, so that most values meet often.
var (
	principals = []value{
		{"cluster.local/ns/app/sa/client", []string{"app/client"}}, {"cluster.local/ns/app/sa/evil", []string{"app/evil"}},
		{"*/sa/batch", []string{"clients/batch"}}, {"cluster.local/ns/clients/*", []string{"clients/runner", "clients/batch"}},
		{"cluster.local/ns/team-a/sa/svc", []string{"team-a/svc"}}, {"*", []string{"other/someone", "app/client"}},
	}
	namespaces = []value{
		{"app", []string{"app/client", "app/evil"}}, {"clients", []string{"clients/runner"}}, {"team-*", []string{"team-a/svc", "team-b/svc"}},
		{"*-a", []string{"team-a/svc"}}, {"*", []string{"other/someone"}},
	}
	accounts = []value{{"client", []string{"app/client"}}, {"clients/runner", []string{"clients/runner"}}, {"team-b/svc", []string{"team-b/svc"}}}
	blocks   = []value{
		{"10.244.0.0/16", []string{"10.244.0.200", "10.244.9.9"}}, {"10.244.9.0/24", []string{"10.244.9.9"}}, {"192.0.2.7", []string{"192.0.2.7"}},
		{"fd00:10:245::/64", []string{"fd00:10:245::c8", "fd00:10:245::c9"}}, {"fd00:10:245::c9", []string{"fd00:10:245::c9"}}, {"10.245.1.0/30", []string{"10.245.1.1"}},
		{"0.0.0.0/0", []string{"10.245.1.1"}}, {"::/0", []string{"fd00:10:245::c8"}},
	}
	remoteBlocks = []value{
		{"203.0.113.0/24", []string{"203.0.113.5", "203.0.113.9"}}, {"203.0.113.9", []string{"203.0.113.9"}}, {"2001:db8::/48", []string{"2001:db8::5"}},
		{"2001:db8:1::9/128", []string{"2001:db8:1::9"}}, {"198.51.100.0/28", []string{"198.51.100.1", "198.51.100.16"}}, {"10.244.0.0/16", []string{""}},
	}
	hosts = []value{
		{"web.example.com", []string{"web.example.com", "WEB.example.com", "web.example.com:80"}}, {"*.example.com", []string{"a.example.com", "admin.example.com"}},
		{"admin.*", []string{"admin.example.com", "admin.local"}}, {"*", []string{"anything"}}, {"exact:8080", []string{"exact:8080", "exact"}},
	}
	verbs = []value{{"GET", []string{"GET"}}, {"POST", []string{"POST"}}, {"P*", []string{"PUT", "POST", "PATCH"}}, {"*ETE", []string{"DELETE"}}, {"*", []string{"OPTIONS"}}}
	paths = []value{
		{"/exact", []string{"/exact", "/exact?q=1", "/exact/", "/Exact", "/exact#x"}}, {"/prefix/*", []string{"/prefix/", "/prefix/a/b", "/prefix", "/prefix/secret"}},
		{"*/suffix", []string{"/suffix", "/a/suffix", "/a/suffix?x", "/suffix/"}}, {"/prefix/secret*", []string{"/prefix/secret", "/prefix/secrets/x"}},
		{"*", []string{"/", "/any"}}, {"/enc%20oded", []string{"/enc%20oded", "/enc oded"}}, {"/dots", []string{"/dots", "/x/../dots", "//dots", "/%64ots", "/dots;x=1"}},
	}
	templates = []value{
		{"/tmpl/{*}/x", []string{"/tmpl/a/x", "/tmpl//x", "/tmpl/a/b/x", "/tmpl/a/x/", "/tmpl/a%2Fb/x", "/tmpl/a/x?q"}},
		{"/deep/{**}", []string{"/deep/", "/deep/a", "/deep/a/b", "/deep"}}, {"/{**}/end", []string{"/a/end", "/a/b/end", "/end", "/a/end/"}},
		{"/{*}/mid/{**}", []string{"/a/mid/b/c", "/a/mid/", "/mid/b"}}, {"/t/{*}", []string{"/t/a", "/t/", "/t/a/b"}},
	}
	ports    = exactly("80", "81", "9000")
	tenants  = []value{{"blue", []string{"blue", "Blue"}}, {"green-*", []string{"green-1", "green-", "green"}}, {"*-old", []string{"green-old", "-old"}}, {"*", []string{"x", ""}}, {"a,b", []string{"a,b"}}}
	services = []value{{"10.96.0.0/16", nil}, {"10.96.20.1", nil}, {"fd00:10:96::/48", nil}, {"203.0.113.0/24", nil}}
	names    = []value{{"web.example.com", nil}, {"*.example.com", nil}}
)

// asked is a request that takes shape.
type asked struct {
	as, from, remote, host, method, path, port string
	headers                                    []string
	token                                      string
}

// field is one field of a policy: its values, and what in a request they are about.
type field struct {
	name   string
	values []value
	not    bool // there is a not-field
	apply  func(a *asked, covered string)
}

var sourceFields = []field{
	{"principals", principals, true, func(a *asked, v string) { a.as = v }},
	{"namespaces", namespaces, true, func(a *asked, v string) { a.as = v }},
	{"remoteIpBlocks", remoteBlocks, true, func(a *asked, v string) { a.remote = v }},
	{"serviceAccounts", accounts, true, func(a *asked, v string) { a.as = v }},
}

// Where a connection comes from is asked in services of their own, to which nobody sends x-forwarded-for.
var (
	addressFields = []field{
		{"ipBlocks", blocks, true, func(a *asked, v string) { a.from = v }}, {"ipBlocks", blocks, true, func(a *asked, v string) { a.from = v }}, sourceFields[0], sourceFields[1],
	}
	addressKeys = []field{{"source.ip", blocks, true, func(a *asked, v string) { a.from = v }}, conditionKeys[0], conditionKeys[4]}
)

var operationFields = []field{
	{"hosts", hosts, true, func(a *asked, v string) { a.host = v }},
	{"methods", verbs, true, func(a *asked, v string) { a.method = v }},
	{"paths", paths, true, func(a *asked, v string) { a.path = v }},
	{"paths", templates, true, func(a *asked, v string) { a.path = v }},
	{"ports", ports, true, func(a *asked, v string) { a.port = v }},
}

var conditionKeys = []field{
	{"request.headers[x-tenant]", tenants, true, func(a *asked, v string) { a.headers = append(a.headers, "x-tenant: "+v) }},
	{"request.headers[x-role]", tenants, true, func(a *asked, v string) { a.headers = append(a.headers, "x-role: "+v) }},
	{"request.headers[X-Upper]", tenants, true, func(a *asked, v string) { a.headers = append(a.headers, "x-upper: "+v) }},
	{"remote.ip", remoteBlocks, true, func(a *asked, v string) { a.remote = v }},
	{"source.namespace", namespaces, true, func(a *asked, v string) { a.as = v }},
	{"source.principal", principals, true, func(a *asked, v string) { a.as = v }},
	{"source.serviceAccount", accounts, true, func(a *asked, v string) { a.as = v }},
	{"destination.ip", services, true, func(*asked, string) {}},
	{"destination.port", ports, true, func(a *asked, v string) { a.port = v }},
	{"connection.sni", names, true, func(*asked, string) {}},
}

// fill writes a field, or its not-field, or both, into a policy, and remembers how a request meets it.
func (m *maker) fill(into object, f field, meets *[]func(a *asked), valueKey, notKey string) {
	write := func(key string, values []value) {
		var texts []string
		for _, v := range values {
			texts = append(texts, v.text)
		}
		into[key] = texts
	}
	negative := f.not && m.chance(25)
	if negative {
		write(notKey, some(m, 1, 2, f.values...))
	}
	if !negative || m.chance(40) {
		chosen := some(m, 1, 3, f.values...)
		write(valueKey, chosen)
		*meets = append(*meets, func(a *asked) {
			if covered := pick(m, chosen...).covers; len(covered) > 0 {
				f.apply(a, pick(m, covered...))
			}
		})
	}
}

// fields fills some of the fields into an object.
func (m *maker) fields(fields []field, low, high int, meets *[]func(a *asked)) object {
	out := object{}
	for _, f := range some(m, low, high, fields...) {
		not := "not" + strings.ToUpper(f.name[:1]) + f.name[1:]
		if out[f.name] != nil || out[not] != nil { // templates do not go with other paths
			continue
		}
		m.fill(out, f, meets, f.name, not)
	}
	if out["serviceAccounts"] != nil || out["notServiceAccounts"] != nil { // not beside principals and namespaces
		for _, key := range []string{"principals", "notPrincipals", "namespaces", "notNamespaces"} {
			delete(out, key)
		}
	}
	return out
}

// rule makes a rule and what a request does to meet it.
func (m *maker) rule(sources, operations, conditions []field) (object, []func(a *asked)) {
	rule := object{}
	var meets []func(a *asked)
	parts := some(m, 1, 3, "from", "from", "to", "to", "when")
	for _, part := range parts {
		if rule[part] != nil {
			continue
		}
		switch part {
		case "from":
			var list []object
			for range 1 + m.IntN(2) {
				list = append(list, object{"source": m.fields(sources, 1, 2, &meets)})
			}
			rule[part] = list
		case "to":
			var list []object
			for range 1 + m.IntN(2) {
				list = append(list, object{"operation": m.fields(operations, 1, 2, &meets)})
			}
			rule[part] = list
		case "when":
			var list []object
			for _, f := range some(m, 1, 2, conditions...) {
				condition := object{"key": f.name}
				m.fill(condition, f, &meets, "values", "notValues")
				list = append(list, condition)
			}
			rule[part] = list
		}
	}
	return rule, meets
}

// draw makes a request of chance: everything that policies look at has a value.
func (m *maker) draw() *asked {
	of := func(values []value) string {
		covered := pick(m, values...).covers
		return pick(m, covered...)
	}
	a := &asked{as: of(principals), from: pick(m, "10.244.0.200", of(blocks)), method: of(verbs), path: of(paths), port: pick(m, "80", "80", "80", "80", "80", "80", "80", "81", "81", "9000")}
	if m.chance(30) {
		a.path = of(templates)
	}
	if m.chance(40) {
		a.remote = of(remoteBlocks)
	}
	if m.chance(40) {
		a.host = of(hosts)
	}
	for _, name := range []string{"x-tenant", "x-role", "x-upper"} {
		if m.chance(30) {
			a.headers = append(a.headers, name+": "+of(tenants))
		}
		if m.chance(6) { // twice
			a.headers = append(a.headers, name+": "+of(tenants))
		}
	}
	return a
}

// write makes a case of it.
func (m *maker) write(u *Unit, a *asked) golden.Case {
	r := golden.Request{As: a.as, From: a.from, Method: a.method, Path: strings.ReplaceAll(a.path, " ", "%20"), Authority: a.host, Headers: a.headers}
	if a.remote != "" {
		r.Headers = append(r.Headers, "x-forwarded-for: "+a.remote)
	}
	r.To = u.address + ":" + a.port
	switch {
	case a.port == "9000":
		r = golden.Request{As: a.as, From: a.from, To: r.To, Protocol: "tcp", Body: fmt.Sprintf("bytes of %s %d", u.Name, len(u.Cases))}
	case m.chance(15):
		r.Protocol = "h2"
		r.Path, _, _ = strings.Cut(r.Path, "#")
	}
	return golden.Case{Request: r}
}
