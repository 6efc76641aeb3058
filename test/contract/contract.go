// Package contract checks messages against the public description of the
// interface: the JSON Schemas under schema/, which docs/asyncapi.yaml uses too.
// It serves tests: give Check whatever a worker published.
package contract

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/topology"
)

// Message is a message of a stream.
type Message struct {
	Subject string
	Header  nats.Header
	Data    []byte
}

// Validator checks messages and jobs. It may be used by several goroutines.
type Validator struct {
	names   topology.Names
	schemas map[string]*jsonschema.Schema // by path under schema/
}

// eventSchemas are the schemas of event bodies by ce-type.
func eventSchemas() map[string]string {
	return map[string]string{
		"avatar.job.started":          "events/started.schema.json",
		"avatar.job.retrying":         "events/retrying.schema.json",
		"avatar.job.held":             "events/held.schema.json",
		"avatar.job.completed":        "events/completed.schema.json",
		"avatar.job.dead_lettered":    "events/dead_lettered.schema.json",
		"avatar.job.expired":          "events/expired.schema.json",
		"avatar.job.cancelled":        "events/cancelled.schema.json",
		"avatar.job.released":         "events/released.schema.json",
		"avatar.job.duplicate":        "events/duplicate.schema.json",
		"avatar.session.error":        "events/error.schema.json",
		"avatar.alert.recurring":      "events/alert_recurring.schema.json",
		"avatar.alert.circuit_opened": "events/alert_circuit.schema.json",
		"avatar.alert.circuit_closed": "events/alert_circuit.schema.json",
		"avatar.alert.storage":        "events/alert_worker.schema.json",
		"avatar.alert.worker_key":     "events/alert_worker.schema.json",
		"avatar.alert.unsettled":      "events/alert_worker.schema.json",
		"avatar.alert.budget":         "events/alert_worker.schema.json",
	}
}

// usageSchema is the schema of usage records.
const usageSchema = "usage.schema.json"

// New loads the schemas under dir, the repository's schema directory. What the
// schemas of events and usage records leave open for later versions (fields that are not in them
// yet) is closed here, so that a field without a description is found.
func New(dir string, names topology.Names) (*Validator, error) {
	c := jsonschema.NewCompiler()
	c.DefaultDraft(jsonschema.Draft2020)
	c.AssertFormat()
	var paths []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".schema.json") {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		doc, err := load(path)
		if err != nil {
			return err
		}
		if strings.HasPrefix(rel, "events/") || rel == usageSchema {
			seal(doc)
		}
		paths = append(paths, rel)
		return c.AddResource(location(rel), doc)
	})
	if err != nil {
		return nil, err
	}
	v := &Validator{names: names, schemas: make(map[string]*jsonschema.Schema, len(paths))}
	for _, rel := range paths {
		if v.schemas[rel], err = c.Compile(location(rel)); err != nil {
			return nil, fmt.Errorf("schema/%s: %w", rel, err)
		}
	}
	return v, nil
}

// location is a made-up address: nothing is ever fetched.
func location(rel string) string { return "mem:///schema/" + rel }

func load(path string) (any, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return doc, nil
}

// seal refuses fields that an event's schema does not name. Definitions that
// others are made of stay open: the whole is sealed, not its parts.
func seal(doc any) {
	schema, ok := doc.(map[string]any)
	if !ok {
		return
	}
	if _, object := schema["properties"]; object {
		schema["unevaluatedProperties"] = false
	}
	defs, _ := schema["$defs"].(map[string]any)
	for name, def := range defs {
		if name != "job_fields" {
			seal(def)
		}
	}
}

// Schema is the schema of that path under schema/; nil where there is none.
func (v *Validator) Schema(path string) *jsonschema.Schema { return v.schemas[path] }

// Job checks a job's JSON against the schema alone.
func (v *Validator) Job(data []byte) error { return v.body("job.schema.json", data) }

// CheckAll checks messages of any kind; the error names each that is not as
// described, by its subject.
func (v *Validator) CheckAll(messages []Message) error {
	var faults []error
	for _, m := range messages {
		if err := v.Check(m); err != nil {
			faults = append(faults, fmt.Errorf("%s: %w", m.Subject, err))
		}
	}
	return errors.Join(faults...)
}

// Check checks one message that a worker published: its subject, its headers
// and, where it is JSON, its body.
func (v *Validator) Check(m Message) error {
	kind, rest := v.kind(m.Subject)
	switch kind {
	case "events", "errors", "alerts":
		return v.event(m)
	case "dlq":
		return v.deadLetter(m, rest)
	case "frames":
		if len(m.Data) == 0 {
			return errors.New("a frame without bytes")
		}
		return v.header("headers/frame.schema.json", m.Header)
	case "usage":
		return v.usage(m)
	default:
		return fmt.Errorf("no worker publishes on this subject")
	}
}

// kind splits a subject into what it is for and the rest.
func (v *Validator) kind(subject string) (kind, rest string) {
	prefix := strings.TrimSuffix(v.names.Jobs("x"), "jobs.x")
	under, ok := strings.CutPrefix(subject, prefix)
	if !ok {
		return "", ""
	}
	kind, rest, _ = strings.Cut(under, ".")
	return kind, rest
}

func (v *Validator) event(m Message) error {
	if err := v.header("headers/event.schema.json", m.Header); err != nil {
		return err
	}
	kind := value(m.Header, "ce-type")
	path, ok := eventSchemas()[kind]
	if !ok {
		return fmt.Errorf("ce-type %q has no schema", kind)
	}
	if err := v.body(path, m.Data); err != nil {
		return err
	}
	if id := value(m.Header, "ce-id"); value(m.Header, nats.MsgIdHdr) != id {
		return fmt.Errorf("%s is not the ce-id %q", nats.MsgIdHdr, id)
	}
	return v.place(m, kind)
}

// place checks that an event is where its type and body say.
func (v *Validator) place(m Message, kind string) error {
	var body struct {
		Code  string `json:"code"`
		What  string `json:"what"` // of an alert about a worker, instead of a code
		Class string `json:"class"`
		JobID string `json:"job_id"`
	}
	if err := json.Unmarshal(m.Data, &body); err != nil {
		return err
	}
	want := ""
	switch family, name, _ := strings.Cut(strings.TrimPrefix(kind, "avatar."), "."); family {
	case "job":
		want = v.names.Events(name, body.JobID)
	case "session":
		want = v.names.Errors(body.Class, body.Code)
	case "alert":
		want = v.names.Alerts(name, cmp.Or(body.What, body.Code))
	}
	if m.Subject != want {
		return fmt.Errorf("an event of type %s with this body belongs on %s", kind, want)
	}
	if got := value(m.Header, "ce-subject"); got != body.JobID {
		return fmt.Errorf("ce-subject is %q, the body's job_id %q", got, body.JobID)
	}
	return nil
}

func (v *Validator) deadLetter(m Message, rest string) error {
	if err := v.header("headers/dead_letter.schema.json", m.Header); err != nil {
		return err
	}
	if want := value(m.Header, "Avatar-Error-Class") + "." + value(m.Header, "Avatar-Error-Code"); rest != want {
		return fmt.Errorf("its headers say %s", want)
	}
	return v.body("events/error.schema.json", []byte(value(m.Header, "Avatar-Error")))
}

// usage checks a usage record, and the estimate that it replaces.
func (v *Validator) usage(m Message) error {
	if err := v.header("headers/usage.schema.json", m.Header); err != nil {
		return err
	}
	if err := v.body(usageSchema, m.Data); err != nil {
		return err
	}
	var r usage.Record
	if err := json.Unmarshal(m.Data, &r); err != nil {
		return err
	}
	if want := v.names.Usage(r.AppID, r.Queue); m.Subject != want {
		return fmt.Errorf("a usage record with this body belongs on %s", want)
	}
	want, estimate := r.ID(), value(m.Header, usage.HeaderReplaces)
	if estimate != "" {
		want += ".exact"
		if err := v.body(usageSchema, []byte(estimate)); err != nil {
			return fmt.Errorf("%s: %w", usage.HeaderReplaces, err)
		}
	}
	if id := value(m.Header, nats.MsgIdHdr); id != want {
		return fmt.Errorf("%s is %q, want %q", nats.MsgIdHdr, id, want)
	}
	return nil
}

func (v *Validator) body(path string, data []byte) error {
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("not JSON: %w", err)
	}
	return v.validate(path, doc)
}

func (v *Validator) header(path string, h nats.Header) error {
	doc := make(map[string]any, len(h))
	for name, values := range h {
		if len(values) != 1 {
			return fmt.Errorf("header %s has %d values", name, len(values))
		}
		doc[name] = values[0]
	}
	return v.validate(path, doc)
}

func (v *Validator) validate(path string, doc any) error {
	schema := v.schemas[path]
	if schema == nil {
		return fmt.Errorf("there is no schema/%s", path)
	}
	if err := schema.Validate(doc); err != nil {
		return fmt.Errorf("not as schema/%s says: %w", path, err)
	}
	return nil
}

// value is a header's value under exactly this name: NATS keeps the case.
func value(h nats.Header, name string) string {
	if len(h[name]) == 0 {
		return ""
	}
	return h[name][0]
}
