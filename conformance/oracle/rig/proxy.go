package rig

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// Proxy is a process in a namespace: the proxy under test, or a helper beside it.
type Proxy struct {
	cmd    *exec.Cmd
	exited chan struct{}
	log    *os.File
}

// Start runs a command in the waypoint's namespace. Its output goes to logPath.
func (n *Network) Start(argv, environment []string, dir, logPath string) (*Proxy, error) {
	return start(n.Waypoint(), argv, environment, dir, logPath)
}

// StartDest runs a command in the destinations' namespace.
func (n *Network) StartDest(argv, environment []string, dir, logPath string) (*Proxy, error) {
	return start(n.dest(), argv, environment, dir, logPath)
}

// RunClient runs a command in the clients' namespace to its end and returns its output.
func (n *Network) RunClient(ctx context.Context, argv []string, dir string) (string, error) {
	cmd := exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", n.client()}, argv...)...)
	cmd.Dir = dir
	text, err := cmd.CombinedOutput()
	return string(text), err
}

func start(namespace string, argv, environment []string, dir, logPath string) (*Proxy, error) {
	log, err := os.Create(logPath)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("ip", append([]string{"netns", "exec", namespace}, argv...)...)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "RUST_LOG=" + os.Getenv("RUST_LOG")}, environment...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &Proxy{cmd: cmd, exited: make(chan struct{}), log: log}
	go func() {
		_ = cmd.Wait()
		close(p.exited)
	}()
	return p, nil
}

// PID is the process id of the proxy.
func (p *Proxy) PID() int { return p.cmd.Process.Pid }

// Probe is how readiness shows: the tunnel port accepts and, when Health is set, that URL answers 200.
type Probe struct{ Tunnels, Health string }

// Ready asks once.
func (n *Network) Ready(probe Probe) error {
	conn, err := n.DialWaypoint(probe.Tunnels, time.Second)
	if err != nil {
		return fmt.Errorf("no tunnel is accepted on %s: %w", probe.Tunnels, err)
	}
	conn.Close()
	if probe.Health == "" {
		return nil
	}
	status, body, err := n.Get(probe.Health, 2*time.Second)
	if err != nil {
		return err
	}
	if status != http.StatusOK {
		return fmt.Errorf("%s answers %d: %s", probe.Health, status, strings.TrimSpace(string(body)))
	}
	return nil
}

// Get fetches a URL from inside the waypoint's namespace.
func (n *Network) Get(url string, limit time.Duration) (status int, body []byte, err error) {
	return n.Do("GET", url, nil, limit)
}

// Do sends one HTTP request from inside the waypoint's namespace.
func (n *Network) Do(method, url string, payload []byte, limit time.Duration) (status int, body []byte, err error) {
	client := http.Client{Timeout: limit, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(_ context.Context, _, address string) (net.Conn, error) {
			return n.DialWaypoint(address, limit)
		},
	}}
	request, err := http.NewRequest(method, url, bytes.NewReader(payload))
	if err != nil {
		return 0, nil, err
	}
	response, err := client.Do(request)
	if err != nil {
		return 0, nil, err
	}
	defer response.Body.Close()
	body, err = io.ReadAll(io.LimitReader(response.Body, 64<<20))
	return response.StatusCode, body, err
}

// WaitReady waits until the proxy is ready.
func (p *Proxy) WaitReady(n *Network, probe Probe, limit time.Duration) error {
	deadline := time.Now().Add(limit)
	var last error
	for time.Now().Before(deadline) {
		if !p.Running() {
			return fmt.Errorf("the proxy exited: see %s\n%s", p.log.Name(), p.Tail(2000))
		}
		if last = n.Ready(probe); last == nil {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return fmt.Errorf("the proxy is not ready after %v: %w: see %s\n%s", limit, last, p.log.Name(), p.Tail(2000))
}

// Running is false once the process has exited.
func (p *Proxy) Running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// Tail is the end of the process's output.
func (p *Proxy) Tail(size int64) string {
	f, err := os.Open(p.log.Name())
	if err != nil {
		return ""
	}
	defer f.Close()
	if at, err := f.Seek(0, io.SeekEnd); err == nil {
		_, _ = f.Seek(max(0, at-size), io.SeekStart)
	}
	text, _ := io.ReadAll(f)
	return string(text)
}

// Stop ends the process: SIGTERM, then SIGKILL.
func (p *Proxy) Stop() { p.StopWithin(500 * time.Millisecond) }

// StopWithin ends the process and leaves it some time to do so itself.
func (p *Proxy) StopWithin(patience time.Duration) {
	_ = syscall.Kill(-p.PID(), syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(patience):
		p.Kill()
	}
	p.log.Close()
}

// Kill ends the process at once, as a node that fails does.
func (p *Proxy) Kill() {
	_ = syscall.Kill(-p.PID(), syscall.SIGKILL)
	<-p.exited
}

// CPU returns the user and system seconds of each thread, by name and id.
func (p *Proxy) CPU() (map[string]float64, error) {
	dir := fmt.Sprintf("/proc/%d/task", p.PID())
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	out := map[string]float64{}
	for _, task := range tasks {
		stat, err := os.ReadFile(dir + "/" + task.Name() + "/stat")
		if err != nil {
			continue
		}
		text := string(stat)
		end := strings.LastIndex(text, ")")
		name := text[strings.Index(text, "(")+1 : end]
		fields := strings.Fields(text[end+1:])
		var user, system float64
		fmt.Sscan(fields[11], &user)
		fmt.Sscan(fields[12], &system)
		out[name+"/"+task.Name()] = (user + system) / 100
	}
	return out, nil
}
