package backend

import (
	"encoding/json"
	"sync"
	"time"

	"oracle/wire"
)

// Arrival is one request or TCP connection as an application saw it.
type Arrival struct {
	Case   string    `json:"-"` // x-case header, "" for raw TCP
	At     time.Time `json:"-"`
	Conn   int       `json:"-"` // number of the application connection
	Number int       `json:"-"` // position in the log

	Pod       string  `json:"pod"`
	IP        string  `json:"-"`
	Port      int     `json:"port"`
	Transport string  `json:"transport"` // hbone or plain
	Tunnel    *Tunnel `json:"tunnel,omitempty"`
	Proxy     string  `json:"proxy_protocol,omitempty"`
	TLS       *TLS    `json:"tls,omitempty"`

	Protocol  string          `json:"protocol"` // HTTP/1.1, HTTP/2, gRPC, WebSocket, TCP
	Method    string          `json:"method,omitempty"`
	Path      string          `json:"path,omitempty"`
	Authority string          `json:"authority,omitempty"`
	Header    []wire.Field    `json:"-"`
	Framing   string          `json:"framing,omitempty"` // HTTP/1.1 only: none, length, chunked
	BodySize  int             `json:"body_size"`
	Body      string          `json:"body,omitempty"` // text up to 64 bytes, otherwise a SHA-256 prefix
	Messages  int             `json:"messages,omitempty"`
	Trailer   []wire.Field    `json:"-"`
	Check     json.RawMessage `json:"check,omitempty"` // a decoded ext_authz CheckRequest

	Attempt int    `json:"attempt,omitempty"`
	Answer  string `json:"answer,omitempty"` // the script step obeyed
	End     string `json:"end,omitempty"`    // how the request ended, when not normally
}

// Tunnel is the CONNECT that brought the connection.
type Tunnel struct {
	Peer      string       `json:"peer"`
	Authority string       `json:"authority"`
	Header    []wire.Field `json:"-"`
	Outer     *Tunnel      `json:"outer,omitempty"` // the tunnel around this one
}

// TLS is what the application's own TLS handshake showed.
type TLS struct {
	SNI    string   `json:"sni"`
	Offers []string `json:"alpn_offered,omitempty"`
	ALPN   string   `json:"alpn,omitempty"`
	Client string   `json:"client,omitempty"`
}

// log collects arrivals in the order in which they came.
type log struct {
	mu       sync.Mutex
	arrivals []*Arrival
	attempts map[string]int
	conns    int
	discard  bool // under load nobody reads the arrivals
}

func (l *log) add(a *Arrival) {
	l.mu.Lock()
	defer l.mu.Unlock()
	a.At = time.Now()
	a.Number = len(l.arrivals)
	if !l.discard {
		l.arrivals = append(l.arrivals, a)
	}
}

// edit changes an arrival that readers may look at meanwhile.
func (l *log) edit(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
}

// attempt counts the requests of one case that one virtual host received.
func (l *log) attempt(key string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.discard {
		return 1
	}
	l.attempts[key]++
	return l.attempts[key]
}

func (l *log) nextConn() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns++
	return l.conns
}

// Arrivals returns copies of everything recorded since the given position.
func (s *Server) Arrivals(from int) []Arrival {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	var out []Arrival
	for _, a := range s.log.arrivals[from:] {
		out = append(out, *a)
	}
	return out
}

// Count is the position after the last arrival.
func (s *Server) Count() int {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	return len(s.log.arrivals)
}

// Discard stops the recording of arrivals, which a long load would fill the memory with.
func (s *Server) Discard() {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	s.log.discard = true
}

// ForgetAttempts starts counting attempts anew.
func (s *Server) ForgetAttempts() {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	clear(s.log.attempts)
}
