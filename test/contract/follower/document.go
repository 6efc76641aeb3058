// Package follower is a publisher and listener that knows nothing of the worker
// but its AsyncAPI document: no name of a subject, stream, bucket, header or
// field stands here. It finds out whether the document says enough. What it
// can't find there is missing there.
package follower

import (
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

// Document is an AsyncAPI 3 document, with all that it refers to.
type Document struct {
	Protocol, Host string
	Operations     map[string]*Operation

	root     node
	compiler *jsonschema.Compiler
}

// Operation is what the application does, seen from its own side.
type Operation struct {
	ID      string
	Action  string // "receive": we send; "send": we listen
	Channel *Channel
	Reply   []*Message // what may come on the reply subject; none: nothing comes
}

// Channel is where messages go.
type Channel struct {
	Name     string
	Stream   string // that keeps the messages; "": none
	Messages []*Message

	address    string
	parameters []parameter
}

type parameter struct {
	name, fallback, location string
	enum                     []string
}

// Open reads a document with one server and resolves it.
func Open(path string) (*Document, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	all := files{}
	value, err := all.load(path)
	if err != nil {
		return nil, err
	}
	d := &Document{Operations: map[string]*Operation{}, root: node{files: all, file: path, value: value}, compiler: jsonschema.NewCompiler()}
	d.compiler.DefaultDraft(jsonschema.Draft2020)
	d.compiler.AssertFormat()
	d.compiler.UseLoader(loader(all))
	if err := d.readServer(); err != nil {
		return nil, err
	}
	operations, err := d.root.get("operations")
	if err != nil {
		return nil, err
	}
	for _, id := range operations.keys() {
		if d.Operations[id], err = d.readOperation(id); err != nil {
			return nil, fmt.Errorf("operation %s: %w", id, err)
		}
	}
	return d, nil
}

// loader gives the schema compiler the same files.
type loader files

func (l loader) Load(location string) (any, error) {
	u, err := url.Parse(location)
	if err != nil {
		return nil, err
	}
	return files(l).load(filepath.FromSlash(u.Path))
}

func (d *Document) readServer() error {
	servers, err := d.root.get("servers")
	if err != nil {
		return err
	}
	if len(servers.keys()) != 1 {
		return fmt.Errorf("%d servers, want one", len(servers.keys()))
	}
	server, err := servers.get(servers.keys()[0])
	if err != nil {
		return err
	}
	return read(server, map[string]*string{"protocol": &d.Protocol, "host": &d.Host})
}

func (d *Document) readOperation(id string) (*Operation, error) {
	n, err := d.root.get("operations", id)
	if err != nil {
		return nil, err
	}
	o := &Operation{ID: id}
	if err := read(n, map[string]*string{"action": &o.Action}); err != nil {
		return nil, err
	}
	channel, err := n.get("channel")
	if err != nil {
		return nil, err
	}
	if o.Channel, err = d.readChannel(channel); err != nil {
		return nil, fmt.Errorf("channel: %w", err)
	}
	replies, err := n.get("reply", "messages")
	if err != nil {
		return nil, err
	}
	o.Reply, err = d.readMessages(replies)
	return o, err
}

func (d *Document) readChannel(n node) (*Channel, error) {
	c := &Channel{Name: n.pointer[strings.LastIndex(n.pointer, "/")+1:]}
	if err := read(n, map[string]*string{"address": &c.address}); err != nil {
		return nil, err
	}
	var err error
	if c.Stream, err = n.text("x-jetstream", "stream"); err != nil {
		return nil, err
	}
	parameters, err := n.get("parameters")
	if err != nil {
		return nil, err
	}
	for _, name := range parameters.keys() {
		at, err := parameters.get(name)
		if err != nil {
			return nil, err
		}
		p := parameter{name: name}
		if p.fallback, err = at.text("default"); err != nil {
			return nil, err
		}
		if p.location, err = at.text("location"); err != nil {
			return nil, err
		}
		enum, err := at.get("enum")
		if err != nil {
			return nil, err
		}
		p.enum = enum.list()
		c.parameters = append(c.parameters, p)
	}
	messages, err := n.get("messages")
	if err != nil {
		return nil, err
	}
	c.Messages, err = d.readMessages(messages)
	return c, err
}

func (d *Document) readMessages(n node) ([]*Message, error) {
	var messages []*Message
	for _, key := range n.keys() {
		at, err := n.get(key)
		if err != nil {
			return nil, err
		}
		m, err := d.readMessage(at)
		if err != nil {
			return nil, fmt.Errorf("message %s: %w", key, err)
		}
		messages = append(messages, m)
	}
	return messages, nil
}

// read takes texts that must be there.
func read(n node, fields map[string]*string) error {
	for key, to := range fields {
		s, err := n.text(key)
		if err != nil {
			return err
		}
		if s == "" {
			return fmt.Errorf("%s has no %s", n, key)
		}
		*to = s
	}
	return nil
}

// Message is the channel's message of that name.
func (c *Channel) Message(name string) (*Message, error) {
	for _, m := range c.Messages {
		if m.Name == name {
			return m, nil
		}
	}
	return nil, fmt.Errorf("channel %s has no message %s", c.Name, name)
}

// Subject fills the address in. A parameter that is not given has its default,
// or stays open if it may.
func (c *Channel) Subject(given map[string]string, mayStayOpen bool) (string, error) {
	subject := c.address
	for _, p := range c.parameters {
		value := given[p.name]
		if value == "" {
			value = p.fallback
		}
		switch {
		case value == "" && mayStayOpen:
			value = "*"
		case value == "":
			return "", fmt.Errorf("channel %s needs a %s", c.Name, p.name)
		case len(p.enum) > 0 && !slices.Contains(p.enum, value):
			return "", fmt.Errorf("channel %s: %s is not a %s", c.Name, value, p.name)
		}
		subject = strings.ReplaceAll(subject, "{"+p.name+"}", value)
	}
	if strings.ContainsAny(subject, "{}") {
		return "", fmt.Errorf("channel %s: %s has a parameter that is not described", c.Name, subject)
	}
	return subject, nil
}

// place checks that a message came on the subject that it should, by what the
// parameters say of themselves.
func (c *Channel) place(r *Received) error {
	want, got := strings.Split(c.address, "."), strings.Split(r.Subject, ".")
	if len(want) != len(got) {
		return fmt.Errorf("%s does not match %s", r.Subject, c.address)
	}
	for i, token := range want {
		at := slices.IndexFunc(c.parameters, func(p parameter) bool { return token == "{"+p.name+"}" })
		if at < 0 {
			if token != got[i] {
				return fmt.Errorf("%s does not match %s", r.Subject, c.address)
			}
			continue
		}
		p := c.parameters[at]
		if len(p.enum) > 0 && !slices.Contains(p.enum, got[i]) {
			return fmt.Errorf("%s: %s is not a %s of the document", r.Subject, got[i], p.name)
		}
		if p.location == "" {
			continue
		}
		value, err := r.at(p.location)
		if err != nil {
			return fmt.Errorf("%s: %s: %w", r.Subject, p.name, err)
		}
		if value != got[i] {
			return fmt.Errorf("%s: %s should be %q, by %s", r.Subject, p.name, value, p.location)
		}
	}
	return nil
}
