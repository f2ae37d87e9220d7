package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"oracle/backend"
	"oracle/golden"
	"oracle/rig"
)

// echoCase is one call of Istio's echo client and what its output must say.
type echoCase struct {
	name  string
	url   string
	flags []string
	want  []string
	count int // how often the first of want must appear
}

// The scenario has one service: HTTP on 80 and 81, gRPC on 82, TCP on 83, with captured, plain and sidecar endpoints.
const (
	echoScenario = "06-multi-port"
	echoIdentity = "spiffe://cluster.local/ns/app/sa/client"
	echoServerID = "spiffe://cluster.local/ns/app/sa/shop"
	// atLayer7 is the header by which Istio's own tests tell that a waypoint handled a request.
	atLayer7 = "RequestHeader=x-request-id:"
)

var echoCases = []echoCase{
	{name: "HTTP/1.1", url: "http://10.96.1.50:80/one", want: []string{"StatusCode=200", "Proto=HTTP/1.1", atLayer7}, count: 1},
	{name: "HTTP/1.1, 20 requests on one connection", url: "http://10.96.1.50:80/", flags: []string{"--count", "20"}, want: []string{"StatusCode=200", atLayer7}, count: 20},
	{name: "HTTP/1.1, a connection each", url: "http://10.96.1.50:80/", flags: []string{"--count", "20", "--new-connection-per-request"}, want: []string{"StatusCode=200", atLayer7}, count: 20},
	{name: "HTTP/1.1 POST", url: "http://10.96.1.50:81/", flags: []string{"--method", "POST"}, want: []string{"StatusCode=200", "Method=POST", atLayer7}, count: 1},
	{name: "HTTP/2", url: "http://10.96.1.50:80/two", flags: []string{"--http2"}, want: []string{"StatusCode=200", "RequestHeader=User-Agent:Go-http-client/2.0", atLayer7}, count: 1},
	{name: "HTTP/2, 20 requests on one connection", url: "http://10.96.1.50:80/", flags: []string{"--http2", "--count", "20"}, want: []string{"StatusCode=200", atLayer7}, count: 20},
	{name: "gRPC", url: "grpc://10.96.1.50:82", want: []string{"StatusCode=200", "Echo=HelloWorld", atLayer7}, count: 1},
	{name: "gRPC, 20 calls", url: "grpc://10.96.1.50:82", flags: []string{"--count", "20"}, want: []string{"StatusCode=200", atLayer7}, count: 20},
	{name: "WebSocket", url: "ws://10.96.1.50:80/chat", flags: []string{"--msg", "hello through the mesh"}, want: []string{"Echo=hello through the mesh", atLayer7}, count: 1},
	{name: "TCP", url: "tcp://10.96.1.50:83", flags: []string{"--msg", "raw bytes"}, want: []string{"StatusCode=200", "Echo=raw bytes"}, count: 1},
	{name: "TCP, 10 connections", url: "tcp://10.96.1.50:83", flags: []string{"--count", "10", "--msg", "raw"}, want: []string{"StatusCode=200", "Echo=raw"}, count: 10},
}

// runEcho sends with Istio's echo client to Istio's echo server, both of which speak HBONE on their own.
func runEcho(args []string) error {
	set, p := flags("echo")
	client := set.String("client", "", "Istio's echo client")
	server := set.String("server", "", "Istio's echo server")
	set.StringVar(&p.runner.Command, "proxy-cmd", "", "shell command that runs the proxy under test (default: Envoy)")
	set.Parse(args)
	if *client == "" || *server == "" {
		return errors.New("--client and --server are required: go build istio.io/istio/pkg/test/echo/cmd/{client,server}")
	}
	p.runner.Destinations = func(s *golden.Session) (func(), error) { return startEchoServer(s, *server) }
	file := &golden.File{Scenario: "echo", Cases: []golden.Case{{Request: golden.Request{From: "10.244.0.200"}}}}
	s, err := p.runner.Open(file, filepath.Join(p.root, "scenarios", echoScenario+".yaml"), p.captureDir(p.root, echoScenario))
	if s != nil {
		defer s.Close()
	}
	if err != nil {
		return err
	}
	certs := filepath.Join(s.Dir(), "client")
	if err := s.Authorities.WriteFiles(certs, echoIdentity); err != nil {
		return err
	}
	failed := 0
	for _, c := range echoCases {
		if err := c.run(s, *client, certs, p.runner.Verbose); err != nil {
			fmt.Printf("FAILED %-42s %v\n", c.name, err)
			failed++
			continue
		}
		fmt.Printf("ok     %s\n", c.name)
	}
	fmt.Printf("%d of %d calls passed\n", len(echoCases)-failed, len(echoCases))
	if failed > 0 {
		return fmt.Errorf("%d calls failed", failed)
	}
	return nil
}

// startEchoServer runs the server in the place of every endpoint of the scenario.
func startEchoServer(s *golden.Session, binary string) (func(), error) {
	certs := filepath.Join(s.Dir(), "server")
	if err := s.Authorities.WriteFiles(certs, echoServerID); err != nil {
		return nil, err
	}
	argv := []string{binary, "--port", "8080", "--port", "9090", "--grpc", "7070", "--tcp", "6000",
		"--hbone", fmt.Sprint(backend.HBONEPort), "--tls", fmt.Sprint(backend.HBONEPort),
		"--crt", filepath.Join(certs, "cert-chain.pem"), "--key", filepath.Join(certs, "key.pem")}
	// Left alone, it listens only in the address families of what it takes for private addresses.
	for _, port := range []string{"8080", "9090", "7070", "6000", fmt.Sprint(backend.HBONEPort)} {
		argv = append(argv, "--bind-ip", port)
	}
	process, err := s.Network.StartDest(argv, []string{"HOME=" + s.Dir(), "INSTANCE_IP=0.0.0.0"}, s.Dir(), filepath.Join(s.Dir(), "echo-server.log"))
	if err != nil {
		return nil, err
	}
	return process.Stop, waitForEcho(s, process)
}

func waitForEcho(s *golden.Session, process *rig.Proxy) error {
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		status, _, err := s.Network.Get("http://"+net.JoinHostPort(s.World.Hosts[0].IP, "8080")+"/", time.Second)
		switch {
		case err == nil && status == 200:
			return nil
		case !process.Running() || time.Now().After(deadline):
			process.Stop()
			return fmt.Errorf("the echo server does not answer: %v\n%s", err, process.Tail(2000))
		}
	}
}

func (c echoCase) run(s *golden.Session, client, certs string, verbose bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	argv := append([]string{client, "--hbone", net.JoinHostPort(s.World.Waypoint, fmt.Sprint(backend.HBONEPort)),
		"--hbone-client-cert", filepath.Join(certs, "cert-chain.pem"), "--hbone-client-key", filepath.Join(certs, "key.pem"),
		"--hbone-insecure-skip-verify", "--timeout", "10s"}, c.flags...)
	text, err := s.Network.RunClient(ctx, append(argv, c.url), s.Dir())
	if verbose {
		fmt.Fprintln(os.Stderr, text)
	}
	if err != nil {
		return fmt.Errorf("%w: %s", err, lastLines(text, 3))
	}
	for i, want := range c.want {
		if n := strings.Count(strings.ToLower(text), strings.ToLower(want)); n == 0 || i == 0 && n != c.count {
			return fmt.Errorf("%q appears %d times: %s", want, n, lastLines(text, 40))
		}
	}
	return nil
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n    ")
}
