package main

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
	"avatarworker/internal/output"
)

// frameFile collects a job's frames as they come, to make a recording of them
// at the end. Only where they lie is kept in memory.
type frameFile struct {
	path    string
	spool   *os.File // beside path
	size    int64
	run     int
	session int // the highest seen: frames of lower ones are dropped
	last    int // Avatar-Seq of that session's last frame
	spoken  map[int]*spokenFrames
	reached uint64 // sequence in the stream of the last frame looked at
}

// spokenFrames are the frames of one utterance, all of one session.
type spokenFrames struct {
	session int
	spans   []span
}

type span struct{ at, length int64 }

// newFrameFile collects the frames of a run. Nothing is at path before save.
func newFrameFile(path string, run int) (*frameFile, error) {
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("--out: %s is there, and no file: name one that may be written", path)
	}
	spool, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.part")
	if err != nil {
		return nil, fmt.Errorf("--out: %w", err)
	}
	return &frameFile{path: path, spool: spool, run: run, spoken: make(map[int]*spokenFrames)}, nil
}

// close removes what was collected.
func (f *frameFile) close() {
	_ = f.spool.Close() // it is removed
	_ = os.Remove(f.spool.Name())
}

// add takes one frame. What belongs to another run, to a session that was
// superseded, or comes twice, is dropped; a session that speaks an utterance
// again replaces what an earlier one had of it.
func (f *frameFile) add(header nats.Header, data []byte, seq uint64) error {
	f.reached = seq
	run, session := number(header, output.HeaderRun), number(header, output.HeaderSession)
	utterance, n := number(header, output.HeaderUtterance), number(header, output.HeaderSeq)
	if run != f.run || utterance < 1 || session < f.session || session == f.session && n <= f.last {
		return nil
	}
	f.session, f.last = session, n
	u := f.spoken[utterance]
	if u == nil || u.session != session {
		u = &spokenFrames{session: session}
		f.spoken[utterance] = u
	}
	var b bytes.Buffer
	output.AppendEnvelope(&b, data)
	if _, err := f.spool.Write(b.Bytes()); err != nil {
		return fmt.Errorf("saving frames: %w", err)
	}
	u.spans = append(u.spans, span{f.size, int64(b.Len())})
	f.size += int64(b.Len())
	return nil
}

func number(header nats.Header, name string) int {
	n, err := strconv.Atoi(header.Get(name))
	if err != nil {
		return 0 // not a frame of ours
	}
	return n
}

// count is how many frames the recording has so far.
func (f *frameFile) count() int {
	n := 0
	for _, u := range f.spoken {
		n += len(u.spans)
	}
	return n
}

// save makes the recording, utterance by utterance.
func (f *frameFile) save() (*savedRecording, error) {
	saved, err := saveFile(f.path, func(w io.Writer) error {
		for _, utterance := range slices.Sorted(maps.Keys(f.spoken)) {
			for _, s := range f.spoken[utterance].spans {
				if _, err := io.Copy(w, io.NewSectionReader(f.spool, s.at, s.length)); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err == nil && saved.Unreadable != "" {
		saved.Frames = f.count()
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
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.part")
	if err != nil {
		return nil, fmt.Errorf("--out: %w", err)
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
