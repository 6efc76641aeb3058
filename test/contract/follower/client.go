package follower

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Client publishes and listens as a document says.
type Client struct {
	nc *nats.Conn
	js jetstream.JetStream
}

// Received is a message that came, known by what the document says of it.
type Received struct {
	Subject string
	Message *Message
	Headers map[string]string
	Body    []byte
	JSON    any // the body, where it is JSON
}

// Field is a text or number of a JSON body, as text.
func (r *Received) Field(keys ...string) string {
	at, err := node{value: r.JSON}.get(keys...)
	if err != nil || at.value == nil {
		return ""
	}
	return fmt.Sprint(at.value)
}

func (r *Received) at(expression string) (string, error) {
	return evaluate(expression, r.Headers, r.JSON)
}

// Connect connects to a server of the document; host replaces the document's.
func (d *Document) Connect(host string) (*Client, error) {
	if d.Protocol != "nats" {
		return nil, fmt.Errorf("protocol %s is none that is known here", d.Protocol)
	}
	nc, err := nats.Connect(d.Protocol + "://" + host)
	if err != nil {
		return nil, err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		nc.Close()
		return nil, err
	}
	return &Client{nc: nc, js: js}, nil
}

// Close disconnects.
func (c *Client) Close() { c.nc.Close() }

// MaxPayload is the server's payload limit in bytes.
func (c *Client) MaxPayload() int64 { return c.nc.MaxPayload() }

// Send publishes a message that the operation receives, and waits for the
// answer that the document promises.
func (c *Client) Send(ctx context.Context, o *Operation, parameters map[string]string, m *Message, headers map[string]string, payload any) (*Received, error) {
	if o.Action != "receive" || len(o.Reply) == 0 {
		return nil, fmt.Errorf("operation %s takes nothing that is answered", o.ID)
	}
	subject, err := o.Channel.Subject(parameters, false)
	if err != nil {
		return nil, err
	}
	request := &nats.Msg{Subject: subject, Header: nats.Header{}}
	if request.Data, err = m.encode(payload); err != nil {
		return nil, err
	}
	sent := map[string]string{}
	if m.saysContentType {
		sent["Content-Type"] = m.ContentType
	}
	for name, value := range headers {
		sent[name] = value
	}
	for name, value := range sent {
		request.Header[name] = []string{value}
	}
	if err := m.fits(sent, request.Data); err != nil {
		return nil, err
	}
	answer, err := c.nc.RequestMsgWithContext(ctx, request)
	if err != nil {
		return nil, err
	}
	return recognise(o.Reply, answer.Subject, answer.Header, answer.Data)
}

// recognise finds the one message of the document that this is.
func recognise(candidates []*Message, subject string, header nats.Header, body []byte) (*Received, error) {
	r := &Received{Subject: subject, Headers: map[string]string{}, Body: body}
	for name, values := range header {
		if len(values) != 1 {
			return nil, fmt.Errorf("%s: header %s has %d values", subject, name, len(values))
		}
		r.Headers[name] = values[0]
	}
	var why []error
	for _, m := range candidates {
		if err := m.fits(r.Headers, body); err != nil {
			why = append(why, err)
			continue
		}
		if r.Message != nil {
			return nil, fmt.Errorf("%s: nothing distinguishes %s and %s: %.200q", subject, r.Message.Name, m.Name, body)
		}
		r.Message = m
	}
	if r.Message == nil {
		return nil, fmt.Errorf("%s: no message of the document: %v: %.200q", subject, why, body)
	}
	if r.Message.ContentType == "application/json" {
		if err := json.Unmarshal(body, &r.JSON); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// Feed is what comes on a channel.
type Feed struct {
	channel *Channel
	next    func(ctx context.Context) (subject string, header nats.Header, body []byte, err error)
}

// Next waits for the next message.
func (f *Feed) Next(ctx context.Context) (*Received, error) {
	subject, header, body, err := f.next(ctx)
	if err != nil {
		return nil, fmt.Errorf("channel %s: %w", f.channel.Name, err)
	}
	r, err := recognise(f.channel.Messages, subject, header, body)
	if err != nil {
		return nil, err
	}
	return r, f.channel.place(r)
}

// Listen subscribes to what an operation sends from now on.
func (c *Client) Listen(o *Operation, parameters map[string]string) (*Feed, error) {
	subject, err := o.sent(parameters)
	if err != nil {
		return nil, err
	}
	sub, err := c.nc.SubscribeSync(subject)
	if err != nil {
		return nil, err
	}
	next := func(ctx context.Context) (string, nats.Header, []byte, error) {
		msg, err := sub.NextMsgWithContext(ctx)
		if err != nil {
			return "", nil, nil, err
		}
		return msg.Subject, msg.Header, msg.Data, nil
	}
	// The server knows of it before anything is published on another connection.
	return &Feed{channel: o.Channel, next: next}, c.nc.Flush()
}

// ReadStream reads what an operation sent from the beginning of its channel's
// stream, as one who comes late. The context of Next needs a deadline.
func (c *Client) ReadStream(ctx context.Context, o *Operation, parameters map[string]string) (*Feed, error) {
	subject, err := o.sent(parameters)
	if err != nil {
		return nil, err
	}
	consumer, err := c.js.OrderedConsumer(ctx, o.Channel.Stream, jetstream.OrderedConsumerConfig{FilterSubjects: []string{subject}})
	if err != nil {
		return nil, fmt.Errorf("stream %s of %s: %w", o.Channel.Stream, o.Channel.Name, err)
	}
	next := func(ctx context.Context) (string, nats.Header, []byte, error) {
		msg, err := consumer.Next(jetstream.FetchContext(ctx))
		if err != nil {
			return "", nil, nil, err
		}
		return msg.Subject(), msg.Headers(), msg.Data(), nil
	}
	return &Feed{channel: o.Channel, next: next}, nil
}

// sent is the subject of what an operation sends; parameters not given stay open.
func (o *Operation) sent(parameters map[string]string) (string, error) {
	if o.Action != "send" {
		return "", fmt.Errorf("operation %s sends nothing", o.ID)
	}
	return o.Channel.Subject(parameters, true)
}

// Upload puts an object where a payload says that it is.
func (c *Client) Upload(ctx context.Context, o Object, data []byte) error {
	store, err := c.js.ObjectStore(ctx, o.Store)
	if err != nil {
		return fmt.Errorf("object store %s: %w", o.Store, err)
	}
	_, err = store.PutBytes(ctx, o.Name, data)
	return err
}

// Download gets an object that a payload names.
func (c *Client) Download(ctx context.Context, o Object) ([]byte, error) {
	store, err := c.js.ObjectStore(ctx, o.Store)
	if err != nil {
		return nil, fmt.Errorf("object store %s: %w", o.Store, err)
	}
	return store.GetBytes(ctx, o.Name)
}
