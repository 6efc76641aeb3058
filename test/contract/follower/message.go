package follower

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"
)

// Message is a kind of message.
type Message struct {
	Name        string
	ContentType string
	Examples    []Example

	correlation     string // runtime expression; "": none
	headers         *jsonschema.Schema
	payload         *jsonschema.Schema
	headersAt       node
	payloadAt       node
	contents        map[string]*jsonschema.Schema // of headers that hold a document of their own
	protobuf        protoreflect.MessageDescriptor
	saysContentType bool
}

// Example is a message as it may be.
type Example struct {
	Name    string            `json:"name"`
	Headers map[string]string `json:"headers"`
	Payload any               `json:"payload"`
}

// Example is the message's example of that name.
func (m *Message) Example(name string) (Example, error) {
	for _, e := range m.Examples {
		if e.Name == name {
			return e, nil
		}
	}
	return Example{}, fmt.Errorf("message %s has no example %s", m.Name, name)
}

func (d *Document) readMessage(n node) (*Message, error) {
	m := &Message{contents: map[string]*jsonschema.Schema{}}
	if err := read(n, map[string]*string{"name": &m.Name}); err != nil {
		return nil, err
	}
	for key, to := range map[string]*string{"contentType": &m.ContentType, "correlationId": &m.correlation} {
		at, err := traited(n, key)
		if err != nil {
			return nil, err
		}
		if key == "correlationId" {
			at, err = at.get("location")
		}
		if err != nil {
			return nil, err
		}
		*to, _ = at.value.(string)
	}
	if m.ContentType == "" {
		var err error
		if m.ContentType, err = d.root.text("defaultContentType"); err != nil {
			return nil, err
		}
	}
	if err := d.readSchemas(n, m); err != nil {
		return nil, err
	}
	examples, err := n.get("examples")
	if err != nil {
		return nil, err
	}
	data, err := json.Marshal(examples.value)
	if err != nil {
		return nil, err
	}
	return m, json.Unmarshal(data, &m.Examples)
}

// traited is a message's field: its own, or that of one of its traits.
func traited(n node, key string) (node, error) {
	own, err := n.get(key)
	if err != nil || own.value != nil {
		return own, err
	}
	traits, err := n.get("traits")
	if err != nil {
		return node{}, err
	}
	for _, i := range traits.keys() {
		if at, err := traits.get(i, key); err != nil || at.value != nil {
			return at, err
		}
	}
	return own, nil
}

func (d *Document) readSchemas(n node, m *Message) error {
	var err error
	if m.headersAt, err = traited(n, "headers"); err != nil {
		return err
	}
	if m.payloadAt, err = traited(n, "payload"); err != nil {
		return err
	}
	if m.headers, err = d.compile(m.headersAt); err != nil {
		return err
	}
	if m.payload, err = d.compile(m.payloadAt); err != nil {
		return err
	}
	err = properties(m.headersAt, func(name string, at node) error {
		m.saysContentType = m.saysContentType || name == "Content-Type"
		content, err := at.get("contentSchema")
		if err != nil || content.value == nil {
			return err
		}
		m.contents[name], err = d.compile(content)
		return err
	})
	if err != nil {
		return err
	}
	about, err := n.get("x-protobuf")
	if err != nil || about.value == nil {
		return err
	}
	m.protobuf, err = descriptor(about)
	return err
}

// compile makes a schema; nil where there is none.
func (d *Document) compile(n node) (*jsonschema.Schema, error) {
	if n.value == nil {
		return nil, nil
	}
	return d.compiler.Compile("file://" + filepath.ToSlash(n.file) + "#" + n.pointer)
}

// properties calls f for each property of an object's schema.
func properties(schema node, f func(name string, at node) error) error {
	parts, err := schema.get("allOf")
	if err != nil {
		return err
	}
	for _, i := range parts.keys() {
		part, err := parts.get(i)
		if err != nil {
			return err
		}
		if err := properties(part, f); err != nil {
			return err
		}
	}
	own, err := schema.get("properties")
	if err != nil {
		return err
	}
	for _, name := range own.keys() {
		at, err := own.get(name)
		if err != nil {
			return err
		}
		if err := f(name, at); err != nil {
			return err
		}
	}
	return nil
}

// descriptor is what protoc made of the file that the document names: here the
// Go code that is linked in.
func descriptor(about node) (protoreflect.MessageDescriptor, error) {
	var file, name string
	if err := read(about, map[string]*string{"file": &file, "message": &name}); err != nil {
		return nil, err
	}
	found, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(name))
	if err != nil {
		return nil, err
	}
	message, ok := found.(protoreflect.MessageDescriptor)
	if from := found.ParentFile().Path(); !ok || !strings.HasSuffix(file, "/"+from) {
		return nil, fmt.Errorf("%s: %s is not a message of %s, but in %s", about, name, file, from)
	}
	return message, nil
}

// Valid checks an example; one without a payload shows headers only.
func (m *Message) Valid(e Example) error {
	if e.Payload == nil {
		return m.ValidHeaders(e.Headers)
	}
	if text, ok := e.Payload.(string); ok && m.ContentType != "application/json" {
		return m.fits(e.Headers, []byte(text))
	}
	data, err := json.Marshal(e.Payload)
	if err != nil {
		return err
	}
	return m.fits(e.Headers, data)
}

// fits checks a message's headers and body.
func (m *Message) fits(headers map[string]string, body []byte) error {
	if err := m.ValidHeaders(headers); err != nil || m.payload == nil {
		return err
	}
	if m.ContentType == "application/json" {
		if err := validate(m.payload, string(body)); err != nil {
			return fmt.Errorf("body of %s: %w", m.Name, err)
		}
		return nil
	}
	if err := m.payload.Validate(string(body)); err != nil {
		return fmt.Errorf("body of %s: %w", m.Name, err)
	}
	if m.protobuf != nil {
		return m.Decode(body)
	}
	return nil
}

// ValidHeaders checks headers alone.
func (m *Message) ValidHeaders(headers map[string]string) error {
	if m.headers != nil {
		all := make(map[string]any, len(headers))
		for name, value := range headers {
			all[name] = value
		}
		if err := m.headers.Validate(all); err != nil {
			return fmt.Errorf("headers of %s: %w", m.Name, err)
		}
	}
	for name, schema := range m.contents {
		if headers[name] == "" {
			continue
		}
		if err := validate(schema, headers[name]); err != nil {
			return fmt.Errorf("header %s of %s: %w", name, m.Name, err)
		}
	}
	return nil
}

func validate(schema *jsonschema.Schema, text string) error {
	v, err := jsonschema.UnmarshalJSON(strings.NewReader(text))
	if err != nil {
		return err
	}
	return schema.Validate(v)
}

// Decode checks that bytes are the message's protobuf, with no field that its
// schema does not have.
func (m *Message) Decode(data []byte) error {
	if m.protobuf == nil {
		return fmt.Errorf("the document names no protobuf for %s", m.Name)
	}
	if len(data) == 0 {
		return fmt.Errorf("%s has no bytes", m.Name)
	}
	decoded := dynamicpb.NewMessage(m.protobuf)
	if err := proto.Unmarshal(data, decoded); err != nil {
		return fmt.Errorf("%s: %w", m.Name, err)
	}
	if len(decoded.GetUnknown()) > 0 {
		return fmt.Errorf("%s: no %s", m.Name, m.protobuf.FullName())
	}
	return nil
}

// encode makes a body of a payload: bytes as they are, anything else by the
// content type.
func (m *Message) encode(payload any) ([]byte, error) {
	if raw, ok := payload.([]byte); ok {
		return raw, nil
	}
	if text, ok := payload.(string); ok && m.ContentType != "application/json" {
		return []byte(text), nil
	}
	data, err := json.Marshal(payload)
	if err != nil || m.protobuf == nil {
		return data, err
	}
	message := dynamicpb.NewMessage(m.protobuf)
	if err := protojson.Unmarshal(data, message); err != nil {
		return nil, err
	}
	return proto.Marshal(message)
}

// ID is what the document says is the id in a message with this payload.
func (m *Message) ID(headers map[string]string, payload any) (string, error) {
	if m.correlation == "" {
		return "", fmt.Errorf("message %s has no correlationId", m.Name)
	}
	return evaluate(m.correlation, headers, payload)
}

// Object is an object of a JetStream object store.
type Object struct{ Store, Name string }

// Objects lists the objects that a payload names.
func (m *Message) Objects(payload any) ([]Object, error) { return objects(m.payloadAt, payload) }

func objects(schema node, v any) ([]Object, error) {
	var found []Object
	add := func(keys []string, v any) error {
		at, err := schema.get(keys...)
		if err != nil {
			return err
		}
		more, err := objects(at, v)
		found = append(found, more...)
		return err
	}
	switch v := v.(type) {
	case string:
		store, err := schema.text("x-object-store")
		if err != nil || store == "" {
			return nil, err
		}
		return []Object{{Store: store, Name: v}}, nil
	case map[string]any:
		for key, value := range v {
			if err := add([]string{"properties", key}, value); err != nil {
				return nil, err
			}
		}
	case []any:
		for _, item := range v {
			if err := add([]string{"items"}, item); err != nil {
				return nil, err
			}
		}
	}
	return found, nil
}

// evaluate finds the text that a runtime expression means.
func evaluate(expression string, headers map[string]string, payload any) (string, error) {
	source, pointer, _ := strings.Cut(expression, "#/")
	var value any
	switch source {
	case "$message.header":
		value = headers[unescape(pointer)]
	case "$message.payload":
		at, err := node{value: payload}.get(strings.Split(pointer, "/")...)
		if err != nil {
			return "", err
		}
		value = at.value
	}
	text, ok := value.(string)
	if !ok || text == "" {
		return "", fmt.Errorf("%s finds no text", expression)
	}
	return text, nil
}
