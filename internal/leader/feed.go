package leader

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"

	"avatarworker/internal/errors"
	"avatarworker/internal/topology"
)

const (
	// feedExpires is how long the server keeps one request for messages.
	feedExpires = 30 * time.Second
	// feedHeartbeat is how often the server confirms that a request still waits.
	feedHeartbeat = 5 * time.Second
	// feedSilence is the time without a message from the server after which the
	// request is assumed lost.
	feedSilence = 2*feedHeartbeat + 2*time.Second
	// feedInactive is how long the server keeps a consumer that nothing reads.
	feedInactive = 30 * time.Second

	feedWindow = 64
)

// FeedConfig describes what a Feed reads.
type FeedConfig struct {
	Stream      string
	Subject     string // may have wildcards
	From        uint64 // sequence of the first message wanted; 0: the first there is
	HeadersOnly bool   // leave out the bodies
	Window      int    // most messages fetched ahead; 0: 64
}

// Feed reads a subject's messages in order, each once. It survives lost
// connections, elections and restarts of the server.
//
// It replaces the client's ordered consumer, which takes any empty message with a
// Status header for one of the server: a user who publishes such a message makes
// it recreate its consumer endlessly. A message of the stream always has a reply
// subject for its acknowledgement; the server's own messages never have one.
type Feed struct {
	js      jetstream.JetStream
	cfg     FeedConfig
	out     chan *jetstream.RawStreamMsg
	life    context.Context
	end     context.CancelFunc
	changed chan nats.Status
	err     error // set before out is closed

	// The consumer in use, and the request to it.
	consumer  string
	sub       *nats.Subscription
	in        chan *nats.Msg
	pulls     int
	reply     string // of the last request
	wanted    int    // messages still to come
	most      int    // messages that one request may be for
	delivered uint64 // consumer sequence of the last message
	stale     bool   // the consumer has to be replaced

	next     uint64 // stream sequence that comes next at the earliest
	buffered []*jetstream.RawStreamMsg
}

// OpenFeed starts reading. The caller must close the Feed.
func OpenFeed(ctx context.Context, js jetstream.JetStream, cfg FeedConfig) (*Feed, error) {
	if cfg.Window <= 0 {
		cfg.Window = feedWindow
	}
	f := &Feed{
		js: js, cfg: cfg, next: max(cfg.From, 1), out: make(chan *jetstream.RawStreamMsg),
		changed: js.Conn().StatusChanged(nats.CONNECTED, nats.CLOSED),
	}
	f.life, f.end = context.WithCancel(context.WithoutCancel(ctx)) // Close ends it
	if err := f.subscribe(ctx); err != nil {
		f.end()
		js.Conn().RemoveStatusListener(f.changed)
		return nil, fmt.Errorf("read %s: %w", cfg.Subject, err)
	}
	go f.run()
	return f, nil
}

// Messages returns the channel of messages. It is closed when the Feed ends; see
// Err.
func (f *Feed) Messages() <-chan *jetstream.RawStreamMsg { return f.out }

// Err returns why the channel was closed, or nil after Close.
func (f *Feed) Err() error { return f.err }

// Close stops reading. The server removes the consumer by itself.
func (f *Feed) Close() {
	f.end()
	for range f.out { // until run has returned
	}
}

func (f *Feed) run() {
	defer close(f.out)
	defer f.js.Conn().RemoveStatusListener(f.changed)
	defer func() { f.unsubscribe() }()
	silence := time.NewTimer(feedSilence)
	defer silence.Stop()
	for {
		// Deliver what was received before requesting the rest again.
		if f.stale && len(f.buffered) == 0 {
			if err := f.renew(); err != nil {
				if f.life.Err() == nil {
					f.err = err
				}
				return
			}
		}
		if !f.stale && f.wanted == 0 && len(f.buffered) < f.cfg.Window {
			f.pull()
			silence.Reset(feedSilence)
			if f.stale {
				continue
			}
		}
		if !f.wait(silence) {
			return
		}
	}
}

// wait waits for the next event. It returns false if the Feed is closed.
func (f *Feed) wait(silence *time.Timer) bool {
	var out chan<- *jetstream.RawStreamMsg
	var first *jetstream.RawStreamMsg
	if len(f.buffered) > 0 {
		out, first = f.out, f.buffered[0]
	}
	var lost <-chan time.Time // no timeout without a request
	if f.wanted > 0 {
		lost = silence.C
	}
	select {
	case <-f.life.Done():
		return false
	case out <- first:
		f.buffered[0] = nil
		f.buffered = f.buffered[1:]
	case msg := <-f.in:
		silence.Reset(feedSilence)
		f.take(msg)
	case _, open := <-f.changed: // messages sent during the outage are lost; a closed connection ends the Feed
		f.stale = true
		if !open {
			f.changed = nil
		}
	case <-lost:
		f.stale = true
	}
	return true
}

// take handles a received message. Messages of the stream have a reply subject
// for their acknowledgement.
func (f *Feed) take(msg *nats.Msg) {
	if f.stale {
		return
	}
	if !strings.HasPrefix(msg.Reply, "$JS.ACK.") {
		f.status(msg)
		return
	}
	meta, err := msg.Metadata()
	if err != nil || meta.Sequence.Consumer != f.delivered+1 {
		f.stale = true // one is missing
		return
	}
	f.delivered++
	f.wanted--
	f.next = meta.Sequence.Stream + 1
	f.buffered = append(f.buffered, &jetstream.RawStreamMsg{
		Subject: msg.Subject, Sequence: meta.Sequence.Stream, Header: msg.Header, Data: msg.Data, Time: meta.Timestamp,
	})
}

// status handles the server's status of a request.
func (f *Feed) status(msg *nats.Msg) {
	if msg.Subject != f.reply {
		return
	}
	switch msg.Header.Get("Status") {
	case "100": // the request still waits
		if last, err := strconv.ParseUint(msg.Header.Get("Nats-Last-Consumer"), 10, 64); err == nil && last > f.delivered {
			f.stale = true // messages were lost
		}
	case "404", "408": // the request is over
		f.wanted = 0
	default:
		f.stale = true
	}
}

// pull requests as many messages as there is room for.
func (f *Feed) pull() {
	f.pulls++
	f.wanted = min(f.cfg.Window-len(f.buffered), f.most)
	f.reply = strings.TrimSuffix(f.sub.Subject, "*") + strconv.Itoa(f.pulls)
	body, err := json.Marshal(map[string]int64{
		"batch": int64(f.wanted), "expires": int64(feedExpires), "idle_heartbeat": int64(feedHeartbeat),
	})
	if err == nil {
		err = f.js.Conn().PublishRequest(topology.APIPrefix(f.js)+"CONSUMER.MSG.NEXT."+f.cfg.Stream+"."+f.consumer, f.reply, body)
	}
	if err != nil {
		f.wanted, f.stale = 0, true
	}
}

// renew replaces the consumer, and tries until that succeeds.
func (f *Feed) renew() error {
	for {
		select {
		case <-f.life.Done():
			return f.life.Err()
		case <-time.After(retryPause): // the fault may persist
		}
		f.unsubscribe()
		err := f.subscribe(f.life)
		if err == nil || permanent(err) || f.life.Err() != nil {
			return err
		}
	}
}

// subscribe creates a consumer that starts with the next message.
func (f *Feed) subscribe(ctx context.Context) error {
	// Room for a window and for the server's own messages. run always receives,
	// except while it replaces the consumer.
	in := make(chan *nats.Msg, 2*f.cfg.Window+16)
	sub, err := f.js.Conn().ChanSubscribe(f.js.Conn().NewInbox()+".*", in)
	if err != nil {
		return err
	}
	cfg := jetstream.ConsumerConfig{
		FilterSubject: f.cfg.Subject, HeadersOnly: f.cfg.HeadersOnly,
		DeliverPolicy: jetstream.DeliverAllPolicy, AckPolicy: jetstream.AckNonePolicy, MaxDeliver: -1,
		MemoryStorage: true, Replicas: 1, InactiveThreshold: feedInactive,
	}
	if f.next > 1 {
		cfg.DeliverPolicy, cfg.OptStartSeq = jetstream.DeliverByStartSequencePolicy, f.next
	}
	err = Try(ctx, f.cfg.Stream, func(ctx context.Context) error {
		cfg.Name = nuid.Next() // a request whose reply was lost may have succeeded
		c, err := f.js.CreateConsumer(ctx, f.cfg.Stream, cfg)
		if err == nil {
			f.most = topology.AtMost(f.cfg.Window, c.CachedInfo().Config)
		}
		return err
	})
	if err != nil {
		return errors.Join(err, sub.Unsubscribe())
	}
	f.consumer, f.sub, f.in = cfg.Name, sub, in
	f.reply, f.wanted, f.delivered, f.stale = "", 0, 0, false
	return nil
}

// unsubscribe ends the subscription, and with it the request.
func (f *Feed) unsubscribe() {
	if f.sub == nil {
		return
	}
	_ = f.sub.Unsubscribe() // an error says that the connection is closed
	f.sub, f.in = nil, nil
}
