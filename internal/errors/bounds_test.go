package errors

import (
	"encoding/json"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// allocated is what f allocates, in bytes: a measure of its work that a busy
// machine does not change.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

func TestWorkForAnErrorBodyGrowsWithItsLengthOnly(t *testing.T) {
	nested := func(open, inside, end string) string {
		return strings.Repeat(open, 9000) + inside + strings.Repeat(end, 9000)
	}
	for name, body := range map[string]string{
		"nested arrays":           `{"detail":` + nested("[", strings.Repeat("1,", 50_000)+"1", "]") + `}`,
		"nested objects":          `{"title":` + nested(`{"a":`, `"`+strings.Repeat("x", 60_000)+`"`, "}") + `}`,
		"nested in errors":        `{"errors":[{"status":` + nested("[", strings.Repeat("1,", 50_000)+"1", "]") + `}]}`,
		"deeper than JSON may be": strings.Repeat("[", 120_000),
		"a key again and again":   `{` + strings.Repeat(`"k":[],`, 15_000) + `"detail":"x"}`,
		"a huge number":           `{"code":` + strings.Repeat("9", 120_000) + `}`,
		"not finite numbers":      `{"detail":[` + strings.Repeat("NaN,", 30_000) + `NaN]}`,
		"queries":                 `{"detail":"` + strings.Repeat("a://b?c=d ", 12_000) + `"}`,
		"users":                   strings.Repeat("a://b@", 20_000),
	} {
		for _, phase := range []Phase{PhaseToken, PhaseConnect} {
			used := allocated(func() { _ = FromHTTP(phase, 500, nil, []byte(body)).Redact("a secret of the job").Error() })
			if most := uint64(200 * len(body)); used > most {
				t.Errorf("%s in %s: %d bytes were allocated for %d", name, phase, used, len(body))
			}
		}
	}
}

func TestRedactedTextsAreBoundedAndCutNoSecretInHalf(t *testing.T) {
	const secret = "sk-1234567890abcdef"
	for cut := range len(secret) + 1 {
		fill := strings.Repeat("x", maxText-cut)
		e := (&Error{ServerDetail: fill + secret + " more", Message: fill + secret}).Redact(secret)
		for _, text := range []string{e.ServerDetail, e.Message} {
			if len(text) > maxText+len("…") || !utf8.ValidString(text) {
				t.Fatalf("%d bytes", len(text))
			}
			if strings.Contains(text, secret[:3]) {
				t.Fatalf("a part of the secret is left: …%s", text[len(text)-40:])
			}
		}
	}
	for _, url := range []string{"https://user:hunter22", `https:\/\/user:hunter22`, "https://h/p?key=hunter22"} {
		for cut := range len(url) {
			text := (&Error{ServerDetail: strings.Repeat("x ", (maxText-cut)/2) + url + "@host/path"}).Redact().ServerDetail
			if strings.Contains(text, "hunter") || strings.Contains(text, "user:") {
				t.Fatalf("…%s", text[len(text)-60:])
			}
		}
	}
}

func TestShortSecretsAreWholeTokensAndLeaveOurOwnTextsAlone(t *testing.T) {
	own := FromHTTP(PhaseToken, 401, nil, nil).Message + " " + FromTransport(PhaseConnect, New("not connected within 10s: any of 401")).Message
	for _, secret := range []string{"a", "any", "the", "401", "key", "s", "or", "backend"} {
		if got := (&Error{Code: CodeUnknown, Message: own, Err: New(own)}).Redact(secret); got.Message != own || got.Err.Error() != own {
			t.Errorf("secret %q garbled our text: %s", secret, got.Message)
		}
	}
	for _, c := range []struct{ text, secret, want string }{
		{"the key any was refused", "any", "the key [redacted] was refused"},
		{"many, anyone, any_1, any-2", "any", "many, anyone, any_1, any-2"},
		{`{"key":"a"}`, "a", `{"key":"[redacted]"}`},
		{"a", "a", "[redacted]"},
		{"a,a a", "a", "[redacted],[redacted] [redacted]"},
		{"aaa aa", "aa", "aaa [redacted]"},
		{"key=s3cr3t&x", "s3cr3t", "key=[redacted]&x"},
		{"éa aé a", "a", "éa aé [redacted]"},
		{"Basic YW55.", "any", "Basic [redacted]."},
		{"xsk-12345678x", "sk-12345678", "x[redacted]x"},
	} {
		if got := RedactText(c.text, c.secret); got != c.want {
			t.Errorf("RedactText(%q, %q) = %q, want %q", c.text, c.secret, got, c.want)
		}
	}
	e := (&Error{Message: "can't dial s3cr3t", ServerDetail: "bad key any", CloseReason: "any"}).Redact("s3cr3t", "any")
	if e.Message != "can't dial [redacted]" || e.ServerDetail != "bad key [redacted]" || e.CloseReason != "[redacted]" {
		t.Errorf("got %+v", *e)
	}
}

func FuzzRetryAfter(f *testing.F) {
	f.Add("120", "")
	f.Add("Mon, 02 Jan 2006 15:05:05 GMT", "Mon, 02 Jan 2006 15:04:05 GMT")
	f.Add("1e400", "x")
	f.Add("-0x1p-2", "")
	f.Fuzz(func(t *testing.T, value, date string) {
		wait := retryAfter(http.Header{"Retry-After": {value}, "Date": {date}})
		if wait < 0 || wait > 365*24*time.Hour {
			t.Fatalf("%q, %q: %s", value, date, wait)
		}
	})
}

func FuzzRedact(f *testing.F) {
	f.Add("the key any was refused at https://u:p@h/?k=v", "any", "sk-1234567890")
	f.Add("aaaa", "aa", "aaaaaaaa")
	f.Fuzz(func(t *testing.T, text, short, long string) {
		if !utf8.ValidString(text) {
			return
		}
		if len(short) >= minSecret || len(long) < minSecret || strings.ContainsAny(long, redacted+"?@") {
			return
		}
		e := (&Error{Code: CodeUnknown, Message: text, ServerDetail: text, Err: New(text)}).Redact(short, long)
		quoted, err := json.Marshal(long)
		if err != nil {
			t.Fatal(err)
		}
		for _, got := range []string{e.Message, e.ServerDetail, e.Err.Error()} {
			if strings.Contains(got, long) || strings.Contains(got, string(quoted[1:len(quoted)-1])) {
				t.Fatalf("%q is left in %q", long, got)
			}
		}
	})
}
