package topology

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
)

// Difference is one setting of an existing object that is not as wanted.
type Difference struct {
	Object  string // "stream AVATAR_JOBS", "bucket AVATAR_STATE", "consumer default"
	Setting string // as the server's configuration names it
	Have    string
	Want    string
}

func (d Difference) String() string {
	return fmt.Sprintf("%s: %s is %s, wanted %s", d.Object, d.Setting, d.Have, d.Want)
}

// ErrUnusable is in the chain of an error about an object that exists with
// settings under which the worker could not keep its promises.
var ErrUnusable = errors.New("the worker could not keep its promises with it")

func unusable(object, why string) error {
	return fmt.Errorf("%s: %w: %s", object, ErrUnusable, why)
}

// writable refuses what can't be written to, or is written elsewhere.
func writable(object string, have jetstream.StreamConfig) error {
	switch {
	case have.Sealed:
		return unusable(object, "it is sealed and takes no messages")
	case have.Mirror != nil:
		return unusable(object, fmt.Sprintf("it mirrors stream %s and takes no other messages: set nats.domain to where that one is, or choose another nats.prefix", have.Mirror.Name))
	}
	return nil
}

// largestRecord is about the size of the longest job record: one with 256 utterances,
// all its labels and an error whose texts are as long as they may be.
const largestRecord = 128 << 10

// recordsKept refuses a bucket that would lose the state of jobs, or that would take the
// record of a session that begins and not the one of its end: each job would open
// sessions that settle nothing.
func recordsKept(bucket string, have jetstream.StreamConfig) error {
	object := "bucket " + bucket
	switch {
	case have.Discard == jetstream.DiscardOld && (have.MaxBytes > 0 || have.MaxMsgs > 0):
		return unusable(object, "it discards old records when full, and their jobs would run again: set its discard policy to new")
	case have.DiscardNewPerSubject:
		return unusable(object, "it takes each key once and no change of it (discard_new_per_subject): unset that")
	case have.MaxMsgSize > 0 && have.MaxMsgSize < largestRecord:
		return unusable(object, fmt.Sprintf("its max_value_size is %d, and the record of a job may have %d bytes: lift it with 'avatarworker setup --apply'", have.MaxMsgSize, largestRecord))
	}
	return nil
}

// lettersKept refuses a stream that keeps what nobody may have read yet, and drops it
// all the same: dead letters and usage records have no reader that waits for them.
func lettersKept(have jetstream.StreamConfig) error {
	if have.Retention == jetstream.LimitsPolicy {
		return nil
	}
	return unusable("stream "+have.Name, fmt.Sprintf("its retention is %s, not limits, so what it has is gone once it was read, or at once: "+
		"set its retention to limits (nats stream edit --retention), or back up its messages and delete it", text(have.Retention)))
}

// leasesEnd refuses a bucket in which a worker's lease would outlast its window. A
// server that keeps several values of a key raises every TTL to that of its delete
// markers, so the jobs of a worker that died would wait so long.
func leasesEnd(bucket string, have jetstream.StreamConfig, window time.Duration) error {
	if have.MaxMsgsPerSubject == 1 || have.SubjectDeleteMarkerTTL <= window {
		return nil
	}
	return unusable("bucket "+bucket, fmt.Sprintf("its history is %s, not 1, so a worker's lease would last %s (subject_delete_marker_ttl) and not %s: "+
		"set it to 1 with 'avatarworker setup --apply'; the newest value of each key stays", text(limitOf(have.MaxMsgsPerSubject)), have.SubjectDeleteMarkerTTL, window))
}

// usable refuses what would lose jobs.
func usable(have, want jetstream.StreamConfig) error {
	object := "stream " + have.Name
	switch {
	case have.Retention != jetstream.WorkQueuePolicy:
		return unusable(object, fmt.Sprintf("its retention is %s, not workqueue, and can't be changed: back up its messages and delete it, or choose another nats.prefix", text(have.Retention)))
	case have.Discard != jetstream.DiscardNew:
		return unusable(object, "it discards old jobs when full: set its discard policy to new")
	case have.MaxMsgsPerSubject > 0 && !have.DiscardNewPerSubject:
		return unusable(object, fmt.Sprintf("it discards old jobs of a queue beyond max_msgs_per_subject %d: lift that limit or set discard_new_per_subject", have.MaxMsgsPerSubject))
	case have.MaxAge != 0:
		return unusable(object, fmt.Sprintf("jobs older than %s would vanish: remove its max_age", have.MaxAge))
	case !slices.ContainsFunc(have.Subjects, func(s string) bool { return covers(s, want.Subjects[0]) }):
		return unusable(object, fmt.Sprintf("its subjects are %s: add %s", text(have.Subjects), want.Subjects[0]))
	}
	return nil
}

// covers reports whether every subject that b matches is matched by a too.
func covers(a, b string) bool {
	as, bs := strings.Split(a, "."), strings.Split(b, ".")
	for i, t := range as {
		switch {
		case t == ">":
			return len(bs) > i
		case i >= len(bs) || bs[i] == ">":
			return false
		case t != "*" && t != bs[i]:
			return false
		}
	}
	return len(as) == len(bs)
}

// usableConsumer refuses what would hand out other jobs, lose them or never
// take them back.
func usableConsumer(have, want jetstream.ConsumerConfig) error {
	object := "consumer " + have.Durable
	filters := filtersOf(have)
	switch {
	case have.AckPolicy != jetstream.AckExplicitPolicy:
		return unusable(object, fmt.Sprintf("its ack policy is %s, not explicit, and can't be changed: delete it, the next start makes it again", text(have.AckPolicy)))
	case !slices.Equal(filters, []string{want.FilterSubject}):
		return unusable(object, fmt.Sprintf("it serves %s, not %s: set its filter", text(filters), want.FilterSubject))
	case have.MaxDeliver > 0:
		return unusable(object, fmt.Sprintf("a job delivered %d times would stay in the stream and never run again: set max_deliver to -1", have.MaxDeliver))
	case have.PriorityPolicy != jetstream.PriorityPolicyNone:
		return unusable(object, fmt.Sprintf("it hands jobs out by priority groups (%s), and workers ask for none: delete it, and the next start makes it again", text(have.PriorityGroups)))
	case have.MaxRequestExpires > 0 && have.MaxRequestExpires < fetchTime:
		return unusable(object, fmt.Sprintf("it refuses requests that wait longer than %s, and workers wait %s: lift its max_expires", have.MaxRequestExpires, fetchTime))
	case have.HeadersOnly:
		return unusable(object, "it delivers headers without jobs: unset headers_only")
	}
	return nil
}

// differ collects the settings that are not as wanted.
type differ struct {
	object string
	found  []Difference
}

func (d *differ) add(setting string, have, want any) {
	if h, w := text(have), text(want); h != w {
		d.found = append(d.found, Difference{Object: d.object, Setting: setting, Have: h, Want: w})
	}
}

func text(v any) string {
	switch v := v.(type) {
	case []string:
		if len(v) == 0 {
			return "none"
		}
		sorted := slices.Sorted(slices.Values(v))
		return strings.Join(sorted, ", ")
	case time.Duration:
		if v == 0 {
			return "none"
		}
		return v.String()
	case fmt.Stringer:
		return strings.ToLower(v.String())
	}
	return fmt.Sprint(v)
}

// limitOf gives the server's several ways to say "no limit" one value.
func limitOf[T int | int32 | int64](n T) any {
	if n <= 0 {
		return "unlimited"
	}
	return n
}

// comparePlacement reports another placement than a wanted one. Where none is
// wanted, any will do.
func (d *differ) comparePlacement(have, want *jetstream.Placement) {
	if want == nil {
		return
	}
	if have == nil {
		have = &jetstream.Placement{}
	}
	d.add("placement.cluster", cmp.Or(have.Cluster, "any"), cmp.Or(want.Cluster, "any"))
	d.add("placement.tags", have.Tags, want.Tags)
}

func compareStreams(object string, have, want jetstream.StreamConfig) []Difference {
	d := differ{object: object}
	d.add("subjects", have.Subjects, want.Subjects)
	d.add("retention", have.Retention, want.Retention)
	d.add("storage", have.Storage, want.Storage)
	d.add("num_replicas", have.Replicas, want.Replicas)
	d.comparePlacement(have.Placement, want.Placement)
	d.add("discard", have.Discard, want.Discard)
	d.add("discard_new_per_subject", have.DiscardNewPerSubject, want.DiscardNewPerSubject)
	d.add("max_age", have.MaxAge, want.MaxAge)
	d.add("max_bytes", limitOf(have.MaxBytes), limitOf(want.MaxBytes))
	d.add("max_msgs", limitOf(have.MaxMsgs), limitOf(want.MaxMsgs))
	d.add("max_msgs_per_subject", limitOf(have.MaxMsgsPerSubject), limitOf(want.MaxMsgsPerSubject))
	d.add("max_msg_size", limitOf(have.MaxMsgSize), limitOf(want.MaxMsgSize))
	d.add("max_consumers", limitOf(have.MaxConsumers), limitOf(want.MaxConsumers))
	d.add("duplicate_window", have.Duplicates, want.Duplicates)
	d.add("allow_direct", have.AllowDirect, want.AllowDirect)
	d.add("no_ack", have.NoAck, want.NoAck)
	d.add("deny_delete", have.DenyDelete, want.DenyDelete)
	d.add("deny_purge", have.DenyPurge, want.DenyPurge)
	d.add("allow_rollup_hdrs", have.AllowRollup, want.AllowRollup)
	d.add("allow_msg_ttl", have.AllowMsgTTL, want.AllowMsgTTL)
	d.add("allow_msg_counter", have.AllowMsgCounter, want.AllowMsgCounter)
	d.add("allow_msg_schedules", have.AllowMsgSchedules, want.AllowMsgSchedules)
	d.add("persist_mode", have.PersistMode, want.PersistMode)
	d.compareFlow(have)
	return d.found
}

func compareKeyValue(object string, have jetstream.StreamConfig, want jetstream.KeyValueConfig) []Difference {
	d := differ{object: object}
	d.add("history", have.MaxMsgsPerSubject, int64(want.History))
	d.add("ttl", have.MaxAge, want.TTL)
	d.add("max_bytes", limitOf(have.MaxBytes), limitOf(want.MaxBytes))
	d.add("max_value_size", limitOf(have.MaxMsgSize), limitOf(want.MaxValueSize))
	d.add("storage", have.Storage, want.Storage)
	d.add("num_replicas", have.Replicas, want.Replicas)
	d.comparePlacement(have.Placement, want.Placement)
	d.add("allow_msg_ttl", have.AllowMsgTTL, want.LimitMarkerTTL != 0)
	d.compareFlow(have)
	return d.found
}

func compareObjects(object string, have jetstream.StreamConfig, want jetstream.ObjectStoreConfig) []Difference {
	d := differ{object: object}
	d.add("max_age", have.MaxAge, want.TTL)
	d.add("max_bytes", limitOf(have.MaxBytes), limitOf(want.MaxBytes))
	d.add("storage", have.Storage, want.Storage)
	d.add("num_replicas", have.Replicas, want.Replicas)
	d.comparePlacement(have.Placement, want.Placement)
	d.compareFlow(have)
	return d.found
}

// compareConsumers leaves out whether the consumer is paused: that is an operator's
// doing, and readiness and status report it.
func compareConsumers(object string, have, want jetstream.ConsumerConfig) []Difference {
	d := differ{object: object}
	d.add("ack_wait", have.AckWait, want.AckWait)
	d.add("max_ack_pending", limitOf(have.MaxAckPending), limitOf(want.MaxAckPending))
	d.add("backoff", fmt.Sprint(have.BackOff), fmt.Sprint(want.BackOff))
	d.add("deliver_policy", have.DeliverPolicy, want.DeliverPolicy)
	d.add("replay_policy", have.ReplayPolicy, want.ReplayPolicy)
	d.add("inactive_threshold", have.InactiveThreshold, want.InactiveThreshold)
	d.add("mem_storage", have.MemoryStorage, want.MemoryStorage)
	d.add("max_batch", limitOf(have.MaxRequestBatch), limitOf(want.MaxRequestBatch))
	return d.found
}
