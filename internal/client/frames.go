package client

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
	"avatarworker/internal/output"
)

// Frames collects a job's frames as they come, for a recording at the end. The
// frames are in a file; memory holds only where each one is. It is not safe for
// concurrent use.
type Frames struct {
	spool      *os.File
	size       int64
	run        int
	session    int // the highest seen: frames of lower ones are dropped
	last       int // Avatar-Seq of that session's last frame
	utterances map[int]*utteranceFrames
	reached    uint64 // sequence in the stream of the last frame read
}

// utteranceFrames are the frames of one utterance, all of one session.
type utteranceFrames struct {
	session int
	spans   []span
}

type span struct{ at, length int64 }

// NewFrames collects the frames of the job's run with that number, in a temporary
// file in dir whose name is made from pattern as os.CreateTemp does.
func NewFrames(dir, pattern string, run int) (*Frames, error) {
	spool, err := os.CreateTemp(dir, pattern)
	if err != nil {
		return nil, err
	}
	return &Frames{spool: spool, run: run, utterances: make(map[int]*utteranceFrames)}, nil
}

// Close removes what was collected.
func (f *Frames) Close() error { return errors.Join(f.spool.Close(), os.Remove(f.spool.Name())) }

// Add takes one frame and its sequence in the stream. It drops a frame of another
// run, of a session that a later one has replaced, and one that comes twice. A
// session that speaks an utterance again replaces what an earlier session had of
// it.
func (f *Frames) Add(header nats.Header, data []byte, seq uint64) error {
	f.reached = seq
	run, session := number(header, output.HeaderRun), number(header, output.HeaderSession)
	utterance, n := number(header, output.HeaderUtterance), number(header, output.HeaderSeq)
	if run != f.run || utterance < 1 || session < f.session || session == f.session && n <= f.last {
		return nil
	}
	f.session, f.last = session, n
	u := f.utterances[utterance]
	if u == nil || u.session != session {
		u = &utteranceFrames{session: session}
		f.utterances[utterance] = u
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
		return 0 // not a worker's frame
	}
	return n
}

// Count returns the number of frames that the recording has so far.
func (f *Frames) Count() int {
	n := 0
	for _, u := range f.utterances {
		n += len(u.spans)
	}
	return n
}

// WriteTo writes the recording, utterance by utterance.
func (f *Frames) WriteTo(w io.Writer) (written int64, err error) {
	for _, utterance := range slices.Sorted(maps.Keys(f.utterances)) {
		for _, s := range f.utterances[utterance].spans {
			n, err := io.Copy(w, io.NewSectionReader(f.spool, s.at, s.length))
			written += n
			if err != nil {
				return written, err
			}
		}
	}
	return written, nil
}
