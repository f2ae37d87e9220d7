package load

import (
	"bufio"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"oracle/wire"
)

// proxy answers every request on a tunnel stream; answer decides how, by the number of the request.
func proxy(t *testing.T, answer func(n int64, stream *wire.Stream)) Dial {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	var count atomic.Int64
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go wire.ServeH2(conn, func(stream *wire.Stream) {
				stream.WriteHeader([]wire.Field{{Name: ":status", Value: "200"}}, false)
				r := bufio.NewReader(stream)
				for {
					if _, err := wire.ReadHead(r); err != nil {
						return
					}
					answer(count.Add(1), stream)
				}
			})
		}
	}()
	return func() (*wire.H2, error) {
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			return nil, err
		}
		return wire.ClientH2(conn)
	}
}

func ok(stream *wire.Stream, header string) {
	fmt.Fprintf(stream, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n%s\r\nok", header)
}

// run keeps one connection busy until that many answers were given.
func run(t *testing.T, answer func(n int64, stream *wire.Stream)) *Load {
	t.Helper()
	enough := make(chan struct{})
	l := New(proxy(t, func(n int64, stream *wire.Stream) {
		answer(n, stream)
		if n == 10 {
			close(enough)
		}
	}))
	l.KeepAlive("keep-alive", Target{Authority: "10.0.0.1:80", Host: "web", Path: "/"}, nil)
	if err := l.WaitOpen(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-enough:
	case <-time.After(10 * time.Second):
		t.Fatal("the load does not go on")
	}
	l.Stop()
	return l
}

func TestGoodAnswersAreNoTrouble(t *testing.T) {
	l := run(t, func(_ int64, s *wire.Stream) { ok(s, "") })
	if err := l.Err(); err != nil {
		t.Error(err)
	}
}

func TestAnAnswerThatAsksToCloseIsCountedAndTheLoadGoesOn(t *testing.T) {
	l := run(t, func(n int64, s *wire.Stream) {
		if n == 3 {
			ok(s, "connection: close\r\n")
			return
		}
		ok(s, "")
	})
	if got := l.Totals(); got.Closing != 1 || got.Failed != 0 || got.Closed != 0 {
		t.Errorf("%+v", got)
	}
	if l.Err() == nil {
		t.Error("nobody complains")
	}
}

func TestAResetIsAFailedRequestAndAClosedConnection(t *testing.T) {
	l := run(t, func(n int64, s *wire.Stream) {
		if n == 3 {
			s.Reset(http2.ErrCodeInternal)
			return
		}
		ok(s, "")
	})
	if got := l.Totals(); got.Failed != 1 || got.Closed != 1 {
		t.Errorf("%+v", got)
	}
}

func TestAnErrorStatusIsAFailedRequestOnAGoodConnection(t *testing.T) {
	l := run(t, func(n int64, s *wire.Stream) {
		if n == 3 {
			fmt.Fprint(s, "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")
			return
		}
		ok(s, "")
	})
	if got := l.Totals(); got.Failed != 1 || got.Closed != 0 {
		t.Errorf("%+v", got)
	}
	if report := strings.Join(l.Report(), "\n"); !strings.Contains(report, "status 503") {
		t.Error(report)
	}
}

func TestQuantilesOfNothingAreZero(t *testing.T) {
	if Quantile(nil, 0.5) != 0 || Quantile([]time.Duration{3, 1, 2}, 0.5) != 2 || Quantile([]time.Duration{3, 1, 2}, 1) != 3 {
		t.Error("wrong")
	}
}
