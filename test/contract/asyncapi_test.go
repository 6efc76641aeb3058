package contract

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v4"

	"avatarworker/internal/errors"
	"avatarworker/internal/topology"
	"avatarworker/test/contract/follower"
)

type object = map[string]any

func asyncapi(t *testing.T) object {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(root, "docs/asyncapi.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var doc object
	if err := yaml.Unmarshal(data, &doc); err != nil {
		t.Fatal(err)
	}
	return doc
}

// at walks into the document; it fails the test where there is nothing.
func at(t *testing.T, doc object, path ...string) object {
	t.Helper()
	for i, key := range path {
		next, ok := doc[key].(object)
		if !ok {
			t.Fatalf("asyncapi.yaml has no %s", strings.Join(path[:i+1], "/"))
		}
		doc = next
	}
	return doc
}

// refs lists every $ref in v.
func refs(v any) []string {
	var found []string
	switch v := v.(type) {
	case object:
		for key, value := range v {
			if text, ok := value.(string); ok && key == "$ref" {
				found = append(found, text)
			} else {
				found = append(found, refs(value)...)
			}
		}
	case []any:
		for _, value := range v {
			found = append(found, refs(value)...)
		}
	}
	return found
}

func TestEveryReferenceOfTheAsyncAPIDocumentLeadsSomewhere(t *testing.T) {
	doc := asyncapi(t)
	for _, ref := range refs(doc) {
		if path, local := strings.CutPrefix(ref, "#/"); local {
			at(t, doc, strings.Split(path, "/")...)
			continue
		}
		if _, err := os.Stat(filepath.Join(root, "docs", ref)); err != nil {
			t.Errorf("%s: %v", ref, err)
		}
	}
}

func TestEverySchemaIsInTheAsyncAPIDocument(t *testing.T) {
	used := refs(asyncapi(t))
	dir := filepath.Join(root, "schema")
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(filepath.Join(root, "docs"), path)
		if err != nil {
			return err
		}
		// What events share comes in through their own schemas.
		if rel = filepath.ToSlash(rel); !slices.Contains(used, rel) && filepath.Base(rel) != "common.schema.json" {
			t.Errorf("%s is described nowhere", rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestTheSubjectsOfTheAsyncAPIDocumentAreTheWorkers(t *testing.T) {
	n := topology.Names{}
	want := map[string]string{
		"jobs": n.Jobs("A"), "liveAudio": n.Audio("A"), "control": n.Control("A"), "events": n.Events("A", "A"),
		"errors": n.Errors("A", "A"), "alerts": n.Alerts("A", "A"), "deadLetters": n.DLQ("A", "A"), "frames": n.Frames("A"), "usage": n.Usage("A", "A"),
		"workerDrain": n.WorkerDrain("A"), "workerState": n.WorkerState("A"),
		"controlReply":     "<nil>", // the reply subject of a request
		"workerDrainReply": "<nil>", "workerStateReply": "<nil>",
		"acknowledgements": "<nil>",
	}
	channels := addresses(t)
	for name, address := range channels {
		if address != want[name] {
			t.Errorf("channel %s is at %s, want %q", name, address, want[name])
		}
		delete(want, name)
	}
	for name := range want {
		t.Errorf("channel %s is missing", name)
	}
	for method, subject := range subjects(n) {
		if !slices.ContainsFunc(slices.Collect(maps.Values(channels)), func(address string) bool { return matches(subject, address) }) {
			t.Errorf("topology.Names.%s: no channel of the document is at %s", method, subject)
		}
	}
}

// addresses lists the document's channels, with A for each parameter.
func addresses(t *testing.T) map[string]string {
	t.Helper()
	channels := at(t, asyncapi(t), "channels")
	found := make(map[string]string, len(channels))
	for name := range channels {
		address := fmt.Sprint(at(t, channels, name)["address"])
		for parameter := range parameters(channels, name) {
			address = strings.Replace(address, "{"+parameter+"}", "A", 1)
		}
		found[name] = address
	}
	return found
}

// subjects lists what each method of Names returns that makes a subject or a
// filter, with A for each token.
func subjects(n topology.Names) map[string]string {
	found := make(map[string]string)
	v := reflect.ValueOf(n)
	for i := range v.NumMethod() {
		method := v.Method(i)
		if name := v.Type().Method(i).Name; strings.Contains(name, "Totals") {
			continue // counters are for the worker and its commands, as docs/cost.md says
		}
		if method.Type().NumOut() != 1 || method.Type().Out(0).Kind() != reflect.String {
			continue
		}
		args := make([]reflect.Value, method.Type().NumIn())
		for a := range args {
			args[a] = reflect.ValueOf("A")
		}
		if subject := method.Call(args)[0].String(); strings.HasPrefix(subject, topology.DefaultPrefix+".") {
			found[v.Type().Method(i).Name] = subject
		}
	}
	return found
}

// matches reports whether a subscription to filter gets what is sent to subject.
func matches(filter, subject string) bool {
	want, have := strings.Split(filter, "."), strings.Split(subject, ".")
	for i, token := range want {
		if token == ">" {
			return len(have) > i
		}
		if i >= len(have) || token != "*" && token != have[i] {
			return false
		}
	}
	return len(have) == len(want)
}

func parameters(channels object, name string) object {
	channel, _ := channels[name].(object)
	p, _ := channel["parameters"].(object)
	return p
}

func TestTheAsyncAPIDocumentHasEveryCodeAndEvent(t *testing.T) {
	doc := asyncapi(t)
	var codes []string
	for _, code := range errors.Codes() {
		codes = append(codes, string(code))
	}
	if got := texts(at(t, doc, "components", "parameters", "code")["enum"]); !slices.Equal(got, codes) {
		t.Errorf("codes are %v, want %v", got, codes)
	}
	families := map[string][]string{
		"job":   texts(at(t, doc, "channels", "events", "parameters", "type")["enum"]),
		"alert": texts(at(t, doc, "channels", "alerts", "parameters", "kind")["enum"]),
	}
	for kind := range eventSchemas() {
		_, rest, _ := strings.Cut(kind, ".")
		family, name, _ := strings.Cut(rest, ".")
		if types, ok := families[family]; ok && !slices.Contains(types, name) {
			t.Errorf("%s has no subject in the document", kind)
		}
	}
}

func texts(v any) []string {
	list, _ := v.([]any)
	out := make([]string, 0, len(list))
	for _, item := range list {
		out = append(out, fmt.Sprint(item))
	}
	return out
}

func TestTheExamplesOfTheAsyncAPIDocumentAreValid(t *testing.T) {
	v := validator(t)
	for _, m := range described(t) {
		if m.ContentType == "application/json" && len(m.Examples) == 0 {
			t.Errorf("%s has no example", m.Name)
		}
		for _, e := range m.Examples {
			if err := exemplary(v, m, e); err != nil {
				t.Errorf("%s, example %s: %v", m.Name, e.Name, err)
			}
		}
	}
}

func TestWhatAWorkerSendsIsDistinguishedByItsHeaders(t *testing.T) {
	for _, o := range document(t).Operations {
		if o.Action != "send" {
			continue
		}
		for _, m := range o.Channel.Messages {
			for _, other := range o.Channel.Messages {
				for _, e := range m.Examples {
					if fits := other.ValidHeaders(e.Headers) == nil; fits != (m == other) {
						t.Errorf("the headers of %s fit %s: %v", m.Name, other.Name, fits)
					}
				}
			}
		}
	}
}

func document(t *testing.T) *follower.Document {
	t.Helper()
	doc, err := follower.Open(filepath.Join(root, "docs/asyncapi.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

// described lists every message of the document's operations and their replies.
func described(t *testing.T) []*follower.Message {
	t.Helper()
	var all []*follower.Message
	for _, o := range document(t).Operations {
		all = append(all, o.Channel.Messages...)
		all = append(all, o.Reply...)
	}
	if len(all) < len(at(t, asyncapi(t), "components", "messages")) {
		t.Errorf("only %d messages were found", len(all))
	}
	return all
}

// exemplary checks an example against what the document says of its message,
// and beyond: an event has no field without a description, and the worker takes
// the job.
func exemplary(v *Validator, m *follower.Message, e follower.Example) error {
	if err := m.Valid(e); err != nil || m.ContentType != "application/json" {
		return err
	}
	data, err := json.Marshal(e.Payload)
	if err != nil {
		return err
	}
	if m.Name == "Job" {
		return parse(string(data))
	}
	if m.Name == "Usage" {
		return v.body("usage.schema.json", data)
	}
	kind := e.Headers["ce-type"]
	if kind == "" {
		return nil
	}
	if e.Headers["Nats-Msg-Id"] != e.Headers["ce-id"] {
		return fmt.Errorf("Nats-Msg-Id is %q, ce-id %q", e.Headers["Nats-Msg-Id"], e.Headers["ce-id"])
	}
	return v.body(eventSchemas()[kind], data)
}
