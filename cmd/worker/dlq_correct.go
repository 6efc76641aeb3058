package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"

	"github.com/spf13/cobra"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/terminal"
)

// correction says how the jobs of dead letters are corrected.
type correction struct {
	sets []string
	body string // file
	edit bool
}

func (f *correction) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringArrayVar(&f.sets, "set", nil, "set a field of the job, `PATH=VALUE`: names joined by dots, entries of lists by number from 0; null removes the field; may be repeated")
	flags.StringVar(&f.body, "body", "", "publish the job in this `FILE` instead (JSON; - for stdin); for one SEQ")
	flags.BoolVar(&f.edit, "edit", false, "edit the job in $VISUAL or $EDITOR; for one SEQ")
}

// prepare reads what is given and returns what corrects each letter; nil: nothing
// is to be corrected.
func (f *correction) prepare(ctx context.Context, c *cli, args []string) (func(dlq.Letter) ([]byte, error), error) {
	given := 0
	for _, is := range []bool{len(f.sets) > 0, f.body != "", f.edit} {
		if is {
			given++
		}
	}
	if given > 1 {
		return nil, usagef("give one of --set, --body and --edit")
	}
	if (f.body != "" || f.edit) && len(args) != 1 {
		return nil, usagef("--body and --edit are for one SEQ; --set corrects several")
	}
	switch {
	case f.edit:
		return f.edited(ctx, c, args[0])
	case f.body != "":
		in, name, err := c.input([]string{f.body})
		if err != nil {
			return nil, err
		}
		defer in.Close() // it was only read
		body, err := io.ReadAll(in)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", name, err)
		}
		return func(dlq.Letter) ([]byte, error) { return body, nil }, nil
	case len(f.sets) == 0:
		return nil, nil //nolint:nilnil // the letters' own bytes
	}
	var settings []dlq.Setting
	for _, text := range f.sets {
		s, err := dlq.ParseSetting(text)
		if err != nil {
			return nil, usagef("--set %s", err)
		}
		settings = append(settings, s)
	}
	return func(l dlq.Letter) ([]byte, error) {
		body, err := dlq.BodyJSON(l)
		if err != nil {
			return nil, err
		}
		return dlq.Apply(body, settings)
	}, nil
}

// edited has a person edit the job of a letter, until it is valid or left as it
// was.
func (f *correction) edited(ctx context.Context, c *cli, seq string) (func(dlq.Letter) ([]byte, error), error) {
	seqs, err := sequences([]string{seq})
	if err != nil {
		return nil, err
	}
	l, err := c.connect(ctx, "dlq replay")
	if err != nil {
		return nil, err
	}
	defer l.close()
	letter, err := dlq.NewStore(l.js, l.names, nil).Show(ctx, seqs[0])
	if err != nil {
		return nil, err
	}
	before := letter.Data
	if body, err := dlq.BodyJSON(letter); err == nil {
		var pretty bytes.Buffer
		if json.Indent(&pretty, body, "", "  ") == nil {
			before = append(pretty.Bytes(), '\n')
		}
	}
	after := before
	for {
		if after, err = c.editor(ctx, after); err != nil {
			return nil, err
		}
		if bytes.Equal(after, before) {
			return nil, fmt.Errorf("the job was left as it was: nothing was changed")
		}
		_, invalid := jobspec.Decode(nil, after)
		if invalid == nil {
			return func(dlq.Letter) ([]byte, error) { return after, nil }, nil
		}
		c.note("the job is not valid: %s", terminal.PlainLines(invalid.Message))
		if !c.interactive() {
			return nil, fmt.Errorf("the job is not valid: nothing was changed")
		}
		if again, err := c.ask(ctx, "Edit it again?"); err != nil || !again {
			return nil, errors.Join(err, fmt.Errorf("the job is not valid: nothing was changed"))
		}
	}
}

// editor opens a text in the person's editor and returns what it became. A job may
// hold tokens, so the file is for this user only, and removed.
func (c *cli) editor(ctx context.Context, text []byte) ([]byte, error) {
	command := c.env("VISUAL")
	if command == "" {
		command = c.env("EDITOR")
	}
	if command == "" {
		return nil, usagef("--edit: neither VISUAL nor EDITOR names an editor")
	}
	dir, err := os.MkdirTemp("", "avatarworker-")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err := os.RemoveAll(dir); err != nil {
			c.note("warning: the job stays in %s: %s", dir, terminal.Plain(err.Error()))
		}
	}()
	file := dir + "/job.json"
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return nil, err
	}
	// The variables hold a command with its options, as a shell reads it.
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", command+` "$1"`, "editor", file) //nolint:gosec // the person's own editor
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.stdin, os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("editor %s: %w", command, err)
	}
	return os.ReadFile(file)
}
