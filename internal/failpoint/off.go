//go:build !failpoint

// Package failpoint names the points between fetching a job and acknowledging it
// at which a test can kill the worker. Without the build tag "failpoint" it does
// nothing and costs nothing. It must not know what happens at a point.
package failpoint

// Here marks a point.
func Here(string) {}
