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
	lookEvery = 10 * time.Second
	// lookTime bounds the look at one stream, restoreTime making one.
	lookTime    = 2 * time.Second
	restoreTime = 10 * time.Second
)

// keeper looks from time to time whether the streams and buckets are still
// there. What is missing makes the worker not ready. What can be empty without
// harm it makes again; the jobs stream and the bucket of records it only
// reports, since an empty one would hide that jobs were lost, or let them run
// again.
type keeper struct {
	js       jetstream.JetStream
	names    topology.Names
	settings topology.Settings
	every    time.Duration
	log      zerolog.Logger
	report   func(error) // what is missing; nil: nothing
	fill     func(kept topology.Kept, info *jetstream.StreamInfo)

	missing map[string]error // by stream
}

func (a *App) newKeeper(js jetstream.JetStream) *keeper {
	every := a.o.LookEvery
	if every <= 0 {
		every = lookEvery
	}
	return &keeper{
		js: js, names: a.names, settings: Settings(a.c), every: every, log: a.log,
		report: a.setMissing, fill: a.storage, missing: make(map[string]error),
	}
}

// run looks until ctx ends.
func (k *keeper) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		k.look(ctx)
		wait := k.every
		if len(k.missing) > 0 {
			wait /= 2
		}
		// Workers that were started together do not all ask at once.
		timer.Reset(time.Duration((0.75 + rand.Float64()/2) * float64(wait)))
	}
}

// look looks at everything once.
func (k *keeper) look(ctx context.Context) {
	for _, kept := range k.names.Kept() {
		if !k.js.Conn().IsConnected() {
			return // nothing is known
		}
		err := k.find(ctx, kept)
		switch {
		case err == nil:
			k.there(kept)
		case errors.Is(err, jetstream.ErrStreamNotFound):
			k.gone(ctx, kept)
		}
		// A server that does not answer says nothing of what it has.
	}
	k.report(k.fault())
}

// find looks for a stream.
func (k *keeper) find(ctx context.Context, kept topology.Kept) error {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	stream, err := k.js.Stream(ctx, kept.Stream)
	if err == nil {
		k.fill(kept, stream.CachedInfo())
	}
	return err
}

// storage keeps the gauges of a stream or bucket up to date.
func (a *App) storage(kept topology.Kept, info *jetstream.StreamInfo) {
	a.metrics.SetStorage(kept.Name(), int64(info.State.Bytes), info.Config.MaxBytes)
}

func (k *keeper) there(kept topology.Kept) {
	if _, was := k.missing[kept.Stream]; was {
		delete(k.missing, kept.Stream)
		k.log.Info().Msg(kept.Object + " is there again")
	}
}

// gone is told at the first look and made again at the next: by then whoever
// asks for readiness has had a chance to see it.
func (k *keeper) gone(ctx context.Context, kept topology.Kept) {
	before, was := k.missing[kept.Stream]
	if !was {
		k.missing[kept.Stream] = k.advise(kept)
		k.log.Error().Err(k.missing[kept.Stream]).Msg("something was deleted underneath the worker, which is not ready without it")
		return
	}
	if kept.Precious {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, restoreTime)
	defer cancel()
	err := topology.Restore(ctx, k.js, k.names, k.settings, kept)
	if err == nil {
		delete(k.missing, kept.Stream)
		k.log.Warn().Msg(kept.Object + " was made again, empty")
		return
	}
	if ctx.Err() != nil {
		return // no answer; the next look tries again
	}
	err = fmt.Errorf("%s is missing, and can't be made again: %w", kept.Object, err)
	k.missing[kept.Stream] = err
	if err.Error() != before.Error() {
		k.log.Error().Err(err).Msg("trying again with every look")
	}
}

// advise says what to do about a stream that is gone.
func (k *keeper) advise(kept topology.Kept) error {
	what := "this worker is about to make it again, empty"
	switch kept.Stream {
	case k.names.JobsStream():
		what = "the jobs in it are gone with it: restore a backup, or start a worker, which makes an empty one, and publish the jobs again"
	case "KV_" + k.names.StateBucket():
		what = "nobody knows any more how jobs stand, and with an empty one those that are delivered again would be run again: restore a backup, or start a worker, which makes an empty one"
	}
	return fmt.Errorf("%s is missing, somebody deleted it: %s", kept.Object, what)
}

// fault is what is missing, in one line.
func (k *keeper) fault() error {
	var texts []string
	for _, kept := range k.names.Kept() {
		if err := k.missing[kept.Stream]; err != nil {
			texts = append(texts, err.Error())
		}
	}
	if len(texts) == 0 {
		return nil
	}
	return errors.New(strings.Join(texts, "; "))
}
