package dlq

import (
	"context"
	"encoding/json"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/topology"
)

const (
	// ackPrefix begins the reply subject of what a consumer delivers, and of
	// nothing else.
	ackPrefix = "$JS.ACK."
	// pullTime is how long the server may take to send a batch.
	pullTime = 10 * time.Second
)

// puller requests batches from a consumer over its own inbox. The client's Fetch
// takes a message without a body that has a Status header for an answer of the
// server, and in a list every letter is without its body.
type puller struct {
	nc      *nats.Conn
	sub     *nats.Subscription
	inbox   chan *nats.Msg
	subject string
	batch   int
}

func newPuller(js jetstream.JetStream, consumer *jetstream.ConsumerInfo, batch int) (*puller, error) {
	p := &puller{
		nc: js.Conn(), batch: batch, inbox: make(chan *nats.Msg, batch+1), // the last is the server's answer
		subject: topology.APIPrefix(js) + "CONSUMER.MSG.NEXT." + consumer.Stream + "." + consumer.Name,
	}
	var err error
	p.sub, err = p.nc.ChanSubscribe(p.nc.NewInbox(), p.inbox)
	return p, err
}

func (p *puller) close() { _ = p.sub.Unsubscribe() } // it fails where the connection is closed: then it is gone too

// request requests a batch of what is there now.
func (p *puller) request() error {
	request, err := json.Marshal(struct {
		Batch  int  `json:"batch"`
		NoWait bool `json:"no_wait"`
	}{p.batch, true})
	if err != nil {
		return err
	}
	return p.nc.PublishRequest(p.subject, p.sub.Subject, request)
}

// next returns the next letter of the batch, nil after the last one.
func (p *puller) next(ctx context.Context) (*nats.Msg, error) {
	limit := time.NewTimer(pullTime)
	defer limit.Stop()
	select {
	case msg, open := <-p.inbox:
		switch {
		case !open:
			return nil, nats.ErrConnectionClosed
		case strings.HasPrefix(msg.Reply, ackPrefix):
			return msg, nil
		}
		return nil, nil // the server's answer: nothing is left, or the consumer is gone
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-limit.C:
		return nil, errInterrupted()
	}
}
