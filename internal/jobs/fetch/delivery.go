package fetch

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// ackPrefix begins the reply subject of each message from a consumer with acks.
// The server sets it; a publisher can't.
const ackPrefix = "$JS.ACK."

// ackLimit bounds DoubleAck if its context has no deadline.
const ackLimit = 5 * time.Second

// Delivery is a fetched message. It may be copied.
type Delivery struct {
	Queue string
	From  time.Time // before the server delivered it: its ack wait ends Window after that at the earliest

	msg  *nats.Msg
	meta *jetstream.MsgMetadata
	nc   *nats.Conn
}

var _ jetstream.Msg = Delivery{}

// Metadata returns the contents of the reply subject. Its error is always nil.
func (d Delivery) Metadata() (*jetstream.MsgMetadata, error) { return d.meta, nil }

// Data returns the body.
func (d Delivery) Data() []byte { return d.msg.Data }

// Headers returns the publisher's headers, nil if there are none.
func (d Delivery) Headers() nats.Header { return d.msg.Header }

// Subject returns the subject that the message was published to.
func (d Delivery) Subject() string { return d.msg.Subject }

// Reply returns the subject of acks.
func (d Delivery) Reply() string { return d.msg.Reply }

// Ack acknowledges the message without waiting for the server.
func (d Delivery) Ack() error { return d.publish("+ACK") }

// DoubleAck acknowledges the message and waits until the server has confirmed it,
// ctx ends or, if ctx has no deadline, 5 s have passed. The error is
// nats.ErrNoResponders if no server has the consumer.
func (d Delivery) DoubleAck(ctx context.Context) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, ackLimit)
		defer cancel()
	}
	if _, err := d.nc.RequestWithContext(ctx, d.msg.Reply, []byte("+ACK")); err != nil {
		return fmt.Errorf("acknowledge message %d: %w", d.meta.Sequence.Stream, err)
	}
	return nil
}

// Nak returns the message for redelivery at once.
func (d Delivery) Nak() error { return d.publish("-NAK") }

// NakWithDelay returns the message for redelivery after delay.
func (d Delivery) NakWithDelay(delay time.Duration) error {
	if delay <= 0 {
		return d.Nak()
	}
	return d.publish(`-NAK {"delay":` + strconv.FormatInt(delay.Nanoseconds(), 10) + `}`)
}

// InProgress restarts the ack wait.
func (d Delivery) InProgress() error { return d.publish("+WPI") }

// Term ends the deliveries of the message. In a work queue it also removes the
// message.
func (d Delivery) Term() error { return d.publish("+TERM") }

// TermWithReason is Term with a text for the server's advisory.
func (d Delivery) TermWithReason(reason string) error { return d.publish("+TERM " + reason) }

func (d Delivery) publish(what string) error { return d.nc.Publish(d.msg.Reply, []byte(what)) }

// parseAck parses an ack subject, which has one of the forms
//
//	$JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>
//	$JS.ACK.<domain or _>.<account hash>.<stream>.<and so on>[.<more>]
func parseAck(reply string) (*jetstream.MsgMetadata, error) {
	const short, long = 7, 9 // tokens after the prefix; the long form may have more
	var tokens [long]string
	n := strings.Count(reply[len(ackPrefix):], ".") + 1
	rest := reply[len(ackPrefix):]
	meta := &jetstream.MsgMetadata{}
	at := tokens[2:]
	switch {
	case n == short:
	case n >= long:
		at = tokens[:]
	default:
		return nil, fmt.Errorf("ack subject %q has %d tokens", reply, n+2)
	}
	for i := range at {
		at[i], rest, _ = strings.Cut(rest, ".")
	}
	if tokens[0] != "_" {
		meta.Domain = tokens[0]
	}
	meta.Stream, meta.Consumer = tokens[2], tokens[3]
	var numbers [5]uint64
	for i, token := range tokens[4:] {
		number, err := strconv.ParseUint(token, 10, 63)
		if err != nil {
			return nil, fmt.Errorf("ack subject %q: %w", reply, err)
		}
		numbers[i] = number
	}
	meta.NumDelivered, meta.NumPending = numbers[0], numbers[4]
	meta.Sequence = jetstream.SequencePair{Stream: numbers[1], Consumer: numbers[2]}
	meta.Timestamp = time.Unix(0, int64(numbers[3])) // parsed as 63 bits
	return meta, nil
}
