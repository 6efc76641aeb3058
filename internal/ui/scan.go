package ui

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/kv"
	"avatarworker/internal/status"
	"avatarworker/internal/streams"
)

// alertsFor is how far back alerts are listed.
const alertsFor = 7 * 24 * time.Hour

// newestAlerts lists the newest alerts, newest first, at most limit; more reports whether
// there are older ones.
func (s *Store) newestAlerts(ctx context.Context, limit int) (list []status.Event, more bool, err error) {
	stream, err := s.o.JS.Stream(ctx, s.o.Names.EventsStream())
	if err != nil {
		return nil, false, fmt.Errorf("stream %s: %w", s.o.Names.EventsStream(), err)
	}
	from := s.o.Now().Add(-alertsFor)
	cfg := jetstream.ConsumerConfig{FilterSubject: s.o.Names.AllAlerts(), DeliverPolicy: jetstream.DeliverByStartTimePolicy, OptStartTime: &from}
	list = []status.Event{}
	err = streams.Scan(ctx, stream, cfg, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) bool {
		if len(list) >= 2*limit {
			list, more = slices.Delete(list, 0, len(list)-limit), true
		}
		list = append(list, status.NewEvent(msg.Subject(), msg.Headers(), slices.Clone(msg.Data()), meta.Sequence.Stream, meta.Timestamp))
		return true
	})
	if err != nil {
		return nil, false, fmt.Errorf("alerts in stream %s: %w", s.o.Names.EventsStream(), err)
	}
	if len(list) > limit {
		list, more = list[len(list)-limit:], true
	}
	slices.Reverse(list)
	return list, more, nil
}

// limitPrefix begins the keys of session limits in the bucket of records.
const limitPrefix = "limit."

// sessionsByLimit counts the sessions that hold a key of each session limit, by the
// limit's name as it is in the keys: "app_id/a1", "label/room/12".
func (s *Store) sessionsByLimit(ctx context.Context) (map[string]int, error) {
	bucket, err := s.o.JS.KeyValue(ctx, s.o.Names.StateBucket())
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", s.o.Names.StateBucket(), err)
	}
	entries, err := kv.Entries(ctx, bucket, limitPrefix+">")
	if err != nil {
		return nil, fmt.Errorf("session limits in bucket %s: %w", s.o.Names.StateBucket(), err)
	}
	counts := make(map[string]int)
	for _, e := range entries {
		name := strings.TrimPrefix(e.Key(), limitPrefix)
		if i := strings.LastIndexByte(name, '.'); i > 0 && strings.Contains(string(e.Value()), `"worker_id":"`) && !strings.Contains(string(e.Value()), `"worker_id":""`) {
			counts[name[:i]]++
		}
	}
	return counts, nil
}
