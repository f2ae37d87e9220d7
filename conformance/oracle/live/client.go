package live

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protowire"

	"oracle/rig"
)

const (
	typePrefix  = "type.googleapis.com/"
	clusterURL  = typePrefix + "envoy.config.cluster.v3.Cluster"
	listenerURL = typePrefix + "envoy.config.listener.v3.Listener"
	addressURL  = typePrefix + "istio.workload.Address"
)

// observer is a second proxy of the same waypoint that only listens: it tells when istiod pushed.
type observer struct {
	conn   *grpc.ClientConn
	stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	cancel context.CancelFunc

	mu        sync.Mutex
	pushes    map[string]time.Time // latest answer by type
	addresses map[string]int       // address resources by name: 1 a workload, 2 a service
	broken    error
}

// observe subscribes to some types, all by wildcard, as a waypoint with this node.
func observe(n *rig.Network, node *core.Node, urls ...string) (*observer, error) {
	conn, err := grpc.NewClient("passthrough:///istiod", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return n.DialWaypoint(plainAddress, 5*time.Second) }))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	o := &observer{conn: conn, cancel: cancel, pushes: map[string]time.Time{}, addresses: map[string]int{}}
	if o.stream, err = discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx); err != nil {
		o.close()
		return nil, err
	}
	for _, url := range urls {
		if err := o.stream.Send(&discovery.DeltaDiscoveryRequest{Node: node, TypeUrl: url, ResourceNamesSubscribe: []string{"*"}}); err != nil {
			o.close()
			return nil, err
		}
	}
	go o.run()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		missing := ""
		for _, url := range urls {
			if o.last(url).IsZero() {
				missing = url
			}
		}
		switch err := o.err(); {
		case missing == "":
			return o, nil
		case err != nil || time.Now().After(deadline):
			o.close()
			return nil, fmt.Errorf("istiod does not answer for %s: %v", missing, err)
		}
	}
}

func (o *observer) run() {
	for {
		response, err := o.stream.Recv()
		o.mu.Lock()
		if err != nil {
			o.broken = err
			o.mu.Unlock()
			return
		}
		o.pushes[response.TypeUrl] = time.Now()
		if response.TypeUrl == addressURL {
			for _, r := range response.Resources {
				number, _, n := protowire.ConsumeTag(r.GetResource().GetValue())
				if n > 0 {
					o.addresses[r.Name] = int(number)
				}
			}
			for _, name := range response.RemovedResources {
				delete(o.addresses, name)
			}
		}
		o.mu.Unlock()
		if err := o.stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: response.TypeUrl, ResponseNonce: response.Nonce}); err != nil {
			return
		}
	}
}

func (o *observer) err() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.broken
}

// last is when the latest answer of a type arrived.
func (o *observer) last(url string) time.Time {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.pushes[url]
}

// pushed waits for an answer of a type that is newer than a moment.
func (o *observer) pushed(url string, after time.Time, limit time.Duration) (time.Time, error) {
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if at := o.last(url); at.After(after) {
			return at, nil
		}
	}
	return time.Time{}, fmt.Errorf("istiod pushed no %s within %v", url, limit)
}

// count returns how many workloads and services are known.
func (o *observer) count() (workloads, services int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, field := range o.addresses {
		switch field {
		case 1:
			workloads++
		case 2:
			services++
		}
	}
	return workloads, services
}

func (o *observer) close() {
	o.cancel()
	o.conn.Close()
}
