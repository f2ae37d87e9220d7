package control

import (
	"net"
	"sync"
	"time"
)

// written notes when data last went out on any connection of a server. gRPC queues a message and
// returns; only the socket tells when its last byte was written.
type written struct {
	mu sync.Mutex
	at time.Time
}

// controlFrames is the size up to which a write is no data: window updates, pings and settings, also over TLS.
const controlFrames = 100

func (w *written) wrote(n int) {
	if n <= controlFrames {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.at = time.Now()
}

// LastData is when data was last written to a proxy.
func (s *Server) LastData() time.Time {
	s.written.mu.Lock()
	defer s.written.mu.Unlock()
	return s.written.at
}

// watchedListener accepts connections whose writes are noted.
type watchedListener struct {
	net.Listener
	written *written
}

func (l watchedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return watchedConn{conn, l.written}, nil
}

type watchedConn struct {
	net.Conn
	written *written
}

func (c watchedConn) Write(data []byte) (int, error) {
	n, err := c.Conn.Write(data)
	c.written.wrote(n)
	return n, err
}
