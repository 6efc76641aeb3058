package output

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/leader"
	"avatarworker/internal/topology"
)

// maxPart bounds one utterance in memory: an hour and a half of speech.
const maxPart = 64 << 20

// Metadata of a recording.
const (
	MetaJobID = "avatar-job-id"
	MetaRun   = "avatar-run"
)

// Object keeps each finished utterance under a private name, one for each
// session, so that a session that was superseded can't touch the winner's.
type Object struct {
	store jetstream.ObjectStore
	id    SessionID
	part  bytes.Buffer // the utterance in flight, length-delimited
}

var _ Sink = (*Object)(nil)

// NewObject returns the sink of one session.
func NewObject(store jetstream.ObjectStore, id SessionID) *Object {
	return &Object{store: store, id: id}
}

// LastSeq implements Sink.
func (o *Object) LastSeq() int64 { return 0 }

// Write implements Sink.
func (o *Object) Write(_ context.Context, e Envelope) error {
	if o.part.Len()+len(e.Data) > maxPart {
		return errors.Newf(errors.CodeInternal, errors.PhaseRuntime, "utterance %d has more than %d MiB of frames; use output frames for it", e.Utterance, maxPart>>20)
	}
	AppendEnvelope(&o.part, e.Data)
	return nil
}

// AppendEnvelope writes one envelope as it stands in a recording: its length as
// a varint, then its bytes.
func AppendEnvelope(b *bytes.Buffer, envelope []byte) {
	var length [binary.MaxVarintLen64]byte
	b.Write(length[:binary.PutUvarint(length[:], uint64(len(envelope)))])
	b.Write(envelope)
}

// Finish implements Sink: it stores the utterance, trying until that is
// acknowledged, ctx ends, or it is of no use.
func (o *Object) Finish(ctx context.Context, utterance int) error {
	name := partName(o.id.JobID, o.id.Run, o.id.Session, utterance)
	defer func() { o.part = bytes.Buffer{} }() // nothing is kept while the session is idle
	err := retry(ctx, func(ctx context.Context) error {
		return put(ctx, o.store, jetstream.ObjectMeta{Name: name}, bytes.NewReader(o.part.Bytes()))
	})
	if err == nil || ctx.Err() != nil {
		return err
	}
	return errors.Wrap(errors.CodeInternal, errors.PhaseRuntime, err, "store utterance "+strconv.Itoa(utterance)+" of the recording")
}

// put stores an object. The client waits for an acknowledgement until ctx's
// deadline, and for some seconds only where ctx has none. One that was lost with
// a node would so hold up a job for as long as a recording may take, so the
// deadline is kept from the client; ctx ends the put all the same.
func put(ctx context.Context, store jetstream.ObjectStore, meta jetstream.ObjectMeta, r io.Reader) error {
	undated, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	defer context.AfterFunc(ctx, func() { cancel(context.Cause(ctx)) })()
	_, err := store.Put(undated, meta, r)
	return err
}

func partName(job string, run, session, utterance int) string {
	return topology.PartsPrefix + job + "/run" + strconv.Itoa(run) + "/s" + strconv.Itoa(session) + "/u" + strconv.Itoa(utterance)
}

// Recording is a finished job's, to be assembled from its parts.
type Recording struct {
	Name       string
	JobID      string
	Run        int
	Session    int // the last session of the run
	Utterances int
}

// Recordings is the bucket of recordings. What is in it, and what is not, its
// leader says: a replica may not know yet of a part that another one has.
type Recordings struct {
	JS     jetstream.JetStream
	Bucket string
	Store  jetstream.ObjectStore // the same bucket, to be written to
}

// Assemble makes the recording out of the finished utterances and removes
// them. It may be repeated: a recording that is there is left alone.
func (b Recordings) Assemble(ctx context.Context, r Recording) error {
	made, err := b.made(ctx, r)
	if err != nil {
		return err
	}
	if !made {
		if err := retry(ctx, func(ctx context.Context) error { return b.put(ctx, r) }); err != nil {
			return fmt.Errorf("recording %s: %w", r.Name, err)
		}
	}
	return b.Sweep(ctx, r)
}

// made tells whether this run's recording is there.
func (b Recordings) made(ctx context.Context, r Recording) (bool, error) {
	info, err := leader.ObjectInfo(ctx, b.JS, b.Bucket, r.Name)
	if errors.Is(err, jetstream.ErrObjectNotFound) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("recording %s: %w", r.Name, err)
	}
	return info.Metadata[MetaJobID] == r.JobID && info.Metadata[MetaRun] == strconv.Itoa(r.Run), nil
}

// put streams the parts into the recording.
func (b Recordings) put(ctx context.Context, r Recording) error {
	return put(ctx, b.Store, jetstream.ObjectMeta{
		Name:     r.Name,
		Metadata: map[string]string{MetaJobID: r.JobID, MetaRun: strconv.Itoa(r.Run)},
	}, &partReader{ctx: ctx, bucket: b, r: r})
}

// partReader reads the parts one after the other.
type partReader struct {
	ctx    context.Context
	bucket Recordings
	r      Recording
	next   int       // utterance opened last
	open   io.Reader // nil: the next one is due
}

func (p *partReader) Read(b []byte) (int, error) {
	for {
		if p.open == nil {
			if p.next == p.r.Utterances {
				return 0, io.EOF
			}
			p.next++
			part, err := p.bucket.part(p.ctx, p.r, p.next)
			if err != nil {
				return 0, err
			}
			p.open = part
		}
		n, err := p.open.Read(b)
		if !errors.Is(err, io.EOF) {
			return n, err
		}
		p.open = nil
		if n > 0 {
			return n, nil
		}
	}
}

// part opens an utterance as the last session that spoke it left it.
func (b Recordings) part(ctx context.Context, r Recording, utterance int) (io.Reader, error) {
	for session := r.Session; session >= 1; session-- {
		info, err := leader.ObjectInfo(ctx, b.JS, b.Bucket, partName(r.JobID, r.Run, session, utterance))
		if err == nil {
			return leader.OpenObject(ctx, b.JS, info)
		}
		if !errors.Is(err, jetstream.ErrObjectNotFound) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("utterance %d is not in the bucket any more: %w", utterance, ErrPartMissing)
}

// ErrPartMissing is in the chain of Assemble's error where an utterance is not
// there, and will not come back.
var ErrPartMissing = errors.New("it has aged out or was removed")

// Sweep removes the parts of a run.
func (b Recordings) Sweep(ctx context.Context, r Recording) error {
	for session := 1; session <= r.Session; session++ {
		if err := b.sweep(ctx, r, session); err != nil {
			return fmt.Errorf("remove the parts of recording %s: %w", r.Name, err)
		}
	}
	return nil
}

// sweep removes the parts of a session: those of the utterances delivered, of
// the one that may have been in flight, and of all that follow without a gap,
// for a session that was to be restarted may have come further than the last.
func (b Recordings) sweep(ctx context.Context, r Recording, session int) error {
	for utterance := 1; ; utterance++ {
		there, err := b.remove(ctx, partName(r.JobID, r.Run, session, utterance))
		if err != nil {
			return err
		}
		if !there && utterance > r.Utterances {
			return nil
		}
	}
}

// remove removes an object; false: it was not there.
func (b Recordings) remove(ctx context.Context, name string) (there bool, err error) {
	err = retry(ctx, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, removeTry)
		defer cancel()
		there = true
		err := b.Store.Delete(ctx, name)
		if !errors.Is(err, jetstream.ErrObjectNotFound) {
			return err
		}
		// The client asked some replica, which may not know of it yet.
		if _, err := leader.ObjectInfo(ctx, b.JS, b.Bucket, name); !errors.Is(err, jetstream.ErrObjectNotFound) {
			return errors.Join(errBehind, err)
		}
		there = false
		return nil
	})
	return there, err
}

// removeTry is one try: its three requests, each of which a node may take along.
const removeTry = 5 * time.Second

// errBehind is what is tried again.
var errBehind = errors.New("a replica of the bucket lags behind")
