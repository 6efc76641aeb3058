package dlq_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobpb"
	"avatarworker/internal/jobs/jobspec"
)

const wrongJob = `{"avatar_id":"gone","audio":{"url":"https://h/a.wav"},"labels":{"customer":"acme"}}`

// wrong writes the letter of a job that needs a correction.
func wrong(t *testing.T, b bench, data []byte, header nats.Header) uint64 {
	t.Helper()
	return wrongOf(t, b, "greeting", data, header)
}

func wrongOf(t *testing.T, b bench, id string, data []byte, header nats.Header) uint64 {
	t.Helper()
	d := letter(id, 1)
	d.Data, d.Header = data, header
	write(t, b, d)
	record(t, b, id, 1, d.Job.StreamSeq, "dead_lettered")
	return newest(t, b)
}

func sets(t *testing.T, texts ...string) dlq.ReplayOptions {
	t.Helper()
	var settings []dlq.Setting
	for _, text := range texts {
		s, err := dlq.ParseSetting(text)
		if err != nil {
			t.Fatal(err)
		}
		settings = append(settings, s)
	}
	return dlq.ReplayOptions{Correct: func(l dlq.Letter) ([]byte, error) {
		body, err := dlq.BodyJSON(l)
		if err != nil {
			return nil, err
		}
		return dlq.Apply(body, settings)
	}}
}

func TestACorrectedJobIsReplayedWithTheDigestOfWhatItWas(t *testing.T) {
	t.Parallel()
	b := setup(t)
	seq := wrong(t, b, []byte(wrongJob), nil)
	r := replay(t, b, seq, sets(t, "avatar_id=ok", `labels.a\.b=1`, "audio.format=wav"))
	if r.Status != dlq.StatusReplayed || r.Run != 2 || !strings.HasPrefix(r.Corrected, "sha256:") {
		t.Fatalf("%+v", r)
	}
	expectCounts(t, b, 0, 1)
	m := lastJob(t, b)
	if got := m.Header[dlq.HeaderCorrected]; len(got) != 1 || got[0] != r.Corrected {
		t.Errorf("header %q", got)
	}
	job, invalid := jobspec.Decode(m.Header, m.Data)
	if invalid != nil || job.GetAvatarId() != "ok" || job.GetLabels()["a.b"] != "1" || job.GetLabels()["customer"] != "acme" || job.GetAudio().GetFormat() != "wav" {
		t.Errorf("%s: %v", m.Data, invalid)
	}
}

func TestACorrectionOfACorrectionKeepsBothDigests(t *testing.T) {
	t.Parallel()
	b := setup(t)
	first := replay(t, b, wrong(t, b, []byte(wrongJob), nil), sets(t, "avatar_id=worse"))
	m := lastJob(t, b)
	d := letter("greeting", 2)
	d.Data, d.Header, d.Job.StreamSeq, d.LettersBefore = m.Data, m.Header, m.Sequence, 1
	write(t, b, d)
	record(t, b, "greeting", 2, m.Sequence, "dead_lettered")
	if err := b.h.Jobs.DeleteMsg(t.Context(), m.Sequence); err != nil {
		t.Fatal(err)
	}
	second := replay(t, b, newest(t, b), sets(t, "avatar_id=ok"))
	if second.Status != dlq.StatusReplayed || second.Run != 3 {
		t.Fatalf("%+v", second)
	}
	if got := fmt.Sprint(lastJob(t, b).Header[dlq.HeaderCorrected]); got != fmt.Sprint([]string{first.Corrected, second.Corrected}) {
		t.Errorf("header %s", got)
	}
}

func TestTheOriginalOfACorrectedReplayIsFoundFromTheJob(t *testing.T) {
	t.Parallel()
	b := setup(t)
	store := dlq.NewStore(b.js, names, nil)
	bodies := []string{`{"avatar_id":"gone","audio":{"url":"https://h/a.wav?key=1"},\n "x":1}` + "\n", "\x00\xff not JSON\n\n"}
	for i, body := range bodies {
		run := i + 1
		d := letter("greeting", run)
		d.Data, d.Header, d.LettersBefore = []byte(body), nats.Header{"X-Own": {"kept"}}, uint64(i)
		write(t, b, d)
		record(t, b, "greeting", run, uint64(i+1), "dead_lettered")
		r := replay(t, b, newest(t, b), dlq.ReplayOptions{Correct: func(dlq.Letter) ([]byte, error) {
			return []byte(`{"avatar_id":"ok","audio":{"url":"https://h/a.wav"}}`), nil
		}})
		if r.Status != dlq.StatusReplayed || r.Run != run+1 {
			t.Fatalf("%+v", r)
		}
		for _, n := range []int{0, r.Run} {
			original, of, err := store.Original(t.Context(), "greeting", n)
			if err != nil || string(original.Data) != body || original.Header.Get("X-Own") != "kept" || of.Run != r.Run || of.Corrected != r.Corrected || of.At.IsZero() || original.Seq != r.Seq {
				t.Errorf("run %d: %+v of %+v, %v", n, original, of, err)
			}
		}
		take(t, b)
		record(t, b, "greeting", r.Run, uint64(i+1), "dead_lettered")
	}
	if first, _, err := store.Original(t.Context(), "greeting", 2); err != nil || string(first.Data) != bodies[0] {
		t.Errorf("the first original: %q, %v", first.Data, err)
	}
	if list, err := store.Replays(t.Context(), "greeting"); err != nil || len(list) != 2 || list[0].Run != 2 || list[1].Run != 3 {
		t.Errorf("%+v, %v", list, err)
	}
}

func TestAReplayWithoutACorrectionKeepsNoOriginal(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := replay(t, b, wrong(t, b, []byte(wrongJob), nil), dlq.ReplayOptions{})
	store := dlq.NewStore(b.js, names, nil)
	for _, run := range []int{0, r.Run} {
		if _, _, err := store.Original(t.Context(), "greeting", run); !errors.Is(err, dlq.ErrNoOriginal) {
			t.Errorf("run %d: %v", run, err)
		}
	}
	list, err := store.Replays(t.Context(), "greeting")
	if err != nil || len(list) != 1 || list[0].Run != 2 || list[0].DeadLetter != r.Seq || list[0].Corrected != "" || list[0].At.IsZero() {
		t.Errorf("%+v, %v", list, err)
	}
}

func TestALetterStaysIfItsOriginalCanNotBeKept(t *testing.T) {
	t.Parallel()
	b := setup(t)
	seq := wrong(t, b, []byte(wrongJob), nil)
	stream, err := b.js.Stream(t.Context(), "KV_"+names.StateBucket())
	if err != nil {
		t.Fatal(err)
	}
	cfg := stream.CachedInfo().Config
	cfg.MaxBytes = int64(stream.CachedInfo().State.Bytes) + 600
	if _, err := b.js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	r, err := dlq.NewStore(b.js, names, nil).Replay(t.Context(), seq, sets(t, "avatar_id=ok"))
	if err == nil || !strings.Contains(err.Error(), "streams.state.max_bytes") {
		t.Fatalf("%+v, %v", r, err)
	}
	expectCounts(t, b, 1, 0)
	cfg.MaxBytes = -1
	if _, err := b.js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if r := replay(t, b, seq, sets(t, "avatar_id=ok")); r.Status != dlq.StatusReplayed || r.Run != 2 {
		t.Errorf("%+v", r)
	}
	expectCounts(t, b, 0, 1)
}

// The replay that published decides what the job's history says.
func TestOfTwoReplaysTheHistoryTellsOfTheOneThatRan(t *testing.T) {
	t.Parallel()
	b := setup(t)
	store := dlq.NewStore(b.js, names, nil)
	seq := wrong(t, b, []byte(wrongJob), nil)
	correct := sets(t, "avatar_id=ok").Correct
	inner := dlq.Status("")
	replay(t, b, seq, dlq.ReplayOptions{Correct: func(l dlq.Letter) ([]byte, error) {
		r, err := store.Replay(t.Context(), seq, dlq.ReplayOptions{}) // another operator, in between
		inner = r.Status
		if err != nil {
			return nil, err
		}
		return correct(l)
	}})
	list, err := store.Replays(t.Context(), "greeting")
	if err != nil || inner != dlq.StatusReplayed || len(list) != 1 || list[0].Corrected != "" {
		t.Errorf("%s, %+v, %v", inner, list, err)
	}
}

func lastJob(t *testing.T, b bench) *jetstream.RawStreamMsg {
	t.Helper()
	info, err := b.h.Jobs.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m, err := b.h.Jobs.GetMsg(t.Context(), info.State.LastSeq)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestACorrectionThatIsNotAJobPublishesNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	seq := wrong(t, b, []byte(wrongJob), nil)
	for name, o := range map[string]dlq.ReplayOptions{
		"no avatar":  sets(t, "avatar_id=null"),
		"two audios": sets(t, "audio.object=x"),
		"another id": sets(t, "id=other"),
		"no JSON":    {Correct: func(dlq.Letter) ([]byte, error) { return []byte("{"), nil }},
	} {
		for _, o.DryRun = range []bool{true, false} {
			if r, err := dlq.NewStore(b.js, names, nil).Replay(t.Context(), seq, o); err == nil || !strings.Contains(err.Error(), "nothing was published") {
				t.Errorf("%s: %+v, %v", name, r, err)
			}
		}
	}
	expectCounts(t, b, 1, 0)
}

// Whose correction is published first is the job's; the other finds it done.
func TestTwoOperatorsWhoCorrectOneLetterRunItOnce(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for round := range 10 {
		seq := wrongOf(t, b, fmt.Sprint("j", round), []byte(wrongJob), nil)
		before, err := b.h.Jobs.Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		statuses := make(chan dlq.Status, 4)
		for i := range 4 {
			o := sets(t, fmt.Sprint("avatar_id=ok", i))
			if i == 3 {
				o = dlq.ReplayOptions{}
			}
			wg.Go(func() {
				r, err := dlq.NewStore(b.js, names, nil).Replay(t.Context(), seq, o)
				if err == nil {
					statuses <- r.Status
				}
			})
		}
		wg.Wait()
		close(statuses)
		replayed := 0
		for s := range statuses {
			if s == dlq.StatusReplayed {
				replayed++
			}
		}
		after, err := b.h.Jobs.Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if n := after.State.LastSeq - before.State.LastSeq; replayed != 1 || n != 1 {
			t.Fatalf("round %d: %d say that they replayed it, %d jobs were published", round, replayed, n)
		}
		if letters, _ := lettersAndJobs(t, b); letters != 0 {
			t.Fatalf("round %d: the letter stays", round)
		}
	}
}

func TestAProtobufJobIsCorrectedAsJSON(t *testing.T) {
	t.Parallel()
	b := setup(t)
	data, err := proto.Marshal(&jobpb.Job{AvatarId: "gone", Audio: &jobpb.Audio{Inline: []byte("RIFF")}, MaxAttempts: 3})
	if err != nil {
		t.Fatal(err)
	}
	seq := wrong(t, b, data, nats.Header{"content-type": {jobspec.ContentTypeProtobuf}})
	replay(t, b, seq, sets(t, "avatar_id=ok", "max_attempts=2"))
	m := lastJob(t, b)
	job, invalid := jobspec.Decode(m.Header, m.Data)
	if invalid != nil || !json.Valid(m.Data) || job.GetAvatarId() != "ok" || job.GetMaxAttempts() != 2 || string(job.GetAudio().GetInline()) != "RIFF" {
		t.Errorf("%s %v: %v", m.Data, m.Header, invalid)
	}
}

func TestACorrectedDeadlineIsTheOneThatCounts(t *testing.T) {
	t.Parallel()
	b := setup(t)
	seq := wrong(t, b, []byte(strings.Replace(wrongJob, "{", `{"deadline":"2001-01-01T00:00:00Z",`, 1)), nil)
	if r := replay(t, b, seq, dlq.ReplayOptions{}); r.Status != dlq.StatusDeadlinePassed {
		t.Errorf("%+v", r)
	}
	if r := replay(t, b, seq, sets(t, "deadline=null")); r.Status != dlq.StatusReplayed || r.Deadline != nil {
		t.Errorf("%+v", r)
	}
}

func TestSettingsAreTextsWhereTheFieldIsOne(t *testing.T) {
	t.Parallel()
	const job = `{"avatar_id":"a","utterances":[{"url":"https://h/1"},{"url":"https://h/2"}],"max_attempts":3}`
	for _, c := range []struct{ set, want string }{
		{"avatar_id=123", `"avatar_id":"123"`},
		{`avatar_id="quoted"`, `"avatar_id":"quoted"`},
		{"avatar_id=true", `"avatar_id":"true"`},
		{"max_attempts=7", `"max_attempts":7`},
		{"utterances.1.url=https://h/<x>&y=1", `{"url":"https://h/<x>&y=1"}]`},
		{"utterances.1=null", `"utterances":[{"url":"https://h/1"}]`},
		{`utterances.2={"object":"o"}`, `,{"object":"o"}]`},
		{"labels.n=1", `"labels":{"n":"1"}`},
		{`labels={"a.b":"c"}`, `"labels":{"a.b":"c"}`},
		{"deadline=2030-01-01T00:00:00Z", `"deadline":"2030-01-01T00:00:00Z"`},
		{"output.livekit.idle_timeout=5", `"output":{"livekit":{"idle_timeout":5}}`},
		{"output.livekit.extra_attributes.k=v=w", `"extra_attributes":{"k":"v=w"}`},
		{"live.max_silence=5s", `"max_silence":"5s"`},
	} {
		s, err := dlq.ParseSetting(c.set)
		if err != nil {
			t.Errorf("%s: %v", c.set, err)
			continue
		}
		if out, err := dlq.Apply([]byte(job), []dlq.Setting{s}); err != nil || !strings.Contains(string(out), c.want) {
			t.Errorf("%s: %s, %v", c.set, out, err)
		}
	}
	for _, set := range []string{"", "=x", "avatar_id", "avatarid=x", "nats.url=x", "max_attempts=many", "audio.nothing=1", "utterances.x.url=1", "avatar_id.x=1", "labels.a.b=1", "deadline.seconds=1"} {
		if s, err := dlq.ParseSetting(set); err == nil {
			t.Errorf("%q: %+v", set, s)
		}
	}
	for _, set := range []string{"utterances.9.url=x", "audio.url=x"} {
		s, err := dlq.ParseSetting(set)
		if err != nil {
			t.Fatal(err)
		}
		if out, err := dlq.Apply([]byte(`{"audio":"no object","utterances":[]}`), []dlq.Setting{s}); err == nil {
			t.Errorf("%q: %s", set, out)
		}
	}
}

func FuzzCorrectionIsJSONOrAnError(f *testing.F) {
	f.Add("avatar_id=x", []byte(wrongJob))
	f.Add(`labels.a\.b=1`, []byte(`{}`))
	f.Add("utterances.0.url=null", []byte(`{"utterances":[1]}`))
	f.Add("audio=[1", []byte(`[]`))
	f.Fuzz(func(t *testing.T, text string, body []byte) {
		s, err := dlq.ParseSetting(text)
		if err != nil {
			return
		}
		out, err := dlq.Apply(body, []dlq.Setting{s})
		if err == nil && !json.Valid(out) {
			t.Fatalf("%q on %q: %q", text, body, out)
		}
	})
}
