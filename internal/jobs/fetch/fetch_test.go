package fetch_test

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/fetch"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
)

func TestMain(m *testing.M) { natstest.Main(m) }

const patience = 60 * time.Second

// env is a work-queue stream S, on subjects s.*, with a consumer for each queue.
type env struct {
	t   testing.TB
	js  jetstream.JetStream
	got chan fetch.Delivery
	bad chan error // what Health was called with; nil: served again
}

func newEnv(t testing.TB, js jetstream.JetStream, queues ...string) *env {
	t.Helper()
	return newEnvIn(t, js, jetstream.MemoryStorage, queues...)
}

func newEnvIn(t testing.TB, js jetstream.JetStream, storage jetstream.StorageType, queues ...string) *env {
	t.Helper()
	e := &env{t: t, js: js, got: make(chan fetch.Delivery, 10000), bad: make(chan error, 10000)}
	_, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s.*"}, Retention: jetstream.WorkQueuePolicy, Storage: storage})
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range queues {
		if err := e.consumer(t.Context(), q); err != nil {
			t.Fatal(err)
		}
	}
	return e
}

func (e *env) consumer(ctx context.Context, queue string) error {
	_, err := e.js.CreateOrUpdateConsumer(ctx, "S", jetstream.ConsumerConfig{
		Durable: queue, FilterSubject: "s." + queue, AckPolicy: jetstream.AckExplicitPolicy, AckWait: time.Minute, MaxAckPending: -1,
	})
	return err
}

func (e *env) options(places int, queues ...string) fetch.Options {
	o := fetch.Options{
		JS: e.js, Stream: "S", Slots: places, Window: time.Minute, Consumer: e.consumer,
		Handle: func(d fetch.Delivery) { e.got <- d },
		Health: func(_ string, err error) { e.bad <- err },
		Log:    zerolog.Nop(),
	}
	for _, q := range queues {
		o.Queues = append(o.Queues, fetch.Queue{Name: q})
	}
	return o
}

// start runs a fetcher until stop is called or the test ends.
func (e *env) start(o fetch.Options) (*fetch.Fetcher, func()) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(e.t.Context()))
	f := fetch.New(o)
	ended := make(chan struct{})
	go func() { defer close(ended); f.Run(ctx) }()
	stop := func() {
		cancel()
		receive(e.t, ended, "the end of Run")
	}
	e.t.Cleanup(stop)
	return f, stop
}

func receive[T any](t testing.TB, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("%s did not come", what)
		panic("unreachable")
	}
}

func (e *env) publish(queue string, n int, header nats.Header, body string) {
	e.t.Helper()
	for range n {
		if _, err := e.js.PublishMsgAsync(&nats.Msg{Subject: "s." + queue, Header: header, Data: []byte(body)}); err != nil {
			e.t.Fatal(err)
		}
	}
	receive(e.t, e.js.PublishAsyncComplete(), "the stream's acknowledgements")
}

func (e *env) ack(d fetch.Delivery) {
	e.t.Helper()
	if err := d.DoubleAck(e.t.Context()); err != nil {
		e.t.Error(err)
	}
}

// fault waits until Health gets a fault that matches.
func (e *env) fault(match func(error) bool) {
	e.t.Helper()
	for {
		if err := receive(e.t, e.bad, "the fault"); err != nil && match(err) {
			return
		}
	}
}

func (e *env) served() {
	e.t.Helper()
	for {
		if receive(e.t, e.bad, "that the queue is served again") == nil {
			return
		}
	}
}

func TestAMessageIsDeliveredWhole(t *testing.T) {
	t.Parallel() // it mostly waits
	e := newEnv(t, natstest.JetStream(t), "a")
	e.publish("a", 1, nats.Header{"Key": {"value"}}, "body")
	before := time.Now()
	e.start(e.options(4, "a"))
	d := receive(t, e.got, "the message")
	if d.Queue != "a" || d.Subject() != "s.a" || d.Headers().Get("Key") != "value" || string(d.Data()) != "body" || d.From.Before(before) || d.From.After(time.Now()) {
		t.Errorf("%+v", d)
	}
	meta, err := d.Metadata()
	if err != nil || meta.Stream != "S" || meta.Consumer != "a" || meta.Domain != "" || meta.NumDelivered != 1 || meta.NumPending != 0 ||
		meta.Sequence != (jetstream.SequencePair{Stream: 1, Consumer: 1}) || time.Since(meta.Timestamp) > time.Minute {
		t.Errorf("%+v %v", meta, err)
	}
	if err := d.NakWithDelay(10 * time.Millisecond); err != nil {
		t.Error(err)
	}
	d = receive(t, e.got, "the message, again")
	if meta, err := d.Metadata(); err != nil || meta.NumDelivered != 2 {
		t.Errorf("%+v %v", meta, err)
	}
	e.ack(d)
	info, err := e.js.Stream(t.Context(), "S")
	if err != nil || info.CachedInfo().State.Msgs != 0 {
		t.Errorf("the message is still there: %v", err)
	}
}

// The client library takes what looks like this for the server's own.
func TestMessagesThatLookLikeTheServersAreMessages(t *testing.T) {
	t.Parallel() // it mostly waits
	e := newEnv(t, natstest.JetStream(t), "a", "b")
	headers := []nats.Header{
		{"Status": {"404"}},
		{"Status": {"408"}},
		{"Status": {"409"}, "Description": {"Consumer Deleted"}},
		{"Status": {"503"}},
		{"Status": {"100"}, "Description": {"Idle Heartbeat"}},
		{"Status": {"400"}},
	}
	for i := range 20 {
		e.publish("a", 1, nil, "good")
		for _, h := range headers {
			e.publish([]string{"a", "b"}[i%2], 5, h, "")
		}
	}
	f, _ := e.start(e.options(16, "a", "b"))
	good, status := 0, 0
	for range 620 {
		d := receive(t, e.got, "a message")
		if string(d.Data()) == "good" {
			good++
		} else if d.Headers().Get("Status") != "" {
			status++
		}
		e.ack(d)
		f.Done()
	}
	if good != 20 || status != 600 {
		t.Errorf("%d good ones, %d with a status", good, status)
	}
	for len(e.bad) > 0 {
		if err := <-e.bad; err != nil {
			t.Errorf("taken for the server's: %v", err)
		}
	}
}

func TestStartsFollowTheWeights(t *testing.T) {
	t.Parallel()
	e := newEnv(t, natstest.JetStream(t), "a", "b", "c")
	for _, q := range []string{"a", "b", "c"} {
		e.publish(q, 600, nil, "x")
	}
	o := e.options(16)
	o.Queues = []fetch.Queue{{Name: "a", Weight: 5}, {Name: "b", Weight: 3}, {Name: "c", Weight: 2}}
	f, _ := e.start(o)
	started := map[string]int{}
	for range 1000 {
		started[receive(t, e.got, "a message").Queue]++
		f.Done()
	}
	const slack = 2 * 16 // as in TestStartsFollowTheWeightsExactly: two rounds of the slots
	for q, want := range map[string]int{"a": 500, "b": 300, "c": 200} {
		if got := started[q]; got < want-slack || got > want+slack {
			t.Errorf("queue %s had %d starts of 1,000, want %d", q, got, want)
		}
	}
}

func TestNoMoreIsFetchedThanThereArePlaces(t *testing.T) {
	t.Parallel()
	e := newEnv(t, natstest.JetStream(t), "a", "b")
	e.publish("a", 20, nil, "x")
	e.publish("b", 20, nil, "x")
	f, _ := e.start(e.options(5, "a", "b"))
	for taken := range 40 {
		if taken >= 5 {
			f.Done()
		}
		receive(t, e.got, "a message")
	}
	outstanding := 0
	for _, q := range []string{"a", "b"} {
		c, err := e.js.Consumer(t.Context(), "S", q)
		if err != nil {
			t.Fatal(err)
		}
		outstanding += c.CachedInfo().NumAckPending
	}
	if outstanding != 40 || len(e.got) != 0 {
		t.Errorf("%d are out, %d more came", outstanding, len(e.got))
	}
}

func TestPausedFetcherRequestsNothing(t *testing.T) {
	t.Parallel() // it mostly waits
	e := newEnv(t, natstest.JetStream(t), "a")
	f := fetch.New(e.options(4, "a"))
	f.Pause(true)
	f.Pause(true)
	f.Pause(false)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	requests := e.requests()
	go func() { defer close(ended); f.Run(ctx) }()
	e.publish("a", 1, nil, "x")
	select {
	case <-e.got:
		t.Error("a message came to a fetcher that is paused")
	case <-time.After(200 * time.Millisecond):
	}
	if n := requests.Load(); n != 0 {
		t.Errorf("%d requests", n)
	}
	f.Pause(false)
	receive(t, e.got, "the message")
	cancel()
	receive(t, ended, "the end of Run")
}

// requests counts the pull requests from now on.
func (e *env) requests() *atomic.Int64 {
	e.t.Helper()
	n := &atomic.Int64{}
	nc := e.js.Conn()
	sub, err := nc.Subscribe("$JS.API.CONSUMER.MSG.NEXT.>", func(*nats.Msg) { n.Add(1) })
	if err == nil {
		err = nc.Flush()
	}
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() {
		if err := sub.Unsubscribe(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
			e.t.Error(err)
		}
	})
	return n
}

func TestHundredsOfIdleQueuesCostLittleAndNoneWaitsLong(t *testing.T) {
	t.Parallel()
	var queues []string
	for i := range 300 {
		queues = append(queues, "q"+strconv.Itoa(i))
	}
	e := newEnv(t, natstest.JetStream(t), queues...)
	o := e.options(16, queues...)
	o.Consumer = func(context.Context, string) error { return nil }
	e.start(o)
	nc := e.js.Conn()
	// Each queue is found empty six times until it rests as long as it may. One
	// round more then takes such a rest.
	sent := func(n uint64) time.Time {
		for nc.Stats().OutMsgs < n {
			time.Sleep(time.Millisecond) //nolint:forbidigo // the client has no signal for it
		}
		return time.Now()
	}
	base := nc.Stats().OutMsgs
	from := sent(base + 6*300)
	if took := sent(base + 7*300).Sub(from); took < 700*time.Millisecond { // 1.5 s, less what this test notices late
		t.Errorf("300 requests in %s, want 200 a second at most", took)
	}
	published := time.Now()
	e.publish("q287", 1, nil, "x")
	receive(t, e.got, "the message")
	// 2 s and what a busy machine adds; TestNoQueueWaitsLongForAFreePlace is exact.
	if waited := time.Since(published); waited > natstest.Unhurried(10*time.Second) {
		t.Errorf("the message waited %s", waited)
	}
}

// relay lets a client's pull requests pass through the test, which may hold them.
func relay(t *testing.T, nc *nats.Conn, pass func(n int, forward func())) jetstream.JetStream {
	t.Helper()
	var mu sync.Mutex
	n := 0
	_, err := nc.Subscribe("relay.>", func(m *nats.Msg) {
		forward := func() {
			onward := &nats.Msg{Subject: jetstream.DefaultAPIPrefix + strings.TrimPrefix(m.Subject, "relay."), Reply: m.Reply, Data: m.Data}
			if err := nc.PublishMsg(onward); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
				t.Error(err)
			}
		}
		if !strings.Contains(m.Subject, "MSG.NEXT") {
			forward()
			return
		}
		mu.Lock()
		n++
		pass(n, forward)
		mu.Unlock()
	})
	if err != nil {
		t.Fatal(err)
	}
	js, err := jetstream.NewWithAPIPrefix(nc, "relay")
	if err != nil {
		t.Fatal(err)
	}
	return js
}

func TestAMessageThatComesAfterItsRequestIsHandedBack(t *testing.T) {
	t.Parallel() // it mostly waits
	nc := natstest.Connect(t, natstest.Start(t))
	held := make(chan func(), 1)
	js := relay(t, nc, func(n int, forward func()) {
		switch n {
		case 1: // goes on when the second request comes: the first is over then
			held <- forward
		case 2:
			(<-held)()
		default:
			forward()
		}
	})
	e := newEnv(t, js, "a")
	e.publish("a", 1, nil, "x")
	o := e.options(1, "a")
	o.Window = 2 * time.Second
	_, stop := e.start(o)
	d := receive(t, e.got, "the message")
	if meta, err := d.Metadata(); err != nil || meta.NumDelivered != 2 {
		t.Errorf("%+v %v: the first delivery was late, the second is the one to take", meta, err)
	}
	if age := time.Since(d.From); age > o.Window {
		t.Errorf("it was requested %s ago", age)
	}
	e.served()
	stop()
	if len(e.got) != 0 {
		t.Error("it was taken twice")
	}
}

func TestARequestWithoutAnAnswerEndsAndHealthSaysWhy(t *testing.T) {
	t.Parallel() // it mostly waits
	nc := natstest.Connect(t, natstest.Start(t))
	var lost atomic.Int64
	js := relay(t, nc, func(int, func()) { lost.Add(1) })
	e := newEnv(t, js, "a")
	o := e.options(2, "a")
	o.Window = 2 * time.Second
	from := time.Now()
	_, stop := e.start(o)
	for range 2 {
		e.fault(func(err error) bool {
			return strings.Contains(err.Error(), "did not answer") && strings.Contains(err.Error(), "relay.CONSUMER.MSG.NEXT.S.a")
		})
	}
	took := time.Since(from)
	stop()
	if n := lost.Load(); n < 2 || n > 3 || took < 2*time.Second {
		t.Errorf("%d requests in %s, want one every two seconds", n, took)
	}
	for len(e.bad) > 0 {
		if err := <-e.bad; err == nil {
			t.Error("a lookup that succeeds says nothing of requests")
		}
	}
}

func TestADeletedConsumerIsReportedAndMadeAgain(t *testing.T) {
	t.Parallel() // it mostly waits
	e := newEnv(t, natstest.JetStream(t), "a", "b")
	f, _ := e.start(e.options(4, "a", "b"))
	e.publish("a", 1, nil, "x")
	receive(t, e.got, "the first message")
	f.Done()
	if err := e.js.DeleteConsumer(t.Context(), "S", "a"); err != nil {
		t.Fatal(err)
	}
	// Which one it is depends on whether a request was waiting in that moment.
	e.fault(func(error) bool { return true })
	e.publish("a", 1, nil, "x")
	receive(t, e.got, "the message that was not acknowledged")
	receive(t, e.got, "the next message")
	e.served()
}

func TestAConsumerThatCannotBeMadeIsLookedUpWithPausesAndHoldsUpNoOther(t *testing.T) {
	t.Parallel()
	e := newEnv(t, natstest.JetStream(t), "b")
	e.publish("b", 50, nil, "x")
	refusal := errors.New("refused")
	o := e.options(1, "a", "b")
	var lookups atomic.Int64
	o.Consumer = func(ctx context.Context, queue string) error {
		if queue == "b" {
			return e.consumer(ctx, queue)
		}
		lookups.Add(1)
		return refusal
	}
	f, _ := e.start(o)
	e.fault(func(err error) bool { return errors.Is(err, refusal) })
	from := time.Now()
	for range 50 {
		receive(t, e.got, "a message of the other queue")
		f.Done()
	}
	e.fault(func(err error) bool { return errors.Is(err, refusal) })
	if n, most := lookups.Load(), int64(time.Since(from).Seconds())+2; n > most {
		t.Errorf("%d lookups, want %d at most", n, most)
	}
}

func TestEverythingArrivesAfterTheServerWasRestarted(t *testing.T) {
	t.Parallel() // it mostly waits
	o := natsserver.Options{StoreDir: t.TempDir(), Port: natstest.Port(t)}
	s, err := natsserver.Start(o)
	if err != nil {
		t.Fatal(err)
	}
	nc := natstest.ConnectURL(t, s.ClientURL(), nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond), nats.ReconnectBufSize(-1))
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	e := newEnvIn(t, js, jetstream.FileStorage, "a", "b")
	f, _ := e.start(e.options(4, "a", "b"))
	e.publish("a", 2, nil, "before")
	e.ack(receive(t, e.got, "a message"))
	f.Done()
	held := receive(t, e.got, "another message")
	if err := s.Shutdown(); err != nil {
		t.Fatal(err)
	}
	e.fault(func(error) bool { return true })
	natstest.StartWith(t, o)
	e.served()
	for !nc.IsConnected() {
		time.Sleep(time.Millisecond) //nolint:forbidigo // the connection has no signal for it
	}
	requests := e.requests()
	from := time.Now()
	e.ack(held)
	f.Done()
	e.publish("a", 5, nil, "after")
	e.publish("b", 5, nil, "after")
	for range 10 {
		d := receive(t, e.got, "a message")
		if string(d.Data()) != "after" {
			t.Errorf("%s came again", d.Data())
		}
		e.ack(d)
		f.Done()
	}
	// A request for each message, and a look at each queue every 50 ms.
	if n, most := requests.Load(), 40+40*time.Since(from).Seconds(); float64(n) > most {
		t.Errorf("%d requests, want %.0f at most", n, most)
	}
}

func TestRunEndsAfterWhatItHasRequested(t *testing.T) {
	t.Parallel()
	e := newEnv(t, natstest.JetStream(t), "a")
	requests := e.requests()
	ctx, cancel := context.WithCancel(t.Context())
	f := fetch.New(e.options(2, "a"))
	ended := make(chan struct{})
	go func() { defer close(ended); f.Run(ctx) }()
	for requests.Load() == 0 {
		time.Sleep(time.Millisecond) //nolint:forbidigo // the counter has no signal
	}
	cancel()
	e.publish("a", 3, nil, "x")
	receive(t, ended, "the end of Run")
	if len(e.got) != 2 || requests.Load() != 1 {
		t.Errorf("%d messages for %d requests, want the 2 of the request under way", len(e.got), requests.Load())
	}
}

func TestMaxAckPendingOfAnExistingConsumerStallsNoOtherQueue(t *testing.T) {
	t.Parallel() // it mostly waits
	e := newEnv(t, natstest.JetStream(t), "b")
	if _, err := e.js.CreateConsumer(t.Context(), "S", jetstream.ConsumerConfig{
		Durable: "a", FilterSubject: "s.a", AckPolicy: jetstream.AckExplicitPolicy, AckWait: time.Minute, MaxAckPending: 1,
	}); err != nil {
		t.Fatal(err)
	}
	o := e.options(3, "a", "b", "c", "d")
	o.Consumer = func(_ context.Context, queue string) error {
		if queue > "b" {
			return errors.New("refused")
		}
		return nil
	}
	f, _ := e.start(o)
	e.publish("a", 3, nil, "x")
	first := receive(t, e.got, "the message that is not acknowledged")
	for range 20 {
		e.publish("b", 1, nil, "x")
		from := time.Now()
		if d := receive(t, e.got, "a message"); d.Queue != "b" {
			t.Fatalf("of queue %s", d.Queue)
		}
		f.Done()
		if waited := time.Since(from); waited > natstest.Unhurried(10*time.Second) {
			t.Errorf("it waited %s", waited)
		}
	}
	e.ack(first)
	receive(t, e.got, "the next message of the limited queue")
}

// An account's or a server's limit for one request is in the consumer's
// configuration.
func TestAConsumerThatGivesFewToOneRequestIsAskedForFew(t *testing.T) {
	e := newEnv(t, natstest.JetStream(t), "b")
	if _, err := e.js.CreateConsumer(t.Context(), "S", jetstream.ConsumerConfig{
		Durable: "a", FilterSubject: "s.a", AckPolicy: jetstream.AckExplicitPolicy, AckWait: time.Minute, MaxAckPending: -1, MaxRequestBatch: 4,
	}); err != nil {
		t.Fatal(err)
	}
	for _, queues := range [][]string{{"a"}, {"a", "b"}} {
		o := e.options(16, queues...)
		o.Consumer = func(context.Context, string) error { return nil }
		_, stop := e.start(o)
		e.publish("a", 16, nil, "x")
		for range 16 { // all slots are used
			e.ack(receive(t, e.got, "a message"))
		}
		stop()
		for len(e.bad) > 0 {
			if err := <-e.bad; err != nil {
				t.Errorf("%d queues: %v", len(queues), err)
			}
		}
	}
}

// serve runs a server with options that natsserver does not have.
func serve(t *testing.T, o *server.Options) *server.Server {
	t.Helper()
	o.Host, o.Port, o.JetStream, o.StoreDir, o.NoLog, o.NoSigs = "127.0.0.1", -1, true, t.TempDir(), true, true
	s, err := server.NewServer(o)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(patience) {
		t.Fatal("NATS did not start")
	}
	return s
}

func TestTheInboxHasTheConnectionsOwnPrefix(t *testing.T) {
	t.Parallel() // it mostly waits
	s := serve(t, &server.Options{Users: []*server.User{{Username: "u", Password: "p", Permissions: &server.Permissions{
		Subscribe: &server.SubjectPermission{Allow: []string{"_INBOX_u.>"}},
	}}}})
	nc := natstest.ConnectURL(t, s.ClientURL(), nats.UserInfo("u", "p"), nats.CustomInboxPrefix("_INBOX_u"))
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	e := newEnv(t, js, "a")
	e.start(e.options(2, "a"))
	e.publish("a", 1, nil, "x")
	e.ack(receive(t, e.got, "the message"))
}

func TestADomainIsReachedThroughItsOwnAPI(t *testing.T) {
	t.Parallel() // it mostly waits
	for _, flags := range []map[string]bool{nil, {"js_ack_fc_v2": true}} {
		t.Run(fmt.Sprint(flags), func(t *testing.T) {
			s := serve(t, &server.Options{JetStreamDomain: "hub", FeatureFlags: flags})
			js, err := jetstream.NewWithDomain(natstest.ConnectURL(t, s.ClientURL()), "hub")
			if err != nil {
				t.Fatal(err)
			}
			e := newEnv(t, js, "a")
			f, _ := e.start(e.options(2, "a"))
			e.publish("a", 1, nats.Header{"Status": {"404"}}, "")
			d := receive(t, e.got, "the message")
			meta, err := d.Metadata()
			if err != nil || meta.Stream != "S" || meta.Consumer != "a" || meta.Sequence.Stream != 1 || meta.NumDelivered != 1 {
				t.Errorf("%s: %+v %v", d.Reply(), meta, err)
			}
			if flags != nil && meta.Domain != "hub" {
				t.Errorf("%s: domain %q", d.Reply(), meta.Domain)
			}
			e.ack(d)
			f.Done()
		})
	}
}

func TestAnAckThatCannotBeConfirmedIsAnError(t *testing.T) {
	t.Parallel()
	e := newEnv(t, natstest.JetStream(t), "a")
	_, stop := e.start(e.options(1, "a"))
	e.publish("a", 1, nil, "x")
	d := receive(t, e.got, "the message")
	stop()
	if err := e.js.DeleteStream(t.Context(), "S"); err != nil {
		t.Fatal(err)
	}
	if err := d.DoubleAck(t.Context()); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("without a consumer: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.DoubleAck(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("without time: %v", err)
	}
	e.js.Conn().Close()
	for name, err := range map[string]error{
		"nak": d.Nak(), "nak with delay": d.NakWithDelay(time.Second), "in progress": d.InProgress(),
		"term": d.Term(), "term with reason": d.TermWithReason("x"), "ack": d.Ack(), "double ack": d.DoubleAck(t.Context()),
	} {
		if !errors.Is(err, nats.ErrConnectionClosed) {
			t.Errorf("%s on a closed connection: %v", name, err)
		}
	}
}
