package audio

import (
	"bufio"
	"context"
	"io"
	"time"

	"avatarworker/internal/errors"
)

// The causes with which a source's own context ends.
type endedError string

func (c endedError) Error() string { return string(c) }

const (
	errStalled endedError = "the source was too slow"
	errClosed  endedError = "the speech is closed"
)

// source is the bytes of a Speech, with their limits. Its errors other than
// io.EOF are permanent: an *errors.Error, or the cancellation cause of the
// caller's context.
type source struct {
	in   *input
	name string // for errors: an object's name, or a URL without its query
	body io.ReadCloser
	size int64 // bytes in all; -1: not known
	max  int64 // maximum number of bytes

	ctx     context.Context // body's: when it ends, a Read that waits ends
	cancel  context.CancelCauseFunc
	timeout time.Duration // Options.FetchTimeout; 0: reading never waits
	fault   func(error) error

	read   int64
	waited time.Duration // in all waits together
	spoken time.Duration // length of the speech returned so far
	err    error
}

// remoteSource returns a source that has yet to be opened; the caller sets body
// and size. Its context has a deadline far in the future, because the JetStream
// client gives up after 5 s without one.
func (o *Opener) remoteSource(ctx context.Context, in *input, name string) *source {
	src := &source{in: in, name: name, size: -1, max: o.opts.MaxBytes, timeout: o.opts.FetchTimeout}
	dated, stop := context.WithTimeout(ctx, maxSpeech)
	var cancel context.CancelCauseFunc
	src.ctx, cancel = context.WithCancelCause(dated)
	src.cancel = func(cause error) {
		cancel(cause)
		stop()
	}
	return src
}

// buffered returns a reader with a buffer, no larger than the source and no
// smaller than what a parser examines.
func (s *source) buffered() *bufio.Reader {
	size := int64(readBuffer)
	if s.size >= 0 {
		size = min(size, max(s.size, 512))
	}
	return bufio.NewReaderSize(s, int(size))
}

// wait runs do, which returns when s.ctx ends, within the remaining time.
func (s *source) wait(do func() error) error {
	if s.ctx.Err() != nil {
		return s.cause()
	}
	if s.timeout == 0 {
		return do()
	}
	limit := min(s.timeout, s.timeout+s.spoken-s.waited)
	if limit <= 0 {
		s.cancel(errStalled)
		return s.cause()
	}
	start := time.Now()
	timer := time.AfterFunc(limit, func() { s.cancel(errStalled) })
	err := do()
	timer.Stop()
	s.waited += time.Since(start)
	if err != nil && err != io.EOF && s.ctx.Err() != nil {
		return s.cause()
	}
	return err
}

// cause returns why s.ctx has ended.
func (s *source) cause() error {
	cause := context.Cause(s.ctx)
	if cause != errStalled {
		return cause
	}
	return s.in.unreachable(nil, "%s: too slow: %d bytes, %s of speech, after waiting %s (the limit is %s and the speech's own length)",
		s.name, s.read, s.spoken.Round(time.Millisecond), s.waited.Round(time.Millisecond), s.timeout)
}

// Read implements io.Reader.
func (s *source) Read(p []byte) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	// Read one byte more than allowed, to notice that there is more.
	if room := s.max - s.read + 1; int64(len(p)) > room {
		p = p[:room]
	}
	var n int
	err := s.wait(func() (err error) {
		n, err = s.body.Read(p)
		return err
	})
	s.read += int64(n)
	switch {
	case s.read > s.max:
		n -= int(s.read - s.max)
		err = s.in.tooLarge(s.name, s.max)
	case err != nil && err != io.EOF && s.fault != nil && s.ctx.Err() == nil:
		err = s.fault(err)
	}
	s.err = err
	return n, err
}

func (s *source) close() error {
	if s.cancel != nil {
		s.cancel(errClosed)
	}
	if s.body == nil {
		return nil
	}
	return s.body.Close()
}

// cancelWith makes ctx end the source as well, until stop is called.
func (s *source) cancelWith(ctx context.Context) (stop func() bool) {
	if s.cancel == nil {
		return func() bool { return true }
	}
	return context.AfterFunc(ctx, func() { s.cancel(context.Cause(ctx)) })
}

func (in *input) tooLarge(name string, limit int64) error {
	return in.unavailable("%s: is larger than audio.max_bytes (%d bytes)", name, limit)
}

// endOfFile reports whether a parser reached the end of its input early, as
// opposed to a source that failed (whose cause may be an EOF as well).
func endOfFile(err error) bool {
	var failed *errors.Error
	if errors.As(err, &failed) {
		return false
	}
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}
