package app_test

import (
	"testing"
	"time"

	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
)

func livekit(token string) fields {
	return fields{"livekit": fields{
		"url": "wss://rooms.example.com", "room_name": "r", "publisher_id": "p", "api_token": token,
		"extra_attributes": fields{"k": "v"}, "idle_timeout": 30,
	}}
}

func agora(token string) fields {
	return fields{"agora": fields{"channel_name": "c", "token": token, "uid": 7, "publisher_id": "p"}}
}

func TestEgressIsDoneAtTheBackendsEndWhereItComes(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{config: func(c *config.Config) { c.Audio.EgressMargin = 30 * time.Second }})
	for name, out := range map[string]fields{"livekit": livekit("good-token"), "agora": agora("good-token")} {
		began := time.Now()
		f.publish(name, "egress-end-"+name, fields{"audio": pcm(time.Second), "output": out})
		done := f.completed(name)
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("%s: the end was not heeded for %s", name, took)
		}
		if len(done.Utterances) != 1 || done.Utterances[0].AudioMS != 1000 || done.Utterances[0].FirstFrameMS != 0 {
			t.Errorf("%s: %+v", name, done)
		}
		s := f.sessions("egress-end-" + name)
		if len(s) != 1 || s[0].Egress != name || s[0].Utterances != 1 || s[0].CloseCode != 1000 {
			t.Errorf("%s: %+v", name, s)
		}
		if n := len(f.frames(name)); n != 0 {
			t.Errorf("%s: %d frames", name, n)
		}
	}
}

func TestEgressWithoutAnEndIsDoneWhenTheSpeechHasHadTimeToBePlayed(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{config: func(c *config.Config) { c.Audio.EgressMargin = 300 * time.Millisecond }})
	f.publish("room", "ok", fields{"utterances": []any{pcm(500 * time.Millisecond), pcm(time.Second)}, "output": livekit("good-token")})
	r := f.state("room", func(r lifecycle.Record) bool { return r.Checkpoint == 1 })
	if r.State != lifecycle.StateRunning {
		t.Errorf("the checkpoint of the first utterance came with state %s", r.State)
	}
	done := f.completed("room")
	const tick = 20 // the kernel's clock, by which a session is measured, goes by milliseconds
	if len(done.Utterances) != 2 || done.Utterances[0].DurationMS < 800 || done.Utterances[1].DurationMS < 1300 || done.SessionMS < 2100-tick || done.SessionMS > 8000 {
		t.Errorf("%+v", done)
	}
	if r := f.record("room"); r.Checkpoint != 2 {
		t.Errorf("checkpoint %d", r.Checkpoint)
	}
}

func TestABadEgressTokenIsGivenUpAtOnce(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{})
	f.publish("bad", "ok", fields{"output": agora("bad-token-of-agora")})
	r := f.outcome("bad")
	if r.State != lifecycle.StateDeadLettered || r.LastError.Code != errors.CodeInvalidEgressConfig || r.Attempt != 1 || r.LastError.ServerCode != "16" {
		t.Errorf("%+v", r.LastError)
	}
}
