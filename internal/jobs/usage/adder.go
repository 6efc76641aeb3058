package usage

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/ack"
	"avatarworker/internal/errors"
	"avatarworker/internal/leader"
	"avatarworker/internal/topology"
)

// AdderOptions configure an Adder. All are required.
type AdderOptions struct {
	JS     jetstream.JetStream
	Names  topology.Names
	Labels []string // by which days and months are added up, sorted
	// Every is how long records are gathered before they are added.
	Every time.Duration
	// Own returns the records after from up to upto, if this worker has stored them
	// all and still knows them: then they are not read.
	Own func(from, upto uint64) ([]Stored, bool)
	// Turn reports whether it is this worker that adds. It is asked every TurnEvery;
	// after ErrNotYet, which takes no request to a bucket, after Every.
	Turn      func(ctx context.Context) (bool, error)
	TurnEvery time.Duration
	// Result is called with the error if records could not be added, which is tried
	// again, and with nil if they were.
	Result func(err error)
	// Foreign is called for a message that is not a usage record.
	Foreign func(error)
}

// ErrNotYet means that the worker can't have a turn yet.
var ErrNotYet = errors.New("the worker has no lease yet")

// Adder adds usage records to the counters as they are stored, for as long as it is
// this worker's turn.
type Adder struct {
	o      AdderOptions
	sender *ack.Sender // of increments, each time that the counters are opened
}

// NewAdder returns an Adder; Run starts it.
func NewAdder(o AdderOptions) *Adder { return &Adder{o: o, sender: ack.NewSender(o.JS.Conn())} }

// open opens the counters.
func (a *Adder) open(ctx context.Context) (*Counters, error) {
	counters, err := OpenCounters(ctx, a.o.JS, a.o.Names, a.o.Labels)
	if err == nil {
		counters.sender = a.sender
	}
	return counters, err
}

// finishTimeout bounds what an Adder still does at its end.
const finishTimeout = 5 * time.Second

// Run adds until ctx ends, and then once more what is stored.
func (a *Adder) Run(ctx context.Context) {
	a.o.Own(0, 0) // what is stored from now on is not to be read back
	for ctx.Err() == nil {
		mine, err := a.o.Turn(ctx)
		if err == nil && mine {
			err = a.follow(ctx)
		}
		if ctx.Err() != nil {
			break
		}
		if errors.Is(err, ErrNotYet) {
			pause(ctx, a.o.Every)
			continue
		}
		if err != nil || mine {
			a.o.Result(err)
		}
		pause(ctx, a.o.TurnEvery)
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), finishTimeout)
	defer cancel()
	if mine, err := a.o.Turn(last); err != nil || !mine {
		return // another worker's turn, or the next one's
	}
	counters, err := a.open(last)
	if err == nil {
		err = counters.CatchUp(last, a.o.Foreign)
	}
	if err != nil {
		a.o.Result(err)
	}
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// follow adds records until ctx ends or the turn is over.
func (a *Adder) follow(ctx context.Context) error {
	counters, err := a.open(ctx)
	if err != nil {
		return err
	}
	upto, err := counters.begin(ctx)
	if err != nil {
		return err
	}
	for asked := time.Now(); ctx.Err() == nil; {
		before := upto
		if upto, err = a.add(ctx, counters, upto); err != nil {
			return err
		}
		if upto > before {
			a.o.Result(nil)
		}
		pause(ctx, a.o.Every)
		if time.Since(asked) < a.o.TurnEvery {
			continue
		}
		asked = time.Now()
		if mine, err := a.o.Turn(ctx); err != nil || !mine {
			return err
		}
	}
	return nil
}

// add adds what was stored since from, and returns up to which record.
func (a *Adder) add(ctx context.Context, counters *Counters, from uint64) (upto uint64, err error) {
	name := a.o.Names.UsageStream()
	var info *jetstream.StreamInfo
	err = leader.Try(ctx, name, func(ctx context.Context) error {
		stream, err := a.o.JS.Stream(ctx, name)
		if err == nil {
			info = stream.CachedInfo()
		}
		return err
	})
	if err != nil {
		return from, fmt.Errorf("stream %s: %w", name, err)
	}
	last := info.State.LastSeq
	if info.Created.UnixMilli() != counters.epoch {
		return from, fmt.Errorf("stream %s was made again", name) // the counters are opened again
	}
	switch {
	case last < from:
		return from, fmt.Errorf("stream %s has %d records, after %d: it was restored", name, last, from) // as well
	case last == from:
		return from, nil
	}
	if own, all := a.o.Own(from, last); all {
		return last, counters.Add(ctx, own, from, last)
	}
	return counters.catchUp(ctx, from, a.o.Foreign)
}
