package topology

import (
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

const (
	// letterRoom is what a dead letter's headers may add to a job: the jobs
	// stream takes messages this much below the server's payload limit.
	letterRoom = 64 << 10
	// minPayload is the least payload limit under which jobs still have room.
	minPayload = 2 * letterRoom

	dlqDuplicates = 24 * time.Hour
	duplicates    = 2 * time.Minute
	// UsageDuplicates is how long the stream of usage records recognises one that
	// was stored before.
	UsageDuplicates = 10 * time.Minute
	// totalsDuplicates is how long the counters recognise an increment.
	totalsDuplicates = time.Hour
	// totalsHistory is how many increments of a counter are kept: by their ids a
	// server that has restarted knows what it has added.
	totalsHistory = 8
	markerLife    = time.Minute

	// fetchTime is the longest wait of a request for jobs.
	fetchTime = 2 * time.Second
)

// Limit bounds what a stream or bucket keeps.
type Limit struct {
	MaxAge   time.Duration // 0: no limit
	MaxBytes int64         // 0: no limit
}

// Settings is what an operator may choose about streams, buckets and consumers.
type Settings struct {
	Replicas     int                  // of every stream and bucket; 0 is 1
	Placement    *jetstream.Placement // of every stream and bucket; nil: as NATS chooses
	Storage      jetstream.StorageType
	StateTTL     time.Duration // how long a job record outlives its last change
	AckWait      time.Duration // the lease
	Queues       []string      // one consumer each
	JobsMaxBytes int64         // 0: no limit; a full jobs stream refuses new jobs
	// StateMaxBytes and FleetMaxBytes bound the two buckets; 0: no limit. A full
	// one refuses what is new in it.
	StateMaxBytes, FleetMaxBytes int64

	Events     Limit
	Usage      Limit
	Totals     Limit
	DLQ        Limit
	Frames     Limit
	Audio      Limit
	AudioFiles Limit
	Recordings Limit
}

// DefaultSettings are for tests and benchmarks: a single server with its files
// on disk and few limits. A worker takes its settings from the configuration.
func DefaultSettings() Settings {
	return Settings{
		Replicas:   1,
		Storage:    jetstream.FileStorage,
		StateTTL:   7 * 24 * time.Hour,
		AckWait:    30 * time.Second,
		Queues:     []string{"default"},
		Events:     Limit{MaxAge: 7 * 24 * time.Hour},
		Usage:      Limit{MaxAge: 400 * 24 * time.Hour},
		Totals:     Limit{MaxAge: 400 * 24 * time.Hour},
		DLQ:        Limit{MaxAge: 30 * 24 * time.Hour},
		Frames:     Limit{MaxAge: time.Hour, MaxBytes: 1 << 30},
		Audio:      Limit{MaxAge: time.Hour, MaxBytes: 256 << 20},
		AudioFiles: Limit{MaxAge: 24 * time.Hour, MaxBytes: 1 << 30},
		Recordings: Limit{MaxAge: 7 * 24 * time.Hour, MaxBytes: 2 << 30},
	}
}

func (s Settings) validate() error {
	if len(s.Queues) == 0 {
		return fmt.Errorf("topology: no queues given: name at least one in worker.queues")
	}
	for _, q := range s.Queues {
		if err := ValidQueue(q); err != nil {
			return err
		}
	}
	if s.AckWait <= 0 {
		return fmt.Errorf("topology: lease.ack_wait is %s: it must be positive", s.AckWait)
	}
	return nil
}

func (s Settings) replicas() int { return max(s.Replicas, 1) }

// unlimited turns "0: no limit" into the -1 that the server stores.
func unlimited(n int64) int64 {
	if n <= 0 {
		return -1
	}
	return n
}

// jobMaxSize is the largest job message, headers and body together, in bytes.
func jobMaxSize(payload int64) (int32, error) {
	if payload < minPayload {
		return 0, fmt.Errorf("%w: its max_payload is %d bytes, and at least %d are needed, so that a job can become a dead letter with its headers: raise it", ErrServer, payload, minPayload)
	}
	return int32(min(payload, 64<<20)) - letterRoom, nil
}

// streams are the streams that are wanted, the jobs stream first. maxJob is in
// bytes.
func (s Settings) streams(n Names, maxJob int32) []jetstream.StreamConfig {
	jobs := s.stream(n.JobsStream(), "Session jobs: a work queue that refuses new jobs when full", Limit{MaxBytes: s.JobsMaxBytes}, n.AllJobs())
	jobs.Retention, jobs.Discard, jobs.MaxMsgSize = jetstream.WorkQueuePolicy, jetstream.DiscardNew, maxJob
	jobs.AllowDirect = true // jobs that wait are found many at a time; nothing is decided by such a read

	events := s.stream(n.EventsStream(), "Error events, alerts and job events", s.Events, n.AllErrors(), n.AllAlerts(), n.AllEvents())
	events.AllowDirect = true

	// Letters are read from the leader: a replica that lags could show one that
	// was replayed and removed.
	dlq := s.stream(n.DLQStream(), "Dead letters: jobs given up, with their own bytes", s.DLQ, n.AllDLQ())
	dlq.Duplicates = dlqDuplicates
	if s.DLQ.MaxAge > 0 {
		dlq.Duplicates = min(dlqDuplicates, s.DLQ.MaxAge)
	}

	frames := s.stream(n.FramesStream(), "Frames of jobs whose output is frames", s.Frames, n.AllFrames())
	frames.AllowDirect = true
	audio := s.stream(n.AudioStream(), "Speech of live jobs", s.Audio, n.allAudio())
	audio.AllowDirect = true

	usage := s.stream(n.UsageStream(), "Usage records: one for each confirmed session", s.Usage, n.AllUsage())
	usage.AllowDirect, usage.Duplicates = true, within(UsageDuplicates, s.Usage)
	totals := s.stream(n.TotalsStream(), "Counters of each day's and month's sessions", s.Totals, n.AllTotals())
	totals.AllowDirect, totals.Duplicates = true, within(totalsDuplicates, s.Totals)
	totals.AllowMsgCounter, totals.MaxMsgsPerSubject = true, totalsHistory
	return []jetstream.StreamConfig{jobs, events, dlq, frames, audio, usage, totals}
}

// within bounds a duplicate window by the age of what is kept.
func within(window time.Duration, limit Limit) time.Duration {
	if limit.MaxAge > 0 {
		return min(window, limit.MaxAge)
	}
	return window
}

func (s Settings) stream(name, description string, limit Limit, subjects ...string) jetstream.StreamConfig {
	window := duplicates
	if limit.MaxAge > 0 {
		window = min(window, limit.MaxAge)
	}
	return jetstream.StreamConfig{
		Name:              name,
		Description:       description,
		Subjects:          subjects,
		Retention:         jetstream.LimitsPolicy,
		Discard:           jetstream.DiscardOld,
		MaxAge:            limit.MaxAge,
		MaxBytes:          unlimited(limit.MaxBytes),
		MaxMsgs:           -1,
		MaxMsgsPerSubject: -1,
		MaxMsgSize:        -1,
		MaxConsumers:      -1,
		Storage:           s.Storage,
		Replicas:          s.replicas(),
		Placement:         s.Placement,
		Duplicates:        window,
	}
}

// state allows a TTL for each key: the workers' leases expire by it.
func (s Settings) state(n Names) jetstream.KeyValueConfig {
	return jetstream.KeyValueConfig{
		Bucket: n.StateBucket(), Description: "Job records, by job id; workers' leases and session limits",
		History: 1, TTL: s.StateTTL, LimitMarkerTTL: markerLife, MaxBytes: unlimited(s.StateMaxBytes), Storage: s.Storage, Replicas: s.replicas(), Placement: s.Placement,
	}
}

// fleet allows a TTL for each key: what a dead worker shared must go away without
// it.
func (s Settings) fleet(n Names) jetstream.KeyValueConfig {
	return jetstream.KeyValueConfig{
		Bucket: n.FleetBucket(), Description: "What workers share: circuits, workers' presence, budget settings, alerts",
		History: 1, LimitMarkerTTL: markerLife, MaxBytes: unlimited(s.FleetMaxBytes), Storage: s.Storage, Replicas: s.replicas(), Placement: s.Placement,
	}
}

func (s Settings) audioFiles(n Names) jetstream.ObjectStoreConfig {
	return s.object(n.AudioFilesBucket(), "Speech in", s.AudioFiles)
}

func (s Settings) recordings(n Names) jetstream.ObjectStoreConfig {
	return s.object(n.RecordingsBucket(), "Frames out", s.Recordings)
}

func (s Settings) object(bucket, description string, limit Limit) jetstream.ObjectStoreConfig {
	return jetstream.ObjectStoreConfig{
		Bucket: bucket, Description: description,
		TTL: limit.MaxAge, MaxBytes: unlimited(limit.MaxBytes), Storage: s.Storage, Replicas: s.replicas(), Placement: s.Placement,
	}
}

// consumer is the durable pull consumer of a queue. Attempts are counted in
// the job record, so deliveries have no limit; and a job that waits for its
// retry keeps its place among the un-acked, so those have none either.
func (s Settings) consumer(n Names, queue string) jetstream.ConsumerConfig {
	return jetstream.ConsumerConfig{
		Durable:       queue,
		Description:   "Workers of queue " + queue,
		FilterSubject: n.Jobs(queue),
		DeliverPolicy: jetstream.DeliverAllPolicy,
		AckPolicy:     jetstream.AckExplicitPolicy,
		AckWait:       s.AckWait,
		MaxDeliver:    -1,
		MaxAckPending: -1,
		ReplayPolicy:  jetstream.ReplayInstantPolicy,
	}
}
