package main

import (
	"context"
	"fmt"

	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/natsconn"
)

// Exit codes. exitConfig is sysexits' EX_CONFIG, which service managers can be
// told not to restart after.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
	exitConfig = 78
)

// errShown ends a command with exit code 1 when all there is to say was said.
var errShown = errors.New("failed")

// usageError is a command line that can't be meant.
type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

func usagef(format string, args ...any) error {
	return &usageError{fmt.Sprintf(format, args...)}
}

// configError is a configuration with which the command can't go on.
type configError struct{ err error }

func (e *configError) Error() string { return e.err.Error() }
func (e *configError) Unwrap() error { return e.err }

// exitCode says on stderr what went wrong and gives the process's exit code.
func (c *cli) exitCode(err error) int {
	if err == nil {
		return exitDone
	}
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
		c.note("worker: %s", err)
		return exitConfig
	case errors.As(err, &usage) || !c.started:
		c.note("worker: %s\nTry 'worker --help', or --help after the command.", err)
		return exitUsage
	case errors.Is(err, context.Canceled):
		c.note("worker: interrupted")
		return exitFailed
	default:
		c.note("worker: %s", err)
		return exitFailed
	}
}
