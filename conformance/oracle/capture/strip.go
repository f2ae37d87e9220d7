package capture

import (
	"fmt"
	"sort"
	"strings"

	udpa "github.com/cncf/xds/go/udpa/type/v1"
	xds "github.com/cncf/xds/go/xds/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"
)

// absent names the extensions that only Istio's build of Envoy has. A list element
// configured with one of them is removed; anything else unknown stops the run, so
// that a new Istio version cannot slip past unnoticed.
var absent = map[string]bool{
	prefix + "io.istio.http.peer_metadata.Config":                               true,
	prefix + "stats.PluginConfig":                                               true,
	prefix + "envoy.tcp.metadataexchange.config.MetadataExchange":               true,
	prefix + "envoy.extensions.network_filters.peer_metadata.Config":            true,
	prefix + "envoy.extensions.network_filters.peer_metadata.UpstreamConfig":    true,
	prefix + "istio.envoy.config.filter.http.istio_authn.v2alpha1.FilterConfig": true,
}

const (
	istioHashable = "istio.hashable_string"
	envoyHashable = "envoy.hashable_string" // the same object under upstream's name
)

// Report counts what was changed, by kind.
type Report map[string]int

// Lines renders a report, sorted.
func (r Report) Lines() []string {
	var out []string
	for what, n := range r {
		out = append(out, fmt.Sprintf("%d × %s", n, what))
	}
	sort.Strings(out)
	return out
}

// Strip adapts every resource in place and reports what it changed.
func (s *Set) Strip() (Report, error) {
	report := Report{}
	for url, resources := range s.Types {
		if url == Workload {
			continue
		}
		for _, r := range resources {
			body, _, err := report.walkAny(r.Body)
			if err != nil {
				return report, fmt.Errorf("%s %q: %w", url, r.Name, err)
			}
			r.Body = body
		}
	}
	return report, nil
}

// Adapt does the same to one resource of a stream. nil means that stock Envoy has no such thing.
func Adapt(body *anypb.Any) (*anypb.Any, error) {
	adapted, _, err := Report{}.walkAny(body)
	return adapted, err
}

// walkAny returns the adapted message, or drop when stock Envoy has no such extension.
func (r Report) walkAny(a *anypb.Any) (result *anypb.Any, drop bool, err error) {
	if absent[a.TypeUrl] {
		return nil, true, nil
	}
	if _, err := protoregistry.GlobalTypes.FindMessageByURL(a.TypeUrl); err != nil {
		return nil, false, fmt.Errorf("unknown type %s", a.TypeUrl)
	}
	message, err := a.UnmarshalNew()
	if err != nil {
		return nil, false, err
	}
	if inner := structURL(message); inner != "" {
		if absent[inner] {
			return nil, true, nil
		}
		if !strings.HasPrefix(inner, prefix+"envoy.") {
			return nil, false, fmt.Errorf("unknown type %s in a TypedStruct", inner)
		}
		return a, false, nil
	}
	before := proto.Clone(message)
	if err := r.walk(message.ProtoReflect()); err != nil {
		return nil, false, err
	}
	if proto.Equal(before, message) {
		return a, false, nil
	}
	out := &anypb.Any{TypeUrl: a.TypeUrl}
	out.Value, err = proto.MarshalOptions{Deterministic: true}.Marshal(message)
	return out, false, err
}

func structURL(m proto.Message) string {
	switch typed := m.(type) {
	case *udpa.TypedStruct:
		return typed.TypeUrl
	case *xds.TypedStruct:
		return typed.TypeUrl
	}
	return ""
}

func (r Report) walk(m protoreflect.Message) error {
	var failure error
	m.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		switch {
		case field.IsMap():
			if field.MapValue().Kind() != protoreflect.MessageKind {
				return true
			}
			value.Map().Range(func(key protoreflect.MapKey, v protoreflect.Value) bool {
				drop, err := r.visit(v.Message())
				if err == nil && drop {
					r[fmt.Sprintf("entry %s of %s.%s", key, m.Descriptor().Name(), field.Name())]++
					value.Map().Clear(key)
				}
				failure = err
				return err == nil
			})
		case field.IsList() && field.Kind() == protoreflect.MessageKind:
			failure = r.walkList(m, field, value.List())
		case field.Kind() == protoreflect.MessageKind:
			drop, err := r.visit(value.Message())
			if err == nil && drop {
				err = fmt.Errorf("%s.%s cannot be removed", m.Descriptor().FullName(), field.Name())
			}
			failure = err
		case field.Name() == "factory_key" && field.Kind() == protoreflect.StringKind && value.String() == istioHashable:
			m.Set(field, protoreflect.ValueOfString(envoyHashable))
			r["factory_key "+istioHashable+" renamed "+envoyHashable]++
		}
		return failure == nil
	})
	return failure
}

// walkList removes the elements that configure an absent extension.
func (r Report) walkList(m protoreflect.Message, field protoreflect.FieldDescriptor, list protoreflect.List) error {
	kept := 0
	for i := 0; i < list.Len(); i++ {
		element := list.Get(i)
		url := configURL(element.Message())
		drop, err := r.visit(element.Message())
		if err != nil {
			return err
		}
		if drop {
			r[fmt.Sprintf("%s in %s.%s", strings.TrimPrefix(url, prefix), m.Descriptor().Name(), field.Name())]++
			continue
		}
		list.Set(kept, element)
		kept++
	}
	list.Truncate(kept)
	return nil
}

// configURL is the extension type that a filter-like message names in typed_config.
func configURL(m protoreflect.Message) string {
	a, ok := m.Interface().(*anypb.Any)
	if !ok {
		field := m.Descriptor().Fields().ByName("typed_config")
		if field == nil || field.Message() == nil || !m.Has(field) {
			return ""
		}
		if a, ok = m.Get(field).Message().Interface().(*anypb.Any); !ok {
			return ""
		}
	}
	if message, err := a.UnmarshalNew(); err == nil {
		if inner := structURL(message); inner != "" {
			return inner
		}
	}
	return a.TypeUrl
}

// visit adapts a message; drop says that its own typed_config is absent from stock Envoy.
func (r Report) visit(m protoreflect.Message) (drop bool, err error) {
	if a, ok := m.Interface().(*anypb.Any); ok {
		adapted, drop, err := r.walkAny(a)
		if err == nil && !drop {
			a.Value = adapted.Value
		}
		return drop, err
	}
	if absent[configURL(m)] {
		return true, nil
	}
	return false, r.walk(m)
}
