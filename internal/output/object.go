package output

import (
	"bytes"
	"context"
	"encoding"
	"encoding/binary"
	"fmt"
	"hash"
	"strconv"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
)

const (
	// chunkSize is the size of a full chunk, as other clients use it.
	chunkSize = 128 << 10
	// chunkRoom is the maximum size of a chunk's headers and subject.
	chunkRoom = 1 << 10
)

// Checkpoint is the part of a recording that is stored for good: whole
// utterances. The job's next session continues after it.
type Checkpoint struct {
	Utterances int    // finished, those without a frame included
	Size       int64  // bytes of all chunks
	Chunks     int    //
	LastSeq    uint64 // stream sequence of the last chunk; 0: there is none
	Session    int    // the session that stored the last chunk
	Digest     []byte // state of the SHA-256 over all chunks; empty: there is none
}

// Object stores the envelopes of one session as chunks of the job's recording,
// each once and in its final place. Every chunk names the previous one, so that a
// superseded session can't add to the recording any more.
type Object struct {
	bucket  *Recordings
	rec     Recording
	done    int // utterances counted by the job's checkpoint
	at      Checkpoint
	digest  hash.Hash
	session int
	chunks  interface {
		put(ctx context.Context, data []byte, header nats.Header) (seq uint64, err error)
	}
	chunk   *bytes.Buffer // buffered data; nil: none
	maxSize int           // of a chunk
}

var _ Sink = (*Object)(nil)

// LastSeq implements Sink.
func (o *Object) LastSeq() int64 { return 0 }

// Open implements Sink: it reserves the recording's name. The error is an
// *errors.Error: invalidJob if another job has that name.
func (o *Object) Open(ctx context.Context) error {
	if o.done != o.at.Utterances {
		return errors.Newf(errors.CodeInternal, errors.PhaseJob,
			"recording %s: the job's record counts %d finished utterances, its recording %d: an older version of the worker began it. Replay the job",
			o.rec.Name, o.done, o.at.Utterances)
	}
	if len(o.at.Digest) > 0 {
		if err := o.digest.(encoding.BinaryUnmarshaler).UnmarshalBinary(o.at.Digest); err != nil {
			return errors.Wrap(errors.CodeInternal, errors.PhaseJob, err, "recording "+o.rec.Name+": read the digest's state in the job's record; replay the job")
		}
	}
	err := o.bucket.reserve(ctx, o.rec)
	var taken *TakenError
	switch {
	case err == nil || ctx.Err() != nil:
		return err
	case errors.As(err, &taken):
		return errors.Newf(errors.CodeInvalidJob, errors.PhaseJob, "output.object.name: %s", taken)
	default:
		return errors.Wrap(errors.CodeInternal, errors.PhaseJob, storageError(o.bucket.stream, err), "reserve the name of recording "+o.rec.Name)
	}
}

// Write implements Sink. It returns when all chunks that the envelope filled are
// stored.
func (o *Object) Write(ctx context.Context, e Envelope) error {
	var length [binary.MaxVarintLen64]byte
	if err := o.add(ctx, length[:binary.PutUvarint(length[:], uint64(len(e.Data)))]); err != nil {
		return err
	}
	return o.add(ctx, e.Data)
}

// AppendEnvelope appends one envelope in the format of a recording: its length as
// a varint, then its bytes.
func AppendEnvelope(b *bytes.Buffer, envelope []byte) {
	var length [binary.MaxVarintLen64]byte
	b.Write(length[:binary.PutUvarint(length[:], uint64(len(envelope)))])
	b.Write(envelope)
}

func (o *Object) add(ctx context.Context, data []byte) error {
	for len(data) > 0 {
		if o.chunk == nil {
			o.chunk = o.bucket.buffer()
		}
		n := min(o.maxSize-o.chunk.Len(), len(data))
		o.chunk.Write(data[:n])
		data = data[n:]
		if o.chunk.Len() == o.maxSize {
			if err := o.flush(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// flush stores the buffer as a chunk. It tries until that is acknowledged, ctx
// ends, or the error is permanent.
func (o *Object) flush(ctx context.Context) error {
	data := o.chunk.Bytes()
	seq, err := o.chunks.put(ctx, data, nil)
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return err
	default:
		return errors.Wrap(errors.CodeInternal, errors.PhaseRuntime, storageError(o.bucket.stream, err), "store a chunk of recording "+o.rec.Name)
	}
	failpoint.Here("recording_chunk")
	o.digest.Write(data)
	o.at.Size += int64(len(data))
	o.at.Chunks++
	o.at.LastSeq, o.at.Session = seq, o.session
	o.chunk.Reset()
	return nil
}

// Finish implements Sink: it stores the rest of the utterance.
func (o *Object) Finish(ctx context.Context, utterance int) error {
	if o.chunk != nil {
		if o.chunk.Len() > 0 {
			if err := o.flush(ctx); err != nil {
				return err
			}
		}
		o.bucket.buffers.Put(o.chunk) // an idle session holds no buffer
		o.chunk = nil
	}
	o.at.Utterances = utterance
	return nil
}

// Checkpoint implements Sink.
func (o *Object) Checkpoint() (*Checkpoint, error) {
	at := o.at
	if at.Chunks > 0 {
		state, err := o.digest.(encoding.BinaryMarshaler).MarshalBinary()
		if err != nil {
			return nil, errors.Wrap(errors.CodeInternal, errors.PhaseRuntime, err, "keep the digest of recording "+o.rec.Name)
		}
		at.Digest = state
	}
	return &at, nil
}

// Headers of a chunk. Readers of the object ignore them.
const (
	headerChunkSession = "Avatar-Session"
	headerCopyOf       = "Avatar-Copy-Of" // sequence of the chunk that this one replaces
)

// chunkWriter appends chunks on a recording's subject.
type chunkWriter struct {
	bucket  *Recordings
	subject string
	session int
	last    uint64 // sequence of the last valid chunk; 0: there is none
	fenced  bool   // last is this session's chunk: earlier sessions can't add any more
}

// put stores a chunk after the last valid one, and returns its sequence. It
// removes what earlier sessions have stored after that one.
func (w *chunkWriter) put(ctx context.Context, data []byte, header nats.Header) (seq uint64, err error) {
	msg := &nats.Msg{Subject: w.subject, Data: data, Header: nats.Header{headerChunkSession: {strconv.Itoa(w.session)}}}
	for k, v := range header {
		msg.Header[k] = v
	}
	behind := w.last // sequence that the chunk follows
	missing := 0
	err = retry(ctx, func(ctx context.Context) error {
		seq, behind, err = w.tryPut(ctx, msg, behind)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			if missing++; missing == missingTries {
				return fmt.Errorf("chunk %d: %w", behind, ErrChunksMissing)
			}
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	if behind != w.last {
		failpoint.Here("recording_overtaken")
		if err := w.bucket.removeBetween(ctx, w.subject, w.last, seq); err != nil {
			return 0, err
		}
	}
	w.last, w.fenced = seq, true
	return seq, nil
}

// tryPut stores the chunk after the message with sequence behind. If it fails,
// next is the sequence to use for the next call.
func (w *chunkWriter) tryPut(ctx context.Context, msg *nats.Msg, behind uint64) (seq, next uint64, err error) {
	for {
		seq, err := w.bucket.publish(ctx, msg, behind)
		if err == nil || !conflicts(err) {
			return seq, behind, err
		}
		last, err := w.bucket.last(ctx, w.subject)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return 0, behind, errors.Join(errChanged, err)
		}
		if err != nil {
			return 0, behind, err
		}
		session, err := strconv.Atoi(last.Header.Get(headerChunkSession))
		if err != nil {
			session = 0 // not a session's chunk: ignored
		}
		switch {
		case last.Sequence <= behind: // the leader was elected just now and lags
			return 0, behind, errChanged
		case session == w.session && bytes.Equal(last.Data, msg.Data):
			return last.Sequence, behind, nil // stored before; the reply was lost
		case session >= w.session || w.fenced:
			return 0, behind, fmt.Errorf("chunk %d is session %d's, this is session %d: %w", last.Sequence, session, w.session, ErrReplaced)
		}
		behind = last.Sequence
	}
}

// ErrReplaced is in the chain of an error if a later session of the job has
// continued its recording.
var ErrReplaced = errors.New("a later session of the job has continued the recording")
