// Package attempt runs one attempt of a job: it sends the job's speech into a
// session, writes the frames that come back to the job's output, and moves the
// checkpoint after each utterance. It owns the session and its sources and sinks
// for that time, and keeps nothing between attempts. It knows nothing of queues,
// records, retries or leases.
package attempt

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/audio"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs"
	"avatarworker/internal/output"
	"avatarworker/internal/session"
	"avatarworker/internal/topology"
)

// Options configure a Runner. All fields are required, except where stated
// otherwise.
type Options struct {
	JS       jetstream.JetStream
	Names    topology.Names
	Sessions *session.Client
	Audio    *audio.Opener
	// APIKey returns the key of an app. It is called for each token, so a key
	// file can change.
	APIKey     func(app string) (string, error)
	MaxSession time.Duration // 0: no limit
	Logger     zerolog.Logger
}

// Runner runs attempts. It is safe for concurrent use and keeps nothing of a job
// between them.
type Runner struct {
	o          Options
	recordings *output.Recordings
}

var _ jobs.Runner = (*Runner)(nil)

// New returns a Runner.
func New(o Options) *Runner {
	return &Runner{o: o, recordings: output.NewRecordings(o.JS, o.Names.RecordingsBucket())}
}

// Run implements jobs.Runner.
func (r *Runner) Run(ctx context.Context, a *jobs.Attempt) (jobs.Report, error) {
	p, err := r.newRun(ctx, a)
	if err != nil {
		return jobs.Report{}, err
	}
	defer p.release()
	err = p.open()
	if err == nil {
		err = p.loop()
	}
	return p.close(blameStorage(err))
}

// blameStorage marks an error of one of our own stores as what it is.
func blameStorage(err error) error {
	if errors.Is(err, output.ErrStorage) {
		return fmt.Errorf("%w: %w", jobs.ErrStorage, err)
	}
	return err
}

func (r *Runner) newRun(ctx context.Context, a *jobs.Attempt) (*run, error) {
	sink, err := r.sink(a.Job.OutputKind(), a)
	if err != nil {
		return nil, err
	}
	p := &run{r: r, a: a, sink: sink, egress: egress(a.Job)}
	p.ctx, p.cancel = r.limited(ctx)
	return p, nil
}

// limited returns a context that ends after backend.max_session.
func (r *Runner) limited(ctx context.Context) (context.Context, context.CancelFunc) {
	if r.o.MaxSession == 0 {
		return ctx, func() {}
	}
	return context.WithTimeoutCause(ctx, r.o.MaxSession, errMaxSession)
}

var errMaxSession = errors.New("backend.max_session is over")

func (r *Runner) overtime(ctx context.Context, err error) error {
	if err == nil || !errors.Is(context.Cause(ctx), errMaxSession) {
		return err
	}
	return errors.Newf(errors.CodeSessionDurationExceeded, errors.PhaseRuntime,
		"the session was closed after %s: backend.max_session", r.o.MaxSession)
}

// source returns the job's speech from the checkpoint on.
func (r *Runner) source(ctx context.Context, a *jobs.Attempt) (source, error) {
	if a.Job.GetLive() != nil {
		return newLive(ctx, r.o.JS, r.o.Names, a)
	}
	return newClips(ctx, r.o.Audio, a)
}

func (r *Runner) params(a *jobs.Attempt, src source) session.Params {
	p := session.Params{
		AppID:       a.AppID,
		APIKey:      func() (string, error) { return r.o.APIKey(a.AppID) },
		AvatarID:    a.Job.GetAvatarId(),
		Region:      a.Region,
		Config:      src.config,
		ExtraParams: a.Job.GetExtraParams(),
		TraceParent: a.Job.TraceParent,
		TraceState:  a.Job.TraceState,
		Secrets:     a.Job.Secrets(),
	}
	if l := a.Job.GetOutput().GetLivekit(); l != nil {
		p.LiveKit = &session.LiveKit{
			URL: l.GetUrl(), RoomName: l.GetRoomName(), PublisherID: l.GetPublisherId(), APIToken: l.GetApiToken(),
			ExtraAttributes: l.GetExtraAttributes(), IdleTimeout: int(l.GetIdleTimeout()),
		}
	}
	if g := a.Job.GetOutput().GetAgora(); g != nil {
		p.Agora = &session.Agora{ChannelName: g.GetChannelName(), Token: g.GetToken(), UID: g.GetUid(), PublisherID: g.GetPublisherId()}
	}
	return p
}
