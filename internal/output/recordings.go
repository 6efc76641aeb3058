package output

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/big"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
	"avatarworker/internal/leader"
)

// Metadata keys of a recording.
const (
	MetaJobID = "avatar-job-id"
	MetaRun   = "avatar-run"
	// MetaReserved marks a name that a job has reserved. To clients the object is
	// deleted, so they do not see it.
	MetaReserved = "avatar-reserved"
	// metaReplaced names the chunks of the recording that this one replaced.
	metaReplaced = "avatar-replaced"
)

// Recording identifies the recording of one run of a job.
type Recording struct {
	Name      string // of the object
	JobID     string
	Run       int
	StreamSeq uint64    // of the job's message
	Published time.Time // of the job's message
}

// nuid returns the name of the recording's chunks. All sessions of the run use
// the same one, and no other job does, even one with the same ID.
func (r Recording) nuid() string {
	h := sha256.New()
	fmt.Fprintf(h, "%s\n%d\n", r.JobID, r.Run)
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], r.StreamSeq)
	binary.BigEndian.PutUint64(b[8:], uint64(r.Published.UnixNano()))
	h.Write(b[:])
	return fmt.Sprintf("%022s", new(big.Int).SetBytes(h.Sum(nil)[:16]).Text(62))
}

// emptyMark ends the chunk name of a recording without chunks, to which no
// session can add one.
const emptyMark = "-empty"

// owns reports whether chunks with that name belong to the recording.
func (r Recording) owns(nuid string) bool { return nuid == r.nuid() || nuid == r.nuid()+emptyMark }

// Recordings is the bucket of recordings. It reads from the leader of the
// bucket's stream, because a replica may lag behind. It is safe for concurrent
// use.
type Recordings struct {
	js      jetstream.JetStream
	bucket  string
	stream  string
	buffers sync.Pool // of *bytes.Buffer with the capacity of a chunk

	mu     sync.Mutex
	handle jetstream.Stream // nil: not looked up yet
}

// NewRecordings returns the bucket with that name. It makes no request.
func NewRecordings(js jetstream.JetStream, bucket string) *Recordings {
	return &Recordings{js: js, bucket: bucket, stream: "OBJ_" + bucket}
}

// Sink returns the sink of one session. done is the number of utterances counted
// by the job's checkpoint, and from the recording's checkpoint at that time; nil:
// nothing is stored.
func (b *Recordings) Sink(r Recording, session, done int, from *Checkpoint) *Object {
	o := &Object{
		bucket: b, rec: r, session: session, done: done, digest: sha256.New(),
		maxSize: max(chunkRoom, min(chunkSize, int(b.js.Conn().MaxPayload())-chunkRoom)),
	}
	if from != nil {
		o.at = *from
	}
	o.chunks = b.writer(r, session, o.at.LastSeq)
	return o
}

func (b *Recordings) writer(r Recording, session int, last uint64) *chunkWriter {
	return &chunkWriter{bucket: b, subject: b.chunks(r.nuid()), session: session, last: last}
}

func (b *Recordings) buffer() *bytes.Buffer {
	if buf, ok := b.buffers.Get().(*bytes.Buffer); ok {
		buf.Reset()
		return buf
	}
	return bytes.NewBuffer(make([]byte, 0, chunkSize))
}

func (b *Recordings) chunks(nuid string) string { return "$O." + b.bucket + ".C." + nuid }

func (b *Recordings) meta(name string) string {
	return "$O." + b.bucket + ".M." + base64.URLEncoding.EncodeToString([]byte(name))
}

// ErrChunksMissing is in the chain of Publish's error if chunks of the recording
// are missing for good.
var ErrChunksMissing = errors.New("its chunks have aged out or were removed")

// TakenError means that another object already has the name of a recording.
type TakenError struct {
	Name     string
	JobID    string // that the name belongs to; empty: no job made the object
	Reserved bool   // that job is not finished
	Stream   string // that has the name's entry
	Seq      uint64 // of the entry
}

// Error implements error.
func (e *TakenError) Error() string {
	switch {
	case e.JobID == "":
		return fmt.Sprintf("there is an object %q that no job has recorded, and it is not replaced; choose another name or remove the object", e.Name)
	case e.Reserved:
		return fmt.Sprintf("job %s, which has no outcome yet, records %q (reserved by message %d of stream %s); choose another name", e.JobID, e.Name, e.Seq, e.Stream)
	default:
		return fmt.Sprintf("%q is the recording of job %s, and it is not replaced; choose another name or remove the recording", e.Name, e.JobID)
	}
}

// entry is the object stored under a name.
type entry struct {
	info jetstream.ObjectInfo
	seq  uint64 // 0: nothing
}

func (e entry) reserved() bool { return e.info.Deleted && e.info.Metadata[MetaReserved] != "" }

func (e entry) visible() bool { return e.seq > 0 && !e.info.Deleted }

// checkOwner returns a *TakenError if the name belongs to another job.
func (b *Recordings) checkOwner(e entry, r Recording) error {
	if job := e.info.Metadata[MetaJobID]; (e.visible() || e.reserved()) && job != r.JobID {
		return &TakenError{Name: r.Name, JobID: job, Reserved: e.reserved(), Stream: b.stream, Seq: e.seq}
	}
	return nil
}

// lookUp reads the object stored under a name.
func (b *Recordings) lookUp(ctx context.Context, name string) (entry, error) {
	msg, err := b.last(ctx, b.meta(name))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return entry{}, nil
	}
	if err != nil {
		return entry{}, err
	}
	e := entry{seq: msg.Sequence}
	if err := json.Unmarshal(msg.Data, &e.info); err != nil {
		return entry{}, fmt.Errorf("object %q: %w", name, errors.Join(jetstream.ErrBadObjectMeta, err))
	}
	return e, nil
}

// reserve keeps other jobs from using the recording's name until Publish or
// Sweep. It leaves the recording of an earlier run as it is. The error may be a
// *TakenError.
func (b *Recordings) reserve(ctx context.Context, r Recording) error {
	mine := r.nuid()
	return retry(ctx, func(ctx context.Context) error {
		e, err := b.lookUp(ctx, r.Name)
		if err != nil {
			return err
		}
		if err := b.checkOwner(e, r); err != nil || e.visible() || e.reserved() && e.info.Metadata[MetaReserved] == mine {
			return err
		}
		return b.putInfo(ctx, e.seq, &jetstream.ObjectInfo{
			ObjectMeta: jetstream.ObjectMeta{Name: r.Name, Metadata: r.metadata(MetaReserved, mine)},
			Bucket:     b.bucket, NUID: MetaReserved, Deleted: true,
		})
	})
}

func (r Recording) metadata(key, value string) map[string]string {
	m := map[string]string{MetaJobID: r.JobID, MetaRun: strconv.Itoa(r.Run)}
	if value != "" {
		m[key] = value
	}
	return m
}

// putInfo replaces the object under a name if its message still has that
// sequence. Otherwise the error is errChanged.
func (b *Recordings) putInfo(ctx context.Context, seq uint64, info *jetstream.ObjectInfo) error {
	data, err := json.Marshal(info)
	if err != nil {
		return err
	}
	msg := &nats.Msg{Subject: b.meta(info.Name), Data: data, Header: nats.Header{jetstream.MsgRollup: {jetstream.MsgRollupSubject}}}
	if _, err = b.publish(ctx, msg, seq); conflicts(err) {
		return errors.Join(errChanged, err)
	}
	return err
}

// Publish makes the recording visible under its name, up to the checkpoint at,
// and removes the recording of an earlier run. session is the run's last session.
// It may be repeated. It does not replace another job's recording: the error is
// then a *TakenError.
func (b *Recordings) Publish(ctx context.Context, r Recording, session, utterances int, at Checkpoint) error {
	if at.Utterances != utterances {
		return fmt.Errorf("recording %s: it holds %d utterances of %d: %w", r.Name, at.Utterances, utterances, ErrChunksMissing)
	}
	for tries := 1; ; tries++ {
		err := retry(ctx, func(ctx context.Context) error { return b.publishRecording(ctx, r, session, at) })
		switch {
		case err == nil:
			return nil
		case errors.Is(err, ErrChunksMissing) && tries < missingTries && wait(ctx):
			// A newly elected leader may not have everything yet.
		default:
			return fmt.Errorf("recording %s: %w", r.Name, err)
		}
	}
}

// missingTries is how often missing chunks are looked for.
const missingTries = 5

func (b *Recordings) publishRecording(ctx context.Context, r Recording, session int, at Checkpoint) error {
	e, err := b.lookUp(ctx, r.Name)
	if err != nil {
		return err
	}
	switch err := b.checkOwner(e, r); {
	case err != nil:
		return err
	case e.visible() && r.owns(e.info.NUID): // made before
		return b.removeReplaced(ctx, e.info)
	case r.owns(e.info.NUID): // made before, and removed since
		return ErrChunksMissing
	}
	if err := b.complete(ctx, r, session, at); err != nil {
		return err
	}
	mine, digest := r.nuid()+emptyMark, sha256.New()
	if at.Chunks > 0 {
		mine = r.nuid()
		if err := digest.(encoding.BinaryUnmarshaler).UnmarshalBinary(at.Digest); err != nil {
			return errors.Join(ErrChunksMissing, err)
		}
	}
	info := jetstream.ObjectInfo{
		ObjectMeta: jetstream.ObjectMeta{
			Name: r.Name, Metadata: r.metadata(metaReplaced, e.chunks()), Opts: &jetstream.ObjectMetaOptions{ChunkSize: chunkSize},
		},
		Bucket: b.bucket, NUID: mine, Size: uint64(at.Size), Chunks: uint32(at.Chunks),
		Digest: jetstream.GetObjectDigestValue(digest),
	}
	if err := b.putInfo(ctx, e.seq, &info); err != nil {
		return err
	}
	failpoint.Here("recording_visible")
	return b.removeReplaced(ctx, info)
}

// chunks returns the chunk name of a visible object.
func (e entry) chunks() string {
	if e.visible() {
		return e.info.NUID
	}
	return ""
}

// removeReplaced removes the chunks of the recording that this one replaced.
func (b *Recordings) removeReplaced(ctx context.Context, info jetstream.ObjectInfo) error {
	old := info.Metadata[metaReplaced]
	if old == "" {
		return nil
	}
	return b.purge(ctx, b.chunks(old), 0)
}

// complete checks that the recording's chunks are all stored and that no session
// can add more.
func (b *Recordings) complete(ctx context.Context, r Recording, session int, at Checkpoint) error {
	subject := b.chunks(r.nuid())
	if at.Chunks == 0 {
		return b.purge(ctx, subject, 0)
	}
	there, err := b.count(ctx, subject)
	// If the last session has stored nothing, it has not fenced the earlier ones.
	if err == nil && (at.Session != session || there > at.Chunks) {
		if err := b.renewLast(ctx, r, session, at); err != nil {
			return err
		}
		there, err = b.count(ctx, subject)
	}
	switch {
	case err != nil:
		return err
	case there < at.Chunks:
		return fmt.Errorf("%d chunks of %d are there: %w", there, at.Chunks, ErrChunksMissing)
	case there > at.Chunks:
		return errors.Join(errChanged, fmt.Errorf("%d chunks are there, not %d", there, at.Chunks))
	default:
		return nil
	}
}

// renewLast appends a copy of the last chunk, and removes the original with all
// that follows it. No session knows the copy's sequence, so none can append a
// chunk any more.
func (b *Recordings) renewLast(ctx context.Context, r Recording, session int, at Checkpoint) error {
	original := strconv.FormatUint(at.LastSeq, 10)
	subject := b.chunks(r.nuid())
	last, err := b.last(ctx, subject)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return ErrChunksMissing
	}
	if err != nil {
		return err
	}
	chunk, err := leader.Message(ctx, b.js, b.stream, at.LastSeq)
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound) && last.Header.Get(headerCopyOf) == original:
		return nil // done before
	case errors.Is(err, jetstream.ErrMsgNotFound):
		return ErrChunksMissing
	case err != nil:
		return err
	case chunk.Subject != subject:
		return ErrChunksMissing
	}
	w := b.writer(r, session+1, at.LastSeq) // what the last session left unfinished does not count either
	seq, err := w.put(ctx, chunk.Data, nats.Header{headerCopyOf: {original}})
	if err != nil {
		return err
	}
	// Remove the original last, so that a repetition finds either the original or
	// only the copy. The copy may be that of another worker, which has removed
	// nothing yet.
	if err := b.removeBetween(ctx, subject, at.LastSeq, seq); err != nil {
		return err
	}
	return b.remove(ctx, at.LastSeq)
}

// Sweep removes what is stored of a recording that is not to be published: its
// chunks, and the reservation of its name. It may be repeated.
func (b *Recordings) Sweep(ctx context.Context, r Recording) error {
	err := retry(ctx, func(ctx context.Context) error { return b.sweep(ctx, r) })
	if err != nil {
		return fmt.Errorf("remove the chunks of recording %s: %w", r.Name, err)
	}
	return nil
}

func (b *Recordings) sweep(ctx context.Context, r Recording) error {
	e, err := b.lookUp(ctx, r.Name)
	if err != nil {
		return err
	}
	if e.visible() && r.owns(e.info.NUID) {
		return nil // it has been published
	}
	if err := b.purge(ctx, b.chunks(r.nuid()), 0); err != nil {
		return err
	}
	if e.reserved() && e.info.Metadata[MetaReserved] == r.nuid() {
		return b.remove(ctx, e.seq)
	}
	return nil
}
