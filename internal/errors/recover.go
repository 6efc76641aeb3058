package errors

import "runtime/debug"

// Recover turns a panic into an error of the worker's own, with code internal.
// Defer it directly in each goroutine that must not end the whole worker, and
// every session with it.
func Recover(err *error, phase Phase) {
	if v := recover(); v != nil {
		*err = Newf(CodeInternal, phase, "panic: %v\n%s", v, debug.Stack())
	}
}
