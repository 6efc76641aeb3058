package ack

import (
	"context"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Sender publishes messages whose acknowledgements are awaited later. One
// subscription takes them all; it is made with the first message and lasts as long as
// the connection. A Sender starts no goroutine and no timer for a message. It is safe
// for concurrent use.
type Sender struct {
	nc *nats.Conn

	mu      sync.Mutex
	prefix  string // of reply subjects; "": there is no subscription yet
	serial  uint64 // of the last message
	waiting map[uint64]chan *nats.Msg
}

// mostWaiting is how many messages later a reply is not waited for any more: it was
// lost, and so was the one who should have waited for it.
const mostWaiting = 1 << 14

// NewSender returns a Sender for messages over nc.
func NewSender(nc *nats.Conn) *Sender {
	return &Sender{nc: nc, waiting: make(map[uint64]chan *nats.Msg)}
}

// Sent is a message whose acknowledgement may be waited for.
type Sent struct {
	sender *Sender
	serial uint64
	reply  chan *nats.Msg
}

// Send publishes msg, whose Reply it sets, and does not wait. msg may be published
// again, but not be changed, once Send has returned.
func (s *Sender) Send(msg *nats.Msg) (Sent, error) {
	sent, prefix, err := s.expect()
	if err != nil {
		return Sent{}, err
	}
	subject := make([]byte, 0, len(prefix)+16)
	msg.Reply = string(strconv.AppendUint(append(subject, prefix...), sent.serial, 36))
	if err := s.nc.PublishMsg(msg); err != nil {
		s.forget(sent.serial)
		return Sent{}, err
	}
	return sent, nil
}

// expect prepares for one more reply.
func (s *Sender) expect() (sent Sent, prefix string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.prefix == "" {
		prefix := s.nc.NewInbox() + "."
		if _, err := s.nc.Subscribe(prefix+"*", s.receive); err != nil {
			return Sent{}, "", err
		}
		s.prefix = prefix
	}
	s.serial++
	if s.serial%mostWaiting == 0 {
		for serial := range s.waiting {
			if serial+mostWaiting <= s.serial {
				delete(s.waiting, serial)
			}
		}
	}
	sent = Sent{s, s.serial, make(chan *nats.Msg, 1)}
	s.waiting[sent.serial] = sent.reply
	return sent, s.prefix, nil
}

func (s *Sender) receive(msg *nats.Msg) {
	s.mu.Lock()
	serial, err := strconv.ParseUint(msg.Subject[min(len(s.prefix), len(msg.Subject)):], 36, 64)
	reply := s.waiting[serial]
	delete(s.waiting, serial)
	s.mu.Unlock()
	if err == nil && reply != nil {
		reply <- msg // there is room: it was taken out of the map
	}
}

func (s *Sender) forget(serial uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.waiting, serial)
}

// Wait returns once the stream has answered, ctx ends, or limit has passed, which is
// context.DeadlineExceeded. The errors are those of Publish. Call it once.
func (s Sent) Wait(ctx context.Context, limit time.Duration) (jetstream.PubAck, error) {
	select {
	case reply := <-s.reply: // it has come meanwhile, as a rule
		return read(reply)
	default:
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	var err error
	select {
	case reply := <-s.reply:
		return read(reply)
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-timer.C:
		err = context.DeadlineExceeded
	}
	s.sender.forget(s.serial)
	return jetstream.PubAck{}, err
}

// noResponders is the status with which the server answers for a stream that is not
// there.
const noResponders = "503"

func read(reply *nats.Msg) (jetstream.PubAck, error) {
	if len(reply.Data) == 0 && reply.Header.Get("Status") == noResponders {
		return jetstream.PubAck{}, jetstream.ErrNoStreamResponse
	}
	return Parse(reply.Data)
}
