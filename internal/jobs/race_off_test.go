//go:build !race

package jobs_test

// raced reports whether the tests run under the race detector.
const raced = false
