package output

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"strconv"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
)

// PartsPrefix begins the names of finished utterances that are not yet part of
// a recording.
const PartsPrefix = ".parts/"

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
		_, err := o.store.PutBytes(ctx, name, o.part.Bytes())
		return err
	})
	if err == nil || ctx.Err() != nil {
		return err
	}
	return errors.Wrap(errors.CodeInternal, errors.PhaseRuntime, err, "store utterance "+strconv.Itoa(utterance)+" of the recording")
}

func partName(job string, run, session, utterance int) string {
	return PartsPrefix + job + "/run" + strconv.Itoa(run) + "/s" + strconv.Itoa(session) + "/u" + strconv.Itoa(utterance)
}

// Recording is a finished job's, to be assembled from its parts.
type Recording struct {
	Name       string
	JobID      string
	Run        int
	Session    int // the last session of the run
	Utterances int
}

// Assemble makes the recording out of the finished utterances and removes
// them. It may be repeated: a recording that is there is left alone.
func Assemble(ctx context.Context, store jetstream.ObjectStore, r Recording) error {
	made, err := r.made(ctx, store)
	if err != nil {
		return err
	}
	if !made {
		if err := retry(ctx, func(ctx context.Context) error { return r.put(ctx, store) }); err != nil {
			return fmt.Errorf("recording %s: %w", r.Name, err)
		}
	}
	return Sweep(ctx, store, r)
}

// made tells whether this run's recording is there.
func (r Recording) made(ctx context.Context, store jetstream.ObjectStore) (bool, error) {
	info, err := store.GetInfo(ctx, r.Name)
	if errors.Is(err, jetstream.ErrObjectNotFound) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("recording %s: %w", r.Name, err)
	}
	return info.Metadata[MetaJobID] == r.JobID && info.Metadata[MetaRun] == strconv.Itoa(r.Run), nil
}

// put streams the parts into the recording.
func (r Recording) put(ctx context.Context, store jetstream.ObjectStore) error {
	parts := &partReader{ctx: ctx, store: store, r: r}
	defer parts.close()
	_, err := store.Put(ctx, jetstream.ObjectMeta{
		Name:     r.Name,
		Metadata: map[string]string{MetaJobID: r.JobID, MetaRun: strconv.Itoa(r.Run)},
	}, parts)
	return err
}

// partReader reads the parts one after the other.
type partReader struct {
	ctx   context.Context
	store jetstream.ObjectStore
	r     Recording
	next  int // utterance opened last
	open  io.ReadCloser
}

func (p *partReader) Read(b []byte) (int, error) {
	for {
		if p.open == nil {
			if p.next == p.r.Utterances {
				return 0, io.EOF
			}
			p.next++
			part, err := p.r.part(p.ctx, p.store, p.next)
			if err != nil {
				return 0, err
			}
			p.open = part
		}
		n, err := p.open.Read(b)
		if !errors.Is(err, io.EOF) {
			return n, err
		}
		p.close()
		if n > 0 {
			return n, nil
		}
	}
}

func (p *partReader) close() {
	if p.open != nil {
		_ = p.open.Close() // it was read to its end, or is given up
		p.open = nil
	}
}

// part opens an utterance as the last session that spoke it left it.
func (r Recording) part(ctx context.Context, store jetstream.ObjectStore, utterance int) (io.ReadCloser, error) {
	for session := r.Session; session >= 1; session-- {
		part, err := store.Get(ctx, partName(r.JobID, r.Run, session, utterance))
		if !errors.Is(err, jetstream.ErrObjectNotFound) {
			return part, err
		}
	}
	return nil, fmt.Errorf("utterance %d is not in the bucket any more: %w", utterance, ErrPartMissing)
}

// ErrPartMissing is in the chain of Assemble's error where an utterance is not
// there, and will not come back.
var ErrPartMissing = errors.New("it has aged out or was removed")

// Sweep removes the parts of a run.
func Sweep(ctx context.Context, store jetstream.ObjectStore, r Recording) error {
	for session := 1; session <= r.Session; session++ {
		if err := r.sweep(ctx, store, session); err != nil {
			return fmt.Errorf("remove the parts of recording %s: %w", r.Name, err)
		}
	}
	return nil
}

// sweep removes the parts of a session: those of the utterances delivered, of
// the one that may have been in flight, and of all that follow without a gap,
// for a session that was to be restarted may have come further than the last.
func (r Recording) sweep(ctx context.Context, store jetstream.ObjectStore, session int) error {
	for utterance := 1; ; utterance++ {
		err := store.Delete(ctx, partName(r.JobID, r.Run, session, utterance))
		switch {
		case err == nil:
		case !errors.Is(err, jetstream.ErrObjectNotFound):
			return err
		case utterance > r.Utterances:
			return nil
		}
	}
}
