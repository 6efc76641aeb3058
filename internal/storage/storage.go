package storage

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/audio"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/topology"
)

// Store is one place that jobs read from or write to, as this worker knows it. Its
// methods may be called from several goroutines.
type Store interface {
	// Name names the store for people.
	Name() string
	// Check returns why no job that needs the store should start; nil: it serves
	// them. It may take a round trip.
	Check(ctx context.Context) error
	// Fault returns what Check found last, without a round trip.
	Fault() error
	// Retry rechecks a store that failed.
	Retry(ctx context.Context)
	// Invalidate makes the next Check ask the server: a session or a write has
	// failed for this store.
	Invalidate()
	// HasAmpleSpace reports whether there is so much space that the size of a job
	// need not be known exactly.
	HasAmpleSpace() bool
	// Reserve keeps space for the bytes that a job has left to store, or returns
	// why there is none. all is what the whole job makes. The error is an
	// *errors.Error with code invalidJob if it can never be stored.
	Reserve(jobID string, left, all int64) error
	// Begin is called when the job's session begins, End when it has ended. A store
	// that made the session fail counts as failed until Retry finds otherwise.
	Begin(jobID string)
	End(jobID string, err error)
}

// Options configure a Storage. All fields are required.
type Options struct {
	JS     jetstream.JetStream
	Names  topology.Names
	Speech *audio.Opener // for the length of speech
}

// Storage checks the stores of a worker, and reserves space in them.
type Storage struct {
	names  topology.Names
	speech *audio.Opener

	// frames and recordings are written, live and uploads are read.
	frames, recordings, live, uploads Store
	// usage is where what a session costs is written down, whatever it makes.
	usage *stream
}

var _ jobs.Storage = (*Storage)(nil)

// New returns a Storage of the worker's own streams and buckets. Watch rechecks
// stores that failed.
func New(o Options) *Storage {
	recordings := "$O." + o.Names.RecordingsBucket()
	usage := newStream(o.JS, o.Names.UsageStream(), o.Names.Usage(probeToken, probeToken))
	usage.largest = largestUsage
	return &Storage{
		names: o.Names, speech: o.Speech, usage: usage,
		frames:     newStream(o.JS, o.Names.FramesStream(), strings.TrimSuffix(o.Names.AllFrames(), "*")+probeToken),
		recordings: newStream(o.JS, "OBJ_"+o.Names.RecordingsBucket(), recordings+".C."+probeToken, recordings+".M."+probeToken),
		live:       newStream(o.JS, o.Names.AudioStream()),
		uploads:    newStream(o.JS, "OBJ_"+o.Names.AudioFilesBucket()),
	}
}

// writes returns the store that outputs of this kind are written to; nil: none of ours.
func (s *Storage) writes(kind string) (Store, error) {
	switch kind {
	case jobspec.OutputFrames:
		return s.frames, nil
	case jobspec.OutputObject:
		return s.recordings, nil
	case jobspec.OutputLiveKit, jobspec.OutputAgora, jobspec.OutputDiscard:
		return nil, nil
	default:
		return nil, fmt.Errorf("internal/storage does not know the output %q; this is a fault of the worker: report it", kind)
	}
}

// reads returns the store of ours that the job's speech comes from; nil: none.
func (s *Storage) reads(job *jobspec.Job) Store {
	if job.GetLive() != nil {
		return s.live
	}
	bucket := s.names.AudioFilesBucket()
	own := func(spec jobspec.AudioSpec) bool {
		return spec.Object != "" && (!strings.Contains(spec.Object, "/") || strings.HasPrefix(spec.Object, bucket+"/"))
	}
	if slices.ContainsFunc(job.AudioSpecs(), own) {
		return s.uploads
	}
	return nil
}

func (s *Storage) all() []Store { return []Store{s.usage, s.live, s.frames, s.uploads, s.recordings} }

// Reserve implements jobs.Storage.
func (s *Storage) Reserve(ctx context.Context, job *jobspec.Job, done int) error {
	if err := s.usage.checkSpace(ctx, largestUsage); err != nil {
		return err
	}
	if source := s.reads(job); source != nil {
		if err := source.Check(ctx); err != nil {
			return err
		}
	}
	target, err := s.writes(job.OutputKind())
	if target == nil || err != nil {
		return err
	}
	if err := target.Check(ctx); err != nil {
		return err
	}
	left, all := s.estimate(ctx, job, done, target.HasAmpleSpace())
	return target.Reserve(job.ID, left, all)
}

// InvalidateLedger makes the next Reserve check the stream of usage records again: it
// did not take one.
func (s *Storage) InvalidateLedger() { s.usage.Invalidate() }

// Err implements jobs.Storage.
func (s *Storage) Err() error {
	var faults []error
	for _, st := range s.all() {
		if err := st.Fault(); err != nil {
			faults = append(faults, fmt.Errorf("jobs that need %s are held: %w", st.Name(), err))
		}
	}
	return errors.Join(faults...)
}

// Watch rechecks stores that failed, until ctx ends.
func (s *Storage) Watch(ctx context.Context) {
	ticker := time.NewTicker(checkLife / 2)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		for _, st := range s.all() {
			if st.Fault() != nil {
				st.Retry(ctx)
			}
		}
	}
}

// Started implements jobs.Storage.
func (s *Storage) Started(job *jobspec.Job) {
	if target, err := s.writes(job.OutputKind()); err == nil && target != nil {
		target.Begin(job.ID)
	}
}

// Ended implements jobs.Storage.
func (s *Storage) Ended(job *jobspec.Job, err error) {
	if target, writesErr := s.writes(job.OutputKind()); writesErr == nil && target != nil {
		target.End(job.ID, err)
	}
	if e := errors.Of(err); e != nil && e.Code == errors.CodeAudioUnavailable {
		if source := s.reads(job); source != nil {
			source.Invalidate()
		}
	}
}
