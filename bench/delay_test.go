package main

import (
	"io"
	"net"
	"testing"
	"time"
)

func TestADelayedRequestTakesItsRoundTrips(t *testing.T) {
	server, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	go func() { // ends with its connection
		if c, err := server.Accept(); err == nil {
			_, _ = io.Copy(c, c)
			_ = c.Close()
		}
	}()
	const delay = 20 * time.Millisecond
	writes := make(chan int, 9)
	d, err := startDelayed(server.Addr().String(), delay, func(n int, _ time.Time) { writes <- n })
	if err != nil {
		t.Fatal(err)
	}
	defer d.close()
	begun := time.Now()
	c, err := net.Dial("tcp", d.listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for i, least := range []time.Duration{4 * delay, 2 * delay} { // the first one connects
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun); took < least || took > least+time.Second {
			t.Errorf("request %d took %s, want %s", i+1, took, least)
		}
		if n := <-writes; n != i+1 {
			t.Errorf("write %d was counted as %d", i+1, n)
		}
		begun = time.Now()
	}
}
