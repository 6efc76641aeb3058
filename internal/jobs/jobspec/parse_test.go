package jobspec

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobpb"
)

// brokenJobs are bodies of JSON jobs and the whole text that is said of each.
var brokenJobs = []struct{ name, body, want string }{
	{"empty", ``, `the message has no body: want a job as a JSON object`},
	{"white space", " \n", `the message has no body: want a job as a JSON object`},
	{"not JSON", `hello`, `not JSON: line 1, column 1: invalid character looking for beginning of value (a job in protobuf needs the header Content-Type: application/protobuf)`},
	{"not UTF-8", "{\"avatar_id\":\"\xff\"}", `not JSON: it is not UTF-8`},
	{"byte order mark", "\xEF\xBB\xBF{}", `not JSON: it starts with a byte order mark; publish UTF-8 without one`},
	{"cut off", `{"avatar_id":"a",`, `not JSON: line 1, column 17: unexpected end of JSON input`},
	{"missing comma on line 2", "{\"id\":\"a\"\n \"avatar_id\":\"a\"}", `not JSON: line 2, column 2: invalid character '"' after object key:value pair`},
	{"trailing garbage", `{"avatar_id":"a","audio":{"object":"o"}} {}`, `not JSON: line 1, column 42: invalid character '{' after top-level value`},
	{"a token without quotes", `{"output":{"livekit":{"api_token":geheim}}}`, `not JSON: line 1, column 35: invalid character looking for beginning of value`},
	{"a token like null", `{"output":{"livekit":{"api_token":ngeheim}}}`, `not JSON: line 1, column 36: invalid character in literal null (expecting 'u')`},
	{"an escape of no kind", `{"output":{"livekit":{"api_token":"a\geheim"}}}`, `not JSON: line 1, column 38: invalid character in string escape code`},
	{"a quote too many", `{"output":{"livekit":{"api_token":"a"geheim"}}}`, `not JSON: line 1, column 38: invalid character after object key:value pair`},
	{"single quotes", `{'avatar_id':'a'}`, `not JSON: line 1, column 2: invalid character '\'' looking for beginning of object key string`},
	{"an array", `[]`, `the job: want an object, got an array`},
	{"null", `null`, `the job: want an object, got null`},
	{"a typing error", `{"avatr_id":"a"}`, `field "avatr_id" is not known; did you mean "avatar_id"?`},
	{"camelCase", `{"avatarId":"a"}`, `field "avatarId" is not known; did you mean "avatar_id"?`},
	{"unknown at depth", `{"avatar_id":"a","utterances":[{"object":"o"},{"objct":"o"}]}`, `utterances[1]: field "objct" is not known; did you mean "object"?`},
	{"unknown without a like", `{"avatar_id":"a","audio":{"file":"o"}}`, `audio: field "file" is not known; known are format, inline, object, sample_rate, url`},
	{"unknown in an empty output", `{"avatar_id":"a","output":{"frames":{"x":1}}}`, `output.frames: field "x" is not known; it has no fields`},
	{"a field twice", `{"avatar_id":"a","avatar_id":"b"}`, `field "avatar_id" is given twice`},
	{"a label twice", `{"labels":{"a":"1","a":"2"}}`, `labels: field "a" is given twice`},
	{"number for string", `{"avatar_id":7}`, `avatar_id: want a string, got a number`},
	{"string for object", `{"audio":"speech.wav"}`, `audio: want an object, got a string`},
	{"object for array", `{"utterances":{"object":"o"}}`, `utterances: want an array, got an object`},
	{"null in an array", `{"utterances":[null]}`, `utterances[0]: want an object, got null`},
	{"bad base64", `{"audio":{"inline":"!!!"}}`, `audio.inline: not base64: at input byte 0 (spaces and line breaks not counted)`},
	{"bad padding", `{"audio":{"inline":"AAA=="}}`, `audio.inline: not base64: wrong padding`},
	{"bytes as array", `{"audio":{"inline":[1,2]}}`, `audio.inline: want base64 in a string, got an array`},
	{"deadline tomorrow", `{"deadline":"tomorrow"}`, `deadline: want an RFC 3339 time such as "2026-01-31T12:00:00Z", got "tomorrow"`},
	{"deadline a number", `{"deadline":1767225600}`, `deadline: want an RFC 3339 time such as "2026-01-31T12:00:00Z", got a number`},
	{"deadline of the year 0", with(`"deadline":"0000-01-01T00:00:00Z"`), `deadline: want a time of the years 2 to 9999 in UTC, got "0000-01-01T00:00:00Z"`},
	{"deadline past the year 9999", with(`"deadline":"9999-12-31T23:59:59-10:00"`), `deadline: want a time of the years 2 to 9999 in UTC, got "9999-12-31T23:59:59-10:00"`},
	{"deadline of ten digits", with(`"deadline":"2099-01-01T00:00:00.1234567890Z"`), `deadline: want at most nine digits after the dot, got "2099-01-01T00:00:00.1234567890Z"`},
	{"deadline with an hour of one digit", with(`"deadline":"2099-01-01T0:00:00Z"`), `deadline: want an RFC 3339 time such as "2026-01-31T12:00:00Z", got "2099-01-01T0:00:00Z"`},
	{"deadline with a comma", with(`"deadline":"2099-01-01T00:00:00,5Z"`), `deadline: want an RFC 3339 time such as "2026-01-31T12:00:00Z", got "2099-01-01T00:00:00,5Z"`},
	{"deadline never set", with(`"deadline":"0001-01-01T00:00:00Z"`), `deadline: year 1 is how a time that was never set is written, got 0001-01-01T00:00:00Z; set it or leave it out`},
	{"deadline never set, elsewhere", with(`"deadline":"0001-01-01T01:00:00.000+01:00"`), `deadline: year 1 is how a time that was never set is written, got 0001-01-01T00:00:00Z; set it or leave it out`},
	{"deadline with an offset of a day", with(`"deadline":"2099-01-01T00:00:00+24:00"`), `deadline: the offset +24:00 is none: want -23:59 to +23:59, with minutes up to 59, got "2099-01-01T00:00:00+24:00"`},
	{"deadline with an offset of 60 minutes", with(`"deadline":"2099-01-01T00:00:00-01:60"`), `deadline: the offset -01:60 is none: want -23:59 to +23:59, with minutes up to 59, got "2099-01-01T00:00:00-01:60"`},
	{"deadline with a large offset, small letters", with(`"deadline":"2099-01-01t00:00:00.5+14:60"`), `deadline: the offset +14:60 is none: want -23:59 to +23:59, with minutes up to 59, got "2099-01-01t00:00:00.5+14:60"`},
	{"deadline in a leap second", with(`"deadline":"2098-12-31T23:59:60Z"`), `deadline: a leap second (:60) is not taken: give the second before or after it, got "2098-12-31T23:59:60Z"`},
	{"deadline in second 61", with(`"deadline":"2098-12-31T23:59:61Z"`), `deadline: want an RFC 3339 time such as "2026-01-31T12:00:00Z", got "2098-12-31T23:59:61Z"`},
	{"deadline never set, small letters", with(`"deadline":"0001-01-01t00:00:00z"`), `deadline: year 1 is how a time that was never set is written, got 0001-01-01T00:00:00Z; set it or leave it out`},
	{"a data URL", `{"avatar_id":"a","audio":{"inline":" Data:audio/wav;base64,AAAA"}}`, `audio.inline: is a data: URL: want only the base64 after its comma`},
	{"a space that is not ASCII in base64", `{"avatar_id":"a","audio":{"inline":"AAAA\u00a0AAAA"}}`, `audio.inline: not base64: at input byte 4 (spaces and line breaks not counted)`},
	{"wrong padding in lines", `{"avatar_id":"a","audio":{"inline":"AAA=\n="}}`, `audio.inline: not base64: wrong padding`},
	{"deadline distinguished from a label", with(`"labels":{"deadline":"2099-01-01T00:00:00Z"},"deadline" : "2099-01-01T0:00:00Z"`), `deadline: want an RFC 3339 time such as "2026-01-31T12:00:00Z", got "2099-01-01T0:00:00Z"`},
	{"deadline in escapes", with(`"dead\u006cine":"2099-01-01T0:00:00Z"`), `deadline: want an RFC 3339 time such as "2026-01-31T12:00:00Z", got "2099-01-01T0:00:00Z"`},
	{"rate a word", `{"audio":{"sample_rate":"fast"}}`, `audio.sample_rate: want a whole number, got "fast"`},
	{"rate a fraction", `{"audio":{"sample_rate":16000.5}}`, `audio.sample_rate: want a whole number, got 16000.5`},
	{"rate too large", `{"audio":{"sample_rate":3000000000}}`, `audio.sample_rate: want a whole number from -2147483648 to 2147483647, got 3000000000`},
	{"uid negative", `{"output":{"agora":{"uid":-1}}}`, `output.agora.uid: want a whole number from 0 to 4294967295, got -1`},
	{"label not a string", `{"labels":{"tier":3}}`, `labels["tier"]: want a string, got a number; put it in quotes`},
	{"params an array", `{"extra_params":["a"]}`, `extra_params: want an object of strings, got an array`},
	{"half a pair in a token", with(`"output":{"livekit":{"url":"wss://h","room_name":"r","api_token":"\ud800geheim"}}`), `output.livekit.api_token: holds half a surrogate pair: \ud800 to \udfff stand for a character only two by two`},
	{"half a pair in a URL", `{"avatar_id":"a","utterances":[{"object":"o"},{"url":"http://h/?token=\ud800geheim"}]}`, `utterances[1].url: holds half a surrogate pair: \ud800 to \udfff stand for a character only two by two`},
	{"half a pair at the end", `{"avatar_id":"\ud83d\ude00 \\ud800 \udbff"}`, `avatar_id: holds half a surrogate pair: \ud800 to \udfff stand for a character only two by two`},
	{"low half first", `{"avatar_id":"\ude00\ud83d"}`, `avatar_id: holds half a surrogate pair: \ud800 to \udfff stand for a character only two by two`},
	{"half a pair before another escape", `{"avatar_id":"\ud83d\u0041"}`, `avatar_id: holds half a surrogate pair: \ud800 to \udfff stand for a character only two by two`},
	{"half a pair in a label", `{"labels":{"a":"\uDEAD"}}`, `labels["a"]: holds half a surrogate pair: \ud800 to \udfff stand for a character only two by two`},
	{"half a pair in a label's name", `{"labels":{"a":"1","\uDEAD":"2"}}`, "labels: field \"\ufffd\": the name holds half a surrogate pair: \\ud800 to \\udfff stand for a character only two by two"},
	{"padding at will", `{"audio":{"inline":"AAAA===="}}`, `audio.inline: not base64: wrong padding`},
	{"rate with a sign", `{"audio":{"sample_rate":"+16000"}}`, `audio.sample_rate: want a whole number in plain digits, got "+16000"`},
	{"rate with spaces", `{"audio":{"sample_rate":" 16000"}}`, `audio.sample_rate: want a whole number, got " 16000"`},
	{"several at once", `{"avatr_id":"a","audio":{"inline":3}}`, `field "avatr_id" is not known; did you mean "avatar_id"?; audio.inline: want base64 in a string, got a number`},

	{"no avatar", `{"audio":{"object":"o"}}`, `avatar_id: is required`},
	{"avatar with a line break", `{"avatar_id":"a\nb","audio":{"object":"o"}}`, `avatar_id: no control characters, got "a\nb"`},
	{"avatar with a space at its end", `{"avatar_id":"a\u2003","audio":{"object":"o"}}`, `avatar_id: no space at its ends, got "a\u2003"`},
	{"avatar too long", `{"avatar_id":"` + strings.Repeat("a", 257) + `","audio":{"object":"o"}}`, `avatar_id: at most 256 bytes, got 257`},
	{"bad id", with(`"id":"a.b"`), `id: want 1 to 64 of A-Z a-z 0-9 _ -, got "a.b"`},
	{"app with a space at its end", with(`"app_id":"a "`), `app_id: no space at its ends, got "a "`},
	{"app with a control character", with(`"app_id":"a\u0085b"`), `app_id: no control characters, got "a\u0085b"`},
	{"app too long", with(`"app_id":"` + strings.Repeat("a", 129) + `"`), `app_id: at most 128 bytes, got 129`},
	{"region that is a host", with(`"region":"evil.example/"`), `region: want lower-case words joined by hyphens such as "us-west", got "evil.example/"`},
	{"nothing to say", `{"avatar_id":"a"}`, `exactly one of audio, utterances, live is needed, none is given`},
	{"no utterances", `{"avatar_id":"a","utterances":[]}`, `exactly one of audio, utterances, live is needed, none is given`},
	{"too many utterances", `{"avatar_id":"a","utterances":[` + strings.Repeat(`{"object":"o"},`, 1000) + `{"object":"o"}]}`, `utterances: at most 1000, got 1001; split the job`},
	{"audio and live", with(`"live":{"sample_rate":16000}`), `exactly one of audio, utterances, live is needed, got audio and live`},
	{"two sources", `{"avatar_id":"a","audio":{"inline":"AAA=","object":"o"}}`, `audio: exactly one of inline, object, url is needed, got inline and object`},
	{"no source", `{"avatar_id":"a","utterances":[{"object":"o"},{"format":"wav"}]}`, `utterances[1]: exactly one of inline, object, url is needed, none is given`},
	{"empty object", `{"avatar_id":"a","audio":{"object":""}}`, `audio.object: is empty`},
	{"empty URL", `{"avatar_id":"a","utterances":[{"object":"o"},{"url":"","format":"wav"}]}`, `utterances[1].url: is empty`},
	{"null object", `{"avatar_id":"a","audio":{"object":null}}`, `audio: exactly one of inline, object, url is needed, none is given`},
	{"empty inline", `{"avatar_id":"a","audio":{"inline":""}}`, `audio.inline: is empty`},
	{"bad scheme", `{"avatar_id":"a","utterances":[{"url":"file:///etc/passwd"}]}`, `utterances[0].url: want a URL that starts with one of http://, https://`},
	{"no host", `{"avatar_id":"a","audio":{"url":"https:///x"}}`, `audio.url: the URL has no host`},
	{"a login", `{"avatar_id":"a","audio":{"url":"https://me:geheim@h/x"}}`, `audio.url: the URL carries a user name or password: none is sent. Use a URL that is signed in its query`},
	{"no port", `{"avatar_id":"a","audio":{"url":"https://h:65536/x"}}`, `audio.url: the URL's port is not a number of 1 to 65535`},
	{"no URL", `{"avatar_id":"a","audio":{"url":"https://h:secret-port/?sig=geheim"}}`, `audio.url: not a URL`},
	{"bad bucket", `{"avatar_id":"a","audio":{"object":"a b/c"}}`, `audio.object: want a name, or bucket/name with a bucket of A-Z a-z 0-9 _ -, got "a b/c"`},
	{"bucket without name", `{"avatar_id":"a","audio":{"object":"bucket/"}}`, `audio.object: has no name after the bucket, got "bucket/"`},
	{"object with a line break", `{"avatar_id":"a","audio":{"object":"a\n"}}`, `audio.object: no control characters, got "a\n"`},
	{"bad format", `{"avatar_id":"a","audio":{"object":"o","format":"mp3"}}`, `audio.format: want one of wav, pcm_s16le, ogg_opus, got "mp3"`},
	{"raw without rate", `{"avatar_id":"a","audio":{"object":"o","format":"pcm_s16le"}}`, `audio.sample_rate: is required with format pcm_s16le, which does not say its rate`},
	{"negative rate", `{"avatar_id":"a","audio":{"object":"o","sample_rate":-1}}`, `audio.sample_rate: want Hz, got -1`},
	{"live without rate", `{"avatar_id":"a","live":{}}`, `live.sample_rate: is required: the speech's rate in Hz, got 0`},
	{"live as wav", `{"avatar_id":"a","live":{"sample_rate":16000,"format":"wav"}}`, `live.format: want one of pcm_s16le, ogg_opus, got "wav"`},
	{"silence a word", `{"avatar_id":"a","live":{"sample_rate":16000,"max_silence":"long"}}`, `live.max_silence: want a duration such as "30s", got "long"`},
	{"silence too short", `{"avatar_id":"a","live":{"sample_rate":16000,"max_silence":"0.5s"}}`, `live.max_silence: want 1s to 10m, got "0.5s"`},
	{"silence for ever", `{"avatar_id":"a","live":{"sample_rate":16000,"max_silence":"inf"}}`, `live.max_silence: want a duration such as "30s", got "inf"`},
	{"no output", with(`"output":{}`), `output: exactly one of frames, object, livekit, agora, discard is needed, none is given`},
	{"two outputs", with(`"output":{"frames":{},"discard":{}}`), `output: exactly one of frames, object, livekit, agora, discard is needed, got frames and discard`},
	{"recording name", with(`"output":{"object":{"name":" x"}}`), `output.object.name: no space at its ends, got " x"`},
	{"livekit without credentials", with(`"output":{"livekit":{"idle_timeout":-1}}`), `output.livekit.url: is required; output.livekit.room_name: is required; output.livekit.api_token: is required; output.livekit.idle_timeout: want seconds, or 0 for the backend's default, got -1`},
	{"livekit token with a line break", with(`"output":{"livekit":{"url":"wss://h","room_name":"r","api_token":"geheim\n"}}`), `output.livekit.api_token: no control characters; is there a line break at its end?`},
	{"agora without credentials", with(`"output":{"agora":{"uid":1}}`), `output.agora.channel_name: is required`},
	{"negative attempts", with(`"max_attempts":-1`), `max_attempts: want 1 or more, or 0 for the worker's default, got -1`},
	{"unknown redelivery", with(`"on_redelivery":"again"`), `on_redelivery: want one of resume, restart, give_up, got "again"`},
	{"too many labels", with(`"labels":{` + members(17) + `}`), `labels: at most 16, got 17`},
	{"long label", with(`"labels":{"note":"` + strings.Repeat("x", 257) + `"}`), `labels.note: at most 256 bytes, got 257`},
	{"long label name", with(`"labels":{"` + strings.Repeat("x", 257) + `":""}`), `labels: names are at most 256 bytes, got "` + strings.Repeat("x", 61) + `…" with 257`},
	{"nameless label", with(`"labels":{"":"x"}`), `labels: a label needs a name`},
	{"too many params", with(`"extra_params":{` + members(65) + `}`), `extra_params: at most 64, got 65`},
	{"nameless param", with(`"extra_params":{"":"x"}`), `extra_params: want keys of 1 to 256 bytes and values of at most 4096, got "" with 1 bytes`},
}

// with is a job that is valid but for the fields given.
func with(fields string) string { return `{"avatar_id":"a","audio":{"object":"o"},` + fields + `}` }

func members(n int) string {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprintf(`"k%d":"v"`, i)
	}
	return strings.Join(list, ",")
}

func TestBrokenJobIsRefusedByTheNameOfItsField(t *testing.T) {
	messages := make([]*nats.Msg, len(brokenJobs))
	for i, row := range brokenJobs {
		messages[i] = &nats.Msg{Data: []byte(row.body)}
	}
	for i, msg := range deliver(t, messages...) {
		t.Run(brokenJobs[i].name, func(t *testing.T) {
			_, job, err := Read(msg)
			wantInvalid(t, job, err, brokenJobs[i].want)
		})
	}
}

func wantInvalid(t *testing.T, job *Job, err *errors.Error, want string) {
	t.Helper()
	if err == nil {
		t.Fatalf("taken as %v", job)
	}
	if job != nil || err.Code != errors.CodeInvalidJob || err.Phase != errors.PhaseJob {
		t.Errorf("got job %v, code %s, phase %s", job, err.Code, err.Phase)
	}
	if err.Message != want {
		t.Errorf("says\n %s\nwant\n %s", err.Message, want)
	}
	if strings.Contains(err.Message, "geheim") {
		t.Errorf("shows a secret: %s", err.Message)
	}
}

func TestBrokenProtobufAndHeadersAreRefused(t *testing.T) {
	valid, err := proto.Marshal(&jobpb.Job{AvatarId: "a", Audio: &jobpb.Audio{Object: "o"}})
	if err != nil {
		t.Fatal(err)
	}
	nested, err := proto.Marshal(&jobpb.Job{AvatarId: "a", Utterances: []*jobpb.Audio{{Object: "o"}, {Object: "p"}}})
	if err != nil {
		t.Fatal(err)
	}
	// A sixth field in the second utterance: the last 3 bytes are its object.
	nested = append(nested[:len(nested)-4], 6, 0x12, 1, 'p', 0xfa, 0x01, 0)
	header := func(pairs ...string) nats.Header {
		h := nats.Header{"Content-Type": {ContentTypeProtobuf}}
		for i := 0; i < len(pairs); i += 2 {
			h[pairs[i]] = []string{pairs[i+1]}
		}
		return h
	}
	rows := []struct {
		name   string
		header nats.Header
		body   []byte
		want   string
	}{
		{"empty", header(), nil, `the message has no body: want a job in protobuf`},
		{"JSON", header(), []byte(`{"avatar_id":"a"}`), `not a job in protobuf (avatarworker.v1.Job), though the header Content-Type says so: cannot parse invalid wire-format data`},
		{"unknown field", header(), append(bytes.Clone(valid), 0xfa, 0x01, 0), `protobuf field number 31 is not known; does the publisher use a newer job.proto?`},
		{"unknown field at depth", header(), nested, `utterances[1]: protobuf field number 31 is not known; does the publisher use a newer job.proto?`},
		{"not UTF-8", header(), []byte("\x1a\x01\xff"), `not a job in protobuf (avatarworker.v1.Job), though the header Content-Type says so: string field contains invalid UTF-8`},
		{"no avatar", header(), []byte("\x2a\x03\x12\x01o"), `avatar_id: is required`},
		{"deadline out of range", header(), append(bytes.Clone(valid), 0x52, 2, 0x10, 0xff, 1), ``},
		{"protobuf without the header", nats.Header{}, valid, `not JSON: line 1, column 1: invalid character '\x1a' looking for beginning of value (a job in protobuf needs the header Content-Type: application/protobuf)`},
		{"job id header", header("Avatar-Job-Id", "a b"), valid, `header Avatar-Job-Id: want 1 to 64 of A-Z a-z 0-9 _ -, got "a b"`},
		{"run header", header("Avatar-Run", "0"), valid, `header Avatar-Run: want a whole number from 1 to 1000000000, got "0"`},
		{"a deadline neither ignored nor kept", header("avatar-ignore-deadline", "maybe"), valid, `header Avatar-Ignore-Deadline: want true or false, got "maybe"`},
		{"run header in another case", header("AVATAR-RUN", "two"), valid, `header Avatar-Run: want a whole number from 1 to 1000000000, got "two"`},
		{"run header past the last", header("Avatar-Run", "1000000001"), valid, `header Avatar-Run: want a whole number from 1 to 1000000000, got "1000000001"`},
	}
	rows[6].body = nil
	if rows[6].body, err = proto.Marshal(&jobpb.Job{AvatarId: "a", Audio: &jobpb.Audio{Object: "o"}, Deadline: &timestamppb.Timestamp{Nanos: -1}}); err != nil {
		t.Fatal(err)
	}
	rows[6].want = `deadline: want a time of the years 2 to 9999 in UTC`
	messages := make([]*nats.Msg, len(rows))
	for i, row := range rows {
		messages[i] = &nats.Msg{Header: row.header, Data: row.body}
	}
	for i, msg := range deliver(t, messages...) {
		t.Run(rows[i].name, func(t *testing.T) {
			_, job, err := Read(msg)
			wantInvalid(t, job, err, rows[i].want)
		})
	}
}

func TestErrorTextOfManyFaultsStaysShort(t *testing.T) {
	var b strings.Builder
	b.WriteString("{")
	for i := range 5_000 {
		fmt.Fprintf(&b, `"%s%d":1,`, strings.Repeat("ü", 500), i)
	}
	b.WriteString(`"x":1}`)
	_, err := Decode(nil, []byte(b.String()))
	if err == nil || len(err.Message) > 3000 || !strings.HasSuffix(err.Message, "; and more") {
		t.Fatalf("got %v", err)
	}
}

const wholeJob = `{
  "id": "J-1", "app_id": "app.one", "avatar_id": "ok", "region": "ap-northeast",
  "utterances": [
    {"inline": "AAAAAA==", "format": "pcm_s16le", "sample_rate": 16000},
    {"object": "bucket/dir/name.wav"},
    {"url": "https://host/x.ogg?sig=geheim", "format": "ogg_opus", "sample_rate": null}
  ],
  "output": {"livekit": {"url": "wss://user:password@lk.example?access=hidden", "room_name": "r", "publisher_id": "p",
    "api_token": "token-1", "extra_attributes": {"k": "v"}, "idle_timeout": 5}},
  "extra_params": {"server_post_process": "false"},
  "deadline": "2026-01-31T12:00:00.5+02:00", "max_attempts": 3, "on_redelivery": "give_up",
  "labels": {"tier": "gold"}
}`

func TestWholeJobIsReadFromJSONAndProtobufAlike(t *testing.T) {
	const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	body, err := Decode(nil, []byte(wholeJob))
	if err != nil {
		t.Fatal(err)
	}
	binary, marshalErr := proto.Marshal(body)
	if marshalErr != nil {
		t.Fatal(marshalErr)
	}
	before := time.Now().Add(-time.Minute)
	for _, msg := range deliver(t,
		&nats.Msg{Subject: "avatar.jobs.vip", Data: []byte(wholeJob), Header: nats.Header{"traceparent": {parent}, "tracestate": {"a=b"}, "Avatar-Run": {"2"}}},
		&nats.Msg{Subject: "avatar.jobs.vip", Data: binary, Header: nats.Header{"Content-Type": {"application/protobuf; charset=x"}, "traceparent": {parent}, "tracestate": {"a=b"}, "Avatar-Run": {"2"}}},
	) {
		ident, job, err := Read(msg)
		if err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(job.Job, body) {
			t.Errorf("got %v", job.Job)
		}
		if job.ID != "J-1" || job.Run != 2 || job.Queue != "vip" || job.Subject != "avatar.jobs.vip" || job.StreamSeq != ident.StreamSeq ||
			job.Published.Before(before) || job.TraceParent != parent || job.TraceState != "a=b" {
			t.Errorf("got %+v", job)
		}
		checkWholeJob(t, job)
	}
}

func checkWholeJob(t *testing.T, job *Job) {
	t.Helper()
	specs := job.AudioSpecs()
	if len(specs) != 3 || !specs[0].HasInline || len(specs[0].Inline) != 4 || specs[0].Field != "utterances[0]" || specs[0].SampleRate != 16000 ||
		specs[1].HasInline || specs[1].Object != "bucket/dir/name.wav" || specs[2].Format != FormatOggOpus || specs[2].Field != "utterances[2]" {
		t.Errorf("got %+v", specs)
	}
	if job.OutputKind() != OutputLiveKit || job.RedeliveryPolicy() != OnRedeliveryGiveUp || job.RecordingName() != "" {
		t.Errorf("got %s, %s, %q", job.OutputKind(), job.RedeliveryPolicy(), job.RecordingName())
	}
	if want := time.Date(2026, 1, 31, 10, 0, 0, 5e8, time.UTC); !job.NotAfter().Equal(want) {
		t.Errorf("deadline %s", job.NotAfter())
	}
	if got, want := strings.Join(job.Secrets(), " "), "token-1 access=hidden password sig=geheim"; got != want {
		t.Errorf("secrets %q, want %q", got, want)
	}
	for n := range specs {
		job.DropInline(n + 1)
	}
	if said := job.AudioSpecs(); !said[0].HasInline || len(said[0].Inline) != 0 || said[1].Object != specs[1].Object || said[2].HasInline != specs[2].HasInline {
		t.Errorf("once it is said: %+v", said)
	}
}

func TestDefaultsOfAJob(t *testing.T) {
	body, err := Decode(nil, []byte(`{"avatar_id":"a","live":{"sample_rate":16000},"output":null}`))
	if err != nil {
		t.Fatal(err)
	}
	job := &Job{Job: body, ID: "J"}
	if job.OutputKind() != OutputFrames || job.RedeliveryPolicy() != OnRedeliveryResume || job.MaxSilence() != 30*time.Second ||
		job.LiveFormat() != FormatPCM || !job.NotAfter().IsZero() || len(job.AudioSpecs()) != 0 || len(job.Secrets()) != 0 {
		t.Errorf("got %s, %s, %s", job.OutputKind(), job.RedeliveryPolicy(), job.MaxSilence())
	}
	for text, want := range map[string]time.Duration{"1.5s": 1500 * time.Millisecond, "45": 45 * time.Second, "10m": 10 * time.Minute, "1m30s": 90 * time.Second} {
		body.Live.MaxSilence = text
		if err := Validate(body); err != nil || job.MaxSilence() != want {
			t.Errorf("%q: got %s, %v", text, job.MaxSilence(), err)
		}
	}
	body.Output = &jobpb.Output{Object: &jobpb.ObjectOutput{}}
	if job.OutputKind() != OutputObject || job.RecordingName() != "J" {
		t.Errorf("got %s named %q", job.OutputKind(), job.RecordingName())
	}
	body.Output.Object.Name = "dir/take 1"
	if err := Validate(body); err != nil || job.RecordingName() != "dir/take 1" {
		t.Errorf("got %q, %v", job.RecordingName(), err)
	}
}

func TestDeadlineOfAnySpellingThatRFC3339HasIsTaken(t *testing.T) {
	want := time.Date(2099, 1, 1, 0, 0, 0, 5e8, time.UTC)
	for _, member := range []string{
		`"deadline":"2099-01-01T00:00:00.5Z"`,
		`"deadline" :` + "\n\t" + `"2099-01-01T02:00:00.500000000+02:00"`,
		`"deadline":"2098-12-31T23:00:00.5\u002d01:00"`,
		`"deadline":"2099-01-01t00:00:00.5z"`,
		`"deadline":"2099-01-01t02:00:00.5+02:00"`,
		`"dead\u006cine":"2099-01-01T00:00:00.5Z"`,
		`"labels":{"note":"deadline","deadline":"soon"},"deadline":"2099-01-01T00:00:00.5Z"`,
	} {
		body, err := Decode(nil, []byte(with(member)))
		if err != nil || !body.GetDeadline().AsTime().Equal(want) {
			t.Errorf("%s: got %v, %v", member, body.GetDeadline(), err)
		}
	}
}

func TestBase64InLinesIsTakenWhateverTheirNumberAndLength(t *testing.T) {
	for length := 1; length < 100; length++ {
		speech := make([]byte, length)
		for i := range speech {
			speech[i] = byte(251 * i)
		}
		for _, encoding := range []*base64.Encoding{base64.StdEncoding, base64.RawStdEncoding, base64.URLEncoding, base64.RawURLEncoding} {
			text := encoding.EncodeToString(speech)
			for _, space := range []string{`\n`, `\r\n`, ` \t\f`, `\u000a`} {
				for _, width := range []int{1, 19, 76} {
					wrapped := strings.Join(chunks(text, width), space) + space
					body, err := Decode(nil, []byte(`{"avatar_id":"a","labels":{"inline":"a b"},"utterances":[{"object":"o"},{"inline":"`+wrapped+`"}]}`))
					if err != nil {
						t.Fatalf("%s: %s", wrapped, err.Message)
					}
					if !bytes.Equal(body.GetUtterances()[1].GetInline(), speech) || body.GetLabels()["inline"] != "a b" {
						t.Fatalf("%s: got %v", wrapped, body)
					}
				}
			}
		}
	}
}

func chunks(text string, width int) []string {
	var lines []string
	for len(text) > width {
		lines, text = append(lines, text[:width]), text[width:]
	}
	return append(lines, text)
}

func FuzzJob(f *testing.F) {
	for _, row := range brokenJobs {
		f.Add(false, []byte(row.body))
	}
	body, err := Decode(nil, []byte(wholeJob))
	if err != nil {
		f.Fatal(err)
	}
	binary, marshalErr := proto.Marshal(body)
	if marshalErr != nil {
		f.Fatal(marshalErr)
	}
	f.Add(false, []byte(wholeJob))
	f.Add(true, binary)
	f.Add(false, []byte(`{"avatar_id":"a","live":{"sample_rate":"16000","max_silence":"1e1"}}`))
	f.Fuzz(func(t *testing.T, binary bool, data []byte) {
		header := nats.Header{}
		if binary {
			header["Content-Type"] = []string{ContentTypeProtobuf}
		}
		body, err := Decode(header, data)
		if id := JobIDOf(header, body); id != "" && (!ValidID(id) || err != nil) {
			t.Fatalf("made the id %q (%v)", id, err)
		}
		if err != nil {
			if err.Code != errors.CodeInvalidJob || err.Message == "" || len(err.Message) > 3000 || strings.Contains(err.Message, "proto:") {
				t.Fatalf("got %+v", err)
			}
			return
		}
		roundTrip(t, body, JobIDOf(header, body))
	})
}

// roundTrip writes a valid job in both encodings and reads it again.
func roundTrip(t rapid.TB, body *jobpb.Job, id string) {
	t.Helper()
	if body.GetId() != "" && body.GetId() != id {
		t.Fatalf("the job is %q, identified as %q", body.GetId(), id)
	}
	asJSON, err := protojson.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	asProto, err := proto.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	for header, data := range map[string][]byte{"": asJSON, ContentTypeProtobuf: asProto} {
		again, err := Decode(nats.Header{"Content-Type": {header}}, data)
		if err != nil {
			t.Fatalf("%q: %v", data, err)
		}
		if !proto.Equal(body, again) {
			t.Fatalf("got %v, want %v", again, body)
		}
	}
	job := &Job{Job: body}
	if d := job.MaxSilence(); d < minMaxSilence || d > maxMaxSilence {
		t.Fatalf("silence of %s", d)
	}
	if len(job.AudioSpecs()) == 0 && body.GetLive() == nil {
		t.Fatal("nothing to say")
	}
}
