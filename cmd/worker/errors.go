package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"avatarworker/internal/app"
	"avatarworker/internal/config"
	"avatarworker/internal/errors"
)

func newErrorsCommand(c *cli) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "errors", Short: "Print what the worker does about each error code", Args: noArgs,
		Long: `Prints every error code with its class, what a worker does about it, and its owner:
who can correct it. The table includes what 'policy' in the configuration changes.`,
		RunE: func(*cobra.Command, []string) error { return c.printErrors(asJSON) },
	}
	jsonFlag(cmd, &asJSON)
	cmd.AddCommand(&cobra.Command{
		Use: "classify [FILE|-]", Short: "Say which code each recorded failure is", Args: cobra.MaximumNArgs(1),
		Long: `Reads failures, one JSON object a line, from FILE or stdin, and prints for each
{"id","code","class","action","server_code","server_title","server_detail"}.
A line that is not a failure is reported on stderr, and the exit code is then 1.`,
		RunE: func(cmd *cobra.Command, args []string) error { return c.classify(cmd.Context(), args) },
	})
	return cmd
}

// errorTable is the table of codes under the configuration's policy.
func errorTable(cfg *config.Config) (*errors.Table, error) {
	t, err := app.Table(cfg)
	if err != nil {
		return nil, &configError{err}
	}
	return t, nil
}

func (c *cli) errorTable() (*errors.Table, error) {
	cfg, err := c.config()
	if err != nil {
		return nil, err
	}
	return errorTable(cfg)
}

func (c *cli) printErrors(asJSON bool) error {
	t, err := c.errorTable()
	if err != nil {
		return err
	}
	rows := t.Rows()
	if asJSON {
		return c.printJSON(rows)
	}
	out := newTable(c.stdout, "CODE", "CLASS", "ACTION", "ATTEMPTS", "ALERT", "OWNER", "EXCEPTION")
	for _, r := range rows {
		out.row(mark(string(r.Code), r.Overridden), r.Class, r.Action, attempts(r.Attempts), yesNo(r.Alert), orDash(r.Owner), r.Exception)
	}
	if err := out.end(); err != nil {
		return err
	}
	for _, r := range rows {
		if r.Overridden {
			_, err = fmt.Fprintln(c.stdout, "\n* changed by the configuration's policy")
			break
		}
	}
	return err
}

func mark(text string, marked bool) string {
	if marked {
		return text + "*"
	}
	return text
}

func attempts(n int) string {
	if n == 0 {
		return "job's"
	}
	return strconv.Itoa(n)
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func (c *cli) classify(ctx context.Context, args []string) error {
	t, err := c.errorTable()
	if err != nil {
		return err
	}
	in, name, err := c.input(args)
	if err != nil {
		return err
	}
	defer in.Close() // it was only read
	out := bufio.NewWriter(c.stdout)
	bad, err := c.classifyLines(ctx, t, in, name, out)
	if err := errors.Join(err, out.Flush()); err != nil {
		return err
	}
	if bad > 0 {
		return errShown
	}
	return nil
}

// classifyLines returns the number of lines that are not failures.
func (c *cli) classifyLines(ctx context.Context, t *errors.Table, in io.Reader, name string, out io.Writer) (bad int, err error) {
	lines := bufio.NewReader(in)
	results := &cli{stdout: out}
	for n := 1; ctx.Err() == nil; n++ {
		line, readErr := lines.ReadBytes('\n')
		if readErr != nil && readErr != io.EOF {
			return bad, fmt.Errorf("reading %s: %w", name, readErr)
		}
		if line = bytes.TrimSpace(line); len(line) > 0 {
			result, err := t.ClassifyLine(line)
			if err != nil {
				bad++
				c.note("%s:%d: %s", name, n, plain(err.Error()))
			} else if err := results.printLine(result); err != nil {
				return bad, err
			}
		}
		if readErr == io.EOF {
			return bad, nil
		}
	}
	return bad, ctx.Err()
}

// input opens the file that the arguments name, or stdin for "-" and nothing.
func (c *cli) input(args []string) (io.ReadCloser, string, error) {
	if len(args) == 0 || args[0] == "-" {
		return io.NopCloser(c.stdin), "stdin", nil
	}
	f, err := os.Open(args[0])
	return f, args[0], err
}
