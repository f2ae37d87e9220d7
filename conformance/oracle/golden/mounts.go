package golden

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"google.golang.org/protobuf/encoding/protojson"

	"oracle/capture"
	"oracle/control"
)

// systemRoots is where a Debian keeps the roots that `file-root:system` stands for.
const systemRoots = "/etc/ssl/certs/ca-certificates.crt"

var fileSecret = regexp.MustCompile(`"name":\s*"(file-(?:cert|root):[^"]+)"`)

// mounts writes the files that DestinationRules name into a tree, as a Deployment would mount them
// into the waypoint: roots are the outside authority's, and so are clients' certificates.
func mounts(set *capture.Set, authorities *control.Authorities, tree string) (any bool, err error) {
	write := func(path string, content []byte) error {
		path = filepath.Join(tree, path)
		any = true
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		return os.WriteFile(path, content, 0o644)
	}
	for _, resource := range set.Types[capture.Cluster] {
		message := &cluster.Cluster{}
		if err := resource.Body.UnmarshalTo(message); err != nil {
			return false, err
		}
		text, err := protojson.Marshal(message)
		if err != nil {
			return false, err
		}
		for _, match := range fileSecret.FindAllStringSubmatch(string(text), -1) {
			if path, is := strings.CutPrefix(match[1], "file-root:"); is {
				if path == "system" {
					path = systemRoots
				}
				if err := write(path, authorities.Outside.PEM); err != nil {
					return false, err
				}
				continue
			}
			issued, err := authorities.External("client.outside")
			if err != nil {
				return false, err
			}
			certificate, key, err := control.PEMPair(issued)
			if err != nil {
				return false, err
			}
			certificatePath, keyPath, _ := strings.Cut(strings.TrimPrefix(match[1], "file-cert:"), "~")
			if err := write(certificatePath, certificate); err != nil {
				return false, err
			}
			if err := write(keyPath, key); err != nil {
				return false, err
			}
		}
	}
	return any, nil
}

// mounted runs a command that sees the tree's /etc over the machine's: each process that `ip netns exec`
// starts has mounts of its own.
func mounted(command, tree string) []string {
	script := `cp -a /etc "$0/all" && cp -a --remove-destination "$0/etc/." "$0/all/" && mount --bind "$0/all" /etc && exec sh -c "$1"`
	return []string{"sh", "-c", script, tree, command}
}
