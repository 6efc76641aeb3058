package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// withSignals returns a context that ends with the first SIGINT, SIGTERM or, for
// a terminal that went away, SIGHUP (not under nohup, which ignores it). A second
// one has its usual effect and ends the process at once: whatever was under way
// is redelivered or repeated.
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
		// Before anybody can know of the first, so that no second one is lost.
		signal.Stop(first)
		cancel()
	}()
	return ctx, func() {
		cancel()
		<-done
	}
}

// outliveReaders lets the process go on when whoever read its stdout or stderr
// has gone (run | head): writing there fails then, and without this the write
// would end it.
func outliveReaders() { signal.Ignore(syscall.SIGPIPE) }
