// Command avatarworker runs avatar session jobs from NATS JetStream, and is the
// tool to publish, watch and repair them.
package main

import (
	"context"
	"io"
	"os"
)

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// run is the whole program but for the process around it: it returns the exit
// code.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	return runContext(context.Background(), args, stdin, stdout, stderr)
}

// runContext is run under a context whose end does what a first signal does.
func runContext(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := withSignals(ctx)
	defer stop()
	c := newCLI(stdin, stdout, stderr, os.Environ())
	root := newRootCommand(c)
	root.SetArgs(args)
	return c.exitCode(root.ExecuteContextC(ctx))
}
