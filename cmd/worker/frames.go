package main

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"avatarworker/internal/client"
	"avatarworker/internal/errors"
	"avatarworker/internal/output"
)

// frameFile is the file of --out, and the job's frames until they are saved in
// it.
type frameFile struct {
	*client.Frames
	path string
}

// newFrameFile collects frames next to path. Nothing is at path before save.
func newFrameFile(path string) (*frameFile, error) {
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("--out: %s exists and is not a regular file: name one that may be written", path)
	}
	frames, err := client.NewFrames(filepath.Dir(path), partName(path), 1)
	if err != nil {
		return nil, cantWrite(path, err)
	}
	return &frameFile{Frames: frames, path: path}, nil
}

// cantWrite is the error of a file that can't be made. It does not name the unfinished
// one beside it, which err is about.
func cantWrite(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("--out %s: there is no directory %s", path, filepath.Dir(path))
	}
	return fmt.Errorf("--out %s: no file can be made in %s: %w", path, filepath.Dir(path), plainFile(err))
}

// plainFile is what went wrong with a file, without the system's call and the file's
// name.
func plainFile(err error) error {
	var path *fs.PathError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return errors.New("there is no such file")
	case errors.As(err, &path):
		return path.Err
	}
	return err
}

// partName is the pattern for the names of unfinished files of path.
func partName(path string) string { return "." + filepath.Base(path) + ".*.part" }

// close removes what was collected.
func (f *frameFile) close() { _ = f.Close() } // it is removed

// save makes the recording, utterance by utterance.
func (f *frameFile) save() (*savedRecording, error) {
	saved, err := saveFile(f.path, func(w io.Writer) error {
		_, err := f.WriteTo(w)
		return err
	})
	if err == nil && saved.Unreadable != "" {
		saved.Frames = f.Count()
	}
	return saved, err
}

// savedRecording is what --out has saved.
type savedRecording struct {
	File string `json:"file"`
	recordingView
	// Unreadable says which envelope is not one that this version knows. It was
	// saved as it came; what is counted ends before it.
	Unreadable string `json:"unreadable,omitempty"`
}

// saveFile writes a recording so that it is at path complete or not at all, and
// says what is in it. Envelopes that can't be read are saved too.
func saveFile(path string, write func(io.Writer) error) (_ *savedRecording, err error) {
	f, err := os.CreateTemp(filepath.Dir(path), partName(path))
	if err != nil {
		return nil, cantWrite(path, err)
	}
	defer func() {
		if err != nil {
			_ = f.Close() // it is removed
			_ = os.Remove(f.Name())
			err = fmt.Errorf("saving %s: %w", path, err)
		}
	}()
	if err := write(f); err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	saved := &savedRecording{File: path}
	info, unreadable := output.ReadRecording(f)
	saved.recordingView = viewRecording(info)
	if unreadable != nil {
		saved.Unreadable = unreadable.Error()
		size, err := f.Seek(0, io.SeekEnd)
		if err != nil {
			return nil, err
		}
		saved.Bytes = size
	}
	// CreateTemp's mode is for secrets; what is saved is an ordinary file.
	if err := errors.Join(f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return nil, err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return nil, err
	}
	return saved, nil
}
