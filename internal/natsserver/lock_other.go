//go:build !unix

package natsserver

import (
	"fmt"
	"os"
)

// dirLock is a file that exists while the process uses the directory. Without
// flock a killed process leaves it behind.
type dirLock struct {
	file *os.File
	path string
}

func lockDir(path string) (*dirLock, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o640)
	if os.IsExist(err) {
		return nil, fmt.Errorf("another process has it: stop that one or, if there is none, remove %s", path)
	}
	if err != nil {
		return nil, err
	}
	return &dirLock{file: f, path: path}, nil
}

func (l *dirLock) release() error {
	if err := l.file.Close(); err != nil {
		return err
	}
	return os.Remove(l.path)
}
