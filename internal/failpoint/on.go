//go:build failpoint

// Package failpoint names the points at which a test can kill the worker, and lets a
// test set the worker's clock wrong.
package failpoint

import (
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Env names the point at which the process dies, and optionally which passage of
// it: "outcome" or "outcome:3".
const Env = "AVATAR_FAILPOINT"

// ClockEnv is how far the process's clock is ahead, as "45m" or "-1h".
const ClockEnv = "AVATAR_FAILPOINT_CLOCK"

// Now returns the time by this process's clock.
func Now() time.Time {
	offset, err := time.ParseDuration(os.Getenv(ClockEnv))
	if err != nil {
		offset = 0
	}
	return time.Now().Add(offset)
}

var (
	mu     sync.Mutex
	passed = map[string]int{}
)

// Here kills the process with SIGKILL if it is the point named by Env.
func Here(name string) {
	want, nth, _ := strings.Cut(os.Getenv(Env), ":")
	if want != name {
		return
	}
	n, err := strconv.Atoi(nth)
	if err != nil {
		n = 1
	}
	mu.Lock()
	passed[name]++
	due := passed[name] == n
	mu.Unlock()
	if due {
		if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
			panic(err)
		}
		select {} // the signal is on its way
	}
}
