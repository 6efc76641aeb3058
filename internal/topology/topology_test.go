package topology_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

func TestMain(m *testing.M) { natstest.Main(m) }

var names = topology.Names{Prefix: "avatar"}

func TestNamesAreThoseOfTheContract(t *testing.T) {
	t.Parallel()
	n := topology.Names{}
	for got, want := range map[string]string{
		n.Jobs("default"):                         "avatar.jobs.default",
		n.Errors("server", "serverError"):         "avatar.errors.server.serverError",
		n.Alerts("recurring", "unknown"):          "avatar.alerts.recurring.unknown",
		n.Events("completed", "j-1"):              "avatar.events.completed.j-1",
		n.EventsFilter("", "j-1"):                 "avatar.events.*.j-1",
		n.DLQ("job", "invalidJob"):                "avatar.dlq.job.invalidJob",
		n.DLQFilter("", "invalidJob"):             "avatar.dlq.*.invalidJob",
		n.Frames("j-1"):                           "avatar.frames.j-1",
		n.Audio("j-1"):                            "avatar.audio.j-1",
		n.Control("j-1"):                          "avatar.control.j-1",
		n.WorkerState("host.example/1"):           "avatar.workers.host=2Eexample=2F1.state",
		n.JobsStream():                            "AVATAR_JOBS",
		n.AudioFilesBucket():                      "AVATAR_AUDIO_FILES",
		n.StateBucket():                           "AVATAR_STATE",
		topology.Names{Prefix: "a-b"}.DLQStream(): "A-B_DLQ",
	} {
		if got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func TestTokensNeverReachAnotherSubject(t *testing.T) {
	t.Parallel()
	seen := map[string]string{}
	for _, text := range []string{"", "=", "*", ">", "a.b", "a b", "a=2Eb", "a_b", "ä", "\x00", "a"} {
		token := topology.Token(text)
		if strings.ContainsAny(token, ".*> \x00") || token == "" {
			t.Errorf("%q became %q", text, token)
		}
		if other, ok := seen[token]; ok {
			t.Errorf("%q and %q are both %q", text, other, token)
		}
		seen[token] = text
	}
}

func TestQueueOfTakesOnlyJobSubjects(t *testing.T) {
	t.Parallel()
	for subject, want := range map[string]string{"avatar.jobs.q": "q", "avatar.jobs.q.r": "", "avatar.dlq.q": "", "avatar.jobs.*": "", "avatar.jobs": ""} {
		if got, ok := names.QueueOf(subject); ok != (want != "") || ok && got != want {
			t.Errorf("%s: got %q, %t", subject, got, ok)
		}
	}
}

func ensure(t *testing.T, js jetstream.JetStream, s topology.Settings) (topology.Handles, []topology.Difference) {
	t.Helper()
	h, differences, err := topology.Ensure(t.Context(), js, names, s)
	if err != nil {
		t.Fatal(err)
	}
	return h, differences
}

func TestFirstStartMakesEverythingAndTheSecondFindsNothingDifferent(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	s := topology.DefaultSettings()
	s.Queues = []string{"default", "bulk"}
	for range 2 {
		h, differences := ensure(t, js, s)
		if len(differences) != 0 {
			t.Fatalf("differences: %v", differences)
		}
		if len(h.Consumers) != 2 || h.State == nil || h.Fleet == nil || h.AudioFiles == nil || h.Recordings == nil {
			t.Fatalf("handles: %+v", h)
		}
	}
	checkJobsStream(t, js)
	dlq, err := js.Stream(t.Context(), "AVATAR_DLQ")
	if err != nil {
		t.Fatal(err)
	}
	if c := dlq.CachedInfo().Config; c.Duplicates != 24*time.Hour || c.MaxAge != 30*24*time.Hour || c.Retention != jetstream.LimitsPolicy {
		t.Errorf("dlq: %+v", c)
	}
}

func checkJobsStream(t *testing.T, js jetstream.JetStream) {
	t.Helper()
	jobs, err := js.Stream(t.Context(), "AVATAR_JOBS")
	if err != nil {
		t.Fatal(err)
	}
	c := jobs.CachedInfo().Config
	if c.Retention != jetstream.WorkQueuePolicy || c.Discard != jetstream.DiscardNew || c.MaxAge != 0 || c.Storage != jetstream.FileStorage {
		t.Errorf("jobs: %+v", c)
	}
	if want := int32(js.Conn().MaxPayload() - 64<<10); c.MaxMsgSize != want {
		t.Errorf("max_msg_size %d, want %d", c.MaxMsgSize, want)
	}
	cons, err := jobs.Consumer(t.Context(), "bulk")
	if err != nil {
		t.Fatal(err)
	}
	k := cons.CachedInfo().Config
	if k.FilterSubject != "avatar.jobs.bulk" || k.MaxDeliver != -1 || k.MaxAckPending != -1 || k.AckWait != 30*time.Second || k.AckPolicy != jetstream.AckExplicitPolicy {
		t.Errorf("consumer: %+v", k)
	}
}

func TestRacingFirstStartsAllSucceed(t *testing.T) {
	t.Parallel()
	srv := natstest.Start(t)
	var wg sync.WaitGroup
	failures := make(chan error, 8)
	for i := range 8 {
		js, err := jetstream.New(natstest.Connect(t, srv))
		if err != nil {
			t.Fatal(err)
		}
		s := topology.DefaultSettings()
		s.Frames.MaxAge += time.Duration(i%2) * time.Hour // half of them configured otherwise
		wg.Go(func() {
			_, _, err := topology.Ensure(t.Context(), js, names, s)
			failures <- err
		})
	}
	wg.Wait()
	close(failures)
	for err := range failures {
		if err != nil {
			t.Error(err)
		}
	}
}

func TestDifferencesAreReportedSettingBySettingAndLeftAlone(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	s := topology.DefaultSettings()
	ensure(t, js, s)
	s.Events.MaxAge = time.Hour
	s.JobsMaxBytes = 1 << 20
	s.AckWait = time.Minute
	s.StateTTL = time.Hour
	s.Recordings.MaxBytes = 0
	want := []string{
		"stream AVATAR_JOBS: max_bytes is unlimited, wanted 1048576",
		"stream AVATAR_EVENTS: max_age is 168h0m0s, wanted 1h0m0s",
		"bucket AVATAR_STATE: ttl is 168h0m0s, wanted 1h0m0s",
		"bucket AVATAR_RECORDINGS: max_bytes is 2147483648, wanted unlimited",
		"consumer default: ack_wait is 30s, wanted 1m0s",
	}
	for range 2 { // twice: the first has changed nothing
		h, differences := ensure(t, js, s)
		if got := fmt.Sprint(differences); got != fmt.Sprint(want) {
			t.Fatalf("got  %s\nwant %v", got, want)
		}
		if w := h.Consumers["default"].CachedInfo().Config.AckWait; w != 30*time.Second {
			t.Fatalf("the handle's ack wait is %s", w)
		}
	}
}

func TestStartIsRefusedWhereJobsCouldBeLost(t *testing.T) {
	t.Parallel()
	good := jetstream.StreamConfig{Name: "AVATAR_JOBS", Subjects: []string{"avatar.jobs.*"}, Retention: jetstream.WorkQueuePolicy, Discard: jetstream.DiscardNew}
	for name, tc := range map[string]struct {
		change func(*jetstream.StreamConfig)
		text   string
	}{
		"no work queue":         {func(c *jetstream.StreamConfig) { c.Retention = jetstream.LimitsPolicy }, "retention is limits"},
		"interest":              {func(c *jetstream.StreamConfig) { c.Retention = jetstream.InterestPolicy }, "retention is interest"},
		"discards old":          {func(c *jetstream.StreamConfig) { c.Discard = jetstream.DiscardOld }, "discards old jobs"},
		"discards in a subject": {func(c *jetstream.StreamConfig) { c.MaxMsgsPerSubject = 5 }, "max_msgs_per_subject 5"},
		"has an age":            {func(c *jetstream.StreamConfig) { c.MaxAge = time.Hour }, "older than 1h0m0s"},
		"takes one queue only":  {func(c *jetstream.StreamConfig) { c.Subjects = []string{"avatar.jobs.default"} }, "add avatar.jobs.*"},
	} {
		t.Run(name, func(t *testing.T) {
			js := natstest.JetStream(t)
			cfg := good
			tc.change(&cfg)
			refused(t, js, cfg, "stream AVATAR_JOBS", tc.text)
		})
	}
}

// refused makes the stream and wants Ensure to refuse it in these words.
func refused(t *testing.T, js jetstream.JetStream, cfg jetstream.StreamConfig, texts ...string) {
	t.Helper()
	if _, err := js.CreateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	_, _, err := topology.Ensure(t.Context(), js, names, topology.DefaultSettings())
	if !errors.Is(err, topology.ErrUnusable) {
		t.Fatalf("got %v", err)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("got %v, want %q in it", err, text)
		}
	}
}

func TestStartIsRefusedWhereAConsumerWouldLoseJobs(t *testing.T) {
	t.Parallel()
	good := jetstream.ConsumerConfig{Durable: "default", FilterSubject: "avatar.jobs.default", AckPolicy: jetstream.AckExplicitPolicy, MaxDeliver: -1}
	for name, tc := range map[string]struct {
		change func(*jetstream.ConsumerConfig)
		text   string
	}{
		"limited deliveries": {func(c *jetstream.ConsumerConfig) { c.MaxDeliver = 5 }, "max_deliver"},
		"another queue":      {func(c *jetstream.ConsumerConfig) { c.FilterSubject = "avatar.jobs.bulk" }, "it serves avatar.jobs.bulk"},
		"headers only":       {func(c *jetstream.ConsumerConfig) { c.HeadersOnly = true }, "headers_only"},
	} {
		t.Run(name, func(t *testing.T) {
			js := natstest.JetStream(t)
			h, _ := ensure(t, js, topology.DefaultSettings())
			if err := h.Jobs.DeleteConsumer(t.Context(), "default"); err != nil {
				t.Fatal(err)
			}
			cfg := good
			tc.change(&cfg)
			if _, err := h.Jobs.CreateConsumer(t.Context(), cfg); err != nil {
				t.Fatal(err)
			}
			_, _, err := topology.Ensure(t.Context(), js, names, topology.DefaultSettings())
			if !errors.Is(err, topology.ErrUnusable) || !strings.Contains(err.Error(), "consumer default") || !strings.Contains(err.Error(), tc.text) {
				t.Fatalf("got %v", err)
			}
		})
	}
}

func TestDeletedConsumerIsRestored(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	s := topology.DefaultSettings()
	h, _ := ensure(t, js, s)
	if _, err := js.Publish(t.Context(), names.Jobs("default"), []byte("{}")); err != nil {
		t.Fatal(err)
	}
	if err := h.Jobs.DeleteConsumer(t.Context(), "default"); err != nil {
		t.Fatal(err)
	}
	c, differences, err := topology.EnsureConsumer(t.Context(), h.Jobs, names, s, "default")
	if err != nil || len(differences) != 0 {
		t.Fatalf("got %v, %v", differences, err)
	}
	msg, err := c.Next(jetstream.FetchMaxWait(5 * time.Second))
	if err != nil || string(msg.Data()) != "{}" {
		t.Fatalf("got %v, %v", msg, err)
	}
}

func TestErrorsNameWhatToDo(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "MINE", Subjects: []string{"avatar.>"}}); err != nil {
		t.Fatal(err)
	}
	settings := topology.DefaultSettings()
	three := settings
	three.Replicas = 3
	badQueue := settings
	badQueue.Queues = []string{"a.b"}
	for _, tc := range []struct {
		names    topology.Names
		settings topology.Settings
		text     string
	}{
		{names, settings, "stream AVATAR_JOBS: nats: API error: code=400 err_code=10065 description=subjects overlap with an existing stream: another stream takes these subjects"},
		{topology.Names{Prefix: "other"}, three, "nats.replicas needs more servers"},
		{topology.Names{Prefix: "a.b"}, settings, `nats.prefix "a.b"`},
		{names, badQueue, `queue "a.b"`},
	} {
		_, _, err := topology.Ensure(t.Context(), js, tc.names, tc.settings)
		if err == nil || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("got %v, want %s", err, tc.text)
		}
	}
}

func TestTooSmallAPayloadLimitIsRefused(t *testing.T) {
	t.Parallel()
	srv := natstest.StartWith(t, natsserver.Options{Port: natsserver.RandomPort, MaxPayload: 64 << 10})
	js, err := jetstream.New(natstest.Connect(t, srv))
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = topology.Ensure(t.Context(), js, names, topology.DefaultSettings())
	if !errors.Is(err, topology.ErrServer) || !strings.Contains(err.Error(), "max_payload is 65536") {
		t.Fatalf("got %v", err)
	}
}

func TestReplicasAndPlacementOnACluster(t *testing.T) {
	t.Parallel()
	c := natstest.Cluster(t, 3)
	ctx, cancel := context.WithTimeout(t.Context(), natstest.Patience)
	defer cancel()
	js, err := jetstream.New(natstest.ConnectURL(t, c.ClientURLs()))
	if err != nil {
		t.Fatal(err)
	}
	s := topology.DefaultSettings()
	s.Replicas = 3
	for range 2 {
		h, differences, err := topology.Ensure(ctx, js, names, s)
		if err != nil || len(differences) != 0 {
			t.Fatalf("got %v, %v", differences, err)
		}
		if n := h.Jobs.CachedInfo().Config.Replicas; n != 3 {
			t.Fatalf("%d replicas", n)
		}
	}
	placed, here := topology.Names{Prefix: "placed"}, topology.DefaultSettings()
	here.Placement = &jetstream.Placement{Cluster: "avatar", Tags: []string{"node:n1"}}
	for range 2 {
		if _, differences, err := topology.Ensure(ctx, js, placed, here); err != nil || len(differences) != 0 {
			t.Fatalf("got %v, %v", differences, err)
		}
	}
	const objects = 11
	made := 0
	for info := range js.ListStreams(ctx).Info() {
		if strings.Contains(info.Config.Name, "PLACED_") {
			if made++; info.Cluster.Leader != "n1" {
				t.Errorf("stream %s is on %s, want n1", info.Config.Name, info.Cluster.Leader)
			}
		}
	}
	if made != objects {
		t.Errorf("%d streams and buckets, want %d", made, objects)
	}
	elsewhere := here
	elsewhere.Placement = &jetstream.Placement{Tags: []string{"node:n2"}}
	_, differences, err := topology.Ensure(ctx, js, placed, elsewhere)
	if err != nil || len(differences) != 2*objects { // the cluster and the tags of each
		t.Errorf("got %v, %v", differences, err)
	}
	steps, err := topology.Setup(ctx, js, placed, elsewhere, topology.SetupOptions{Apply: true})
	if err != nil || len(steps) != 2*objects || slices.ContainsFunc(steps, func(s topology.Step) bool { return s.Action != topology.StepKept }) {
		t.Errorf("setup moved streams: %v, %v", steps, err)
	}
	nowhere := here
	nowhere.Placement = &jetstream.Placement{Tags: []string{"node:none"}}
	if _, _, err := topology.Ensure(ctx, js, topology.Names{Prefix: "nowhere"}, nowhere); err == nil || !strings.Contains(err.Error(), "nats.placement") {
		t.Errorf("a placement that no server has: %v", err)
	}
}
