package permissions_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// secret is an egress token in a job.
const secret = "an-egress-token"

// reading are filters by which a role would see more than is its own.
func reading() []string {
	return []string{
		">", "_INBOX.>", "_INBOX_worker.>", "_INBOX_operator.>", "_INBOX_admin.>", "*.*.>", "_R_.>", "$JS.>", "$KV.>", "$O.>",
		"avatar.jobs.*", "avatar.>", "avatar.control.*", "avatar.audio.*", "avatar.dlq.>", "AVATAR.API.>",
	}
}

// A job is published, pulled, and read by an operator while a role listens
// wherever the server lets it: none of it may come to the role.
func TestNoRoleReadsJobsOrTheInboxesOfOthers(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(*testing.T) string{
		"accounts":    func(t *testing.T) string { return startAccounts(t, "") },
		"one account": func(t *testing.T) string { return start(t, "publisher", nil) },
	} {
		for _, role := range []string{"publisher", "listener", "operator"} {
			t.Run(name+"/"+role, func(t *testing.T) {
				t.Parallel()
				ctx, cancel := context.WithTimeout(t.Context(), enough)
				defer cancel()
				url := start(t)
				admin := connect(t, url, "admin", nil)
				prepare(ctx, t, admin)
				c := connect(t, url, role, newRefusals(nil))
				var subs []*nats.Subscription
				for _, filter := range reading() {
					sub, err := c.nc.SubscribeSync(filter)
					if err != nil {
						t.Fatal(err)
					}
					subs = append(subs, sub)
				}
				if err := c.nc.Flush(); err != nil {
					t.Fatal(err)
				}
				pullJob(ctx, t, connect(t, url, "publisher", nil), connect(t, url, "worker", nil), admin)
				if err := c.nc.Flush(); err != nil { // what was on its way is here
					t.Fatal(err)
				}
				for _, sub := range subs {
					for n, _, _ := sub.Pending(); n > 0; n-- {
						msg, err := sub.NextMsg(time.Second)
						if err != nil {
							t.Fatal(err)
						}
						if strings.Contains(string(msg.Data), secret) {
							t.Errorf("%s reads a job on %s (as %s)", role, sub.Subject, msg.Subject)
						}
					}
				}
			})
		}
	}
}

// pullJob publishes a job with a secret, and takes it as a worker and by its
// sequence as an administrator.
func pullJob(ctx context.Context, t *testing.T, publisher, worker, admin client) {
	t.Helper()
	ack, err := publisher.js.Publish(ctx, names.Jobs("default"), []byte(secret))
	if err != nil {
		t.Fatal(err)
	}
	consumer, err := worker.js.Consumer(ctx, names.JobsStream(), "default")
	if err != nil {
		t.Fatal(err)
	}
	msg, err := consumer.Next(jetstream.FetchMaxWait(5 * time.Second))
	if err != nil || string(msg.Data()) != secret {
		t.Fatalf("the worker got %v, %v", msg, err)
	}
	stream, err := admin.js.Stream(ctx, names.JobsStream())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.GetMsg(ctx, ack.Sequence); err != nil {
		t.Fatal(err)
	}
}

// forged is what an attacker would have written as the record of a job.
const forged = `{"job_id":"J","run":1,"state":"completed"}`

// attack is one message of an attacker.
type attack struct {
	name    string
	subject string
	header  nats.Header
	data    string
}

// writing are ways to have the server write what the attacker likes to a subject
// that he may not publish to: himself, as the answer to a request, or as what
// JetStream delivers.
func writing(target string) map[string][]attack {
	deliver := fmt.Sprintf(`{"stream_name":"%%s","config":{"name":"x","deliver_subject":%q,"ack_policy":"none","deliver_policy":"all"}}`, target)
	return map[string][]attack{
		"publisher": {
			{name: "plainly", subject: target, data: forged},
			{name: "by a direct read of an upload", subject: "$JS.API.DIRECT.GET.OBJ_AVATAR_AUDIO_FILES.$O.AVATAR_AUDIO_FILES.C.x"},
			{name: "by a direct read of an upload, unmapped", subject: "AVATAR.API.DIRECT.GET.OBJ_AVATAR_AUDIO_FILES.$O.AVATAR_AUDIO_FILES.C.x"},
			{name: "by an acknowledgement", subject: "avatar.jobs.default", data: "{}"},
			{name: "by the acknowledgement of speech", subject: "avatar.audio.J", data: "x"},
			{name: "by the acknowledgement of an upload", subject: "$O.AVATAR_AUDIO_FILES.C.y", data: "x"},
			{name: "by a look at a bucket", subject: "$JS.API.STREAM.INFO.OBJ_AVATAR_AUDIO_FILES"},
			{name: "by a purge", subject: "$JS.API.STREAM.PURGE.OBJ_AVATAR_AUDIO_FILES", data: `{"filter":"$O.AVATAR_AUDIO_FILES.C.nothing"}`},
			{name: "by an error", subject: "$JS.API.STREAM.PURGE.OBJ_AVATAR_AUDIO_FILES", data: forged},
			{name: "by what a worker answers", subject: "avatar.control.J", data: `{"op":"cancel"}`},
			{name: "by a trace", subject: "avatar.jobs.default", header: nats.Header{"Nats-Trace-Dest": {target}}, data: "{}"},
			{name: "by a consumer", subject: "$JS.API.CONSUMER.CREATE.OBJ_AVATAR_AUDIO_FILES.x", data: fmt.Sprintf(deliver, "OBJ_AVATAR_AUDIO_FILES")},
			{name: "by JetStream's answer to a stranger", subject: "$JS.API.INFO"},
		},
		"listener": {
			{name: "plainly", subject: target, data: forged},
			{name: "by a consumer of events", subject: "$JS.API.CONSUMER.CREATE.AVATAR_EVENTS.x", data: fmt.Sprintf(deliver, "AVATAR_EVENTS")},
			{name: "by a consumer of recordings", subject: "$JS.API.CONSUMER.CREATE.OBJ_AVATAR_RECORDINGS.x", data: fmt.Sprintf(deliver, "OBJ_AVATAR_RECORDINGS")},
			{name: "by its consumer", subject: "$JS.API.CONSUMER.MSG.NEXT.AVATAR_EVENTS.listener", data: "1"},
			{name: "by a look at its consumer", subject: "$JS.API.CONSUMER.INFO.AVATAR_EVENTS.listener"},
			{name: "by a direct read of frames", subject: "$JS.API.DIRECT.GET.AVATAR_FRAMES", data: `{"seq":1,"batch":10}`},
			{name: "by a read of a recording", subject: "$JS.API.STREAM.MSG.GET.OBJ_AVATAR_RECORDINGS", data: `{"seq":1}`},
			{name: "by a direct read of a recording", subject: "$JS.API.DIRECT.GET.OBJ_AVATAR_RECORDINGS", data: `{"seq":1}`},
			{name: "by a look at frames", subject: "$JS.API.STREAM.INFO.AVATAR_FRAMES"},
			{name: "by a trace", subject: "$JS.API.STREAM.INFO.AVATAR_FRAMES", header: nats.Header{"Nats-Trace-Dest": {target}}},
		},
	}
}

// What decides about a job is out of reach of publishers and listeners: its
// record, events, dead letters, and the acknowledgement of its message.
func TestNoPublisherOrListenerWritesWhatIsNotItsOwn(t *testing.T) {
	t.Parallel()
	for target, stream := range map[string]string{
		"$KV.AVATAR_STATE.J": "KV_AVATAR_STATE", "$KV.AVATAR_STATE.lease.w": "KV_AVATAR_STATE", "$KV.AVATAR_FLEET.circuit.app.us": "KV_AVATAR_FLEET",
		"avatar.events.completed.J": "AVATAR_EVENTS", "avatar.dlq.job.invalidJob": "AVATAR_DLQ", "avatar.frames.J": "AVATAR_FRAMES",
		"$O.AVATAR_RECORDINGS.M.x": "OBJ_AVATAR_RECORDINGS",
	} {
		for role, attacks := range writing(target) {
			t.Run(role+"/"+target, func(t *testing.T) {
				t.Parallel()
				ctx, cancel := context.WithTimeout(t.Context(), enough)
				defer cancel()
				url := startAccounts(t, "")
				admin := connect(t, url, "admin", nil)
				furnish(ctx, t, admin)
				victim, err := admin.js.Stream(ctx, stream)
				if err != nil {
					t.Fatal(err)
				}
				before := victim.CachedInfo().State.LastSeq
				c := connect(t, url, role, newRefusals(nil))
				for _, a := range attacks {
					msg := &nats.Msg{Subject: a.subject, Reply: target, Header: a.header, Data: []byte(a.data)}
					if err := c.nc.PublishMsg(msg); err != nil {
						t.Fatal(err)
					}
					settle(ctx, t, c, admin)
					info, err := victim.Info(ctx)
					if err != nil {
						t.Fatal(err)
					}
					if info.State.LastSeq != before {
						got, _ := victim.GetMsg(ctx, info.State.LastSeq)
						t.Errorf("%s, %s: %+v was written", role, a.name, got)
						before = info.State.LastSeq
					}
				}
			})
		}
	}
}

// furnish makes what an attack could use: an upload with a forged record for a
// chunk, an event, a frame, a recording, the listeners' consumer, and a worker
// that answers.
func furnish(ctx context.Context, t *testing.T, admin client) {
	t.Helper()
	handles := prepare(ctx, t, admin)
	for _, subject := range []string{"$O.AVATAR_AUDIO_FILES.C.x", names.Events("started", "J"), names.Frames("J")} {
		if _, err := admin.js.Publish(ctx, subject, []byte(forged)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := handles.Recordings.PutBytes(ctx, "J", []byte(forged)); err != nil {
		t.Fatal(err)
	}
	if _, err := handles.Events.CreateConsumer(ctx, jetstream.ConsumerConfig{Durable: "listener", AckPolicy: jetstream.AckExplicitPolicy}); err != nil {
		t.Fatal(err)
	}
	_, err := admin.nc.Subscribe(names.AllControl(), func(m *nats.Msg) {
		_ = m.Respond([]byte(forged)) // the test may have ended
	})
	if err != nil {
		t.Fatal(err)
	}
}

// settle returns when the server has done what it was asked before, and what that
// led to has been stored.
func settle(ctx context.Context, t *testing.T, attacker, admin client) {
	t.Helper()
	for range 3 { // request, answer, and what is stored of it
		for _, c := range []client{attacker, admin} {
			if err := c.nc.FlushWithContext(ctx); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := admin.js.AccountInfo(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

// The attacks above are real: in one account, where the roles have the
// permissions of permissions.conf, JetStream's answers go where they like.
// docs/permissions.md says so. When this no longer holds, it has to be changed.
func TestInOneAccountAnswersGoWhereverTheyAreSent(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), enough)
	defer cancel()
	url := start(t, "publisher", nil)
	admin := connect(t, url, "admin", nil)
	furnish(ctx, t, admin)
	sub, err := admin.nc.SubscribeSync("$KV.AVATAR_STATE.J")
	if err != nil {
		t.Fatal(err)
	}
	if err := admin.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	c := connect(t, url, "publisher", nil)
	if err := c.nc.PublishRequest("$JS.API.DIRECT.GET.OBJ_AVATAR_AUDIO_FILES.$O.AVATAR_AUDIO_FILES.C.x", "$KV.AVATAR_STATE.J", nil); err != nil {
		t.Fatal(err)
	}
	if msg, err := sub.NextMsgWithContext(ctx); err != nil || string(msg.Data) != forged {
		t.Errorf("got %v, %v", msg, err)
	}
}
