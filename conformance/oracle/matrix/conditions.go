package matrix

import (
	"maps"
	"slices"
	"strings"

	"oracle/golden"
)

// text is a condition on a piece of a request, with values that meet it and values that nearly do.
type text struct {
	kind      string // exact, prefix, regex; present for headers
	value     string
	hits      []string
	misses    []string
	caseBlind bool
}

var pathWords = []string{"items", "api", "static", "v1", "users", "a-b", "x.y", "éclair"}

// pathCondition makes a condition on the path.
func (m *maker) pathCondition() text {
	word := pick(m, pathWords...)
	if word == "éclair" {
		word = "%C3%A9clair"
	}
	path := "/" + word
	if m.chance(50) {
		path += "/" + pick(m, "list", "7", "deep/er", "%20")
	}
	switch m.IntN(4) {
	case 0:
		return text{kind: "exact", value: path, hits: []string{path, path + "?q=1"}, misses: nearPaths(path), caseBlind: m.chance(25)}
	case 1:
		return text{kind: "prefix", value: path, hits: []string{path, path + "/more", path + "more", path + "?x"}, misses: []string{path[:len(path)-1], strings.ToUpper(path), "/" + path}, caseBlind: m.chance(25)}
	case 2:
		slash := path + "/"
		return text{kind: "prefix", value: slash, hits: []string{slash, slash + "more/", slash + "?x=/"}, misses: []string{path, path + "more", strings.ToUpper(slash)}}
	default:
		r := pick(m, pathExpressions...)
		r.hits, r.misses = slices.Clone(r.hits), slices.Clone(r.misses)
		return r
	}
}

var pathExpressions = []text{
	{kind: "regex", value: "/item/[0-9]+", hits: []string{"/item/7", "/item/123", "/item/1?x=y"}, misses: []string{"/item/", "/item/7/", "/item/x7", "/Item/7", "/more/item/7"}},
	{kind: "regex", value: "/(a|bc)/.*\\.json", hits: []string{"/a/x.json", "/bc/y/z.json", "/a/.json"}, misses: []string{"/b/x.json", "/a/xjson", "/a/x.json/"}},
	{kind: "regex", value: "/v[1-3](/.*)?", hits: []string{"/v1", "/v2/", "/v3/a/b"}, misses: []string{"/v4", "/v1x", "/v"}},
	{kind: "regex", value: "/[^/]+/edit", hits: []string{"/x/edit", "/%2F/edit"}, misses: []string{"/x/y/edit", "//edit", "/x/edit/"}},
	{kind: "regex", value: "/(?i)case/.+", hits: []string{"/case/x", "/CASE/x", "/cAsE/y/z"}, misses: []string{"/case/", "/cas/x"}},
	{kind: "regex", value: "/\\w{2,4}/\\d+-?\\d*", hits: []string{"/ab/1", "/abcd/12-3"}, misses: []string{"/a/1", "/abcde/1", "/ab/x"}},
}

// nearPaths are paths that look like a path and are not it, or are it in another spelling.
func nearPaths(path string) []string {
	return []string{path + "/", path + "x", strings.ToUpper(path), "/" + path, path + ";v=1", "/." + path, path + "%2F", path[:len(path)-1], path + "#frag"}
}

var headerNames = []string{"x-tenant", "x-version", "user-agent", "x-Mixed-Case", "cookie"}

var valueConditions = []text{
	{kind: "exact", value: "blue", hits: []string{"blue"}, misses: []string{"Blue", "blue ", "bluer", "", "green", "blue,green"}},
	{kind: "exact", value: "a b=c", hits: []string{"a b=c"}, misses: []string{"a  b=c", "a b", "ab=c"}},
	{kind: "prefix", value: "v1", hits: []string{"v1", "v1.2", "v12"}, misses: []string{"V1", "xv1", "v"}},
	{kind: "regex", value: "v[0-9]+", hits: []string{"v1", "v42"}, misses: []string{"v", "v1a", "xv1", "V1"}},
	{kind: "regex", value: "(blue|green).*", hits: []string{"blue", "greenish", "blue, red"}, misses: []string{"red", "red, blue", "Blue"}},
	{kind: "regex", value: ".*", hits: []string{"", "anything"}, misses: nil},
	{kind: "regex", value: "[^;]+;s=1(;.*)?", hits: []string{"a=b;s=1", "a=b;s=1;t"}, misses: []string{"s=1", "a=b; s=1", ";s=1"}},
}

// match is what a rule asks of a request.
type match struct {
	path      *text
	method    string
	headers   map[string]text
	without   map[string]text
	query     map[string]text
	authority *text
}

// newMatch makes up a match. Gateway API knows fewer kinds of conditions.
func (m *maker) newMatch(gateway bool) match {
	out := match{headers: map[string]text{}, without: map[string]text{}, query: map[string]text{}}
	if m.chance(80) {
		path := m.pathCondition()
		if gateway {
			path.caseBlind = false
			if path.kind == "prefix" { // by whole segments
				path.value = strings.TrimSuffix(path.value, "/")
				path.hits = []string{path.value, path.value + "/", path.value + "/more", path.value + "?x"}
				path.misses = []string{path.value + "more", strings.ToUpper(path.value), "/" + path.value, path.value + "%2Fx"}
			}
		}
		out.path = &path
	}
	if m.chance(25) {
		out.method = pick(m, "GET", "POST", "PUT", "DELETE", "OPTIONS")
	}
	value := func() text {
		for {
			if v := pick(m, valueConditions...); !gateway || v.kind != "prefix" {
				return v
			}
		}
	}
	if m.chance(40) || out.path == nil {
		for _, name := range some(m, 1, 2, headerNames...) {
			if name == "cookie" && gateway {
				continue
			}
			out.headers[strings.ToLower(name)] = value()
		}
	}
	if m.chance(20) && !gateway {
		out.headers["x-any"] = text{kind: "present", hits: []string{"1", ""}}
	}
	if m.chance(20) && !gateway {
		v := value()
		if v.value == ".*" { // would never be met
			v = text{kind: "present", hits: []string{"1"}}
		}
		out.without["x-skip"] = v
	}
	if m.chance(25) {
		v := value()
		out.query[pick(m, "q", "page", "x-y")] = v
	}
	if m.chance(10) && !gateway {
		out.authority = &text{kind: "prefix", value: "special.", hits: []string{"special.example.com", "special.:80"}, misses: []string{"Special.example.com", "x.special.com"}}
	}
	return out
}

// istio writes the match as a VirtualService does.
func (c match) istio() object {
	out := object{}
	condition := func(t text) object {
		if t.kind == "present" {
			return object{}
		}
		return object{t.kind: t.value}
	}
	conditions := func(of map[string]text) object {
		all := object{}
		for name, t := range of {
			all[name] = condition(t)
		}
		return all
	}
	if c.path != nil {
		out["uri"] = condition(*c.path)
		if c.path.caseBlind {
			out["ignoreUriCase"] = true
		}
	}
	if c.method != "" {
		out["method"] = object{"exact": c.method}
	}
	if c.authority != nil {
		out["authority"] = condition(*c.authority)
	}
	for key, of := range map[string]map[string]text{"headers": c.headers, "withoutHeaders": c.without, "queryParams": c.query} {
		if len(of) > 0 {
			out[key] = conditions(of)
		}
	}
	return out
}

// gateway writes the match as an HTTPRoute does.
func (c match) gateway() object {
	kinds := map[string]string{"exact": "Exact", "prefix": "PathPrefix", "regex": "RegularExpression"}
	out := object{}
	if c.path != nil {
		out["path"] = object{"type": kinds[c.path.kind], "value": c.path.value}
	}
	if c.method != "" {
		out["method"] = c.method
	}
	for key, of := range map[string]map[string]text{"headers": c.headers, "queryParams": c.query} {
		var list []object
		for _, name := range slices.Sorted(maps.Keys(of)) {
			list = append(list, object{"type": kinds[of[name].kind], "name": name, "value": of[name].value})
		}
		if list != nil {
			out[key] = list
		}
	}
	return out
}

// request makes a request that meets the match, or misses it in one thing.
func (m *maker) request(c match, meet bool) golden.Request {
	missing := ""
	if !meet {
		var ways []string
		if c.path != nil {
			ways = append(ways, "path", "path")
		}
		if c.method != "" {
			ways = append(ways, "method")
		}
		for _, name := range slices.Sorted(maps.Keys(c.headers)) {
			ways = append(ways, "header "+name)
		}
		for _, name := range slices.Sorted(maps.Keys(c.without)) {
			ways = append(ways, "without "+name)
		}
		for _, name := range slices.Sorted(maps.Keys(c.query)) {
			ways = append(ways, "query "+name)
		}
		if c.authority != nil {
			ways = append(ways, "authority")
		}
		if len(ways) > 0 {
			missing = pick(m, ways...)
		}
	}
	value := func(t text, what string) (string, bool) {
		if missing != what {
			return pick(m, t.hits...), true
		}
		if len(t.misses) == 0 || m.chance(25) {
			return "", false // absent
		}
		return pick(m, t.misses...), true
	}
	r := golden.Request{Method: or(c.method, pick(m, "GET", "GET", "GET", "POST", "PUT", "DELETE", "PATCH")), Path: "/" + pick(m, "other", "", "api/x")}
	if missing == "method" {
		r.Method = pick(m, "PATCH", "OPTIONS")
	}
	if c.path != nil {
		if path, there := value(*c.path, "path"); there {
			r.Path = path
		}
		if c.path.caseBlind && m.chance(40) && !strings.Contains(r.Path, "%") {
			r.Path = strings.ToUpper(r.Path)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.query)) {
		if v, there := value(c.query[name], "query "+name); there {
			r.Path = m.withQuery(r.Path, name, v)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.headers)) {
		v, there := value(c.headers[name], "header "+name)
		if !there {
			continue
		}
		r.Headers = append(r.Headers, m.spelling(name)+": "+v)
		if m.chance(8) && name != "cookie" && name != "user-agent" {
			r.Headers = append(r.Headers, name+": second")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.without)) {
		if missing == "without "+name {
			r.Headers = append(r.Headers, name+": "+pick(m, c.without[name].hits...))
		} else if t := c.without[name]; len(t.misses) > 0 && m.chance(50) {
			r.Headers = append(r.Headers, name+": "+pick(m, t.misses...))
		}
	}
	if c.authority != nil {
		if v, there := value(*c.authority, "authority"); there {
			r.Authority = v
		}
	}
	if r.Method == "POST" || r.Method == "PUT" || r.Method == "PATCH" {
		r.Body = pick(m, "", "body", "a=1&b=2")
	}
	if m.chance(20) {
		r.Protocol = "h2"
		for i, line := range r.Headers { // HTTP/2 has no upper case
			name, rest, _ := strings.Cut(line, ":")
			r.Headers[i] = strings.ToLower(name) + ":" + rest
		}
		r.Path, _, _ = strings.Cut(r.Path, "#")
	}
	return r
}

func (m *maker) spelling(name string) string {
	if m.chance(20) {
		return strings.ToUpper(name[:1]) + name[1:]
	}
	return name
}

// withQuery adds a parameter, in front of others or behind, sometimes twice.
func (m *maker) withQuery(path, name, value string) string {
	path, fragment, _ := strings.Cut(path, "#")
	path, query, had := strings.Cut(path, "?")
	escaped := strings.NewReplacer(" ", "%20", "&", "%26", "#", "%23").Replace(value)
	parameter := name + "=" + escaped
	if value == "" && m.chance(50) {
		parameter = name
	}
	if m.chance(10) {
		parameter += "&" + name + "=second"
	}
	switch {
	case had && m.chance(50):
		query += "&" + parameter
	case had:
		query = parameter + "&" + query
	default:
		query = parameter
	}
	if fragment != "" {
		query += "#" + fragment
	}
	return path + "?" + query
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
