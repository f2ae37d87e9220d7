package control

import (
	"net"
	"testing"
	"time"
)

func TestOnlyDataCountsAsWritten(t *testing.T) {
	var noted written
	ours, theirs := net.Pipe()
	defer ours.Close()
	defer theirs.Close()
	go func() {
		sink := make([]byte, 1<<16)
		for {
			if _, err := theirs.Read(sink); err != nil {
				return
			}
		}
	}()
	conn := watchedConn{ours, &noted}
	if _, err := conn.Write(make([]byte, controlFrames)); err != nil || !noted.at.IsZero() {
		t.Fatalf("a control frame counts as data: %v %v", noted.at, err)
	}
	before := time.Now()
	if _, err := conn.Write(make([]byte, controlFrames+1)); err != nil || noted.at.Before(before) {
		t.Fatalf("data was not noted: %v %v", noted.at, err)
	}
}
