package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// withSignals returns a context that ends with the first SIGINT or SIGTERM. A
// second one has its usual effect and ends the process at once: whatever was
// under way is redelivered or repeated.
func withSignals(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(parent, os.Interrupt, syscall.SIGTERM)
	unhook := context.AfterFunc(ctx, stop)
	return ctx, func() {
		unhook()
		stop()
	}
}
