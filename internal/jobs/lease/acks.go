package lease

import (
	"context"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// progress is the acknowledgement that begins a message's ack wait anew.
var progress = []byte("+WPI")

// acks extends the ack waits of the messages in hand, so that JetStream does not
// deliver them again for nothing. Nothing depends on an extension that is lost.
type acks struct {
	nc    *nats.Conn
	every time.Duration
	// sending is held while one extension is sent, which may last as long as the
	// connection takes nothing.
	sending sync.Mutex
	mu      sync.Mutex // guards what follows
	held    map[*Message]time.Time
}

func newAcks(nc *nats.Conn, window time.Duration) *acks {
	return &acks{nc: nc, every: window / 3, held: make(map[*Message]time.Time)}
}

// Message is a message whose ack wait is extended.
type Message struct {
	all   *acks
	reply string
}

// Track extends the ack wait of the message with this reply subject until
// Release.
func (m *Manager) Track(reply string) *Message {
	x := &Message{all: m.acks, reply: reply}
	m.acks.mu.Lock()
	m.acks.held[x] = time.Now()
	m.acks.mu.Unlock()
	// At once: JetStream remembers a delivery with the time at which the job was
	// published, so a job that queued for long would be delivered again as soon
	// as the consumer's leader changes.
	_ = m.acks.nc.Publish(reply, progress)
	return x
}

// Release ends the extension. None is on its way any more when it returns: one
// that came after a delayed nak would put off the delivery. It may be called
// again.
func (x *Message) Release() {
	x.all.sending.Lock()
	defer x.all.sending.Unlock()
	x.all.mu.Lock()
	defer x.all.mu.Unlock()
	delete(x.all.held, x)
}

func (a *acks) run(ctx context.Context) {
	ticker := time.NewTicker(min(max(a.every/10, 20*time.Millisecond), time.Second))
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			for _, x := range a.due(time.Now()) {
				a.extend(x)
			}
		}
	}
}

func (a *acks) due(now time.Time) []*Message {
	a.mu.Lock()
	defer a.mu.Unlock()
	var due []*Message
	for x, sent := range a.held {
		if now.Sub(sent) >= a.every {
			due = append(due, x)
		}
	}
	return due
}

func (a *acks) extend(x *Message) {
	a.sending.Lock()
	defer a.sending.Unlock()
	a.mu.Lock()
	_, held := a.held[x]
	if held {
		a.held[x] = time.Now()
	}
	a.mu.Unlock()
	if held {
		_ = a.nc.Publish(x.reply, progress) // a lost one is followed by the next
	}
}
