package dlq_test

import (
	"encoding/json"
	"strings"
	"testing"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
)

const editable = `{"avatar_id":"a","audio":{"inline":"` + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWZnaGlqa2xtbm9wcXJzdHV2d3h5ejAxMjM0NTY3ODk=" +
	`"},"output":{"livekit":{"url":"wss://h/x?sig=hush","api_token":"tok-1"}},"n":12345678901234567890}`

func TestAnEditedJobKeepsWhatWasHidden(t *testing.T) {
	l := dlq.Letter{Data: []byte(editable)}
	shown, err := dlq.EditJSON(l)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{"tok-1", "hush", "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWZnaGlqa2xtbm9w"} {
		if strings.Contains(string(shown), secret) {
			t.Errorf("%s is shown:\n%s", secret, shown)
		}
	}
	same := func(name string, edited, want string) {
		t.Helper()
		got, err := dlq.Unmask(l, []byte(edited))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var a, b any
		if json.Unmarshal(got, &a) != nil || json.Unmarshal([]byte(want), &b) != nil {
			t.Fatalf("%s: %s", name, got)
		}
		x, _ := json.Marshal(a)
		y, _ := json.Marshal(b)
		if string(x) != string(y) {
			t.Errorf("%s: got\n%s\nwant\n%s", name, x, y)
		}
		if strings.Contains(want, "12345678901234567890") && !strings.Contains(string(got), "12345678901234567890") {
			t.Errorf("%s: the number was rounded: %s", name, got)
		}
	}
	same("nothing", string(shown), editable)
	same("another field", strings.Replace(string(shown), `"a"`, `"b"`, 1), strings.Replace(editable, `"a"`, `"b"`, 1))
	same("a new token", strings.Replace(string(shown), "[hidden]", "tok-2", 1), strings.Replace(editable, "tok-1", "tok-2", 1))
	same("the audio moved", strings.Replace(strings.Replace(string(shown), `"audio": {`, `"utterances": [{`, 1), "},\n  \"avatar_id\"", "}],\n  \"avatar_id\"", 1),
		strings.Replace(strings.Replace(editable, `"audio":{`, `"utterances":[{`, 1), `"},"output"`, `"}],"output"`, 1))
	same("whole", `{"avatar_id":"z"}`, `{"avatar_id":"z"}`)
	if got, err := dlq.Unmask(l, []byte(`{"avatar_id":`)); err != nil || string(got) != `{"avatar_id":` {
		t.Errorf("half a job: %s, %v", got, err)
	}
	if _, err := dlq.Unmask(l, []byte(`{"a":"[hidden]","output":{"livekit":{"api_token":"x"}}}`)); err != nil {
		t.Errorf("the only hidden value, moved: %v", err)
	}
	two := dlq.Letter{Data: []byte(`{"a_token":"x1","b_token":"x2"}`)}
	if _, err := dlq.Unmask(two, []byte(`{"c_token":"[hidden]"}`)); !errors.Is(err, dlq.ErrHidden) {
		t.Errorf("one of two hidden values, moved: %v", err)
	}
}

func TestATextThatSteersTheScreenIsEscapedInWhatIsEdited(t *testing.T) {
	l := dlq.Letter{Data: []byte("{\"avatar_id\":\"a\u202eb\u2028c\"}")}
	shown, err := dlq.EditJSON(l)
	if err != nil || !strings.Contains(string(shown), `a\u202eb\u2028c`) {
		t.Errorf("%s, %v", shown, err)
	}
	got, err := dlq.Unmask(l, shown)
	if err != nil || !json.Valid(got) {
		t.Errorf("%s, %v", got, err)
	}
}

func FuzzUnmask(f *testing.F) {
	f.Add([]byte(editable), []byte(`{"output":{"livekit":{"api_token":"[hidden]"}}}`))
	f.Add([]byte(`{"a_token":["x"]}`), []byte(`{"a_token":["[hidden]","[hidden]"]}`))
	f.Fuzz(func(t *testing.T, body, edited []byte) {
		l := dlq.Letter{Data: body}
		if _, err := dlq.EditJSON(l); err != nil {
			return
		}
		got, err := dlq.Unmask(l, edited)
		if err == nil && json.Valid(edited) && !json.Valid(got) {
			t.Errorf("%q became %q", edited, got)
		}
	})
}
