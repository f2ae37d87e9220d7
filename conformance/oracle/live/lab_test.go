package live

import (
	"encoding/json"
	"testing"
)

func parsed(t *testing.T, text string) status {
	t.Helper()
	var s status
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSyncedMeansThatEveryTypeWasAcknowledged(t *testing.T) {
	const cluster, listener = `"type.googleapis.com/envoy.config.cluster.v3.Cluster"`, `"type.googleapis.com/envoy.config.listener.v3.Listener"`
	for _, c := range []struct {
		name, resources string
		want            bool
	}{
		{"both", cluster + `: {"sent": "a", "acked": "a"}, ` + listener + `: {"sent": "b", "acked": "b"}`, true},
		{"one is stale", cluster + `: {"sent": "a", "acked": "a"}, ` + listener + `: {"sent": "c", "acked": "b"}`, false},
		{"one was refused", cluster + `: {"sent": "a", "acked": "a", "lastError": "no"}, ` + listener + `: {"sent": "b", "acked": "b"}`, false},
		{"one was never asked for", cluster + `: {"sent": "a", "acked": "a"}`, false},
		{"one was never acknowledged", cluster + `: {"sent": "a", "acked": "a"}, ` + listener + `: {"sent": ""}`, false},
	} {
		err := parsed(t, `{"proxy": "p", "resources": {`+c.resources+`}}`).synced("Cluster", "Listener")
		if (err == nil) != c.want {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
