package errors

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestClassifyLinePrintsTheContractsFields(t *testing.T) {
	tab := table(t, nil)
	got, err := tab.ClassifyLine([]byte(`{"id":"a","phase":"websocket_runtime","kind":"server_error","server_code":4001,"detail":"","expected_code":"x","more":[1]}`))
	if err != nil {
		t.Fatal(err)
	}
	out, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"id":"a","code":"creditsExhausted","class":"billing","action":"hold","server_code":"4001","server_title":null,"server_detail":null}`
	if string(out) != want {
		t.Errorf("got %s, want %s", out, want)
	}
}

func TestClassifyLineUsesThePolicy(t *testing.T) {
	tab := table(t, Policy{CodeConnectionClosed: {Action: ActionDeadLetter}})
	got, err := tab.ClassifyLine([]byte(`{"phase":"websocket_runtime","kind":"close","close_code":1011}`))
	if err != nil || got.Action != ActionDeadLetter {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestCloseWithoutACodeIsConnectionClosed(t *testing.T) {
	tab := table(t, nil)
	for _, line := range []string{
		`{"id":"c","phase":"websocket_runtime","kind":"close"}`,
		`{"id":"c","phase":"websocket_runtime","kind":"close","close_code":null,"close_reason":null}`,
		`{"id":"c","phase":"websocket_runtime","kind":"close","close_code":null,"close_reason":"gone"}`,
	} {
		got, err := tab.ClassifyLine([]byte(line))
		if err != nil || got.ID != "c" || got.Code != CodeConnectionClosed || got.Class != ClassTransient || got.Action != ActionRetry {
			t.Errorf("%s: got %+v, %v", line, got, err)
		}
	}
}

func TestServerErrorInAFrameIsReadAsOne(t *testing.T) {
	v := Vector{Kind: "frame", Phase: PhaseRuntime, FrameHex: new(string)}
	*v.FrameHex = "08042a200a03636964120372696418a21f22116475726174696f6e206578636565646564"
	e, err := v.Classify()
	if err != nil {
		t.Fatal(err)
	}
	if e.Code != CodeSessionDurationExceeded || e.ConnectionID != "cid" || e.ReqID != "rid" || e.ServerCode != "4002" || e.ServerDetail != "duration exceeded" {
		t.Errorf("got %v", e)
	}
}

func TestBadFailureIsRefusedByName(t *testing.T) {
	tab := table(t, nil)
	for _, c := range []struct{ name, line, want string }{
		{"empty", ``, "empty"},
		{"no JSON", `{"id":`, "not a JSON object"},
		{"list", `[1]`, "not a JSON array"},
		{"null", `null`, "field phase: missing"},
		{"two values", `{"kind":"transport","phase":"job"} {}`, "more than one JSON value"},
		{"rubbish after", `{"kind":"transport","phase":"job"}]`, "more than one JSON value"},
		{"no phase", `{"kind":"http","http_status":500}`, "field phase: missing"},
		{"unknown phase", `{"kind":"http","phase":"connect","http_status":500}`, `"connect" is not a phase`},
		{"no kind", `{"phase":"session_token"}`, "field kind: missing"},
		{"unknown kind", `{"phase":"session_token","kind":"htp"}`, `"htp" is not a kind`},
		{"no status", `{"phase":"session_token","kind":"http"}`, "field http_status: missing"},
		{"status as text", `{"phase":"session_token","kind":"http","http_status":"500"}`, "field http_status"},
		{"body no text", `{"phase":"session_token","kind":"http","http_status":500,"body":{}}`, "field body"},
		{"no server code", `{"phase":"websocket_runtime","kind":"server_error"}`, "field server_code: missing"},
		{"server code too large", `{"phase":"websocket_runtime","kind":"server_error","server_code":3000000000}`, "field server_code"},
		{"close code as text", `{"phase":"websocket_runtime","kind":"close","close_code":"1006"}`, "field close_code"},
		{"no frame", `{"phase":"websocket_runtime","kind":"frame"}`, "field frame_hex: missing"},
		{"frame no hex", `{"phase":"websocket_runtime","kind":"frame","frame_hex":"xy"}`, "field frame_hex: not hexadecimal"},
		{"no failure", `{"phase":"session_token","kind":"http","http_status":200,"body":"{\"sessionToken\":\"t\"}"}`, "not a failure"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := tab.ClassifyLine([]byte(c.line))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func FuzzClassifyLine(f *testing.F) {
	for _, line := range vectorLines(f) {
		if len(line) < 2048 {
			f.Add(line)
		}
	}
	tab := table(f, nil)
	f.Fuzz(func(t *testing.T, line []byte) {
		got, err := tab.ClassifyLine(line)
		if err == nil && (!got.Code.Known() || got.Action == "" || got.Class == "") {
			t.Fatalf("%+v", got)
		}
		if err != nil && err.Error() == "" {
			t.Fatal("an error without a text")
		}
	})
}
