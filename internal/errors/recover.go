package errors

import "runtime/debug"

// Recover makes a panic an error of the worker's own, with code internal. It is
// to be deferred itself: in a goroutine of its own a panic would end the worker,
// with all its sessions.
func Recover(err *error, phase Phase) {
	if v := recover(); v != nil {
		*err = Newf(CodeInternal, phase, "panic: %v\n%s", v, debug.Stack())
	}
}
