package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"syscall"

	"avatarworker/internal/errors"
)

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := begin(ctx, args, stdin, stdout, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintln(stderr, "bench:", err)
		return 1
	default:
		return 0
	}
}

func begin(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	if len(args) == 2 && args[0] == "child" {
		return playRole(ctx, args[1], stdin, stdout)
	}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	quick := flags.Bool("quick", false, "small sizes: whether it works, not what it costs")
	rounds := flags.Int("rounds", 5, "rounds over all measurements; the table has medians")
	only := flags.String("only", "", "measurements to take, a `regexp` over group/name")
	asJSON := flags.Bool("json", false, "print JSON")
	soakN := flags.Int("soak", 0, "instead of the table: so many short sessions, memory and goroutines")
	scale := flags.Bool("scale", false, "instead of the table: measure the unit costs that -simulate multiplies, and print them as JSON")
	simulated := flags.Bool("simulate", false, "instead of the table: what fleets of up to 1,000,000 sessions need, and what saturates first")
	costsFile := flags.String("costs", "", "with -simulate: a `file` that -scale printed; the default is that of docs/scale.md")
	var p plan
	p.flags(flags)
	profiles := flags.String("profiles", "", "`directory` for CPU, heap, mutex and block profiles of what is measured")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *rounds < 1 {
		return errors.New("-rounds: at least 1")
	}
	if *soakN > 0 {
		return soak(ctx, *soakN, *profiles, stdout)
	}
	if *simulated {
		return simulate(*costsFile, p, stdout)
	}
	if *scale {
		return measureUnitCosts(ctx, *quick, stdout, stderr)
	}
	z := fullSizes
	if *quick {
		z = quickSizes
	}
	list, err := chosen(suite(z), *only)
	if err != nil {
		return err
	}
	all, err := play(ctx, list, *rounds, *profiles, stderr)
	if err != nil {
		return err
	}
	r := reportOf(list, all, *rounds)
	if *asJSON {
		return r.printJSON(stdout)
	}
	return r.print(stdout)
}

func chosen(list []measurement, only string) ([]measurement, error) {
	pattern, err := regexp.Compile(only)
	if err != nil {
		return nil, fmt.Errorf("-only: %w", err)
	}
	var out []measurement
	for _, m := range list {
		if pattern.MatchString(m.key()) {
			out = append(out, m)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("-only: no measurement is called %q", only)
	}
	return out, nil
}

// playRole plays one role for the harness that started it.
func playRole(ctx context.Context, arg string, in io.Reader, out io.Writer) error {
	var p params
	if err := json.Unmarshal([]byte(arg), &p); err != nil {
		return fmt.Errorf("child: %w", err)
	}
	r, err := roleOf(p.Role)
	if err != nil {
		return err
	}
	return serve(ctx, p, r, in, out)
}
