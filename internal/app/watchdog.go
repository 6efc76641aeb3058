package app

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/topology"
)

const (
	checkEvery = 10 * time.Second
	// checkTimeout bounds the check of one stream, restoreTimeout making one.
	checkTimeout   = 2 * time.Second
	restoreTimeout = 10 * time.Second
)

// watchdog checks at intervals whether the streams and buckets still exist. The
// worker is not ready while one is missing. The watchdog makes it again, empty,
// unless it is critical: an empty jobs stream would hide that jobs were lost, and
// an empty bucket of records would let jobs run again.
type watchdog struct {
	js       jetstream.JetStream
	names    topology.Names
	kept     []topology.Kept // what it checks
	settings topology.Settings
	every    time.Duration
	log      zerolog.Logger
	report   func(error) // what is missing; nil: nothing
	fill     func(kept topology.Kept, info *jetstream.StreamInfo)

	missing map[string]error // by stream
}

func (a *App) newWatchdog(js jetstream.JetStream, h topology.Handles) *watchdog {
	every := a.o.CheckEvery
	if every <= 0 {
		every = checkEvery
	}
	return &watchdog{
		js: js, names: a.names, kept: h.Kept(a.names), settings: Settings(a.c), every: every, log: a.log,
		report: a.setMissing, fill: a.storage, missing: make(map[string]error),
	}
}

// run checks until ctx ends.
func (w *watchdog) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		w.check(ctx)
		wait := w.every
		if len(w.missing) > 0 {
			wait /= 2
		}
		// Workers that were started together should not all ask at once.
		timer.Reset(time.Duration((0.75 + rand.Float64()/2) * float64(wait)))
	}
}

// check checks every stream and bucket once.
func (w *watchdog) check(ctx context.Context) {
	for _, kept := range w.kept {
		if !w.js.Conn().IsConnected() {
			return // nothing can be found out
		}
		err := w.find(ctx, kept)
		switch {
		case err == nil:
			w.found(kept)
		case errors.Is(err, jetstream.ErrStreamNotFound):
			w.lost(ctx, kept)
		}
		// Without an answer from the server nothing has changed.
	}
	w.report(w.fault())
}

// find returns nil if the stream exists.
func (w *watchdog) find(ctx context.Context, kept topology.Kept) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	stream, err := w.js.Stream(ctx, kept.Stream)
	if err == nil {
		w.fill(kept, stream.CachedInfo())
	}
	return err
}

// storage updates the gauges of a stream or bucket.
func (a *App) storage(kept topology.Kept, info *jetstream.StreamInfo) {
	a.metrics.SetStorage(kept.Name(), int64(info.State.Bytes), info.Config.MaxBytes)
}

func (w *watchdog) found(kept topology.Kept) {
	if _, was := w.missing[kept.Stream]; was {
		delete(w.missing, kept.Stream)
		w.log.Info().Msg(kept.Object + " is back")
	}
}

// lost logs at the first check that a stream is missing, and makes it again at
// the next. In between, a readiness probe can see it.
func (w *watchdog) lost(ctx context.Context, kept topology.Kept) {
	before, was := w.missing[kept.Stream]
	if !was {
		w.missing[kept.Stream] = w.advise(kept)
		w.log.Error().Err(w.missing[kept.Stream]).Msg("a stream or bucket was deleted while the worker runs; it is not ready without it")
		return
	}
	if kept.Critical {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, restoreTimeout)
	defer cancel()
	err := topology.Restore(ctx, w.js, w.names, w.settings, kept)
	if err == nil {
		delete(w.missing, kept.Stream)
		w.log.Warn().Msg(kept.Object + " was recreated, empty")
		return
	}
	if ctx.Err() != nil {
		return // no answer; the next check tries again
	}
	err = fmt.Errorf("%s is missing and can't be made again: %w", kept.Object, err)
	w.missing[kept.Stream] = err
	if err.Error() != before.Error() {
		w.log.Error().Err(err).Msg("the worker tries again at each check")
	}
}

// advise returns an error that says what to do about a missing stream.
func (w *watchdog) advise(kept topology.Kept) error {
	what := "this worker is about to make it again, empty"
	switch kept.Stream {
	case w.names.JobsStream():
		what = "the jobs in it are gone with it: restore a backup, or start a worker, which makes an empty one, and publish the jobs again"
	case "KV_" + w.names.StateBucket():
		what = "the state of every job is gone with it, and with an empty one jobs that are delivered again would run again: restore a backup, or start a worker, which makes an empty one"
	}
	return fmt.Errorf("%s is missing: it was deleted while the worker runs: %s", kept.Object, what)
}

// fault returns what is missing as an error of one line, or nil.
func (w *watchdog) fault() error {
	var texts []string
	for _, kept := range w.kept {
		if err := w.missing[kept.Stream]; err != nil {
			texts = append(texts, err.Error())
		}
	}
	if len(texts) == 0 {
		return nil
	}
	return errors.New(strings.Join(texts, "; "))
}
