package control

import (
	"context"
	"fmt"
	"net"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretservice "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"oracle/capture"
)

// maxMessage bounds one xDS answer; istiod's own clients use the same.
const maxMessage = 200 << 20

// Relay stands between a stock Envoy and a live istiod: it plays pilot-agent (SDS, the ADS
// connection) and takes out of the configuration what only Istio's build of Envoy knows.
type Relay struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	upstream discovery.AggregatedDiscoveryServiceClient
	server   *grpc.Server
	conn     *grpc.ClientConn
}

// StartRelay serves on a listener what istiod says on the connections that dial opens.
func StartRelay(l net.Listener, dial func(context.Context, string) (net.Conn, error), authorities *Authorities, identity string) (*Relay, error) {
	conn, err := grpc.NewClient("passthrough:///istiod", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(dial), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	if err != nil {
		return nil, err
	}
	r := &Relay{upstream: discovery.NewAggregatedDiscoveryServiceClient(conn), server: grpc.NewServer(), conn: conn}
	discovery.RegisterAggregatedDiscoveryServiceServer(r.server, r)
	secretservice.RegisterSecretDiscoveryServiceServer(r.server, &secrets{authorities: authorities, identity: identity})
	go r.server.Serve(l)
	return r, nil
}

// Stop ends the relay.
func (r *Relay) Stop() {
	r.server.Stop()
	r.conn.Close()
}

// DeltaAggregatedResources passes both directions on.
func (r *Relay) DeltaAggregatedResources(down discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	ctx, cancel := context.WithCancel(down.Context())
	defer cancel()
	up, err := r.upstream.DeltaAggregatedResources(ctx)
	if err != nil {
		return err
	}
	go func() {
		defer cancel()
		for {
			request, err := down.Recv()
			if err != nil || up.Send(request) != nil {
				return
			}
		}
	}()
	for {
		response, err := up.Recv()
		if err != nil {
			return err
		}
		kept := response.Resources[:0]
		for _, resource := range response.Resources {
			if response.TypeUrl != capture.Workload {
				if resource.Resource, err = capture.Adapt(resource.Resource); err != nil {
					return fmt.Errorf("%s: %w", resource.Name, err)
				}
			}
			if resource.Resource != nil {
				kept = append(kept, resource)
			}
		}
		response.Resources = kept
		if err := down.Send(response); err != nil {
			return err
		}
	}
}
