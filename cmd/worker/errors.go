package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"avatarworker/internal/app"
	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/terminal"
)

func newErrorsCommand(c *cli) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use: "errors [CODE]", Short: "Print what error codes mean, and what the worker does about each", Args: argCount(0, 1),
		Long: `Prints every error code with its class, what a worker does about it, and its owner:
who can correct it. The table includes what 'policy' in the configuration changes.
With a CODE: what the code means, its owner, and what to do.`,
		ValidArgsFunction: cobra.FixedCompletions(codeNames(), cobra.ShellCompDirectiveNoFileComp),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				return c.explainCode(cmd, args[0], asJSON)
			}
			return c.printErrors(asJSON)
		},
	}
	jsonFlag(cmd, &asJSON)
	cmd.AddCommand(&cobra.Command{
		Use: "classify [FILE|-]", Short: "Say which code each recorded failure is", Args: argCount(0, 1),
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
	out := terminal.NewTable(c.stdout, "CODE", "CLASS", "ACTION", "ATTEMPTS", "ALERT", "OWNER", "EXCEPTION")
	for _, r := range rows {
		out.Row(mark(string(r.Code), r.Overridden), r.Class, r.Action, attempts(r), yesNo(r.Alert), terminal.OrDash(r.Owner), r.Exception)
	}
	if err := out.Flush(); err != nil {
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

// explainedCode is a code with all that is known of it.
type explainedCode struct {
	errors.Row
	Meaning  string   `json:"meaning"`
	Remedy   string   `json:"remedy"`
	Commands []string `json:"commands"`
}

func (c *cli) explainCode(cmd *cobra.Command, name string, asJSON bool) error {
	code := findCode(name)
	if code == "" {
		return usagef("there is no error code %q%s; '%s' lists the codes", name, didYouMean("", append(suggestions(cmd, name), similar(errors.Codes(), name)...)), cmd.CommandPath())
	}
	t, err := c.errorTable()
	if err != nil {
		return err
	}
	x := explainedCode{Meaning: errors.Explain(code).Meaning, Remedy: errors.Explain(code).Remedy, Commands: remedies(code)}
	for _, row := range t.Rows() {
		if row.Code == code {
			x.Row = row
		}
	}
	if asJSON {
		return c.printJSON(x)
	}
	out := terminal.NewTable(c.stdout)
	out.Row("code", x.Code)
	out.Row("class", x.Class)
	out.Row("meaning", x.Meaning)
	out.Row("owner", terminal.OrDash(x.Owner))
	out.Row("what the worker does", mark(string(x.Action), x.Overridden)+exception(x.Exception))
	out.Row("what to do", x.Remedy)
	for i, command := range x.Commands {
		label := ""
		if i == 0 {
			label = "commands"
		}
		out.Row(label, command)
	}
	return out.Flush()
}

func exception(text string) string {
	if text == "" {
		return ""
	}
	return "; " + text
}

// findCode finds a code whatever the case of its letters; "": there is none.
func findCode(name string) errors.Code {
	for _, code := range errors.Codes() {
		if strings.EqualFold(string(code), name) {
			return code
		}
	}
	return ""
}

// remedies are the commands that help with a code.
func remedies(code errors.Code) []string {
	list := []string{"avatarworker jobs ls --code " + string(code), "avatarworker dlq show --code " + string(code)}
	replay := "avatarworker dlq replay --code " + string(code)
	switch code {
	case errors.CodeBillingRequired, errors.CodeCreditsExhausted:
		return append(list, "avatarworker circuit ls", "avatarworker circuit probe APP")
	case errors.CodeAvatarNotFound:
		return append(list, replay+" --set avatar_id=ID")
	case errors.CodeAppIDUnrecognized, errors.CodeAppIDMismatch:
		return append(list, replay, "avatarworker dlq replay SEQ --set app_id=ID")
	case errors.CodeInvalidJob, errors.CodeInvalidRequest, errors.CodeInvalidEgressConfig, errors.CodeUnsupportedSampleRate, errors.CodeAudioUnavailable:
		return append(list, "avatarworker dlq replay SEQ --set PATH=VALUE", "avatarworker dlq replay SEQ --edit")
	case errors.CodeDeadlineExceeded:
		return list[:1]
	default:
		return append(list, replay)
	}
}

func mark(text string, marked bool) string {
	if marked {
		return text + "*"
	}
	return text
}

// attempts is how many failures with a code end a job; only a retry has a limit.
func attempts(r errors.Row) string {
	switch {
	case r.Action != errors.ActionRetry:
		return "-"
	case r.Attempts == 0:
		return "job's"
	default:
		return strconv.Itoa(r.Attempts)
	}
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
				c.note("%s:%d: %s", name, n, terminal.Plain(err.Error()))
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
