package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"istio.io/istio/pkg/test"
)

type serveOptions struct {
	listen, tlsListen, admin, rootCert string
	caCert, caKey                      string // empty: a root for the life of the process
	debounce, certTTL                  time.Duration
}

func serve(t test.Failer, m *manifests, opts serveOptions) {
	l := startLab(t, m, opts.listen, opts.debounce)
	if opts.tlsListen != "" {
		var err error
		if opts.tlsListen, err = serveTLS(t, l, opts); err != nil {
			t.Fatal(err)
		}
	}
	listener, err := net.Listen("tcp", opts.admin)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = http.Serve(listener, l.adminHandler()) }()
	fmt.Printf("ready: xds %s tls %s admin %s (%s)\n", l.address(), opts.tlsListen, listener.Addr(), istioModule())

	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	<-stop
}

// adminHandler changes objects while the server runs and shows istiod's debug pages:
//
//	POST   /apply   a YAML stream: create or update
//	DELETE /apply   a YAML stream: delete (kind, namespace and name are enough)
//	GET    /objects the objects held, as a list of keys
//	GET    /debug/… istiod's own debug endpoints
func (l *lab) adminHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /apply", l.change(parseManifests, l.apply))
	mux.HandleFunc("DELETE /apply", l.change(parseKeys, l.remove))
	mux.HandleFunc("GET /objects", func(w http.ResponseWriter, _ *http.Request) {
		l.mu.Lock()
		defer l.mu.Unlock()
		keys := []string{}
		for _, item := range l.objects.list {
			keys = append(keys, item.key())
		}
		_ = json.NewEncoder(w).Encode(keys)
	})
	mux.HandleFunc("GET /ready", func(http.ResponseWriter, *http.Request) {})
	mux.Handle("/debug/", l.server.DiscoveryDebug)
	return mux
}

func (l *lab) change(parse func([]byte, int) ([]*manifest, error), do func([]*manifest) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		l.mu.Lock()
		position := len(l.objects.list)
		l.mu.Unlock()
		list, err := parse(body, position)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if err := do(list); err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		fmt.Fprintf(w, "%d objects\n", len(list))
	}
}
