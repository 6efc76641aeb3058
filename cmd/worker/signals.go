package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// withSignals returns a context that ends with the first SIGINT, SIGTERM or, for
// a terminal that went away, SIGHUP (not under nohup, which ignores it). A second
// one has its usual effect and ends the process at once: what was running is
// redelivered or repeated.
func withSignals(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(parent)
	first, done := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(first, os.Interrupt, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) {
		signal.Notify(first, syscall.SIGHUP)
	}
	go func() {
		defer close(done)
		select {
		case <-first:
		case <-ctx.Done():
		}
		// Before the first one can have an effect, so that no second one is lost.
		signal.Stop(first)
		cancel()
	}()
	return ctx, func() {
		cancel()
		<-done
	}
}

// outliveReaders lets the process go on when the reader of its stdout or stderr has
// gone (run | head). Writing there fails then; without this, SIGPIPE would end the
// process.
func outliveReaders() { signal.Ignore(syscall.SIGPIPE) }
