package leader_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"io"
	"testing"
	"testing/iotest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/leader"
	"avatarworker/internal/natsserver/natstest"
)

func TestMain(m *testing.M) { natstest.Main(m) }

// prepare makes stream S with messages 1 to 3, on s.a, s.b and s.a.
func prepare(t *testing.T) jetstream.JetStream {
	t.Helper()
	js := natstest.JetStream(t)
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s.*"}, AllowDirect: true, Storage: jetstream.MemoryStorage}); err != nil {
		t.Fatal(err)
	}
	for _, subject := range []string{"s.a", "s.b", "s.a"} {
		if _, err := js.PublishMsg(t.Context(), &nats.Msg{Subject: subject, Header: nats.Header{"Key": {"value"}}, Data: []byte("on " + subject)}); err != nil {
			t.Fatal(err)
		}
	}
	return js
}

func TestAMessageIsReadWhole(t *testing.T) {
	t.Parallel()
	js := prepare(t)
	ctx := t.Context()
	for name, c := range map[string]struct {
		read    func() (*jetstream.RawStreamMsg, error)
		seq     uint64
		subject string
	}{
		"last":    {func() (*jetstream.RawStreamMsg, error) { return leader.Last(ctx, js, "S", "s.a") }, 3, "s.a"},
		"by seq":  {func() (*jetstream.RawStreamMsg, error) { return leader.Message(ctx, js, "S", 2) }, 2, "s.b"},
		"next":    {func() (*jetstream.RawStreamMsg, error) { return leader.Next(ctx, js, "S", 2, "s.a") }, 3, "s.a"},
		"itself":  {func() (*jetstream.RawStreamMsg, error) { return leader.Next(ctx, js, "S", 1, "s.a") }, 1, "s.a"},
		"another": {func() (*jetstream.RawStreamMsg, error) { return leader.Last(ctx, js, "S", "s.b") }, 2, "s.b"},
	} {
		m, err := c.read()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if m.Sequence != c.seq || m.Subject != c.subject || string(m.Data) != "on "+c.subject || m.Header.Get("Key") != "value" || time.Since(m.Time) > time.Minute {
			t.Errorf("%s: %+v", name, m)
		}
	}
}

func TestWhatIsNotThereIsReportedAtOnce(t *testing.T) {
	t.Parallel()
	js := prepare(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	store, err := js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{Bucket: "B", Storage: jetstream.MemoryStorage})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.PutBytes(ctx, "deleted", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := store.Delete(ctx, "deleted"); err != nil {
		t.Fatal(err)
	}
	_, last := leader.Last(ctx, js, "S", "s.none")
	_, message := leader.Message(ctx, js, "S", 99)
	_, next := leader.Next(ctx, js, "S", 3, "s.b")
	_, stream := leader.Last(ctx, js, "NONE", "s.a")
	info := func(bucket, name string) error {
		_, err := leader.ObjectInfo(ctx, js, bucket, name)
		return err
	}
	for name, c := range map[string]struct{ got, want error }{
		"last":           {last, jetstream.ErrMsgNotFound},
		"message":        {message, jetstream.ErrMsgNotFound},
		"next":           {next, jetstream.ErrMsgNotFound},
		"stream":         {stream, jetstream.ErrStreamNotFound},
		"object":         {info("B", "none"), jetstream.ErrObjectNotFound},
		"deleted object": {info("B", "deleted"), jetstream.ErrObjectNotFound},
		"bucket":         {info("NONE", "x"), jetstream.ErrBucketNotFound},
		"bad bucket":     {info("B.>", "x"), jetstream.ErrInvalidStoreName},
		"no bucket":      {info("", "x"), jetstream.ErrInvalidStoreName},
		"no name":        {info("B", ""), jetstream.ErrNameRequired},
	} {
		if !errors.Is(c.got, c.want) {
			t.Errorf("%s: %v, want %v", name, c.got, c.want)
		}
	}
}

func TestAnObjectIsReadToItsEndAndItsDigestCompared(t *testing.T) {
	t.Parallel()
	js := natstest.JetStream(t)
	ctx := t.Context()
	store, err := js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{Bucket: "B", Storage: jetstream.MemoryStorage})
	if err != nil {
		t.Fatal(err)
	}
	long := make([]byte, 300_000) // three chunks
	if _, err := rand.Read(long); err != nil {
		t.Fatal(err)
	}
	open := func(name string, data []byte) (*jetstream.ObjectInfo, io.Reader) {
		t.Helper()
		if _, err := store.PutBytes(ctx, name, data); err != nil {
			t.Fatal(err)
		}
		info, err := leader.ObjectInfo(ctx, js, "B", name)
		if err != nil || info.Size != uint64(len(data)) {
			t.Fatalf("%+v %v", info, err)
		}
		body, err := leader.OpenObject(ctx, js, info)
		if err != nil {
			t.Fatal(err)
		}
		return info, body
	}
	_, body := open("dir/long name ü", long)
	if err := iotest.TestReader(body, long); err != nil {
		t.Error(err)
	}
	if _, body = open("empty", nil); iotest.TestReader(body, nil) != nil {
		t.Error("an empty object has bytes")
	}
	info, body := open("spoiled", []byte("ab"))
	info.Digest = jetstream.GetObjectDigestValue(sha256.New())
	if _, err := io.ReadAll(body); !errors.Is(err, jetstream.ErrDigestMismatch) {
		t.Errorf("another digest: %v", err)
	}
	_, body = open("replaced", []byte("old"))
	open("replaced", []byte("new"))
	if data, err := io.ReadAll(body); err == nil {
		t.Errorf("an object that was replaced: read %q", data)
	}
}

// In the leader's answer a message is larger than any that a client may publish,
// and it comes from another node.
func TestTheLargestMessageIsReadToo(t *testing.T) {
	t.Parallel()
	c := natstest.Cluster(t, 3)
	ctx, cancel := context.WithTimeout(t.Context(), natstest.Patience)
	defer cancel()
	first, err := jetstream.New(natstest.ConnectURL(t, c.ClientURL(0)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := first.CreateStream(ctx, jetstream.StreamConfig{Name: "S", Subjects: []string{"s.*"}, Replicas: 3, Storage: jetstream.MemoryStorage}); err != nil {
		t.Fatal(err)
	}
	data := make([]byte, first.Conn().MaxPayload())
	if _, err := first.Publish(ctx, "s.a", data); err != nil {
		t.Fatal(err)
	}
	for i := range c.Size() {
		js, err := jetstream.New(natstest.ConnectURL(t, c.ClientURL(i)))
		if err != nil {
			t.Fatal(err)
		}
		if m, err := leader.Last(ctx, js, "S", "s.a"); err != nil || len(m.Data) != len(data) {
			t.Errorf("read at node %d: %v", i, err)
		}
	}
}

func TestAReadWithoutAnAnswerEndsWithItsContext(t *testing.T) {
	t.Parallel()
	nc := natstest.Connect(t, natstest.Start(t))
	js, err := jetstream.NewWithAPIPrefix(nc, "nobody.answers")
	if err != nil {
		t.Fatal(err)
	}
	gone := errors.New("the lease is lost")
	ctx, cancel := context.WithCancelCause(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := leader.Message(ctx, js, "S", 1)
		ended <- err
	}()
	cancel(gone)
	if err := <-ended; !errors.Is(err, gone) {
		t.Error(err)
	}
	nc.Close()
	if _, err := leader.Message(t.Context(), js, "S", 1); !errors.Is(err, nats.ErrConnectionClosed) {
		t.Error(err)
	}
}

// The client never fails a request that was lost: it waits until its context ends.
func TestARequestThatWasLostHoldsUpNoObject(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	js := natstest.Losing(t, s.ClientURL(), "STREAM.INFO", "STREAM.MSG", "DIRECT.GET")
	ctx, cancel := context.WithTimeout(t.Context(), 25*time.Second)
	defer cancel()
	direct, err := jetstream.New(js.Conn())
	if err != nil {
		t.Fatal(err)
	}
	store, err := direct.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{Bucket: "B", Storage: jetstream.MemoryStorage})
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 300_000) // three chunks
	if _, err := store.PutBytes(ctx, "o", data); err != nil {
		t.Fatal(err)
	}
	info, err := leader.ObjectInfo(ctx, js, "B", "o")
	if err != nil {
		t.Fatal(err)
	}
	body, err := leader.OpenObject(ctx, js, info)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(body); err != nil || len(got) != len(data) {
		t.Errorf("read %d bytes: %v", len(got), err)
	}
}

func TestReadsGoToTheClientsOwnAPI(t *testing.T) {
	t.Parallel()
	js := prepare(t)
	nc := js.Conn()
	for _, api := range []string{"$JS.hub.API.", "an.import."} {
		sub, err := nc.Subscribe(api+"STREAM.MSG.GET.S", func(m *nats.Msg) {
			answer, err := nc.Request("$JS.API.STREAM.MSG.GET.S", m.Data, 5*time.Second)
			if err == nil {
				err = m.Respond(answer.Data)
			}
			if err != nil {
				t.Error(err)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := sub.Unsubscribe(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
				t.Error(err)
			}
		})
	}
	domain, err := jetstream.NewWithDomain(nc, "hub")
	if err != nil {
		t.Fatal(err)
	}
	prefixed, err := jetstream.NewWithAPIPrefix(nc, "an.import")
	if err != nil {
		t.Fatal(err)
	}
	for _, js := range []jetstream.JetStream{domain, prefixed} {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		if m, err := leader.Message(ctx, js, "S", 1); err != nil || m.Sequence != 1 {
			t.Errorf("%+v %v", m, err)
		}
		cancel()
	}
}
