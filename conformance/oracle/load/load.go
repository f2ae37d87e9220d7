// Package load keeps exchanges of every kind alive through a proxy while something
// happens to it, and counts what a user would notice: failed requests, connections
// that ended, answers that ask the client to close.
package load

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"sort"
	"strings"
	"sync"
	"time"

	"oracle/golden"
	"oracle/wire"
)

// Dial opens an HBONE connection to the proxy.
type Dial func() (*wire.H2, error)

// Target is a service reached through the tunnel.
type Target struct {
	Authority string // of the CONNECT
	Host      string // of the requests
	Path      string
}

// Patience is how long one answer may take before it counts as failed.
const Patience = 10 * time.Second

// Watched is one kind of exchange with its counts.
type Watched struct {
	Name string

	mu        sync.Mutex
	exchanges int
	failed    int
	closed    int
	closing   int
	firsts    []string // the first few troubles, for the report
}

const keptTroubles = 3

func (w *Watched) done() { w.mu.Lock(); w.exchanges++; w.mu.Unlock() }

func (w *Watched) trouble(count *int, what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	*count++
	if len(w.firsts) < keptTroubles {
		w.firsts = append(w.firsts, what)
	}
}

// Totals are the counts of one kind, or of all.
type Totals struct{ Exchanges, Failed, Closed, Closing int }

func (w *Watched) totals() Totals {
	w.mu.Lock()
	defer w.mu.Unlock()
	return Totals{w.exchanges, w.failed, w.closed, w.closing}
}

// Load is a set of running exchanges.
type Load struct {
	// Answered, when set before the first exchange, gets when each good exchange began and how long it took.
	// It is called from several goroutines.
	Answered func(begun time.Time, took time.Duration)

	dial    Dial
	begun   time.Time
	stop    context.CancelFunc
	stopped context.Context
	group   sync.WaitGroup
	kinds   []*Watched
	open    chan error // one message for each exchange that is up
	waiting int
}

// New prepares a load; nothing runs yet.
func New(dial Dial) *Load {
	ctx, cancel := context.WithCancel(context.Background())
	return &Load{dial: dial, begun: time.Now(), stopped: ctx, stop: cancel, open: make(chan error, 64)}
}

func (l *Load) at() string { return fmt.Sprintf("after %.2f s: ", time.Since(l.begun).Seconds()) }

func (l *Load) over() bool { return l.stopped.Err() != nil }

// pause waits, and tells whether the load goes on.
func (l *Load) pause(d time.Duration) bool {
	select {
	case <-l.stopped.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// watch runs one exchange: connect opens what it needs, beat uses it once. Whenever beat fails
// the connection is opened again, so that one accident is not counted for ever.
func (l *Load) watch(name string, pause time.Duration, connect func() (*exchange, error), beat func(*exchange) error) {
	w := &Watched{Name: name}
	l.kinds = append(l.kinds, w)
	l.waiting++
	l.group.Go(func() {
		e, err := connect()
		if err == nil {
			err = beat(e)
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", name, err)
		}
		l.open <- err
		if err != nil {
			return
		}
		w.done()
		for l.pause(pause) {
			if e == nil {
				if e, err = connect(); err != nil {
					w.trouble(&w.failed, l.at()+"cannot connect again: "+err.Error())
					if e != nil {
						e.close()
					}
					e = nil
					continue
				}
			}
			begun := time.Now()
			err := beat(e)
			var asked closingError
			switch {
			case err == nil:
				w.done()
				if l.Answered != nil {
					l.Answered(begun, time.Since(begun))
				}
				continue
			case l.over():
				continue
			case errors.As(err, &asked):
				w.trouble(&w.closing, l.at()+err.Error())
			case errors.As(err, new(statusError)):
				w.trouble(&w.failed, l.at()+err.Error())
				continue // the connection is still good
			default:
				w.trouble(&w.failed, l.at()+err.Error())
				w.mu.Lock()
				w.closed++
				w.mu.Unlock()
			}
			e.close()
			e = nil
		}
		if e != nil {
			e.close()
		}
	})
}

// exchange is an open tunnel stream on a tunnel connection of its own.
type exchange struct {
	h2     *wire.H2
	stream *wire.Stream
	reader *bufio.Reader
	inner  *wire.H2
}

func (e *exchange) close() {
	if e.stream != nil {
		e.stream.Close()
	}
	e.h2.Close()
}

type statusError struct{ status int }

func (e statusError) Error() string { return fmt.Sprintf("status %d", e.status) }

type closingError struct{ how string }

func (e closingError) Error() string { return e.how }

func (l *Load) tunnel(to string) func() (*exchange, error) {
	return func() (*exchange, error) {
		h2, err := l.dial()
		if err != nil {
			return nil, err
		}
		stream, err := golden.OpenStream(h2, to)
		if err != nil {
			h2.Close()
			return nil, err
		}
		return &exchange{h2: h2, stream: stream, reader: bufio.NewReader(stream)}, nil
	}
}

// get sends one HTTP/1.1 request on an exchange and reads its answer.
func (e *exchange) get(t Target, script string) (*wire.Message, error) {
	e.stream.SetReadDeadline(time.Now().Add(Patience))
	if _, err := fmt.Fprintf(e.stream, "GET %s HTTP/1.1\r\nhost: %s\r\nx-echo-script: %s\r\n\r\n", t.Path, t.Host, script); err != nil {
		return nil, errors.New(golden.Ending(err))
	}
	m, err := wire.ReadResponse(e.reader, "GET")
	if err != nil {
		return nil, errors.New(golden.Ending(err))
	}
	if m.Status() != 200 {
		return m, statusError{m.Status()}
	}
	if strings.EqualFold(wire.Get(m.Header, "connection"), "close") {
		return m, closingError{"answered with connection: close"}
	}
	return m, nil
}

// KeepAlive sends requests on one HTTP/1.1 connection. saw gets every answer.
func (l *Load) KeepAlive(name string, t Target, saw func(*wire.Message)) {
	l.watch(name, 2*time.Millisecond, l.tunnel(t.Authority), func(e *exchange) error {
		m, err := e.get(t, "200+body=20")
		if m != nil && saw != nil {
			saw(m)
		}
		return err
	})
}

// Fresh sends each request on a tunnel stream of its own; all streams share a tunnel connection.
func (l *Load) Fresh(name string, t Target, saw func(*wire.Message)) {
	connect := func() (*exchange, error) {
		h2, err := l.dial()
		if err != nil {
			return nil, err
		}
		return &exchange{h2: h2}, nil
	}
	l.watch(name, 2*time.Millisecond, connect, func(e *exchange) error {
		if code := e.h2.GoneAway(); code != nil {
			return closingError{"GOAWAY " + code.String()}
		}
		stream, err := golden.OpenStream(e.h2, t.Authority)
		if err != nil {
			return err
		}
		defer golden.Leave(stream)
		one := &exchange{h2: e.h2, stream: stream, reader: bufio.NewReader(stream)}
		m, err := one.get(t, "200+body=20")
		if m != nil && saw != nil {
			saw(m)
		}
		return err
	})
}

// HTTP2 sends requests on one inner HTTP/2 connection.
func (l *Load) HTTP2(name string, t Target) {
	connect := func() (*exchange, error) {
		e, err := l.tunnel(t.Authority)()
		if err == nil {
			e.inner, err = wire.ClientH2(e.stream)
		}
		return e, err
	}
	l.watch(name, 2*time.Millisecond, connect, func(e *exchange) error {
		if code := e.inner.GoneAway(); code != nil {
			return closingError{"GOAWAY " + code.String()}
		}
		stream, err := e.inner.Open([]wire.Field{
			{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "http"}, {Name: ":authority", Value: t.Host}, {Name: ":path", Value: t.Path},
			{Name: "x-echo-script", Value: "200+body=20"},
		}, true)
		if err != nil {
			return errors.New(golden.Ending(err))
		}
		defer stream.Close()
		stream.SetReadDeadline(time.Now().Add(Patience))
		header, err := stream.Header()
		if err != nil {
			return errors.New(golden.Ending(err))
		}
		if _, err := io.ReadAll(stream); err != nil {
			return errors.New(golden.Ending(err))
		}
		if status := wire.Get(header, ":status"); status != "200" {
			var code int
			_, _ = fmt.Sscan(status, &code)
			return statusError{code}
		}
		return nil
	})
}

// WebSocket exchanges messages on one upgraded connection.
func (l *Load) WebSocket(name string, t Target) {
	connect := func() (*exchange, error) {
		e, err := l.tunnel(t.Authority)()
		if err != nil {
			return e, err
		}
		e.stream.SetReadDeadline(time.Now().Add(Patience))
		fmt.Fprintf(e.stream, "GET %s HTTP/1.1\r\nhost: %s\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", t.Path, t.Host)
		m, err := wire.ReadResponse(e.reader, "GET")
		if err == nil && m.Status() != 101 {
			err = statusError{m.Status()}
		}
		return e, err
	}
	l.watch(name, 20*time.Millisecond, connect, func(e *exchange) error {
		e.stream.SetReadDeadline(time.Now().Add(Patience))
		if err := wire.WriteWebSocketFrame(e.stream, wire.WebSocketText, []byte("beat"), true); err != nil {
			return errors.New(golden.Ending(err))
		}
		_, payload, err := wire.ReadWebSocketFrame(e.reader)
		if err != nil {
			return errors.New(golden.Ending(err))
		}
		if string(payload) != "beat" {
			return fmt.Errorf("the echo is %q", payload)
		}
		return nil
	})
}

// TCP exchanges bytes on one stream.
func (l *Load) TCP(name, to string) {
	l.watch(name, 20*time.Millisecond, l.tunnel(to), func(e *exchange) error {
		e.stream.SetReadDeadline(time.Now().Add(Patience))
		if _, err := io.WriteString(e.stream, "beat"); err != nil {
			return errors.New(golden.Ending(err))
		}
		echo := make([]byte, 4)
		if _, err := io.ReadFull(e.reader, echo); err != nil {
			return errors.New(golden.Ending(err))
		}
		if string(echo) != "beat" {
			return fmt.Errorf("the echo is %q", echo)
		}
		return nil
	})
}

// longBody is the size of a long response; its halves are sent with the pause between them.
const longBody = 1000

// LongResponse reads responses that take this long, one after the other.
func (l *Load) LongResponse(name string, t Target, lasts time.Duration) {
	w := &Watched{Name: name}
	l.kinds = append(l.kinds, w)
	l.group.Go(func() {
		for !l.over() {
			err := func() error {
				e, err := l.tunnel(t.Authority)()
				if err != nil {
					return err
				}
				defer e.close()
				e.stream.SetReadDeadline(time.Now().Add(lasts + Patience))
				fmt.Fprintf(e.stream, "GET %s HTTP/1.1\r\nhost: %s\r\nx-echo-script: 200+body=%d+bodydelay=%s\r\n\r\n", t.Path, t.Host, longBody, lasts)
				m, err := wire.ReadResponse(e.reader, "GET")
				if err != nil {
					return fmt.Errorf("cut: %s", golden.Ending(err))
				}
				if m.Status() != 200 || len(m.Body) != longBody {
					return fmt.Errorf("status %d with %d bytes", m.Status(), len(m.Body))
				}
				return nil
			}()
			if err != nil {
				w.trouble(&w.failed, l.at()+err.Error())
				l.pause(100 * time.Millisecond)
			} else {
				w.done()
			}
		}
	})
}

// WaitOpen waits until every exchange has worked once, and fails if one does not.
func (l *Load) WaitOpen() error {
	for range l.waiting {
		select {
		case err := <-l.open:
			if err != nil {
				return err
			}
		case <-time.After(2 * Patience):
			return errors.New("an exchange does not come up")
		}
	}
	l.begun = time.Now()
	return nil
}

// Stop ends every exchange and waits for it.
func (l *Load) Stop() {
	l.stop()
	l.group.Wait()
}

// Totals sums up all kinds.
func (l *Load) Totals() Totals {
	var sum Totals
	for _, w := range l.kinds {
		t := w.totals()
		sum.Exchanges, sum.Failed, sum.Closed, sum.Closing = sum.Exchanges+t.Exchanges, sum.Failed+t.Failed, sum.Closed+t.Closed, sum.Closing+t.Closing
	}
	return sum
}

// Report has one line for each kind, and the first troubles of those that had any.
func (l *Load) Report() []string {
	var lines []string
	for _, w := range l.kinds {
		t := w.totals()
		lines = append(lines, fmt.Sprintf("%-34s %7d exchanges, %d failed, %d connections closed, %d asked to close", w.Name, t.Exchanges, t.Failed, t.Closed, t.Closing))
		for _, f := range w.firsts {
			lines = append(lines, "    "+f)
		}
	}
	return lines
}

// Err is nil when nobody noticed anything and every kind did something.
func (l *Load) Err() error {
	t := l.Totals()
	for _, w := range l.kinds {
		if w.totals().Exchanges == 0 {
			return fmt.Errorf("%s: nothing was exchanged", w.Name)
		}
	}
	if t.Failed+t.Closed+t.Closing > 0 {
		return fmt.Errorf("%d failed requests, %d closed connections, %d answers that ask to close", t.Failed, t.Closed, t.Closing)
	}
	return nil
}

// Quantile is the q-th part of some durations, 0 when there are none.
func Quantile(all []time.Duration, q float64) time.Duration {
	if len(all) == 0 {
		return 0
	}
	sorted := append([]time.Duration{}, all...)
	sort.Slice(sorted, func(i, j int) bool { return sorted[i] < sorted[j] })
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}
