//go:build !failpoint

// Package failpoint names the points at which a test can kill the worker, and lets a
// test set the worker's clock wrong. It owns the names of the points. Without the build
// tag "failpoint" it does nothing and costs nothing. It must not know what happens at a
// point.
package failpoint

import "time"

// Now returns the time by this process's clock.
func Now() time.Time { return time.Now() }

// Here marks a point.
func Here(string) {}
