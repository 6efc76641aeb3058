//go:build !race

package natstest

// Raced reports whether the tests run under the race detector.
const Raced = false
