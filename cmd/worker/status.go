package main

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"avatarworker/internal/app"
	"avatarworker/internal/status"
	"avatarworker/internal/terminal"
)

func newStatusCommand(c *cli) *cobra.Command {
	var (
		asJSON, watch bool
		every         time.Duration
		countFor      time.Duration
	)
	cmd := &cobra.Command{
		Use: "status [JOB]", Short: "Show the state of a job, or of the whole fleet", Args: argCount(0, 1),
		Long: `With a JOB: its record, and its events and errors in order.

Without: the queues, workers, circuits, and dead letters by code.
  queues    How many jobs are in each state. WAITING: never delivered, or handed back
            without a record, as those behind a full session limit are. A queue
            with jobs but no worker is listed too.
  workers   SESSIONS: open now. SLOTS: jobs at a time.
Job records are read newest first, for --count-for at most. Where that was too
short, WAITING begins with "≤", the others with "≥". With --watch all records are
read once, and after that only what is new.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				if err := checkJobID(args[0]); err != nil {
					return err
				}
			}
			if every < minEvery {
				return usagef("--every %s: want at least %s", every, minEvery)
			}
			l, err := c.connect(cmd.Context(), "status")
			if err != nil {
				return err
			}
			defer l.close()
			store := status.NewStore(l.js, l.names, c.now, countFor).WithTariff(app.Tariff(l.cfg)).WithBudgets(fleetBudgets(l.cfg, l.js, l.names, c.now))
			show := func(c *cli) error { return c.fleetStatus(cmd.Context(), l, store, asJSON) }
			if len(args) == 1 {
				show = func(c *cli) error { return c.jobStatus(cmd.Context(), l, store, args[0], asJSON) }
			}
			switch {
			case watch && len(args) == 0:
				return c.watchFleet(cmd.Context(), l, store, every, asJSON)
			case watch:
				return c.watch(cmd.Context(), every, asJSON, show)
			}
			return show(c)
		},
		ValidArgsFunction: c.completeJobs(nil),
	}
	cmd.Flags().BoolVar(&watch, "watch", false, "show it again and again until interrupted; on a terminal it is redrawn")
	cmd.Flags().DurationVar(&every, "every", 2*time.Second, "with --watch: the `TIME` between updates")
	jsonFlag(cmd, &asJSON)
	cmd.Flags().DurationVar(&countFor, "count-for", status.DefaultCountFor, "longest `TIME` for reading records or error events")
	return cmd
}

// minEvery is the shortest time between updates.
const minEvery = 200 * time.Millisecond

// watch shows something again and again until ctx ends. On a terminal each time
// replaces the last one, at once: it is drawn when it is whole. An error ends it,
// unless something was shown before: NATS may be away for a while.
func (c *cli) watch(ctx context.Context, every time.Duration, asJSON bool, show func(*cli) error) error {
	redraw := terminal.Is(c.stdout) && !asJSON
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for shown := false; ; {
		var picture bytes.Buffer
		drawer := *c
		drawer.stdout, drawer.colours = &picture, c.coloured(c.stdout)
		err := show(&drawer)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !shown:
			return err
		case err != nil:
			c.note("%s", terminal.PlainLines(err.Error()))
		default:
			shown = true
			before := ""
			if redraw {
				before = "\x1b[H\x1b[2J"
			}
			if _, err := fmt.Fprintf(c.stdout, "%s%s", before, picture.Bytes()); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// watchFleet shows the fleet from memory: each update reads only what is new.
func (c *cli) watchFleet(ctx context.Context, l *link, store *status.Store, every time.Duration, asJSON bool) error {
	model := status.NewModel(store, every)
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { model.Run(ctx) })
	defer running.Wait()
	defer cancel()
	return c.watch(ctx, every, asJSON, func(c *cli) error {
		err := c.fleetStatus(ctx, l, model, asJSON)
		if f := model.Freshness(); err == nil && f.Error != "" && ctx.Err() == nil {
			return fmt.Errorf("the state is that of %s: %s", f.At.Format(time.RFC3339), f.Error)
		}
		return err
	})
}

func (c *cli) heading(text string) error {
	_, err := fmt.Fprintln(c.stdout, c.colour(c.stdout, terminal.Bold, text))
	return err
}
