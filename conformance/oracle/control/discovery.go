package control

import (
	"fmt"
	"os"
	"slices"
	"sync"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"oracle/capture"
)

// Discovery serves a resource set over delta ADS, as istiod does.
type Discovery struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	secrets *secrets
	verbose bool

	mu      sync.Mutex
	set     *capture.Set
	streams map[*adsStream]bool
	nacks   []string
	nonce   int
}

type adsStream struct {
	server        discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	sendMu        sync.Mutex
	wildcard      map[string]bool
	subscriptions map[string]map[string]bool
}

// wildcardTypes are requested whole; every other type by name.
var wildcardTypes = map[string]bool{capture.Cluster: true, capture.Listener: true, capture.Workload: true}

// DeltaAggregatedResources answers subscriptions until the proxy leaves.
func (d *Discovery) DeltaAggregatedResources(server discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	s := &adsStream{server: server, wildcard: map[string]bool{}, subscriptions: map[string]map[string]bool{}}
	d.mu.Lock()
	d.streams[s] = true
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		delete(d.streams, s)
		d.mu.Unlock()
	}()
	for {
		request, err := server.Recv()
		if err != nil {
			return err
		}
		if request.ErrorDetail != nil {
			d.mu.Lock()
			d.nacks = append(d.nacks, fmt.Sprintf("%s: %s", request.TypeUrl, request.ErrorDetail.Message))
			d.mu.Unlock()
			fmt.Fprintf(os.Stderr, "NACK %s: %s\n", request.TypeUrl, request.ErrorDetail.Message)
		}
		if err := d.answer(s, request); err != nil {
			return err
		}
	}
}

func (d *Discovery) answer(s *adsStream, request *discovery.DeltaDiscoveryRequest) error {
	url := request.TypeUrl
	d.mu.Lock()
	first := s.subscriptions[url] == nil
	if first {
		s.subscriptions[url] = map[string]bool{}
	}
	fresh := []string{}
	for _, name := range request.ResourceNamesSubscribe {
		if name == "*" {
			continue
		}
		s.subscriptions[url][name] = true
		fresh = append(fresh, name)
	}
	for _, name := range request.ResourceNamesUnsubscribe {
		delete(s.subscriptions[url], name)
	}
	wildcard := slices.Contains(request.ResourceNamesSubscribe, "*") || (first && wildcardTypes[url])
	s.wildcard[url] = s.wildcard[url] || wildcard
	response := &discovery.DeltaDiscoveryResponse{TypeUrl: url}
	switch {
	case wildcard:
		for _, r := range d.set.Types[url] {
			response.Resources = append(response.Resources, asResource(r))
		}
	case len(fresh) > 0:
		for _, name := range fresh {
			if r := d.find(url, name); r != nil {
				response.Resources = append(response.Resources, r)
			} else {
				response.RemovedResources = append(response.RemovedResources, name)
			}
		}
	default: // an ACK, a NACK or an unsubscription
		d.mu.Unlock()
		return nil
	}
	d.mu.Unlock()
	return d.send(s, response)
}

func (d *Discovery) find(url, name string) *discovery.Resource {
	if r := d.set.Find(url, name); r != nil && !(url == capture.Secret && d.secrets.replaces(r)) {
		return asResource(r)
	}
	if url == capture.Secret {
		if secret, err := d.secrets.secret(name); err == nil {
			packed, _ := anypb.New(secret)
			return &discovery.Resource{Name: name, Version: "1", Resource: packed}
		}
	}
	return nil
}

func asResource(r *capture.Resource) *discovery.Resource {
	version := r.Version
	if version == "" {
		version = "1"
	}
	return &discovery.Resource{Name: r.Name, Aliases: r.Aliases, Version: version, Resource: r.Body}
}

func (d *Discovery) send(s *adsStream, response *discovery.DeltaDiscoveryResponse) error {
	d.mu.Lock()
	d.nonce++
	response.Nonce = fmt.Sprint(d.nonce)
	response.SystemVersionInfo = response.Nonce
	d.mu.Unlock()
	if d.verbose {
		fmt.Fprintf(os.Stderr, "sent %s: %d resources, %d removed\n", response.TypeUrl, len(response.Resources), len(response.RemovedResources))
	}
	s.sendMu.Lock()
	defer s.sendMu.Unlock()
	return s.server.Send(response)
}

// Replace changes one resource and pushes it to every proxy that wants it.
func (d *Discovery) Replace(url, name string, body proto.Message) error {
	packed, err := anypb.New(body)
	if err != nil {
		return err
	}
	d.mu.Lock()
	r := d.change(url, name, packed)
	var targets []*adsStream
	for s := range d.streams {
		if s.wildcard[url] || s.subscriptions[url][name] {
			targets = append(targets, s)
		}
	}
	d.mu.Unlock()
	for _, s := range targets {
		if err := d.send(s, &discovery.DeltaDiscoveryResponse{TypeUrl: url, Resources: []*discovery.Resource{asResource(r)}}); err != nil {
			return err
		}
	}
	return nil
}

// change stores a resource; the caller holds the lock.
func (d *Discovery) change(url, name string, body *anypb.Any) *capture.Resource {
	r := d.set.Find(url, name)
	if r == nil {
		r = &capture.Resource{Name: name}
		d.set.Types[url] = append(d.set.Types[url], r)
	}
	r.Body = body
	r.Version = fmt.Sprintf("changed-%d", d.nonce)
	return r
}

// ReplaceInFull changes one resource and pushes every resource of its wildcard type, as istiod does.
func (d *Discovery) ReplaceInFull(url, name string, body *anypb.Any) error {
	d.mu.Lock()
	d.change(url, name, body)
	d.mu.Unlock()
	return d.Resend(url)
}

// Resend pushes every resource of a wildcard type as it stands.
func (d *Discovery) Resend(url string) error {
	d.mu.Lock()
	response := &discovery.DeltaDiscoveryResponse{TypeUrl: url}
	for _, r := range d.set.Types[url] {
		response.Resources = append(response.Resources, asResource(r))
	}
	var targets []*adsStream
	for s := range d.streams {
		if s.wildcard[url] {
			targets = append(targets, s)
		}
	}
	d.mu.Unlock()
	for _, s := range targets { // each gets a nonce of its own; the resources are shared
		one := &discovery.DeltaDiscoveryResponse{TypeUrl: url, Resources: response.Resources}
		if err := d.send(s, one); err != nil {
			return err
		}
	}
	return nil
}

// NACKs lists the refusals seen so far.
func (d *Discovery) NACKs() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.nacks)
}
