package ui

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/streams"
)

const (
	// failuresFor is how far back failures are counted, minute by minute.
	failuresFor = 24 * time.Hour
	minutes     = int(failuresFor / time.Minute)
	// maxCodes bounds the codes that are counted one by one: their names are
	// other programs' texts.
	maxCodes = 64
	// followPause is the wait before following is tried again.
	followPause = 5 * time.Second
	// settleTime is how long after the last old event the counts are complete.
	settleTime = 2 * time.Second
)

// otherCodes counts what came after maxCodes codes.
const otherCodes errors.Code = "others"

// failures counts error events by code and minute.
type failures struct {
	mu       sync.Mutex
	counts   map[errors.Code]*[minutes]int32 // by minute since the epoch, modulo
	newest   int64                           // the last minute that was counted
	complete bool
}

func (f *failures) add(code errors.Code, at time.Time) {
	minute := at.Unix() / 60
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.newest == 0 {
		f.newest = minute
	}
	f.advance(minute)
	if f.newest-minute >= int64(minutes) {
		return // too old
	}
	if f.counts == nil {
		f.counts = make(map[errors.Code]*[minutes]int32)
	}
	if f.counts[code] == nil {
		if len(f.counts) >= maxCodes {
			code = otherCodes
		}
		if f.counts[code] == nil {
			f.counts[code] = new([minutes]int32)
		}
	}
	f.counts[code][minute%int64(minutes)]++
}

// advance clears the counts of the minutes after newest up to minute, so that those of a
// day before are not taken for theirs.
func (f *failures) advance(minute int64) {
	for ; f.newest < minute; f.newest++ {
		if minute-f.newest > int64(minutes) {
			f.newest = minute - int64(minutes)
		}
		for _, ring := range f.counts {
			ring[(f.newest+1)%int64(minutes)] = 0
		}
	}
}

// in counts by code in n intervals between two times.
func (f *failures) in(since, now time.Time, n int) Failures {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.newest > 0 {
		f.advance(now.Unix() / 60)
	}
	result := Failures{Complete: f.complete}
	first, last := since.Unix()/60+1, now.Unix()/60
	first = max(first, last-int64(minutes)+1)
	for code, ring := range f.counts {
		c := CodeCount{Code: code, Counts: make([]int, n)}
		for minute := first; minute <= last; minute++ {
			if k := int(ring[minute%int64(minutes)]); k > 0 {
				c.Counts[int(minute-first)*n/int(last-first+1)] += k
				c.Total += k
			}
		}
		if c.Total > 0 {
			result.Codes = append(result.Codes, c)
		}
	}
	slices.SortFunc(result.Codes, func(a, b CodeCount) int {
		return cmp.Or(cmp.Compare(b.Total, a.Total), cmp.Compare(a.Code, b.Code))
	})
	return result
}

// Failures counts failed attempts.
func (s *Store) Failures(since, now time.Time, n int) Failures { return s.failures.in(since, now, n) }

// changes wakes those who wait for a change.
type changes struct {
	mu   sync.Mutex
	wait chan struct{}
}

func (c *changes) announce() {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.wait)
	c.wait = make(chan struct{})
}

// Changed returns a channel that is closed at the next event.
func (s *Store) Changed() <-chan struct{} {
	s.changes.mu.Lock()
	defer s.changes.mu.Unlock()
	return s.changes.wait
}

// Run follows the events until ctx ends: it counts failures, and notifies those that
// wait for a change.
func (s *Store) Run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { s.follow(ctx, s.followFailures) })
	wg.Go(func() { s.follow(ctx, s.followEvents) })
	wg.Wait()
}

// follow tries again after errors: the stream may not be there yet.
func (s *Store) follow(ctx context.Context, follow func(context.Context, jetstream.Stream) error) {
	for ctx.Err() == nil {
		stream, err := s.o.JS.Stream(ctx, s.o.Names.EventsStream())
		if err == nil {
			err = follow(ctx, stream)
		}
		if err != nil && ctx.Err() == nil {
			s.o.Log.Debug().Err(err).Msg("following events; trying again")
		}
		select {
		case <-ctx.Done():
		case <-time.After(followPause):
		}
	}
}

func (s *Store) followFailures(ctx context.Context, stream jetstream.Stream) error {
	from := s.o.Now().Add(-failuresFor)
	s.failures.mu.Lock()
	s.failures.counts, s.failures.complete = nil, false
	s.failures.mu.Unlock()
	began := stream.CachedInfo().State.LastSeq
	done := func() {
		s.failures.mu.Lock()
		s.failures.complete = true
		s.failures.mu.Unlock()
	}
	// If the last event of those there were is none of a failure, none says so.
	settled := time.AfterFunc(settleTime, done)
	defer settled.Stop()
	return streams.Follow(ctx, stream, jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{s.o.Names.AllErrors()}, HeadersOnly: true,
		DeliverPolicy: jetstream.DeliverByStartTimePolicy, OptStartTime: &from,
	}, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) error {
		if meta.Sequence.Stream >= began || meta.NumPending == 0 {
			done()
		} else {
			settled.Reset(settleTime)
		}
		subject := msg.Subject() // its last token is the code
		s.failures.add(errors.Code(subject[strings.LastIndexByte(subject, '.')+1:]), meta.Timestamp)
		s.changes.announce()
		return nil
	})
}

func (s *Store) followEvents(ctx context.Context, stream jetstream.Stream) error {
	return streams.Follow(ctx, stream, jetstream.OrderedConsumerConfig{
		FilterSubjects: []string{s.o.Names.AllEvents(), s.o.Names.AllAlerts()}, HeadersOnly: true, DeliverPolicy: jetstream.DeliverNewPolicy,
	}, func(jetstream.Msg, *jetstream.MsgMetadata) error {
		s.changes.announce()
		return nil
	})
}
