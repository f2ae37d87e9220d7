// Package live holds the proxy against a real istiod: Istio's own discovery server and CA,
// run by istiod-lab in the waypoint's namespace, changed while traffic flows.
package live

import (
	"bytes"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"oracle/golden"
	"oracle/rig"
)

//go:embed mesh.yaml
var mesh []byte

// Addresses in the waypoint's namespace.
const (
	plainAddress = "127.0.0.1:15010"
	tlsAddress   = "127.0.0.1:15012"
	adminURL     = "http://127.0.0.1:15080"
)

// startLimit is how long istiod-lab may take to serve.
const startLimit = 60 * time.Second

// lab is an istiod in the waypoint's namespace. Its root certificate outlives restarts.
type lab struct {
	binary  string
	dir     string // manifests, CA files and logs
	network *rig.Network
	process *rig.Proxy
	starts  int
}

func newLab(binary string, s *golden.Session) (*lab, error) {
	l := &lab{binary: binary, dir: filepath.Join(s.Dir(), "istiod"), network: s.Network}
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return nil, err
	}
	key, err := s.Authorities.Mesh.KeyPEM()
	if err != nil {
		return nil, err
	}
	return l, errors.Join(
		os.WriteFile(filepath.Join(l.dir, "ca-cert.pem"), s.Authorities.Mesh.PEM, 0o644),
		os.WriteFile(filepath.Join(l.dir, "ca-key.pem"), key, 0o600),
		os.WriteFile(filepath.Join(l.dir, "mesh.yaml"), mesh, 0o644),
	)
}

// start runs istiod and waits until it serves.
func (l *lab) start() error {
	l.starts++
	argv := []string{l.binary, "serve", "-f", "mesh.yaml", "--listen", plainAddress, "--tls-listen", tlsAddress,
		"--admin", strings.TrimPrefix(adminURL, "http://"), "--debounce", "20ms", "--ca-cert", "ca-cert.pem", "--ca-key", "ca-key.pem"}
	var err error
	if l.process, err = l.network.Start(argv, []string{"HOME=" + l.dir}, l.dir, filepath.Join(l.dir, fmt.Sprintf("istiod-%d.log", l.starts))); err != nil {
		return err
	}
	for deadline := time.Now().Add(startLimit); ; time.Sleep(50 * time.Millisecond) {
		status, _, err := l.network.Get(adminURL+"/ready", time.Second)
		switch {
		case err == nil && status == http.StatusOK:
			return nil
		case !l.process.Running():
			return fmt.Errorf("istiod-lab exited:\n%s", l.process.Tail(4000))
		case time.Now().After(deadline):
			return fmt.Errorf("istiod-lab does not serve after %v:\n%s", startLimit, l.process.Tail(4000))
		}
	}
}

// kill ends istiod without a goodbye.
func (l *lab) kill() {
	if l.process != nil && l.process.Running() {
		l.process.Kill()
	}
}

func (l *lab) stop() {
	if l.process != nil && l.process.Running() {
		l.process.Stop()
	}
}

func (l *lab) change(method, yaml string) error {
	status, body, err := l.network.Do(method, adminURL+"/apply", []byte(yaml), 10*time.Second)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("istiod-lab answers %d to a change: %s", status, bytes.TrimSpace(body))
	}
	return err
}

// apply creates or updates objects.
func (l *lab) apply(yaml string) error { return l.change("POST", yaml) }

// remove deletes objects.
func (l *lab) remove(yaml string) error { return l.change("DELETE", yaml) }

// status is what istioctl proxy-status reads.
type status struct {
	Proxy     string                    `json:"proxy"`
	Version   string                    `json:"istio_version"`
	Resources map[string]resourceStatus `json:"resources"`
}

type resourceStatus struct {
	Sent      string `json:"sent"`
	Acked     string `json:"acked"`
	LastError string `json:"lastError"`
}

func (l *lab) status() ([]status, error) {
	code, body, err := l.network.Get(adminURL+"/debug/syncz", 5*time.Second)
	if err != nil {
		return nil, err
	}
	if code != http.StatusOK {
		return nil, fmt.Errorf("/debug/syncz answers %d", code)
	}
	var out []status
	return out, json.Unmarshal(body, &out)
}

// synced tells why a proxy is not shown as SYNCED for every type that it asked for, nil when it is.
func (s status) synced(required ...string) error {
	for _, short := range required {
		found := false
		for url, r := range s.Resources {
			found = found || strings.HasSuffix(url, "."+short) && r.Acked != ""
		}
		if !found {
			return fmt.Errorf("%s: nothing of type %s was acknowledged: %v", s.Proxy, short, s.Resources)
		}
	}
	for url, r := range s.Resources {
		if r.LastError != "" {
			return fmt.Errorf("%s: refused %s: %s", s.Proxy, url, r.LastError)
		}
		if r.Sent != r.Acked {
			return fmt.Errorf("%s: %s is STALE: sent %q, acknowledged %q", s.Proxy, url, r.Sent, r.Acked)
		}
	}
	return nil
}

// captureMesh records what istiod makes of the mesh, for the addresses of the rig.
func captureMesh(binary, dir string) (manifests string, err error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	manifests = dir + ".yaml" // capture empties the folder itself
	if err := os.WriteFile(manifests, mesh, 0o644); err != nil {
		return "", err
	}
	text, err := exec.Command(binary, "capture", "-f", manifests, "--out", dir, "--json=false").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("istiod-lab capture: %w: %s", err, text)
	}
	return manifests, nil
}

// token is a service account token that istiod-lab believes.
func token(namespace, account string) string {
	encode := func(v any) string {
		text, _ := json.Marshal(v)
		return base64.RawURLEncoding.EncodeToString(text)
	}
	now := time.Now()
	return encode(map[string]string{"alg": "none", "typ": "JWT"}) + "." + encode(map[string]any{
		"sub": "system:serviceaccount:" + namespace + ":" + account, "aud": []string{"istio-ca"},
		"iat": now.Unix(), "exp": now.Add(24 * time.Hour).Unix(),
	}) + "."
}
