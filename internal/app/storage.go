package app

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/audio"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/output"
	"avatarworker/internal/topology"
)

const (
	// storeLook is how long what is known of a stream counts.
	storeLook = 5 * time.Second
	// storeTry bounds one look: a stream without a leader does not answer.
	storeTry = 4 * time.Second
	// storePause is how long a stream that failed a session is left alone; each
	// further failure doubles it, up to maxStorePause.
	storePause    = 5 * time.Second
	maxStorePause = 5 * time.Minute
	// unstarted is how long room is kept for a job whose session has not started.
	unstarted = time.Minute
	// unknownSpeech stands for speech whose length is not known beforehand. A
	// stream without room for as much is full.
	unknownSpeech = 30 * time.Second
	// leastFrames is the speech of the longest frame. A stream that does not take
	// as much is of no use to any job.
	leastFrames = 4 * time.Second
	// largestFrame is the size of the largest messages that frames make, largestUsage
	// of a usage record: its labels may have 8 KiB as JSON.
	largestFrame = 64 << 10
	largestUsage = 16 << 10
	// plenty is so much room that the length of speech in objects is not looked up.
	plenty = 256 << 20
)

// storage looks whether the streams and buckets that a job reads and writes can
// serve it, before a session is paid for. It wraps the Runner, so that it learns
// when a session has failed for a store.
type storage struct {
	jobs.Runner
	js     jetstream.JetStream
	names  topology.Names
	speech *audio.Opener
	// stores by the name of the stream; the map does not change.
	stores map[string]*store
}

var (
	_ jobs.Storage = (*storage)(nil)
	_ jobs.Runner  = (*storage)(nil)
)

func newStorage(js jetstream.JetStream, names topology.Names, speech *audio.Opener, runner jobs.Runner) *storage {
	s := &storage{Runner: runner, js: js, names: names, speech: speech, stores: make(map[string]*store)}
	recordings := "$O." + names.RecordingsBucket()
	s.add(names.FramesStream(), strings.TrimSuffix(names.AllFrames(), "*")+probeToken)
	s.add("OBJ_"+names.RecordingsBucket(), recordings+".C."+probeToken, recordings+".M."+probeToken)
	s.add(names.AudioStream())
	s.add("OBJ_" + names.AudioFilesBucket())
	s.add(names.UsageStream(), names.Usage(probeToken, probeToken))
	s.stores[names.UsageStream()].largest = largestUsage
	return s
}

// probeToken is where a job's id, or an object's name, stands else. It can be
// neither.
const probeToken = "~probe"

func (s *storage) add(stream string, probes ...string) {
	s.stores[stream] = &store{js: s.js, stream: stream, probes: probes, largest: largestFrame, rooms: make(map[string]*room)}
}

// Check implements jobs.Storage.
func (s *storage) Check(ctx context.Context, job *jobspec.Job, done int) error {
	// What a session costs has to be written down, whatever it makes.
	if err := s.stores[s.names.UsageStream()].lookFor(ctx, largestUsage); err != nil {
		return err
	}
	for _, stream := range s.reads(job) {
		if err := s.stores[stream].look(ctx); err != nil {
			return err
		}
	}
	target := s.writes(job)
	if target == nil {
		return nil
	}
	if err := target.look(ctx); err != nil {
		return err
	}
	left, all := s.estimate(ctx, job, done, target.plenty())
	return target.reserve(job.ID, left, all)
}

// Doubt implements jobs.Storage.
func (s *storage) Doubt() { s.stores[s.names.UsageStream()].doubt() }

// Err implements jobs.Storage.
func (s *storage) Err() error {
	var faults []error
	for _, stream := range s.streams() {
		if err := s.stores[stream].fault(); err != nil {
			faults = append(faults, fmt.Errorf("jobs that need stream %s are held: %w", stream, err))
		}
	}
	return errors.Join(faults...)
}

func (s *storage) streams() []string {
	return []string{
		s.names.UsageStream(), s.names.AudioStream(), s.names.FramesStream(), "OBJ_" + s.names.AudioFilesBucket(), "OBJ_" + s.names.RecordingsBucket(),
	}
}

// run looks again at the stores that are at fault, until ctx ends.
func (s *storage) run(ctx context.Context) {
	ticker := time.NewTicker(storeLook / 2)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		for _, stream := range s.streams() {
			if st := s.stores[stream]; st.fault() != nil {
				st.again(ctx)
			}
		}
	}
}

// Run implements jobs.Runner.
func (s *storage) Run(ctx context.Context, a *jobs.Attempt) (jobs.Report, error) {
	target := s.writes(a.Job)
	if target != nil {
		target.start(a.Job.ID)
	}
	report, err := s.Runner.Run(ctx, a)
	if target != nil {
		target.end(a.Job.ID, err)
	}
	if e := errors.Of(err); e != nil && e.Code == errors.CodeAudioUnavailable {
		for _, stream := range s.reads(a.Job) {
			s.stores[stream].forget()
		}
	}
	return report, err
}

// writes is the store that the job's output goes to; nil: none.
func (s *storage) writes(job *jobspec.Job) *store {
	switch job.OutputKind() {
	case jobspec.OutputFrames:
		return s.stores[s.names.FramesStream()]
	case jobspec.OutputObject:
		return s.stores["OBJ_"+s.names.RecordingsBucket()]
	default:
		return nil
	}
}

// reads names our own streams that the job's speech comes from.
func (s *storage) reads(job *jobspec.Job) []string {
	if job.GetLive() != nil {
		return []string{s.names.AudioStream()}
	}
	uploads := s.names.AudioFilesBucket()
	own := func(spec jobspec.AudioSpec) bool {
		return spec.Object != "" && (!strings.Contains(spec.Object, "/") || strings.HasPrefix(spec.Object, uploads+"/"))
	}
	if slices.ContainsFunc(job.AudioSpecs(), own) {
		return []string{"OBJ_" + uploads}
	}
	return nil
}

// estimate is about how many bytes the job still stores, and how many it makes in
// all. Of speech whose length is not known, all counts nothing.
func (s *storage) estimate(ctx context.Context, job *jobspec.Job, done int, plenty bool) (left, all int64) {
	var leftTime, allTime time.Duration
	specs := job.AudioSpecs()
	if len(specs) == 0 { // live
		leftTime = unknownSpeech
	}
	for i, spec := range specs {
		length, known := s.length(ctx, spec, plenty)
		if known {
			allTime += length
		}
		if i >= done {
			leftTime += length
		}
	}
	return output.EstimateBytes(leftTime), output.EstimateBytes(allTime)
}

// length is that of one utterance's speech, where that can be found out without
// fetching it.
func (s *storage) length(ctx context.Context, spec jobspec.AudioSpec, plenty bool) (length time.Duration, known bool) {
	if spec.URL != "" || plenty && !spec.HasInline {
		return unknownSpeech, false
	}
	ctx, cancel := context.WithTimeout(ctx, storeTry)
	defer cancel()
	speech, err := s.speech.Open(ctx, audio.Spec{
		Inline: spec.Inline, HasInline: spec.HasInline, Object: spec.Object, Format: spec.Format, SampleRate: spec.SampleRate, Field: spec.Field,
	})
	if err != nil {
		return 0, false // the attempt says what is wrong with it
	}
	defer func() { _ = speech.Close() }() // read as far as it is needed
	if length, known = speech.Total(); !known {
		return unknownSpeech, false
	}
	return length, true
}

// store is one stream as this worker knows it.
type store struct {
	js     jetstream.JetStream
	stream string
	probes []string // subjects that it is written to; none: it is only read
	// largest is the size of the largest messages that it is to take.
	largest int

	looking sync.Mutex // held during a look

	mu     sync.Mutex
	at     time.Time // of the last look; zero: not looked at, or not to be believed any more
	space  output.Space
	err    error     // why no job that needs it is started; nil: they are
	need   int64     // room that must be there before err is over
	proven bool      // it takes what is written, as far as a probe can say
	failed int       // sessions in a row that it has failed
	rest   time.Time // it is not tried before
	rooms  map[string]*room
}

// room is kept for a job.
type room struct {
	bytes   int64
	running bool
	since   time.Time // of its start, of its end, or when it was reserved
	over    bool
}

// fault is why jobs that need the store are not started; nil: they are.
func (s *store) fault() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// forget has the next job look again.
func (s *store) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at = time.Time{}
}

// doubt has the next job look again whether the store takes what is written.
func (s *store) doubt() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.at, s.proven = time.Time{}, false
	}
}

// plenty reports whether there is room for any job.
func (s *store) plenty() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.space.Max == 0 || s.space.Free > plenty
}

// look looks at the store unless that was done just now. One that is at fault is
// looked at by again alone.
func (s *store) look(ctx context.Context) error {
	if known, err := s.known(); known {
		return err
	}
	s.looking.Lock()
	defer s.looking.Unlock()
	if known, err := s.known(); known {
		return err
	}
	return s.ask(ctx, 0)
}

// lookFor is look, and wants so much room.
func (s *store) lookFor(ctx context.Context, need int64) error {
	if err := s.look(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		if s.err = s.space.For(need); s.err != nil {
			s.need = need
		}
	}
	return s.err
}

func (s *store) known() (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err != nil || time.Since(s.at) < storeLook, s.err
}

// again looks whether a fault is over.
func (s *store) again(ctx context.Context) {
	s.looking.Lock()
	defer s.looking.Unlock()
	s.mu.Lock()
	rests, need := time.Now().Before(s.rest), s.need
	s.mu.Unlock()
	if !rests {
		_ = s.ask(ctx, need) // kept for those who ask
	}
}

// ask looks at the store, and whether it has so much room.
func (s *store) ask(ctx context.Context, need int64) error {
	since := time.Now()
	space, err := s.inspect(ctx)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at, s.err = time.Now(), err
	if err != nil {
		s.proven = false
		return err
	}
	s.space, s.proven = space, true
	for id, r := range s.rooms {
		if r.over && r.since.Before(since) || !r.over && !r.running && time.Since(r.since) > unstarted {
			delete(s.rooms, id) // what it has stored is in the stream's size now
		}
	}
	if need > 0 {
		s.err = space.For(need)
	}
	if s.err == nil {
		s.need = 0
	}
	return s.err
}

func (s *store) inspect(ctx context.Context) (output.Space, error) {
	ctx, cancel := context.WithTimeout(ctx, storeTry)
	defer cancel()
	space, err := output.Look(ctx, s.js, s.stream)
	if err != nil || len(s.probes) == 0 {
		return space, err
	}
	if space.MaxMessage > 0 && int(space.MaxMessage) < s.largest {
		return space, fmt.Errorf("stream %s takes messages of %d bytes at most (max_msg_size), and what jobs store in it is larger; raise it to %d", s.stream, space.MaxMessage, s.largest)
	}
	s.mu.Lock()
	proven := s.proven
	s.mu.Unlock()
	if proven {
		return space, nil
	}
	for _, subject := range s.probes {
		if err := s.probe(ctx, subject); err != nil {
			return space, err
		}
	}
	return space, nil
}

// probe writes to the stream what that refuses, for a sequence that it can't be
// at: so it is there, takes what is written, and this worker may write.
func (s *store) probe(ctx context.Context, subject string) error {
	_, err := s.js.PublishMsg(ctx, nats.NewMsg(subject), jetstream.WithExpectLastSequence(1<<62))
	var api *jetstream.APIError
	switch {
	case err == nil:
		return nil // another stream's
	case errors.As(err, &api) && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant):
		return nil
	case errors.As(err, &api) && api.Code < http.StatusInternalServerError, errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("stream %s does not take a message on %s; look at the stream, and at this worker's permission to publish there: %w", s.stream, subject, err)
	default:
		return fmt.Errorf("write to stream %s: %w", s.stream, err)
	}
}

// reserve keeps room for what a job has left to store, or says why there is none.
// all is what the whole job makes.
func (s *store) reserve(jobID string, left, all int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	if s.failed > 0 && s.tried(jobID) {
		return fmt.Errorf("stream %s has failed the last session that wrote to it, and another job tries it first", s.stream)
	}
	whole := &output.RoomError{Stream: s.stream, Need: all, Free: s.space.Free, Max: s.space.Max}
	if s.space.Max > 0 && whole.Never() && s.usable() {
		return errors.Wrap(errors.CodeInvalidJob, errors.PhaseJob, whole, "the job's frames can never be stored")
	}
	least := min(left, output.EstimateBytes(unknownSpeech))
	if err := s.space.For(least); err != nil {
		s.err, s.need = err, least
		return err
	}
	if err := s.fits(jobID, left); err != nil {
		return err
	}
	s.rooms[jobID] = &room{bytes: left, since: time.Now()}
	return nil
}

// usable reports whether the empty stream has room for any job at all.
func (s *store) usable() bool {
	least := output.RoomError{Need: output.EstimateBytes(leastFrames), Max: s.space.Max}
	return !least.Never()
}

// tried reports whether another job writes to the store, or is about to.
func (s *store) tried(jobID string) bool {
	for id, r := range s.rooms {
		if id != jobID && !r.over && (r.running || time.Since(r.since) < unstarted) {
			return true
		}
	}
	return false
}

// fits reports whether there is so much room beside what is kept for other jobs.
func (s *store) fits(jobID string, need int64) error {
	for id, r := range s.rooms {
		if id != jobID && !s.space.Evicts {
			need += r.bytes
		}
	}
	return s.space.For(need)
}

// start says that the session begins for which room was reserved.
func (s *store) start(jobID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.rooms[jobID]; r != nil {
		r.running, r.since = true, time.Now()
	}
}

// end says how the session went.
func (s *store) end(jobID string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.rooms[jobID]; r != nil {
		r.running, r.over, r.since = false, true, time.Now()
	}
	if err == nil {
		s.failed = 0
	}
	if !errors.Is(err, jobs.ErrStorage) {
		return
	}
	s.err, s.proven = err, false
	s.rest = time.Now().Add(min(storePause<<min(s.failed, 8), maxStorePause))
	s.failed++
}
