package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"

	"avatarworker/internal/app"
	"avatarworker/internal/config"
	"avatarworker/internal/cost"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/terminal"
)

func newCostBudgetCommand(c *cli, with ledgerFunc) *cobra.Command {
	var (
		per           string
		credits       int64
		reset, asJSON bool
	)
	cmd := &cobra.Command{
		Use: "budget [KEY]", Short: "Show what is spent of each budget, or change one while workers run", Args: argCount(0, 1),
		Long: `Without a KEY: what is spent of the budgets of this configuration in the current
period. With a KEY as in budgets (app_id or label.NAME) and --credits: sets the budget
of every app or value under it, for all workers at once, whatever their configuration
says; --reset takes that back. Jobs that were held go on as
their waits end: within seconds if few wait.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			set := cmd.Flags().Changed("credits")
			switch {
			case len(args) == 0 && (set || reset):
				return usagef("name the KEY of the budget: app_id or label.NAME")
			case len(args) == 1 && set == reset:
				return usagef("give either --credits N or --reset")
			case set && (credits < 1 || credits > config.MaxBudget):
				return usagef("--credits %d: want a number from 1 to %d", credits, config.MaxBudget)
			case per != budget.Day && per != budget.Month:
				return usagef("--per %q: want day or month", per)
			case len(args) == 0 && cmd.Flags().Changed("per"):
				return usagef("--per goes with a KEY: without one all budgets are shown")
			}
			return with(cmd.Context(), "cost budget", func(l *link, s *cost.Store) error {
				if len(args) == 0 {
					return c.showBudgets(cmd.Context(), l, s, asJSON)
				}
				return c.setBudget(cmd.Context(), l, args[0], per, credits, reset)
			})
		},
	}
	cmd.Flags().StringVar(&per, "per", budget.Month, "of this `PERIOD`: "+strings.Join(budget.Periods(), " or "))
	cmd.Flags().Int64Var(&credits, "credits", 0, "the budget from now on, in `N` credits")
	cmd.Flags().BoolVar(&reset, "reset", false, "take back what --credits set")
	jsonFlag(cmd, &asJSON)
	return cmd
}

func (c *cli) showBudgets(ctx context.Context, l *link, s *cost.Store, asJSON bool) error {
	rules := app.Budgets(l.cfg)
	list, err := s.Budgets(ctx, rules, c.now().UTC())
	if err != nil {
		return err
	}
	if asJSON {
		return c.printJSON(list)
	}
	if len(rules) == 0 {
		c.note("no budgets: set them under budgets in the configuration")
		return nil
	}
	t := terminal.NewTable(c.stdout, "KEY", "VALUE", "PER", "CREDITS", "SPENT", "UNTIL")
	for _, b := range list {
		t.Row(b.Key, terminal.OrDash(b.Value), b.Per, b.Credits, b.Spent, b.Until.Format("2006-01-02"))
	}
	return t.Flush()
}

func (c *cli) setBudget(ctx context.Context, l *link, key, per string, credits int64, reset bool) error {
	known := false
	for _, r := range app.Budgets(l.cfg) {
		known = known || r.Key == key && r.Per == per
	}
	if !known {
		return fmt.Errorf("there is no budget for %s per %s in this configuration: workers would not know of it; add it under budgets", key, per)
	}
	bucket, err := l.js.KeyValue(ctx, l.names.FleetBucket())
	if err != nil {
		return l.names.Unavailable("bucket "+l.names.FleetBucket(), err)
	}
	name := budget.SettingKey(key, per)
	if reset {
		if err := bucket.Delete(ctx, name); err != nil && !errors.Is(err, jetstream.ErrKeyNotFound) {
			return fmt.Errorf("bucket %s: %w", l.names.FleetBucket(), err)
		}
		c.note("the budget for %s per %s is the configuration's again", key, per)
		return nil
	}
	data, err := json.Marshal(budget.Setting{Credits: credits})
	if err != nil {
		return err
	}
	if _, err := bucket.Put(ctx, name, data); err != nil {
		return fmt.Errorf("bucket %s: %w", l.names.FleetBucket(), err)
	}
	c.note("the budget for %s per %s is %d credits now", key, per, credits)
	return nil
}
