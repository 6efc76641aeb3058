package jobspec

import (
	"fmt"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/encoding/protowire"

	"avatarworker/internal/errors"
)

// secretMark is part of every secret here. No error text has one of its letters
// for another reason.
const secretMark = "QXKZQXKZ"

// secretFields are jobs whose one %s is a value that must never be shown.
var secretFields = []string{
	`{"avatar_id":"ok","audio":{"object":"o"},"output":{"livekit":{"url":"wss://h","room_name":"r","publisher_id":"p","api_token":%s}}}`,
	`{"avatar_id":"ok","audio":{"object":"o"},"output":{"livekit":{"room_name":"r","api_token":"t","url":%s}}}`,
	`{"avatar_id":"ok","audio":{"object":"o"},"output":{"agora":{"channel_name":"c","token":%s}}}`,
	`{"avatar_id":"ok","audio":{"url":%s}}`,
	`{"avatar_id":"ok","utterances":[{"object":"o"},{"url":%s}]}`,
}

// secretsBroken are texts before and after the mark, as they stand in JSON.
var secretsBroken = [][2]string{
	{`\ud800`, ``}, {`http://h/?token=\ud800`, ``}, {`\udc00`, ``}, {`\ud83d\u`, ``}, {``, `\ud83d`},
	{`\`, ``}, {`\u12`, ``}, {``, `\`}, {``, `\q`}, {"\n", ``}, {"\xff", ``}, {``, "\xed\xa0\x80"}, {`http://h:`, ``}, {`%zz`, `%`},
	{`\u0000`, ``},
}

func TestErrorTextNeverShowsALetterOfASecret(t *testing.T) {
	for field := range secretFields {
		for _, around := range secretsBroken {
			checkSecret(t, field, true, around[0], around[1])
			checkSecret(t, field, false, around[0], around[1])
		}
		checkSecret(t, field, true, `http://h/?`, strings.Repeat("x", maxToken)) // too long
		checkSecret(t, field, false, `[{`, ``)
		checkSecret(t, field, false, `1.5e`, `e7`)
	}
}

func TestPositionIsAllThatIsShownOfAnErrorOfProtojson(t *testing.T) {
	for text, want := range map[string]string{
		"proto: syntax error (line 1:20): invalid escape code \"" + secretMark + "\" in string": " (line 1, column 20)",
		"proto:\u00a0(line 3:4): unknown field \"" + secretMark + "\"":                          " (line 3, column 4)",
		"proto: " + secretMark + " (line 3:4): ":                                                "",
		"unexpected EOF":                                                                        "",
	} {
		if got := protoPosition(errors.New(text)); got != want {
			t.Errorf("of %q it shows %q, want %q", text, got, want)
		}
	}
}

func FuzzSecretsOfAJob(f *testing.F) {
	for field := range secretFields {
		for _, around := range secretsBroken {
			f.Add(field, true, around[0], around[1])
			f.Add(field, false, around[0], around[1])
		}
	}
	f.Fuzz(func(t *testing.T, field int, quoted bool, before, after string) {
		if field < 0 || field >= len(secretFields) || strings.Contains(before+after, `"`) {
			return // a quote would end the secret, and begin another field
		}
		checkSecret(t, field, quoted, before, after)
	})
}

// checkSecret reads a job with a secret in a field, as JSON and as protobuf,
// whole and cut off.
func checkSecret(t *testing.T, field int, quoted bool, before, after string) {
	t.Helper()
	secret := before + secretMark + after
	value := secret
	if quoted {
		value = `"` + secret + `"`
	}
	wantHidden(t, nil, fmt.Appendf(nil, secretFields[field], value))
	binary := tokenInProtobuf(secret)
	header := nats.Header{"Content-Type": {ContentTypeProtobuf}}
	wantHidden(t, header, binary)
	wantHidden(t, header, binary[:len(binary)-1])
}

// tokenInProtobuf is a job (output 8, livekit 3, api_token 4) whose token need
// not be UTF-8.
func tokenInProtobuf(token string) []byte {
	livekit := protowire.AppendString(protowire.AppendTag(nil, 4, protowire.BytesType), token)
	output := protowire.AppendBytes(protowire.AppendTag(nil, 3, protowire.BytesType), livekit)
	return protowire.AppendBytes(protowire.AppendTag(nil, 8, protowire.BytesType), output)
}

func wantHidden(t *testing.T, header nats.Header, body []byte) {
	t.Helper()
	if _, err := Decode(header, body); err != nil && strings.ContainsAny(err.Message, secretMark) {
		t.Fatalf("of %.300q it shows: %s", body, err.Message)
	}
}
