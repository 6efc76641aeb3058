package errors

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"strings"
	"testing"
)

func TestErrorIsOneReadableLine(t *testing.T) {
	e := &Error{
		Code: CodeBillingRequired, Phase: PhaseConnect, Message: "refused\nby the backend",
		HTTPStatus: 402, ServerCode: "x", ServerTitle: "Denied", ServerDetail: "session \"denied\"",
		ConnectionID: "c1", ReqID: "r1", CloseCode: 1011, CloseReason: "gone", Region: "us-west", RetryAfter: 3e9,
	}
	want := `billingRequired (websocket_connect): refused by the backend [http_status=402 server_code="x" ` +
		`server_title="Denied" server_detail="session \"denied\"" connection_id="c1" req_id="r1" ` +
		`close_code=1011 close_reason="gone" region="us-west" retry_after=3s]`
	if got := e.Error(); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got := (&Error{Code: CodeUnknown}).Error(); got != "unknown" {
		t.Errorf("got %q, want no empty fields", got)
	}
	var none *Error
	if none.Error() == "" || none.Unwrap() != nil {
		t.Error("a nil Error must print, and have no cause")
	}
}

func TestErrorCutsALongTextOnACharacter(t *testing.T) {
	got := (&Error{Code: CodeUnknown, ServerDetail: strings.Repeat("ü", 9000)}).Error()
	if len(got) > 2*maxShown || strings.Contains(got, "\uFFFD") || !strings.Contains(got, "…") {
		t.Errorf("%d bytes: %.80s", len(got), got)
	}
}

func TestErrorNamesItsCauseOnce(t *testing.T) {
	for _, e := range []*Error{
		Wrap(CodeInternal, PhaseJob, io.ErrUnexpectedEOF, "reading the record"),
		{Code: CodeInternal, Phase: PhaseJob, Message: "reading the record", Err: io.ErrUnexpectedEOF},
	} {
		if got, want := e.Error(), "internal (job): reading the record: unexpected EOF"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		if !Is(e, io.ErrUnexpectedEOF) {
			t.Error("the cause is not in the chain")
		}
	}
	if got := (&Error{Code: CodeInternal, Err: io.EOF}).Error(); got != "internal: EOF" {
		t.Errorf("got %q", got)
	}
}

func TestNewfKeepsTheWrappedCause(t *testing.T) {
	e := Newf(CodeAudioUnavailable, PhaseAudio, "object %q: %w", "a.wav", io.EOF)
	if e.Message != `object "a.wav": EOF` || !Is(e, io.EOF) {
		t.Errorf("got %+v", e)
	}
}

func TestOf(t *testing.T) {
	own := Newf(CodeInvalidJob, PhaseJob, "avatar_id: missing")
	if got := Of(fmt.Errorf("job 1: %w", Join(io.EOF, own))); got != own {
		t.Errorf("got %v, want the Error in the chain", got)
	}
	other := Of(io.EOF)
	if other.Code != CodeInternal || other.Phase != PhaseJob || other.Message != "EOF" || !Is(other, io.EOF) {
		t.Errorf("got %+v", other)
	}
	if Of(nil) != nil {
		t.Error("Of(nil) is not nil")
	}
	var typedNil *Error
	if got := Of(fmt.Errorf("x: %w", typedNil)); got == nil || got.Code != CodeInternal {
		t.Errorf("got %v", got)
	}
}

func TestEveryFormOfASecretIsRedacted(t *testing.T) {
	const secret = `s3c/r+t "k&y"=é`
	for _, form := range escapes(secret) {
		text := "before " + form + " after"
		if got := RedactText(text, "", secret); got != "before [redacted] after" {
			t.Errorf("%s: got %s", text, got)
		}
	}
	if got := RedactText("abcd abc", "abc", "abcd"); got != "[redacted] [redacted]" {
		t.Errorf("a secret that begins another leaves a rest: %s", got)
	}
}

func TestQueryStringsAndUsersOfURLsAreRedacted(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{`Get "wss://api.example/v2/websocket?id=a&sessionKey=t": EOF`, `Get "wss://api.example/v2/websocket?[redacted]": EOF`},
		{`see https://h/p?tok and http://h?a=1.`, `see https://h/p?[redacted] and http://h?[redacted]`},
		{`{"url":"https:\/\/h\/p?a=1\u0026sessionKey=t","n":1}`, `{"url":"https:\/\/h\/p?[redacted]","n":1}`},
		{`POST /v1/x?key=v HTTP/1.1`, `POST /v1/x?[redacted] HTTP/1.1`},
		{`nats://user:pass@host:4222 failed`, `nats://[redacted]@host:4222 failed`},
		{`what? no = sign`, `what? no = sign`},
		{`mail a@b.c`, `mail a@b.c`},
	} {
		got := RedactText(c.in)
		if got != c.want {
			t.Errorf("%s: got %s, want %s", c.in, got, c.want)
		}
		if again := RedactText(got); again != got {
			t.Errorf("redacting twice changes %s to %s", got, again)
		}
	}
}

func TestRedactReachesEveryTextAndTheCause(t *testing.T) {
	const secret = "k3y-123456"
	cause := &url.Error{Op: "Post", URL: "https://h/p?x=" + secret, Err: fmt.Errorf("%s: %w", secret, context.Canceled)}
	e := &Error{
		Code: CodeUnknown, Phase: PhaseToken, Message: secret, ServerCode: secret, ServerTitle: secret,
		ServerDetail: secret, ConnectionID: secret, ReqID: secret, CloseReason: secret, Region: secret,
		HTTPStatus: 500, Err: cause,
	}
	clean := e.Redact(secret)
	for _, verb := range []string{"%v", "%+v", "%s", "%q"} {
		if got := fmt.Sprintf(verb, clean); strings.Contains(got, secret) {
			t.Errorf("%s shows the secret: %s", verb, got)
		}
	}
	for _, verb := range []string{"%v", "%+v", "%#v"} {
		if got := fmt.Sprintf(verb, *clean); strings.Contains(got, secret) {
			t.Errorf("%s of the value shows the secret: %s", verb, got)
		}
		if got := fmt.Sprintf(verb, Unwrap(clean)); strings.Contains(got, secret) {
			t.Errorf("%s of the cause shows the secret: %s", verb, got)
		}
	}
	var leaked *url.Error
	if As(clean, &leaked) {
		t.Error("As still finds the unredacted cause")
	}
	if !Is(clean, context.Canceled) || clean.HTTPStatus != 500 {
		t.Error("Redact lost what is not a secret")
	}
	if e.Message != secret || e.Err != cause {
		t.Error("Redact changed the original")
	}
	var none *Error
	if none.Redact(secret) != nil {
		t.Error("Redact of nil is not nil")
	}
}

func TestErrorNeverShowsAQueryString(t *testing.T) {
	cause := &url.Error{Op: "Get", URL: "https://h/p?sessionKey=abc", Err: io.EOF}
	for _, e := range []*Error{
		FromTransport(PhaseConnect, cause),
		{Code: CodeUnknown, Message: "x", Err: cause, ServerDetail: "https://h/p?sessionKey=abc"},
	} {
		if strings.Contains(e.Error()+e.Message, "abc") {
			t.Errorf("shows the query: %v", e)
		}
	}
}
