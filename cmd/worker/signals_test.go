package main

import (
	"os"
	"syscall"
	"testing"
)

// interruptSelf sends this process the signal that a service manager would.
func interruptSelf(t *testing.T) {
	t.Helper()
	p, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
}
