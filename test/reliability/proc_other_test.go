//go:build !linux

package reliability

import "syscall"

func dieWithParent() *syscall.SysProcAttr { return nil }
