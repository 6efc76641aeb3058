package contract

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/topology"
)

// root is the repository's directory, seen from this package.
const root = "../.."

func validator(t *testing.T) *Validator {
	t.Helper()
	v, err := New(filepath.Join(root, "schema"), topology.Names{})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// golden reads the messages that the event code is tested against: subject,
// headers, an empty line, the body.
func golden(t *testing.T) map[string]Message {
	t.Helper()
	var paths []string
	for _, dir := range []string{"internal/jobs", "internal/jobs/event"} {
		found, err := filepath.Glob(filepath.Join(root, dir, "testdata/events/*.golden"))
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, found...)
	}
	if len(paths) == 0 {
		t.Fatal("no golden events")
	}
	messages := make(map[string]Message, len(paths))
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		head, body, ok := bytes.Cut(data, []byte("\n\n"))
		if !ok {
			t.Fatalf("%s: no empty line after the headers", path)
		}
		lines := strings.Split(string(head), "\n")
		m := Message{Subject: lines[0], Header: nats.Header{}, Data: body}
		for _, line := range lines[1:] {
			name, value, _ := strings.Cut(line, ": ")
			m.Header[name] = []string{value}
		}
		messages[strings.TrimSuffix(filepath.Base(path), ".golden")] = m
	}
	return messages
}

func TestEveryEventIsAsTheSchemasSay(t *testing.T) {
	v := validator(t)
	seen := map[string]bool{}
	for name, m := range golden(t) {
		if err := v.Check(m); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		seen[m.Header["ce-type"][0]] = true
	}
	for kind := range eventSchemas() {
		if !seen[kind] {
			t.Errorf("no golden event of type %s: its schema is checked against nothing", kind)
		}
	}
}

func TestWhatAnEventMustNotBeIsFound(t *testing.T) {
	v := validator(t)
	started := func(change func(*Message)) Message {
		m := golden(t)["started"]
		change(&m)
		return m
	}
	replace := func(old, replacement string) Message {
		return started(func(m *Message) { m.Data = bytes.Replace(m.Data, []byte(old), []byte(replacement), 1) })
	}
	for name, m := range map[string]Message{
		"a field that no schema has":   replace(`"queue"`, `"quue": 1, "queue"`),
		"a field that is missing":      replace(`"queue": "default",`, ``),
		"a field of another kind":      replace(`"attempt": 2`, `"attempt": "2"`),
		"null instead of absent":       replace(`"app_id": "app"`, `"app_id": null`),
		"a time that is none":          replace(`"time": "2026-01-31T11:00:00.123456789Z"`, `"time": "yesterday"`),
		"another job's subject":        started(func(m *Message) { m.Subject = "avatar.events.started.K" }),
		"another type's subject":       started(func(m *Message) { m.Subject = "avatar.events.held.J" }),
		"a subject that is not ours":   started(func(m *Message) { m.Subject = "other.events.started.J" }),
		"a ce-type without a schema":   started(func(m *Message) { m.Header["ce-type"] = []string{"avatar.job.stopped"} }),
		"no ce-id":                     started(func(m *Message) { delete(m.Header, "ce-id") }),
		"an id that is not the ce-id":  started(func(m *Message) { m.Header[nats.MsgIdHdr] = []string{"x"} }),
		"a header in another spelling": started(func(m *Message) { m.Header["Ce-Type"] = m.Header["ce-type"]; delete(m.Header, "ce-type") }),
	} {
		if v.CheckAll([]Message{m}) == nil {
			t.Errorf("%s: not found", name)
		}
	}
}

// jobCase is a job and what is to be thought of it.
type jobCase struct{ name, job string }

// speak puts fields into an otherwise valid job.
func speak(fields string) string {
	return `{"avatar_id":"ok","audio":{"inline":"AAAA","format":"pcm_s16le","sample_rate":16000}` + fields + `}`
}

func spoken(audio string) string { return `{"avatar_id":"ok","audio":` + audio + `}` }

func validJobs() []jobCase {
	return []jobCase{
		{"inline", speak(``)},
		{"url-safe base64 without padding", spoken(`{"inline":"_-8"}`)},
		{"base64 in lines", spoken(`{"inline":"AAA\r\nA AAAA\n"}`)},
		{"object", spoken(`{"object":"hello.wav"}`)},
		{"object of another bucket", spoken(`{"object":"MY_BUCKET/2026/hello world.wav"}`)},
		{"url", spoken(`{"url":"https://example.com/a.wav?sig=x","format":"wav"}`)},
		{"url in capitals", spoken(`{"url":"HTTPS://example.com/a.wav"}`)},
		{"ogg", spoken(`{"object":"a.ogg","format":"ogg_opus"}`)},
		{"utterances", `{"avatar_id":"ok","utterances":[{"object":"a"},{"object":"b"}]}`},
		{"live", `{"avatar_id":"ok","live":{"sample_rate":16000}}`},
		{"live with everything", `{"avatar_id":"ok","live":{"sample_rate":24000,"format":"ogg_opus","max_silence":"1m30s"}}`},
		{"silence in seconds", `{"avatar_id":"ok","live":{"sample_rate":16000,"max_silence":"45"}}`},
		{"all the rest", speak(`,"id":"order-7_B","app_id":"shop.eu","region":"us-west","deadline":"2026-12-31T23:59:59.5+01:00","max_attempts":2,"on_redelivery":"give_up","labels":{"tier":"gold"},"extra_params":{"server_post_process":"false"}`)},
		{"frames", speak(`,"output":{"frames":{}}`)},
		{"recording", speak(`,"output":{"object":{"name":"a b.rec"}}`)},
		{"recording by the job's id", speak(`,"output":{"object":{}}`)},
		{"discard", speak(`,"output":{"discard":{}}`)},
		{"livekit", speak(`,"output":{"livekit":{"url":"wss://lk.example.com","room_name":"r","api_token":"t","publisher_id":"p","extra_attributes":{"a":"b"},"idle_timeout":0}}`)},
		{"agora", speak(`,"output":{"agora":{"channel_name":"c","token":"t","uid":4294967295,"publisher_id":"p"}}`)},
		{"agora with its channel only", speak(`,"output":{"agora":{"channel_name":"c","token":""}}`)},
		{"ids of any text", `{"avatar_id":"avatar/123 \\ é","app_id":"app & id/.","audio":{"object":"a"}}`},
		{"a number with a point", speak(`,"max_attempts":2.0`)},
		{"a deadline in small letters", speak(`,"deadline":"2026-12-31t23:59:59.5z"`)},
		{"an avatar in Japanese", `{"avatar_id":"\u30a2\u30d0","audio":{"object":"a"}}`},
	}
}

func brokenJobs() []jobCase {
	long := strings.Repeat("x", 300)
	many := func(n int) string {
		var pairs []string
		for i := range n {
			pairs = append(pairs, fmt.Sprintf(`"k%d":"v"`, i))
		}
		return "{" + strings.Join(pairs, ",") + "}"
	}
	return []jobCase{
		{"not JSON", `{"avatar_id":`},
		{"a list", `[]`},
		{"nothing asked", `{}`},
		{"no avatar", `{"audio":{"object":"a"}}`},
		{"an empty avatar", `{"avatar_id":"","audio":{"object":"a"}}`},
		{"an avatar with a line break", `{"avatar_id":"a\nb","audio":{"object":"a"}}`},
		{"an avatar with a space at its end", `{"avatar_id":"a ","audio":{"object":"a"}}`},
		{"an avatar with a wide space at its start", `{"avatar_id":"\u3000b","audio":{"object":"a"}}`},
		{"an avatar with a C1 control", `{"avatar_id":"a\u0085b","audio":{"object":"a"}}`},
		{"a long avatar", `{"avatar_id":"` + long + `","audio":{"object":"a"}}`},
		{"a field that is not known", speak(`,"priority":1`)},
		{"a field in another spelling", `{"avatarId":"ok","audio":{"object":"a"}}`},
		{"an audio field that is not known", spoken(`{"object":"a","rate":1}`)},
		{"an output field that is not known", speak(`,"output":{"frames":{"x":1}}`)},
		{"an output that is not known", speak(`,"output":{"rtmp":{}}`)},
		{"an id with a dot", speak(`,"id":"a.b"`)},
		{"a long id", speak(`,"id":"` + long + `"`)},
		{"an app id with a tab", speak(`,"app_id":"a\tb"`)},
		{"an app id that is a space", speak(`,"app_id":" "`)},
		{"a region that is a host", speak(`,"region":"evil.com"`)},
		{"a region of one word", speak(`,"region":"west"`)},
		{"no speech", `{"avatar_id":"ok"}`},
		{"speech twice", speak(`,"utterances":[{"object":"a"}]`)},
		{"speech and live", speak(`,"live":{"sample_rate":16000}`)},
		{"no utterances", `{"avatar_id":"ok","utterances":[]}`},
		{"a broken utterance", `{"avatar_id":"ok","utterances":[{"object":"a"},{}]}`},
		{"utterances that are no list", `{"avatar_id":"ok","utterances":{"object":"a"}}`},
		{"audio without a source", spoken(`{"format":"wav"}`)},
		{"audio with two sources", spoken(`{"object":"a","url":"http://x/"}`)},
		{"no bytes", spoken(`{"inline":""}`)},
		{"bytes that are no base64", spoken(`{"inline":"a b!"}`)},
		{"a data URL", spoken(`{"inline":"data:audio/wav;base64,AAAA"}`)},
		{"another format", spoken(`{"object":"a","format":"mp3"}`)},
		{"raw PCM without a rate", spoken(`{"object":"a","format":"pcm_s16le"}`)},
		{"a rate below zero", spoken(`{"object":"a","sample_rate":-1}`)},
		{"a rate that is not whole", spoken(`{"object":"a","sample_rate":1.5}`)},
		{"a rate in words", spoken(`{"object":"a","sample_rate":"fast"}`)},
		{"an object with a space at its end", spoken(`{"object":"a "}`)},
		{"an object with a line break", spoken(`{"object":"a\nb"}`)},
		{"an object in no bucket", spoken(`{"object":"/a"}`)},
		{"an object in a bucket with a dot", spoken(`{"object":"b.c/a"}`)},
		{"a bucket without an object", spoken(`{"object":"bucket/"}`)},
		{"a file URL", spoken(`{"url":"file:///etc/passwd"}`)},
		{"a URL without a host", spoken(`{"url":"http:///a.wav"}`)},
		{"live without a rate", `{"avatar_id":"ok","live":{}}`},
		{"live WAV", `{"avatar_id":"ok","live":{"sample_rate":16000,"format":"wav"}}`},
		{"silence in words", `{"avatar_id":"ok","live":{"sample_rate":16000,"max_silence":"long"}}`},
		{"no output", speak(`,"output":{}`)},
		{"two outputs", speak(`,"output":{"frames":{},"discard":{}}`)},
		{"livekit without a token", speak(`,"output":{"livekit":{"url":"wss://x","room_name":"r"}}`)},
		{"livekit by ftp", speak(`,"output":{"livekit":{"url":"ftp://x","room_name":"r","api_token":"t"}}`)},
		{"a token with a line break", speak(`,"output":{"agora":{"channel_name":"c","token":"t\n"}}`)},
		{"agora with a uid below zero", speak(`,"output":{"agora":{"channel_name":"c","token":"t","uid":-1}}`)},
		{"agora with a uid that is too high", speak(`,"output":{"agora":{"channel_name":"c","token":"t","uid":4294967296}}`)},
		{"a deadline without a zone", speak(`,"deadline":"2026-12-31T23:59:59"`)},
		{"a deadline that was never set", speak(`,"deadline":"0001-01-01T00:00:00Z"`)},
		{"a deadline with an offset of a day", speak(`,"deadline":"2026-12-31T23:59:59+24:00"`)},
		{"a deadline with an offset of 60 minutes", speak(`,"deadline":"2026-12-31T23:59:59+01:60"`)},
		{"a deadline in a leap second", speak(`,"deadline":"2026-12-31T23:59:60Z"`)},
		{"a deadline on no day", speak(`,"deadline":"2026-13-31T23:59:59Z"`)},
		{"a deadline in seconds", speak(`,"deadline":1798761599`)},
		{"attempts below zero", speak(`,"max_attempts":-1`)},
		{"too many attempts for a number", speak(`,"max_attempts":2147483648`)},
		{"another redelivery", speak(`,"on_redelivery":"maybe"`)},
		{"a label that is a number", speak(`,"labels":{"a":1}`)},
		{"a label without a name", speak(`,"labels":{"":"v"}`)},
		{"a long label", speak(`,"labels":{"a":"` + long + `"}`)},
		{"seventeen labels", speak(`,"labels":` + many(17))},
		{"sixty-five parameters", speak(`,"extra_params":` + many(65))},
		{"labels in a list", speak(`,"labels":["a"]`)},
	}
}

func TestTheJobSchemaAgreesWithTheWorkerOnValidJobs(t *testing.T) {
	v := validator(t)
	for _, c := range validJobs() {
		if err := v.Job([]byte(c.job)); err != nil {
			t.Errorf("%s: the schema refuses it: %v", c.name, err)
		}
		if err := parse(c.job); err != nil {
			t.Errorf("%s: the worker refuses it: %v", c.name, err)
		}
	}
}

func TestTheJobSchemaAgreesWithTheWorkerOnBrokenJobs(t *testing.T) {
	v := validator(t)
	for _, c := range brokenJobs() {
		if v.Job([]byte(c.job)) == nil {
			t.Errorf("%s: the schema takes %.200s", c.name, c.job)
		}
		if parse(c.job) == nil {
			t.Errorf("%s: the worker takes %.200s", c.name, c.job)
		}
	}
}

// What JSON Schema can't say, or what generated clients should not get:
// the schema's description names each.
func TestWhereTheJobSchemaAndTheWorkerDifferIsKnown(t *testing.T) {
	v := validator(t)
	for _, c := range []struct {
		name, job      string
		schema, worker bool // takes it
	}{
		{"null for an absent field", speak(`,"region":null`), false, true},
		{"an empty text for an absent field", speak(`,"region":""`), false, true},
		{"zero for an absent number", speak(`,"max_attempts":0`), false, true},
		{"no utterances beside speech", speak(`,"utterances":[]`), false, true},
		{"a number in quotes", spoken(`{"object":"a","sample_rate":"16000"}`), false, true},
		{"a key that comes twice", speak(`,"id":"a","id":"b"`), true, false},
		{"a silence out of its bounds", `{"avatar_id":"ok","live":{"sample_rate":16000,"max_silence":"1h"}}`, true, false},
		{"base64 with wrong padding", spoken(`{"inline":"AA="}`), true, false},
		{"256 letters of two bytes", speak(`,"labels":{"a":"` + strings.Repeat("é", 256) + `"}`), true, false},
	} {
		if got := v.Job([]byte(c.job)) == nil; got != c.schema {
			t.Errorf("%s: the schema takes it: %v, want %v", c.name, got, c.schema)
		}
		if got := parse(c.job) == nil; got != c.worker {
			t.Errorf("%s: the worker takes it: %v, want %v", c.name, got, c.worker)
		}
	}
}

// parse reads a job as the worker does.
func parse(job string) error {
	if _, err := jobspec.Decode(nil, []byte(job)); err != nil {
		return err
	}
	return nil
}

func TestEveryCodeClassAndPhaseIsInTheSchemas(t *testing.T) {
	v := validator(t)
	for name, m := range golden(t) {
		if name != "error" {
			continue
		}
		for _, code := range errors.Codes() {
			data := bytes.Replace(m.Data, []byte(`"code": "serverError"`), fmt.Appendf(nil, `"code": %q`, code), 1)
			data = bytes.Replace(data, []byte(`"class": "server"`), fmt.Appendf(nil, `"class": %q`, code.Class()), 1)
			if err := v.body("events/error.schema.json", data); err != nil {
				t.Errorf("code %s: %v", code, err)
			}
		}
		for _, phase := range errors.Phases() {
			data := bytes.Replace(m.Data, []byte(`"phase": "websocket_runtime"`), fmt.Appendf(nil, `"phase": %q`, phase), 1)
			if err := v.body("events/error.schema.json", data); err != nil {
				t.Errorf("phase %s: %v", phase, err)
			}
		}
	}
}

// A generator of clients names a type by its title, or by a number.
func TestWhatBecomesATypeInAClientHasAName(t *testing.T) {
	for _, pattern := range []string{"schema/*.json", "schema/events/*.json"} {
		paths, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil || len(paths) == 0 {
			t.Fatalf("%s: no schemas: %v", pattern, err)
		}
		for _, path := range paths {
			doc, err := load(path)
			if err != nil {
				t.Fatal(err)
			}
			for _, where := range nameless(doc, filepath.Base(path)) {
				t.Errorf("%s has no title", where)
			}
		}
	}
}

// nameless lists the objects, enumerations and alternatives without a title.
func nameless(schema any, where string) []string {
	s, _ := schema.(map[string]any)
	var found []string
	_, choice := s["enum"]
	_, fields := s["properties"]
	_, closed := s["additionalProperties"].(bool)
	if _, titled := s["title"]; !titled && (choice || fields || closed) {
		found = append(found, where)
	}
	for _, key := range []string{"properties", "$defs"} {
		children, _ := s[key].(map[string]any)
		for name, child := range children {
			found = append(found, nameless(child, where+"/"+name)...)
		}
	}
	alternatives, _ := s["oneOf"].([]any)
	for i, child := range alternatives {
		if branch, _ := child.(map[string]any); branch["title"] == nil {
			found = append(found, fmt.Sprintf("%s/oneOf/%d", where, i))
		}
	}
	return found
}
