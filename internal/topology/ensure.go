package topology

import (
	"context"
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
)

// Handles are the opened streams, buckets and consumers.
type Handles struct {
	Jobs, Events, DLQ, Frames, Audio, Usage jetstream.Stream

	// Totals is nil if the server is too old for counters.
	Totals jetstream.Stream

	// Consumers by queue. A consumer that existed keeps its own ack wait: take
	// the lease from CachedInfo().Config.AckWait.
	Consumers              map[string]jetstream.Consumer
	State, Fleet           jetstream.KeyValue
	AudioFiles, Recordings jetstream.ObjectStore
}

// Ensure opens everything that the worker needs and makes what is missing. It
// changes nothing that exists: what has other settings than wanted is in the
// differences, setting by setting. The error names the object that could not
// be opened or made, or with which the worker could not keep its promises
// (ErrUnusable).
//
// Without a connection it fails at once with nats.ErrDisconnected.
//
// Racing first starts are fine: who comes second opens what the first made.
func Ensure(ctx context.Context, js jetstream.JetStream, n Names, s Settings) (Handles, []Difference, error) {
	if err := n.Validate(); err != nil {
		return Handles{}, nil, err
	}
	if err := s.validate(); err != nil {
		return Handles{}, nil, err
	}
	if !js.Conn().IsConnected() {
		return Handles{}, nil, fmt.Errorf("topology: %w", nats.ErrDisconnected)
	}
	maxJob, err := jobMaxSize(js.Conn().MaxPayload())
	if err != nil {
		return Handles{}, nil, err
	}
	e := ensurer{js: js, names: n, settings: s}
	if err := e.require(ctx, maxJob); err != nil {
		return Handles{}, nil, err
	}
	h := Handles{Consumers: make(map[string]jetstream.Consumer, len(s.Queues))}
	if err := e.streams(ctx, &h, maxJob); err != nil {
		return Handles{}, e.found, err
	}
	if err := e.buckets(ctx, &h); err != nil {
		return Handles{}, e.found, err
	}
	for _, q := range s.Queues {
		c, differences, err := EnsureConsumer(ctx, h.Jobs, n, s, q)
		e.found = append(e.found, differences...)
		if err != nil {
			return Handles{}, e.found, err
		}
		h.Consumers[q] = c
	}
	e.reportForeigners(ctx, h.Jobs)
	return h, e.found, nil
}

// reportForeigners reports consumers that take jobs before any worker does. One
// that takes a queue's jobs has been refused by then.
func (e *ensurer) reportForeigners(ctx context.Context, jobs jetstream.Stream) {
	found, err := foreigners(ctx, jobs, e.names)
	if err != nil {
		return // this user may not list them: the server's refusal is in the log
	}
	d := differ{object: "stream " + e.names.JobsStream()}
	for _, f := range found {
		d.add("consumers", f.String(), "those of queues only")
	}
	e.found = append(e.found, d.found...)
}

type ensurer struct {
	js       jetstream.JetStream
	names    Names
	settings Settings
	found    []Difference
}

func (e *ensurer) streams(ctx context.Context, h *Handles, maxJob int32) error {
	into := []*jetstream.Stream{&h.Jobs, &h.Events, &h.DLQ, &h.Frames, &h.Audio, &h.Usage, &h.Totals}
	for i, want := range e.settings.streams(e.names, maxJob) {
		if want.AllowMsgCounter && !hasCounters(h.Jobs.CachedInfo().Config.Metadata[levelKey]) {
			e.found = append(e.found, noCounters(e.js, "stream "+want.Name))
			continue
		}
		s, err := e.stream(ctx, want)
		if err != nil {
			return err
		}
		*into[i] = s
	}
	return nil
}

func (e *ensurer) stream(ctx context.Context, want jetstream.StreamConfig) (jetstream.Stream, error) {
	s, err := e.js.Stream(ctx, want.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		s, err = e.js.CreateStream(ctx, want)
		if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
			// Another first start, with other settings, was quicker.
			s, err = e.js.Stream(ctx, want.Name)
		}
	}
	if err != nil {
		return nil, e.explained("stream", want.Name, err)
	}
	have := s.CachedInfo().Config
	if err := writable("stream "+want.Name, have); err != nil {
		return nil, err
	}
	switch want.Name {
	case e.names.DLQStream(), e.names.UsageStream():
		if err := lettersKept(have); err != nil {
			return nil, err
		}
	case e.names.JobsStream():
		if err := usable(have, want); err != nil {
			return nil, err
		}
		if err := divertedJobs(have, e.names.AllJobs(), e.served(ctx, s)); err != nil {
			return nil, err
		}
		if err := e.foreignSource(ctx, have); err != nil {
			return nil, err
		}
	}
	if want.AllowMsgCounter && !have.AllowMsgCounter {
		return nil, unusable("stream "+want.Name, "it takes no counters, and can't be changed to: delete it, the next start makes it again, and `avatarworker cost rebuild` fills it")
	}
	e.found = append(e.found, compareStreams("stream "+want.Name, have, want)...)
	return s, nil
}

// served lists the subjects of the queues that this worker serves, and where
// that matters of those that have a consumer already.
func (e *ensurer) served(ctx context.Context, jobs jetstream.Stream) []string {
	var subjects []string
	for _, q := range e.settings.Queues {
		subjects = append(subjects, e.names.Jobs(q))
	}
	if jobs.CachedInfo().Config.SubjectTransform == nil {
		return subjects
	}
	short, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	for name := range jobs.ConsumerNames(short).Name() {
		subjects = append(subjects, e.names.Jobs(name))
	}
	return subjects
}

func (e *ensurer) buckets(ctx context.Context, h *Handles) error {
	n, s := e.names, e.settings
	var err error
	if h.State, err = e.keyValue(ctx, s.state(n)); err != nil {
		return err
	}
	if h.Fleet, err = e.keyValue(ctx, s.fleet(n)); err != nil {
		return err
	}
	if h.AudioFiles, err = e.objects(ctx, s.audioFiles(n)); err != nil {
		return err
	}
	h.Recordings, err = e.objects(ctx, s.recordings(n))
	return err
}

func (e *ensurer) keyValue(ctx context.Context, want jetstream.KeyValueConfig) (jetstream.KeyValue, error) {
	kv, err := e.js.KeyValue(ctx, want.Bucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		kv, err = e.js.CreateKeyValue(ctx, want)
		if errors.Is(err, jetstream.ErrBucketExists) {
			kv, err = e.js.KeyValue(ctx, want.Bucket)
		}
	}
	if err != nil {
		return nil, failed("key-value bucket", want.Bucket, err)
	}
	have, err := e.backing(ctx, "KV_"+want.Bucket)
	if err != nil {
		return nil, failed("key-value bucket", want.Bucket, err)
	}
	if err := writable("bucket "+want.Bucket, have); err != nil {
		return nil, err
	}
	if want.LimitMarkerTTL != 0 && !have.AllowMsgTTL {
		return nil, unusable("bucket "+want.Bucket, "its keys can't expire one by one, as workers' leases must: allow it with 'avatarworker setup --apply'")
	}
	if want.Bucket == e.names.StateBucket() {
		if err := errors.Join(recordsKept(want.Bucket, have), leasesEnd(want.Bucket, have, e.settings.AckWait)); err != nil {
			return nil, err
		}
	}
	if err := divertedKeys(want.Bucket, have); err != nil {
		return nil, err
	}
	e.found = append(e.found, compareKeyValue("bucket "+want.Bucket, have, want)...)
	return kv, nil
}

func (e *ensurer) objects(ctx context.Context, want jetstream.ObjectStoreConfig) (jetstream.ObjectStore, error) {
	store, err := e.js.ObjectStore(ctx, want.Bucket)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		store, err = e.js.CreateObjectStore(ctx, want)
		if errors.Is(err, jetstream.ErrBucketExists) {
			store, err = e.js.ObjectStore(ctx, want.Bucket)
		}
	}
	if err != nil {
		return nil, failed("object bucket", want.Bucket, err)
	}
	have, err := e.backing(ctx, "OBJ_"+want.Bucket)
	if err != nil {
		return nil, failed("object bucket", want.Bucket, err)
	}
	if err := writable("bucket "+want.Bucket, have); err != nil {
		return nil, err
	}
	e.found = append(e.found, compareObjects("bucket "+want.Bucket, have, want)...)
	return store, nil
}

// backing is the configuration of the stream that a bucket is kept in.
func (e *ensurer) backing(ctx context.Context, stream string) (jetstream.StreamConfig, error) {
	s, err := e.js.Stream(ctx, stream)
	if err != nil {
		return jetstream.StreamConfig{}, err
	}
	return s.CachedInfo().Config, nil
}

// EnsureConsumer opens the consumer of a queue, or makes it where it is
// missing: also for one that was deleted underneath a running worker.
func EnsureConsumer(ctx context.Context, jobs jetstream.Stream, n Names, s Settings, queue string) (jetstream.Consumer, []Difference, error) {
	if err := ValidQueue(queue); err != nil {
		return nil, nil, err
	}
	want := s.consumer(n, queue)
	c, err := jobs.Consumer(ctx, queue)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		c, err = jobs.CreateConsumer(ctx, want)
		if errors.Is(err, jetstream.ErrConsumerExists) || errors.Is(err, jetstream.ErrConsumerNameAlreadyInUse) {
			c, err = jobs.Consumer(ctx, queue)
		}
	}
	var api *jetstream.APIError
	if errors.As(err, &api) && (api.ErrorCode == codeQueueTaken || api.ErrorCode == codeQueueUnfiltered) {
		return nil, nil, queueTaken(ctx, jobs, n, queue, err)
	}
	if errors.Is(err, jetstream.ErrNotPullConsumer) {
		return nil, nil, unusable("consumer "+queue, "it pushes; workers pull. Delete it, the next start makes it again")
	}
	if err != nil {
		return nil, nil, failed("consumer", queue, err)
	}
	have := c.CachedInfo().Config
	if err := usableConsumer(have, want); err != nil {
		return nil, nil, err
	}
	return c, compareConsumers("consumer "+queue, have, want), nil
}
