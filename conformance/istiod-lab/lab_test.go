package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	capb "istio.io/api/security/v1alpha1"
)

const basicScenario = "../fixtures/scenarios/01-http-basic.yaml"

// TestMain restarts the test binary with ambient mode on, which istiod reads
// while packages initialise.
func TestMain(m *testing.M) {
	if os.Getenv("PILOT_ENABLE_AMBIENT") == "" {
		self, err := os.Executable()
		if err == nil {
			err = syscall.Exec(self, os.Args, append(os.Environ(), "PILOT_ENABLE_AMBIENT=true"))
		}
		panic(err)
	}
	quietLogs()
	os.Exit(m.Run())
}

func startBasic(t *testing.T) (*lab, *core.Node) {
	t.Helper()
	m, err := loadManifests([]string{basicScenario})
	if err != nil {
		t.Fatal(err)
	}
	l := startLab(t, m, "127.0.0.1:0", 0)
	waypoints, err := m.waypoints(nil)
	if err != nil {
		t.Fatal(err)
	}
	node, err := m.node(waypoints[0], l.mesh, defaultProxyVersion)
	if err != nil {
		t.Fatal(err)
	}
	return l, node
}

func (l *lab) clusterNames(t *testing.T, node *core.Node) string {
	t.Helper()
	s, err := subscribe(l.address(), proto.Clone(node).(*core.Node), quietPeriod)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, response := range s.recorded(urlOf("cds")) {
		for _, resource := range response.Resources {
			names = append(names, resource.Name)
		}
	}
	return strings.Join(names, " ")
}

func parse(t *testing.T, text string) []*manifest {
	t.Helper()
	list, err := parseManifests([]byte(text), 100)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

const extraService = `
apiVersion: v1
kind: Service
metadata: {name: extra, namespace: app}
spec:
  clusterIP: 10.96.9.9
  clusterIPs: [10.96.9.9]
  selector: {app: web}
  ports: [{name: grpc, port: 7000}]
`

const extraSubsets = `
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web, namespace: app}
spec:
  host: web.app.svc.cluster.local
  subsets: [{name: NAME, labels: {version: v1}}]
`

func TestObjectsChangeWhileServing(t *testing.T) {
	l, node := startBasic(t)
	expect := func(step string, present bool, cluster string) {
		t.Helper()
		deadline := time.Now().Add(10 * time.Second)
		for {
			names := l.clusterNames(t, node)
			if strings.Contains(names, cluster) == present {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: cluster %s present=%v not seen in %s", step, cluster, present, names)
			}
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(l.apply(parse(t, extraService)))
	expect("create a service", true, "inbound-vip|7000|http|extra.app.svc.cluster.local")
	must(l.apply(parse(t, strings.Replace(extraService, "7000", "7001", 1))))
	expect("update a service", true, "inbound-vip|7001|http|extra.app.svc.cluster.local")
	must(l.remove(parse(t, extraService)))
	expect("delete a service", false, "extra.app.svc.cluster.local")

	must(l.apply(parse(t, strings.Replace(extraSubsets, "NAME", "one", 1))))
	expect("create a destination rule", true, "inbound-vip|80|http/one|web")
	must(l.apply(parse(t, strings.Replace(extraSubsets, "NAME", "two", 1))))
	expect("update a destination rule", true, "inbound-vip|80|http/two|web")
	keys, err := parseKeys([]byte("apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: web, namespace: app}\n"), 0)
	must(err)
	must(l.remove(keys))
	expect("delete a destination rule", false, "inbound-vip|80|http/two|web")
}

func TestShortHostNamesResolve(t *testing.T) {
	l, node := startBasic(t)
	if err := l.apply(parse(t, strings.Replace(extraSubsets, "host: web.app.svc.cluster.local", "host: web", 1))); err != nil {
		t.Fatal(err)
	}
	if names := l.clusterNames(t, node); !strings.Contains(names, "inbound-vip|80|http/NAME|web.app.svc.cluster.local") {
		t.Fatalf("the destination rule did not take effect: %s", names)
	}
}

func TestCertificateFromToken(t *testing.T) {
	l, _ := startBasic(t)
	opts := serveOptions{tlsListen: "127.0.0.1:0", rootCert: filepath.Join(t.TempDir(), "root.pem"), certTTL: time.Hour}
	address, err := serveTLS(t, l, opts)
	if err != nil {
		t.Fatal(err)
	}
	root, err := credentials.NewClientTLSFromFile(opts.rootCert, istiodHost)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(root))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()

	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	request := &capb.IstioCertificateRequest{
		Csr:              string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})),
		ValidityDuration: 600,
	}
	client := capb.NewIstioCertificateServiceClient(conn)
	if _, err := client.CreateCertificate(context.Background(), request); err == nil {
		t.Fatal("a caller without a token got a certificate")
	}
	ctx := metadata.AppendToOutgoingContext(context.Background(), "authorization", "Bearer "+unsignedToken("app", "waypoint"))
	response, err := client.CreateCertificate(ctx, request)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode([]byte(response.CertChain[0]))
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if got := leaf.URIs[0].String(); got != "spiffe://cluster.local/ns/app/sa/waypoint" {
		t.Fatalf("identity %s", got)
	}
}
