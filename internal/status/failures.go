package status

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/streams"
	"avatarworker/internal/topology"
)

const (
	// failuresStep and failuresSteps are the chart of failures: a day.
	failuresStep  = 15 * time.Minute
	failuresSteps = 96
)

// Failures counts failed attempts by code over the last day.
type Failures struct {
	Since  time.Time       `json:"since"`   // when the first step begins
	StepMS int64           `json:"step_ms"` // length of a step
	Codes  []FailuresOfOne `json:"codes"`   // most failures first
	// CountedAll is false where there was no time to count all of them.
	CountedAll bool `json:"counted_all"`
}

// FailuresOfOne are the failures with one code.
type FailuresOfOne struct {
	Code  errors.Code  `json:"code"`
	Class errors.Class `json:"class"`
	Total int          `json:"total"`
	Steps []int        `json:"steps"` // failures in each step, oldest first
}

// Failures counts the error events of the last day.
func (s *Store) Failures(ctx context.Context) (Failures, error) {
	now, err := s.serverTime(ctx)
	if err != nil {
		return Failures{}, err
	}
	stream, err := s.js.Stream(ctx, s.names.EventsStream())
	if err != nil {
		return Failures{}, fmt.Errorf("stream %s: %w", s.names.EventsStream(), err)
	}
	short, cancel := context.WithTimeout(ctx, s.countFor)
	defer cancel()
	since := beginOfDay(now)
	counted := newFailureCounts(s.names)
	cfg := jetstream.ConsumerConfig{
		FilterSubject: s.names.AllErrors(), HeadersOnly: true, DeliverPolicy: jetstream.DeliverByStartTimePolicy, OptStartTime: &since,
	}
	err = streams.Scan(short, stream, cfg, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) bool {
		counted.add(msg.Subject(), meta.Timestamp)
		return true
	})
	all := err == nil
	if err != nil && (ctx.Err() != nil || short.Err() == nil) {
		return Failures{}, fmt.Errorf("error events in stream %s: %w", s.names.EventsStream(), err)
	}
	f := counted.at(now)
	f.CountedAll = all
	return f, nil
}

// beginOfDay is when the chart of failures begins that ends now.
func beginOfDay(now time.Time) time.Time {
	return now.Truncate(failuresStep).Add(-(failuresSteps - 1) * failuresStep)
}

// failureCounts counts error events by subject and step. It keeps no more than a day.
type failureCounts struct {
	prefix string
	counts map[string]*dayCount // by the subject's class and code
}

type dayCount struct {
	steps [failuresSteps]int32
	last  int64 // number of the newest step
}

func newFailureCounts(names topology.Names) *failureCounts {
	return &failureCounts{prefix: strings.TrimSuffix(names.AllErrors(), ">"), counts: make(map[string]*dayCount)}
}

func stepOf(at time.Time) int64 { return at.UnixNano() / int64(failuresStep) }

func (f *failureCounts) add(subject string, at time.Time) {
	name, ok := strings.CutPrefix(subject, f.prefix)
	if !ok {
		return
	}
	day := f.counts[name]
	step := stepOf(at)
	if day == nil {
		day = &dayCount{last: step}
		f.counts[strings.Clone(name)] = day
	}
	day.advance(step)
	if step > day.last-failuresSteps {
		day.steps[step%failuresSteps]++
	}
}

// advance makes step the newest one, if it is newer.
func (d *dayCount) advance(step int64) {
	for range min(step-d.last, failuresSteps) {
		d.last++
		d.steps[d.last%failuresSteps] = 0
	}
	d.last = max(d.last, step)
}

// at returns the chart that ends at that time.
func (f *failureCounts) at(now time.Time) Failures {
	since := beginOfDay(now)
	out := Failures{Since: since.UTC(), StepMS: failuresStep.Milliseconds(), Codes: []FailuresOfOne{}, CountedAll: true}
	first := stepOf(since)
	for name, day := range f.counts {
		class, code, _ := strings.Cut(name, ".")
		one := FailuresOfOne{Code: errors.Code(code), Class: errors.Class(class), Steps: make([]int, failuresSteps)}
		for i := range failuresSteps {
			if step := first + int64(i); step <= day.last && step > day.last-failuresSteps {
				one.Steps[i] = int(day.steps[step%failuresSteps])
				one.Total += one.Steps[i]
			}
		}
		if one.Total > 0 {
			out.Codes = append(out.Codes, one)
		}
	}
	slices.SortFunc(out.Codes, func(a, b FailuresOfOne) int {
		return cmp.Or(cmp.Compare(b.Total, a.Total), cmp.Compare(a.Class, b.Class), cmp.Compare(a.Code, b.Code))
	})
	return out
}

// Alerts returns the newest alerts, newest first, at most limit (0: all there are).
func (s *Store) Alerts(ctx context.Context, limit int) ([]Event, error) {
	stream, err := s.js.Stream(ctx, s.names.EventsStream())
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", s.names.EventsStream(), err)
	}
	alerts := []Event{}
	err = streams.Scan(ctx, stream, jetstream.ConsumerConfig{FilterSubject: s.names.AllAlerts()}, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) bool {
		if limit > 0 && len(alerts) == 2*limit {
			alerts = slices.Delete(alerts, 0, limit)
		}
		alerts = append(alerts, NewEvent(msg.Subject(), msg.Headers(), slices.Clone(msg.Data()), meta.Sequence.Stream, meta.Timestamp))
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("alerts in stream %s: %w", s.names.EventsStream(), err)
	}
	slices.Reverse(alerts)
	if limit > 0 && len(alerts) > limit {
		alerts = alerts[:limit]
	}
	return alerts, nil
}
