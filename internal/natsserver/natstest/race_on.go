//go:build race

package natstest

// Raced reports whether the tests run under the race detector, which makes all
// of the worker's own work several times slower, and the sessions no slower.
const Raced = true
