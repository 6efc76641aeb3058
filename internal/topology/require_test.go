package topology_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/natsserver/natstest"
	"avatarworker/internal/topology"
)

// account starts a server with JetStream whose user u is in an account with this
// JetStream setting, and connects as u.
func account(t *testing.T, setting string) jetstream.JetStream {
	t.Helper()
	url := natstest.Configured(t, `
		listen: 127.0.0.1:-1
		jetstream: enabled
		accounts {
			A { `+setting+`, users: [{user: u, password: p}] }
			OTHER { jetstream: enabled, users: [{user: o, password: p}] }
		}`)
	js, err := jetstream.New(natstest.ConnectURL(t, url, nats.UserInfo("u", "p")))
	if err != nil {
		t.Fatal(err)
	}
	return js
}

func TestAnAccountThatCanNotHoldTheStreamsIsNamedBeforeAnythingIsMade(t *testing.T) {
	t.Parallel()
	bounded := topology.DefaultSettings()
	bounded.JobsMaxBytes, bounded.StateMaxBytes, bounded.FleetMaxBytes = 1<<30, 1<<30, 64<<20
	bounded.Events.MaxBytes, bounded.DLQ.MaxBytes = 1<<29, 1<<30
	inMemory := bounded
	inMemory.Storage = jetstream.MemoryStorage
	for name, tc := range map[string]struct {
		setting  string
		settings topology.Settings
		texts    []string
	}{
		"too few streams":   {"jetstream: {max_streams: 4}", bounded, []string{"may have 4 streams and has 0", "11 more", "stream AVATAR_JOBS (1GiB)", "bucket AVATAR_RECORDINGS (2GiB)"}},
		"too few bytes":     {"jetstream: {max_file: 1GB}", bounded, []string{"in file storage", "add up to", "streams.*.max_bytes"}},
		"too little memory": {"jetstream: {max_memory: 1GB}", inMemory, []string{"in memory storage"}},
		"streams too large": {"jetstream: {max_stream_bytes: true, disk_max_stream_bytes: 100MB}", bounded, []string{"larger than", "bucket AVATAR_RECORDINGS"}},
		"sizes required":    {"jetstream: {max_bytes: true}", topology.DefaultSettings(), []string{"needs a size limit", "stream AVATAR_JOBS", "bucket AVATAR_STATE"}},
	} {
		t.Run(name, func(t *testing.T) {
			js := account(t, tc.setting)
			_, _, err := topology.Ensure(t.Context(), js, names, tc.settings)
			if !errors.Is(err, topology.ErrServer) {
				t.Fatalf("got %v", err)
			}
			for _, text := range tc.texts {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("%q is not in: %v", text, err)
				}
			}
			for name := range js.StreamNames(t.Context()).Name() {
				t.Errorf("%s was made", name)
			}
		})
	}
}

func TestAnAccountWithJustEnoughIsEnough(t *testing.T) {
	t.Parallel()
	settings := topology.DefaultSettings()
	settings.JobsMaxBytes, settings.StateMaxBytes, settings.FleetMaxBytes = 1<<20, 1<<20, 1<<20
	small := topology.Limit{MaxAge: time.Hour, MaxBytes: 1 << 20}
	settings.Events, settings.DLQ, settings.Frames, settings.Audio, settings.AudioFiles, settings.Recordings = small, small, small, small, small, small
	js := account(t, "jetstream: {max_streams: 11, max_file: 10MB}")
	for range 2 {
		ensure(t, js, settings)
	}
}

func TestRacingFirstStartsFitIntoAnAccountWithJustEnough(t *testing.T) {
	t.Parallel()
	url := natstest.Configured(t, `
		listen: 127.0.0.1:-1
		jetstream: enabled
		accounts { A { jetstream: {max_streams: 11}, users: [{user: u, password: p}] } }`)
	failures := make(chan error, 8)
	natstest.Together(cap(failures), func(int) {
		js, err := jetstream.New(natstest.ConnectURL(t, url, nats.UserInfo("u", "p")))
		if err == nil {
			_, _, err = topology.Ensure(t.Context(), js, names, topology.DefaultSettings())
		}
		failures <- err
	})
	close(failures)
	for err := range failures {
		if err != nil {
			t.Error(err)
		}
	}
}

func TestWhereThereIsNoJetStreamTheErrorSaysHowToGetIt(t *testing.T) {
	t.Parallel()
	without, err := jetstream.New(natstest.ConnectURL(t, natstest.Configured(t, "listen: 127.0.0.1:-1")))
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, err := jetstream.NewWithDomain(natstest.JetStream(t).Conn(), "hub")
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		js    jetstream.JetStream
		texts []string
	}{
		"account": {account(t, "jetstream: disabled"), []string{"this user's account has no JetStream", "nats.domain"}},
		"server":  {without, []string{"nats-server -js", "$JS.API"}},
		"domain":  {elsewhere, []string{"$JS.hub.API", "nats.domain"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := topology.Ensure(t.Context(), tc.js, names, topology.DefaultSettings())
			for _, text := range tc.texts {
				if err == nil || !strings.Contains(err.Error(), text) {
					t.Errorf("%q is not in: %v", text, err)
				}
			}
		})
	}
}

// older answers JetStream's API as a server of before 2.11 does, without its level,
// or with level 1 as 2.11 does. What else is asked goes to a real server.
func older(t *testing.T, level int) jetstream.JetStream {
	t.Helper()
	nc := natstest.JetStream(t).Conn()
	forward := func(m *nats.Msg) {
		// It takes a stream with counters for one without.
		data := bytes.ReplaceAll(m.Data, []byte(`"allow_msg_counter":true`), []byte(`"allow_msg_counter":false`))
		answer, err := nc.RequestMsgWithContext(t.Context(), &nats.Msg{Subject: "$JS.API." + strings.TrimPrefix(m.Subject, "old."), Header: m.Header, Data: data})
		if err != nil {
			return // the test ends
		}
		var fields map[string]any
		if err := json.Unmarshal(answer.Data, &fields); err != nil {
			t.Error(err)
		}
		config, ok := fields["config"].(map[string]any)
		if level == 0 {
			delete(fields, "api")
			delete(config, "metadata")
		} else {
			fields["api"] = map[string]any{"level": level}
			if ok {
				config["metadata"] = map[string]any{"_nats.level": strconv.Itoa(level)}
			}
		}
		if data, err = json.Marshal(fields); err != nil {
			t.Error(err)
		}
		if err := m.Respond(data); err != nil {
			t.Error(err)
		}
	}
	// The handler waits for an answer, so each request has its own.
	if _, err := nc.Subscribe("old.>", func(m *nats.Msg) { go forward(m) }); err != nil {
		t.Fatal(err)
	}
	js, err := jetstream.NewWithAPIPrefix(nc, "old")
	if err != nil {
		t.Fatal(err)
	}
	return js
}

func TestAServerThatIsTooOldIsRefusedFirst(t *testing.T) {
	t.Parallel()
	js := older(t, 0)
	check := func(when string) {
		_, _, err := topology.Ensure(t.Context(), js, names, topology.DefaultSettings())
		if !errors.Is(err, topology.ErrServer) || !strings.Contains(err.Error(), "older than NATS "+topology.LeastServer) {
			t.Errorf("%s: %v", when, err)
		}
	}
	check("nothing is there")
	own, err := jetstream.New(js.Conn())
	if err != nil {
		t.Fatal(err)
	}
	ensure(t, own, topology.DefaultSettings())
	check("everything is there")
}

func TestOnAServerWithoutCountersAFleetHasNoTotalsAndMissesNone(t *testing.T) {
	t.Parallel()
	js, settings := older(t, 1), topology.DefaultSettings()
	noTotals := func(when string) {
		t.Helper()
		if _, err := js.Stream(t.Context(), names.TotalsStream()); !errors.Is(err, jetstream.ErrStreamNotFound) {
			t.Errorf("%s: a stream for totals was made that takes none (%v)", when, err)
		}
	}
	setup := func(when string, dryRun bool) {
		t.Helper()
		for _, step := range setUp(t, js, settings, topology.SetupOptions{DryRun: dryRun}) {
			if step.Object == "stream AVATAR_TOTALS" && (step.Action != topology.StepKept || !strings.Contains(step.Have, "no counters")) {
				t.Errorf("%s: %+v", when, step)
			}
		}
		noTotals(when)
	}
	setup("nothing is there", true)
	h, differences, err := topology.Ensure(t.Context(), js, names, settings)
	if err != nil {
		t.Fatal(err)
	}
	noTotals("a worker started")
	if len(differences) != 1 || h.Totals != nil {
		t.Errorf("totals %v, differences %v, want none and one", h.Totals, differences)
	}
	for _, kept := range h.Kept(names) {
		if kept.Stream == names.TotalsStream() {
			t.Error("the worker checks whether the totals are still there")
		}
	}
	setup("everything is there", false)
}

func TestWhatDivertsJobsIsRefusedAndNamed(t *testing.T) {
	t.Parallel()
	jobs := func() jetstream.StreamConfig {
		return jetstream.StreamConfig{Name: "AVATAR_JOBS", Subjects: []string{"avatar.jobs.*"}, Retention: jetstream.WorkQueuePolicy, Discard: jetstream.DiscardNew}
	}
	moved := func(from, to string) jetstream.StreamConfig {
		c := jobs()
		c.SubjectTransform = &jetstream.SubjectTransformConfig{Source: from, Destination: to}
		return c
	}
	sourced := func(s jetstream.StreamSource) jetstream.StreamConfig {
		c := jobs()
		s.Name = "ORDERS"
		c.Sources = []*jetstream.StreamSource{&s}
		return c
	}
	transform := func(from, to string) []jetstream.SubjectTransformConfig {
		return []jetstream.SubjectTransformConfig{{Source: from, Destination: to}}
	}
	for name, tc := range map[string]struct {
		stream  jetstream.StreamConfig
		refused string // "": it is only reported
		report  string
	}{
		"out of the queues":         {moved("avatar.jobs.*", "orders.{{wildcard(1)}}"), "as orders.{{wildcard(1)}}, which no worker serves", ""},
		"everything":                {moved("", "archive.>"), "subject_transform", ""},
		"one queue, not ours":       {moved("avatar.jobs.other", "elsewhere"), "subject_transform", ""},
		"too many tokens":           {moved("avatar.jobs.*", "avatar.jobs.x.{{wildcard(1)}}"), "subject_transform", ""},
		"split":                     {moved("avatar.jobs.*", "avatar.jobs.{{split(1,-)}}"), "subject_transform", ""},
		"to a queue without worker": {moved("avatar.jobs.*", "avatar.jobs.other"), "subject_transform", ""},
		"to a queue":                {moved("avatar.jobs.*", "avatar.jobs.default"), "", "subject_transform is from avatar.jobs.* to avatar.jobs.default"},
		"to the same":               {moved("avatar.jobs.*", "avatar.jobs.$1"), "", "subject_transform"},
		"of no queue":               {moved("avatar.jobs.*.x", "elsewhere.$1"), "", "subject_transform"},
		"sources others":            {sourced(jetstream.StreamSource{}), "stream ORDERS", ""},
		"sources others, filtered":  {sourced(jetstream.StreamSource{FilterSubject: "orders.a"}), "orders.a", ""},
		"sources, mapped wrongly":   {sourced(jetstream.StreamSource{SubjectTransforms: transform("orders.*", "jobs.$1")}), "stream ORDERS", ""},
		"sources, mapped":           {sourced(jetstream.StreamSource{SubjectTransforms: transform("orders.*", "avatar.jobs.$1")}), "", "sources is ORDERS"},
		"republished": {func() jetstream.StreamConfig {
			c := jobs()
			c.RePublish = &jetstream.RePublish{Source: ">", Destination: "copy.>"}
			return c
		}(), "", "republish is from > to copy.>"},
		"acknowledged early": {func() jetstream.StreamConfig { c := jobs(); c.PersistMode = jetstream.AsyncPersistMode; return c }(), "", "persist_mode"},
	} {
		t.Run(name, func(t *testing.T) {
			js := natstest.JetStream(t)
			if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.*"}}); err != nil {
				t.Fatal(err)
			}
			if _, err := js.CreateStream(t.Context(), tc.stream); err != nil {
				t.Fatal(err)
			}
			_, differences, err := topology.Ensure(t.Context(), js, names, topology.DefaultSettings())
			if tc.refused != "" {
				if !errors.Is(err, topology.ErrUnusable) || !strings.Contains(err.Error(), "stream AVATAR_JOBS") || !strings.Contains(err.Error(), tc.refused) {
					t.Errorf("got %v", err)
				}
				return
			}
			if err != nil || !strings.Contains(fmt.Sprint(differences), tc.report) {
				t.Errorf("got %v, %v", differences, err)
			}
		})
	}
}

func TestABucketThatWouldLoseRecordsIsRefusedAndNamed(t *testing.T) {
	t.Parallel()
	state := func() jetstream.StreamConfig {
		return jetstream.StreamConfig{
			Name: "KV_AVATAR_STATE", Subjects: []string{"$KV.AVATAR_STATE.>"}, MaxMsgsPerSubject: 1, Discard: jetstream.DiscardNew,
			AllowRollup: true, DenyDelete: true, AllowDirect: true, AllowMsgTTL: true, SubjectDeleteMarkerTTL: time.Minute,
		}
	}
	for name, tc := range map[string]struct {
		change func(*jetstream.StreamConfig)
		text   string
	}{
		"moves records": {func(c *jetstream.StreamConfig) {
			c.SubjectTransform = &jetstream.SubjectTransformConfig{Source: "$KV.AVATAR_STATE.*", Destination: "$KV.AVATAR_STATE.x.$1"}
		}, "subject_transform"},
		"forgets records":  {func(c *jetstream.StreamConfig) { c.Discard, c.MaxBytes = jetstream.DiscardOld, 1<<20 }, "discards old records"},
		"takes no changes": {func(c *jetstream.StreamConfig) { c.DiscardNewPerSubject = true }, "discard_new_per_subject"},
		"cuts records":     {func(c *jetstream.StreamConfig) { c.MaxMsgSize = 1 << 10 }, "max_value_size"},
		"mirrors another": {func(c *jetstream.StreamConfig) {
			c.Subjects, c.Mirror, c.SubjectDeleteMarkerTTL = nil, &jetstream.StreamSource{Name: "KV_OTHER"}, 0
		}, "mirrors stream KV_OTHER"},
	} {
		t.Run(name, func(t *testing.T) {
			js := natstest.JetStream(t)
			if _, err := js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "OTHER"}); err != nil {
				t.Fatal(err)
			}
			cfg := state()
			tc.change(&cfg)
			refused(t, js, cfg, "bucket AVATAR_STATE", tc.text)
		})
	}
}

func TestAStreamThatWouldLoseWhatNobodyHasReadIsRefusedAndNamed(t *testing.T) {
	t.Parallel()
	for name, subject := range map[string]string{names.DLQStream(): names.AllDLQ(), names.UsageStream(): names.AllUsage()} {
		for _, retention := range []jetstream.RetentionPolicy{jetstream.InterestPolicy, jetstream.WorkQueuePolicy} {
			t.Run(name+" "+retention.String(), func(t *testing.T) {
				js := natstest.JetStream(t)
				if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: name, Subjects: []string{subject}, Retention: retention}); err != nil {
					t.Fatal(err)
				}
				_, _, err := topology.Ensure(t.Context(), js, names, topology.DefaultSettings())
				if !errors.Is(err, topology.ErrUnusable) || !strings.Contains(err.Error(), "stream "+name+":") || !strings.Contains(err.Error(), "retention") {
					t.Errorf("got %v", err)
				}
			})
		}
	}
}

func TestAConsumerThatTakesAQueuesJobsIsRefusedByName(t *testing.T) {
	t.Parallel()
	for name, filters := range map[string][]string{
		"everything": nil, "every queue": {"avatar.jobs.*"}, "this queue": {"avatar.jobs.default"}, "among others": {"avatar.jobs.a", "avatar.jobs.default"},
	} {
		t.Run(name, func(t *testing.T) {
			js := natstest.JetStream(t)
			h, _ := ensure(t, js, topology.DefaultSettings())
			if err := h.Jobs.DeleteConsumer(t.Context(), "default"); err != nil {
				t.Fatal(err)
			}
			if _, err := h.Jobs.CreateConsumer(t.Context(), jetstream.ConsumerConfig{Durable: "reporter", AckPolicy: jetstream.AckExplicitPolicy, FilterSubjects: filters}); err != nil {
				t.Fatal(err)
			}
			_, _, err := topology.Ensure(t.Context(), js, names, topology.DefaultSettings())
			if !errors.Is(err, topology.ErrUnusable) || !strings.Contains(err.Error(), "consumer reporter") {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestAConsumerThatTakesAnotherQueuesJobsIsReportedByName(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	settings := topology.DefaultSettings()
	settings.Queues = []string{"default", "vip"} // vip is another worker's, below
	h, _ := ensure(t, js, settings)
	if _, err := h.Jobs.CreateConsumer(t.Context(), jetstream.ConsumerConfig{Durable: "reporter", AckPolicy: jetstream.AckExplicitPolicy, FilterSubject: "avatar.jobs.audit"}); err != nil {
		t.Fatal(err)
	}
	_, differences := ensure(t, js, topology.DefaultSettings())
	want := "[stream AVATAR_JOBS: consumers is consumer reporter, which takes avatar.jobs.audit, wanted those of queues only]"
	if got := fmt.Sprint(differences); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestAStreamThatCopiesJobsIsReported(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	h, _ := ensure(t, js, topology.DefaultSettings())
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "ARCHIVE", Sources: []*jetstream.StreamSource{{Name: names.JobsStream()}}}); err != nil {
		t.Fatal(err)
	}
	for h.Jobs.CachedInfo().State.Consumers < 2 { // until the server has made its consumer
		if _, err := h.Jobs.Info(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if _, differences := ensure(t, js, topology.DefaultSettings()); !strings.Contains(fmt.Sprint(differences), "which copies everything") {
		t.Errorf("got %v", differences)
	}
}

func TestAConsumerThatDeliversNothingToWorkersIsRefused(t *testing.T) {
	t.Parallel()
	good := jetstream.ConsumerConfig{Durable: "default", FilterSubject: "avatar.jobs.default", AckPolicy: jetstream.AckExplicitPolicy, MaxDeliver: -1}
	for name, tc := range map[string]struct {
		change func(*jetstream.ConsumerConfig)
		text   string
	}{
		"priority groups": {func(c *jetstream.ConsumerConfig) {
			c.PriorityPolicy, c.PriorityGroups = jetstream.PriorityPolicyOverflow, []string{"a"}
		}, "priority groups (a)"},
		"short requests": {func(c *jetstream.ConsumerConfig) { c.MaxRequestExpires = time.Second }, "max_expires"},
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
			if !errors.Is(err, topology.ErrUnusable) || !strings.Contains(err.Error(), tc.text) {
				t.Errorf("got %v", err)
			}
		})
	}
}
