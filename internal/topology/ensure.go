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
	Jobs, Events, DLQ, Frames, Audio jetstream.Stream

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
	return h, e.found, nil
}

type ensurer struct {
	js       jetstream.JetStream
	names    Names
	settings Settings
	found    []Difference
}

func (e *ensurer) streams(ctx context.Context, h *Handles, maxJob int32) error {
	into := []*jetstream.Stream{&h.Jobs, &h.Events, &h.DLQ, &h.Frames, &h.Audio}
	for i, want := range e.settings.streams(e.names, maxJob) {
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
		return nil, failed("stream", want.Name, err)
	}
	have := s.CachedInfo().Config
	if err := usable(have, want, want.Name == e.names.JobsStream()); err != nil {
		return nil, err
	}
	e.found = append(e.found, compareStreams("stream "+want.Name, have, want)...)
	return s, nil
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
	if want.LimitMarkerTTL != 0 && !have.AllowMsgTTL {
		return nil, unusable("bucket "+want.Bucket, "its keys can't expire one by one, as workers' leases must: allow it with `nats stream edit "+have.Name+" --allow-msg-ttl --subject-del-markers-ttl=1m`")
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
	if errors.Is(err, jetstream.ErrNotPullConsumer) {
		return nil, nil, unusable("consumer "+queue, "it pushes; workers pull. Delete it, the next start makes it anew")
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

// Server answers that people meet, and what they can do about them.
const (
	codeSubjectOverlap = 10065
	codeNoStorage      = 10047
	codeNoMemory       = 10028
	codeNoPeers        = 10005
	codeReplicas       = 10074
)

func failed(kind, name string, err error) error {
	hint := ""
	var api *jetstream.APIError
	if errors.As(err, &api) {
		switch api.ErrorCode {
		case codeSubjectOverlap:
			hint = ": another stream takes these subjects already; remove them there or choose another nats.prefix"
		case codeNoStorage, codeNoMemory:
			hint = ": the server has less room than the size limits ask for; lower them or give JetStream more"
		case codeNoPeers, codeReplicas:
			hint = ": nats.replicas asks for more servers than the cluster has up"
		}
	}
	return fmt.Errorf("%s %s: %w%s", kind, name, err, hint)
}
