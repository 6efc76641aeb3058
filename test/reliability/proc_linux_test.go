package reliability

import "syscall"

// dieWithParent makes the kernel kill the process when the test's ends, even
// by a signal.
func dieWithParent() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
