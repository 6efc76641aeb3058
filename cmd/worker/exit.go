package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/natsconn"
	"avatarworker/internal/terminal"
)

// Exit codes. exitConfig is sysexits' EX_CONFIG, which service managers can be
// told not to restart after.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
	exitConfig = 78
)

// errShown ends a command with exit code 1 after everything has been printed.
var errShown = errors.New("failed")

// usageError is an invalid command line.
type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

func usagef(format string, args ...any) error {
	return &usageError{fmt.Sprintf(format, args...)}
}

// configError is a configuration with which the command can't run.
type configError struct{ err error }

func (e *configError) Error() string { return e.err.Error() }
func (e *configError) Unwrap() error { return e.err }

// exitCode says on stderr what went wrong with a command and returns the
// process's exit code.
func (c *cli) exitCode(cmd *cobra.Command, err error) int {
	if err == nil {
		return exitDone
	}
	defer c.noteDenied()
	var (
		usage     *usageError
		badConfig *config.Error
		unusable  *configError
		setting   *natsconn.SettingError
	)
	switch {
	case errors.Is(err, errShown):
		return exitFailed
	case errors.As(err, &badConfig), errors.As(err, &unusable), errors.As(err, &setting):
		c.note("avatarworker: %s", terminal.PlainLines(err.Error()))
		return exitConfig
	case errors.As(err, &usage) || !c.started:
		c.note("avatarworker: %s\nTry '%s --help'.", terminal.PlainLines(err.Error()), cmd.CommandPath())
		return exitUsage
	case errors.Is(err, context.Canceled):
		c.note("avatarworker: interrupted")
		return exitFailed
	default:
		c.note("avatarworker: %s", terminal.PlainLines(err.Error()))
		return exitFailed
	}
}

// noteDenied says what NATS did not permit the command that failed.
func (c *cli) noteDenied() {
	if operations := c.denied.list(); len(operations) > 0 {
		c.note("This NATS user is not permitted to: %s. docs/permissions.md lists what each command needs.", terminal.Plain(strings.Join(operations, ", ")))
	}
}
