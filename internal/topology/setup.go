package topology

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
)

// Actions of a Step.
const (
	StepMissing = "missing" // it is not there; it would be made
	StepMade    = "made"
	StepDiffers = "differs" // it can be changed without loss
	StepChanged = "changed"
	StepKept    = "kept" // it can't be changed without loss, or not at all: see Why
)

// Step is one thing that is missing, or one setting that is not as wanted.
type Step struct {
	Object  string `json:"object"`            // "stream AVATAR_JOBS", "bucket AVATAR_STATE", "consumer default"
	Setting string `json:"setting,omitempty"` // as the server's configuration names it
	Have    string `json:"have,omitempty"`
	Want    string `json:"want,omitempty"`
	Action  string `json:"action"`
	Why     string `json:"why,omitempty"` // it is kept
}

// SetupOptions say what Setup does.
type SetupOptions struct {
	DryRun bool // make and change nothing
	Apply  bool // change what can be changed without loss
}

// Setup makes what is missing, and reports and may change the settings that are not
// as wanted. What would lose something, or take something from jobs that wait, it
// leaves as it is and says why. It may be repeated. With an error the steps are
// those that were made or seen before it.
func Setup(ctx context.Context, js jetstream.JetStream, n Names, s Settings, o SetupOptions) ([]Step, error) {
	if err := n.Validate(); err != nil {
		return nil, err
	}
	if err := s.validate(); err != nil {
		return nil, err
	}
	maxJob, err := jobMaxSize(js.Conn().MaxPayload())
	if err != nil {
		return nil, err
	}
	var steps []Step
	for _, part := range s.parts(n, maxJob) {
		if part.want.AllowMsgCounter && tooOldForCounters(ctx, js) {
			d := noCounters(js, part.object)
			steps = append(steps, Step{Object: d.Object, Setting: d.Setting, Have: d.Have, Want: d.Want, Action: StepKept, Why: "upgrade NATS to have totals"})
			continue
		}
		found, err := part.look(ctx, js, o)
		steps = append(steps, found...)
		if err != nil {
			return steps, n.Unavailable(part.object, err)
		}
	}
	consumers, err := s.lookAtConsumers(ctx, js, n)
	steps = append(steps, consumers...)
	if err != nil {
		return steps, err
	}
	if o.DryRun {
		return steps, nil
	}
	// Also where nothing is missing: it says what a worker could not live with.
	if _, _, err := Ensure(ctx, js, n, s); err != nil {
		return steps, err
	}
	for i := range steps {
		if steps[i].Action == StepMissing {
			steps[i].Action = StepMade
		}
	}
	return steps, nil
}

// part is a stream, or the stream behind a bucket, as it is wanted.
type part struct {
	object  string
	want    jetstream.StreamConfig
	compare func(have jetstream.StreamConfig) []Difference
}

func (s Settings) parts(n Names, maxJob int32) []part {
	var parts []part
	for _, want := range s.streams(n, maxJob) {
		object := "stream " + want.Name
		parts = append(parts, part{object, want, func(have jetstream.StreamConfig) []Difference { return compareStreams(object, have, want) }})
	}
	for _, want := range []jetstream.KeyValueConfig{s.state(n), s.fleet(n)} {
		object := "bucket " + want.Bucket
		parts = append(parts, part{
			object, jetstream.StreamConfig{
				Name: "KV_" + want.Bucket, MaxAge: want.TTL, MaxBytes: want.MaxBytes, MaxMsgSize: want.MaxValueSize, Replicas: want.Replicas, Placement: want.Placement, AllowMsgTTL: want.LimitMarkerTTL != 0,
				MaxMsgsPerSubject: int64(want.History),
			},
			func(have jetstream.StreamConfig) []Difference { return compareKeyValue(object, have, want) },
		})
	}
	for _, want := range []jetstream.ObjectStoreConfig{s.audioFiles(n), s.recordings(n)} {
		object := "bucket " + want.Bucket
		parts = append(parts, part{
			object, jetstream.StreamConfig{Name: "OBJ_" + want.Bucket, MaxAge: want.TTL, MaxBytes: want.MaxBytes, Replicas: want.Replicas, Placement: want.Placement},
			func(have jetstream.StreamConfig) []Difference { return compareObjects(object, have, want) },
		})
	}
	return parts
}

// look compares a part with what is there, and changes what may be changed.
func (p part) look(ctx context.Context, js jetstream.JetStream, o SetupOptions) ([]Step, error) {
	stream, err := js.Stream(ctx, p.want.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return []Step{{Object: p.object, Action: StepMissing}}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.object, err)
	}
	info := stream.CachedInfo()
	next := info.Config
	var steps []Step
	for _, d := range p.compare(info.Config) {
		step := Step{Object: d.Object, Setting: d.Setting, Have: d.Have, Want: d.Want, Action: StepDiffers}
		if step.Why = change(&next, p.want, info.State, d.Setting); step.Why != "" {
			step.Action = StepKept
		}
		steps = append(steps, step)
	}
	changes := slices.ContainsFunc(steps, func(s Step) bool { return s.Action == StepDiffers })
	if !changes || !o.Apply || o.DryRun {
		return steps, nil
	}
	if _, err := js.UpdateStream(ctx, next); err != nil {
		return steps, fmt.Errorf("changing %s: %w", p.object, err)
	}
	for i := range steps {
		if steps[i].Action == StepDiffers {
			steps[i].Action = StepChanged
		}
	}
	return steps, nil
}

// Reasons why a setting is kept.
const (
	keptFixed  = "it can't be changed"
	keptLosing = "a lower limit may drop what is there: change it by hand once that is not needed"
	keptByHand = "it was set by hand: change it by hand"
)

// change takes one setting over, or says why it must not be.
func change(next *jetstream.StreamConfig, want jetstream.StreamConfig, state jetstream.StreamState, setting string) (kept string) {
	switch setting {
	case "subjects":
		kept = "additional subjects are left"
		for _, subject := range want.Subjects {
			if !slices.ContainsFunc(next.Subjects, func(have string) bool { return covers(have, subject) }) {
				next.Subjects, kept = append(slices.Clone(next.Subjects), subject), ""
			}
		}
		return kept
	case "num_replicas":
		if want.Replicas < next.Replicas {
			return "fewer replicas keep less safely: change it by hand"
		}
		next.Replicas = want.Replicas
		return ""
	case "placement.cluster", "placement.tags":
		return "moving a stream copies all that it holds: change it by hand (nats stream edit --cluster, --tag)"
	case "max_age", "ttl":
		old := want.MaxAge > 0 && (next.MaxAge == 0 || want.MaxAge < next.MaxAge)
		if old && state.Msgs > 0 && time.Since(state.FirstTime) > want.MaxAge/2 {
			return keptLosing
		}
		next.MaxAge = want.MaxAge
		if next.MaxAge > 0 {
			next.Duplicates = min(next.Duplicates, next.MaxAge)
		}
		return ""
	case "max_bytes":
		if want.MaxBytes > 0 && state.Bytes > uint64(want.MaxBytes)/2 && (next.MaxBytes <= 0 || want.MaxBytes < next.MaxBytes) {
			return keptLosing
		}
		next.MaxBytes = want.MaxBytes
		return ""
	case "max_msgs":
		next.MaxMsgs = want.MaxMsgs // no limit is wanted anywhere
		return ""
	case "max_msgs_per_subject", "history": // only a key's newest value is read
		next.MaxMsgsPerSubject = want.MaxMsgsPerSubject
		return ""
	case "max_msg_size", "max_value_size": // what is there stays
		next.MaxMsgSize = want.MaxMsgSize
		return ""
	case "duplicate_window":
		if want.Duplicates < next.Duplicates {
			return keptLosing
		}
		next.Duplicates = want.Duplicates
		return ""
	case "allow_direct":
		next.AllowDirect = want.AllowDirect
		return ""
	case "allow_msg_ttl":
		if !want.AllowMsgTTL {
			return keptFixed
		}
		next.AllowMsgTTL, next.SubjectDeleteMarkerTTL = true, markerLife
		return ""
	case "discard":
		if want.Discard != jetstream.DiscardNew {
			return keptLosing
		}
		next.Discard = want.Discard
		return ""
	case "retention", "storage", "deny_delete", "deny_purge", "persist_mode":
		return keptFixed
	default:
		return keptByHand
	}
}

// lookAtConsumers compares the consumers. Their settings are never changed: a
// server may forget the delays of the jobs that wait with such a change.
func (s Settings) lookAtConsumers(ctx context.Context, js jetstream.JetStream, n Names) ([]Step, error) {
	var steps []Step
	for _, queue := range s.Queues {
		want := s.consumer(n, queue)
		object := "consumer " + queue
		c, err := js.Consumer(ctx, n.JobsStream(), queue)
		switch {
		case errors.Is(err, jetstream.ErrConsumerNotFound), errors.Is(err, jetstream.ErrStreamNotFound):
			steps = append(steps, Step{Object: object, Action: StepMissing})
			continue
		case err != nil:
			return steps, fmt.Errorf("%s: %w", object, err)
		}
		for _, d := range compareConsumers(object, c.CachedInfo().Config, want) {
			const why = "a change may make waiting jobs come at once: delete the consumer while no worker runs, and the next start makes it again"
			steps = append(steps, Step{Object: d.Object, Setting: d.Setting, Have: d.Have, Want: d.Want, Action: StepKept, Why: why})
		}
	}
	return steps, nil
}
