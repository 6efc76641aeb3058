package topology_test

import (
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

func setUp(t *testing.T, js jetstream.JetStream, s topology.Settings, o topology.SetupOptions) map[string]topology.Step {
	t.Helper()
	steps, err := topology.Setup(t.Context(), js, topology.Names{}, s, o)
	if err != nil {
		t.Fatal(err)
	}
	byName := make(map[string]topology.Step)
	for _, s := range steps {
		byName[s.Object+" "+s.Setting] = s
	}
	return byName
}

func TestSetupMakesWhatIsMissingUnlessItIsADryRun(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	s := topology.DefaultSettings()
	all := len(topology.Names{}.Kept()) + len(s.Queues)
	for _, want := range []string{topology.StepMissing, topology.StepMade, ""} {
		steps := setUp(t, js, s, topology.SetupOptions{DryRun: want == topology.StepMissing})
		if want == "" && len(steps) != 0 {
			t.Errorf("repeated: %+v", steps)
		}
		if want != "" && len(steps) != all {
			t.Errorf("%d steps, want %d: %+v", len(steps), all, steps)
		}
		for _, step := range steps {
			if step.Action != want {
				t.Errorf("%+v, want %s", step, want)
			}
		}
	}
}

// otherwise makes settings of a fleet that was made before this version, and otherwise.
func otherwise(t *testing.T, js jetstream.JetStream) {
	t.Helper()
	h, _, err := topology.Ensure(t.Context(), js, topology.Names{}, topology.DefaultSettings())
	if err != nil {
		t.Fatal(err)
	}
	jobs := h.Jobs.CachedInfo().Config
	jobs.AllowDirect, jobs.MaxBytes, jobs.Subjects = false, 1<<20, append(jobs.Subjects, "elsewhere.>")
	dlq := h.DLQ.CachedInfo().Config
	dlq.MaxAge, dlq.Duplicates = 48*time.Hour, time.Hour
	events := h.Events.CachedInfo().Config
	events.MaxAge = 0
	for _, cfg := range []jetstream.StreamConfig{jobs, dlq, events} {
		if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := js.PauseConsumer(t.Context(), jobs.Name, "default", time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	// Events of long ago would be dropped by the age that is wanted: as if.
	if _, err := js.Publish(t.Context(), "avatar.events.x.y", []byte("{}")); err != nil {
		t.Fatal(err)
	}
}

func TestSetupChangesWhatCanBeChangedWithoutLossAndOnlyWhenAskedTo(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	otherwise(t, js)
	s := topology.DefaultSettings()
	s.Events.MaxAge = time.Nanosecond * 100 // shorter than the events there are old
	want := map[string]string{
		"stream AVATAR_JOBS allow_direct":       topology.StepChanged,
		"stream AVATAR_JOBS max_bytes":          topology.StepChanged,
		"stream AVATAR_JOBS subjects":           topology.StepKept,
		"stream AVATAR_DLQ max_age":             topology.StepChanged,
		"stream AVATAR_DLQ duplicate_window":    topology.StepChanged,
		"stream AVATAR_EVENTS max_age":          topology.StepKept,
		"stream AVATAR_EVENTS duplicate_window": topology.StepKept,
	}
	for _, o := range []topology.SetupOptions{{DryRun: true}, {}, {DryRun: true, Apply: true}, {Apply: true}} {
		steps := setUp(t, js, s, o)
		for name, action := range want {
			if action == topology.StepChanged && (o.DryRun || !o.Apply) {
				action = topology.StepDiffers
			}
			if step := steps[name]; step.Action != action || (step.Why == "") != (action != topology.StepKept) {
				t.Errorf("%+v: %s: %+v, want %s", o, name, step, action)
			}
		}
		if len(steps) != len(want) {
			t.Errorf("%+v: %+v", o, steps)
		}
	}
	after := setUp(t, js, s, topology.SetupOptions{Apply: true})
	for name, step := range after {
		if step.Action != topology.StepKept {
			t.Errorf("repeated: %s: %+v", name, step)
		}
	}
	_, differences, err := topology.Ensure(t.Context(), js, topology.Names{}, s)
	if err != nil || len(differences) != len(after) {
		t.Errorf("%v, %v", differences, err)
	}
	stream, err := js.Stream(t.Context(), "AVATAR_EVENTS")
	if err != nil || stream.CachedInfo().State.Msgs != 1 {
		t.Errorf("an event was lost: %v", err)
	}
}

// A server that keeps several values of a key raises every TTL to that of its
// delete markers: a lease of 5 s would last a minute.
func TestABucketInWhichLeasesWouldLastTooLongIsRefusedUntilItIsSetUp(t *testing.T) {
	for setting, cfg := range map[string]jetstream.KeyValueConfig{
		"history":       {History: 5, LimitMarkerTTL: time.Minute},
		"allow_msg_ttl": {History: 64},
	} {
		t.Run(setting, func(t *testing.T) {
			js := natstest.JetStream(t)
			n, settings := topology.Names{}, topology.DefaultSettings()
			cfg.Bucket, cfg.TTL, cfg.MaxBytes = n.StateBucket(), settings.StateTTL, settings.StateMaxBytes
			state, err := js.CreateKeyValue(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			for _, value := range []string{"older", "newest"} {
				if _, err := state.PutString(t.Context(), "j1", value); err != nil {
					t.Fatal(err)
				}
			}
			_, _, err = topology.Ensure(t.Context(), js, n, settings)
			if !errors.Is(err, topology.ErrUnusable) || !strings.Contains(err.Error(), "bucket AVATAR_STATE") || !strings.Contains(err.Error(), "setup --apply") {
				t.Fatalf("got %v", err)
			}
			steps := setUp(t, js, settings, topology.SetupOptions{Apply: true})
			if step := steps["bucket AVATAR_STATE "+setting]; step.Action != topology.StepChanged {
				t.Errorf("setup --apply: %+v", steps)
			}
			if _, found := ensure(t, js, settings); len(found) != 0 {
				t.Errorf("after setup --apply: %v", found)
			}
			entry, err := state.Get(t.Context(), "j1")
			if err != nil || string(entry.Value()) != "newest" {
				t.Errorf("%v: the record is %v", err, entry)
			}
		})
	}
}
