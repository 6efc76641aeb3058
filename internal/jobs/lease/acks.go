package lease

import (
	"context"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// progress is the acknowledgement that restarts a message's ack wait.
var progress = []byte("+WPI")

// ackExtender extends the ack waits of tracked messages, so that JetStream does
// not deliver them again needlessly. Losing an extension does no harm.
type ackExtender struct {
	nc       *nats.Conn
	interval time.Duration
	// sending is held while one extension is sent, which may block while the
	// connection is stalled.
	sending sync.Mutex
	mu      sync.Mutex // guards what follows
	tracked map[*Message]time.Time
}

func newAckExtender(nc *nats.Conn, window time.Duration) *ackExtender {
	return &ackExtender{nc: nc, interval: window / 3, tracked: make(map[*Message]time.Time)}
}

// Message is a message whose ack wait is extended.
type Message struct {
	all   *ackExtender
	reply string
}

// Track extends the ack wait of the message with this reply subject until
// Release.
func (m *Manager) Track(reply string) *Message {
	x := &Message{all: m.acks, reply: reply}
	m.acks.mu.Lock()
	m.acks.tracked[x] = time.Now()
	m.acks.mu.Unlock()
	// Extend at once. JetStream counts a delivery from the time the job was
	// published, so without this a job that queued for long would be delivered
	// again when the consumer's leader changes. If it fails, the next extension follows.
	_ = m.acks.nc.Publish(reply, progress)
	return x
}

// Release stops the extensions. None is in flight when it returns, because one
// that came after a delayed nak would cancel the delay. It may be called again.
func (x *Message) Release() {
	x.all.sending.Lock()
	defer x.all.sending.Unlock()
	x.all.mu.Lock()
	defer x.all.mu.Unlock()
	delete(x.all.tracked, x)
}

func (a *ackExtender) run(ctx context.Context) {
	ticker := time.NewTicker(min(max(a.interval/10, 20*time.Millisecond), time.Second))
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

func (a *ackExtender) due(now time.Time) []*Message {
	a.mu.Lock()
	defer a.mu.Unlock()
	var due []*Message
	for x, sent := range a.tracked {
		if now.Sub(sent) >= a.interval {
			due = append(due, x)
		}
	}
	return due
}

func (a *ackExtender) extend(x *Message) {
	a.sending.Lock()
	defer a.sending.Unlock()
	a.mu.Lock()
	_, held := a.tracked[x]
	if held {
		a.tracked[x] = time.Now()
	}
	a.mu.Unlock()
	if held {
		_ = a.nc.Publish(x.reply, progress) // a lost one is followed by the next
	}
}
