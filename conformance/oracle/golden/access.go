package golden

import (
	"net"
	"time"

	"oracle/wire"
)

// Dial opens a tunnel connection for an identity ("namespace/account") from an address.
func (s *Session) Dial(as, from string) (*wire.H2, error) {
	return s.client.tunnels(Request{As: as, From: from})
}

// Attempt is the course of one CONNECT.
type Attempt struct {
	Status   int
	Answered time.Duration // until the answer to CONNECT
	End      string        // how the stream ended, "" when it was still open
	Ended    time.Duration // from the answer to the end
	Bytes    int
}

// Try sends a CONNECT, then the given bytes, and watches the stream for a while.
func (s *Session) Try(h2 *wire.H2, to string, send []byte, watch time.Duration) Attempt {
	begun := time.Now()
	stream, response, err := connect(h2, Request{To: to, Timeout: Duration(watch)})
	out := Attempt{Status: response.Status, Answered: time.Since(begun)}
	if err != nil || response.Status != 200 {
		out.End, out.Bytes = response.End, response.BodySize
		return out
	}
	defer stream.Close()
	begun = time.Now()
	if send != nil {
		stream.Write(send)
	}
	stream.SetReadDeadline(time.Now().Add(watch))
	buffer := make([]byte, 4096)
	for {
		n, err := stream.Read(buffer)
		out.Bytes += n
		if err != nil {
			out.Ended = time.Since(begun)
			if out.End = ending(err, out.Bytes); out.End == "timeout" {
				out.End = ""
			}
			return out
		}
	}
}

// OpenStream opens a tunnel stream that must be accepted.
func OpenStream(h2 *wire.H2, to string) (*wire.Stream, error) {
	stream, response, err := connect(h2, Request{To: to, Timeout: Duration(5 * time.Second)})
	if err == nil && response.Status != 200 {
		err = net.ErrClosed
	}
	if err == nil {
		stream.SetReadDeadline(time.Time{})
	}
	return stream, err
}

// Leave ends a stream in the background as a client does that closes its socket. A reset each time would
// look like an attack: Envoy ends a connection on which most streams are reset early.
func Leave(stream *wire.Stream) { go finish(stream) }

// Ending describes how a connection ended.
func Ending(err error) string { return ending(err, 1) }
