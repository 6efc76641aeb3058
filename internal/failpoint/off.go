//go:build !failpoint

// Package failpoint names the points between pulling a job and acknowledging it
// at which a test can kill the worker. Without the build tag "failpoint" it does
// nothing and costs nothing.
package failpoint

// Here marks a point.
func Here(string) {}
