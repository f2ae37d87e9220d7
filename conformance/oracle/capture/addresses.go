package capture

import (
	"strings"

	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbac "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	httprbac "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	networkrbac "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// ReadPeerAsClient makes policies ask for the client's address (remote_ip) where istiod has them ask for the peer's
// (direct_remote_ip). Behind an internal listener Envoy's peer has no IP address, so that ipBlocks and source.ip never match there,
// not even 0.0.0.0/0; without x-forwarded-for the client's address is what the policies mean. Policies whose name contains
// except are left as they are.
func (s *Set) ReadPeerAsClient(except string) error {
	return s.editFilters(func(f *listener.Filter, _, _ string) error { return peerAsClient(f.GetTypedConfig(), except) })
}

// peerAsClient edits a filter's configuration in place.
func peerAsClient(config *anypb.Any, except string) error {
	if config == nil {
		return nil
	}
	var message proto.Message
	switch config.TypeUrl {
	case prefix + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager":
		m := &hcm.HttpConnectionManager{}
		if err := config.UnmarshalTo(m); err != nil {
			return err
		}
		for _, f := range m.HttpFilters {
			if err := peerAsClient(f.GetTypedConfig(), except); err != nil {
				return err
			}
		}
		message = m
	case prefix + "envoy.extensions.filters.http.rbac.v3.RBAC":
		m := &httprbac.RBAC{}
		if err := config.UnmarshalTo(m); err != nil {
			return err
		}
		rulesPeerAsClient(m.Rules, except)
		message = m
	case prefix + "envoy.extensions.filters.network.rbac.v3.RBAC":
		m := &networkrbac.RBAC{}
		if err := config.UnmarshalTo(m); err != nil {
			return err
		}
		rulesPeerAsClient(m.Rules, except)
		message = m
	default:
		return nil
	}
	return config.MarshalFrom(message)
}

func rulesPeerAsClient(rules *rbac.RBAC, except string) {
	for name, policy := range rules.GetPolicies() {
		if strings.Contains(name, except) {
			continue
		}
		for _, p := range policy.Principals {
			principalPeerAsClient(p)
		}
	}
}

func principalPeerAsClient(p *rbac.Principal) {
	switch is := p.Identifier.(type) {
	case *rbac.Principal_DirectRemoteIp:
		p.Identifier = &rbac.Principal_RemoteIp{RemoteIp: is.DirectRemoteIp}
	case *rbac.Principal_NotId:
		principalPeerAsClient(is.NotId)
	case *rbac.Principal_AndIds:
		for _, inner := range is.AndIds.Ids {
			principalPeerAsClient(inner)
		}
	case *rbac.Principal_OrIds:
		for _, inner := range is.OrIds.Ids {
			principalPeerAsClient(inner)
		}
	}
}
