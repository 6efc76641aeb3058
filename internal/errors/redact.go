package errors

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// redacted stands where a secret stood.
const redacted = "[redacted]"

// Redact returns a copy of e in which no text, the cause's included, holds one
// of the secrets or a URL's query string (see RedactText). Is still finds the
// cause; As and Unwrap no longer do, for the cause has the unredacted text.
// Redact of nil is nil.
func (e *Error) Redact(secrets ...string) *Error {
	if e == nil {
		return nil
	}
	clean := redactor(secrets)
	out := *e
	for _, text := range []*string{
		&out.Message, &out.ServerCode, &out.ServerTitle, &out.ServerDetail,
		&out.ConnectionID, &out.ReqID, &out.CloseReason, &out.Region,
	} {
		*text = clean(*text)
	}
	if e.Err != nil {
		out.Err = &redactedError{text: clean(e.Err.Error()), is: e.Err}
	}
	return &out
}

// RedactText returns text with "[redacted]" for each secret, also where it is
// escaped for JSON or a URL or encoded in base64, and with "?[redacted]" for
// each URL's query string and "[redacted]@" for its user. Empty secrets are
// ignored.
func RedactText(text string, secrets ...string) string {
	return redactor(secrets)(text)
}

// redactedError keeps what a cause is, and not what it says.
type redactedError struct {
	text string
	is   error
}

func (r *redactedError) Error() string { return r.text }

func (r *redactedError) Is(target error) bool { return Is(r.is, target) }

// Format keeps every verb, %#v included, from printing the cause.
func (r *redactedError) Format(s fmt.State, _ rune) {
	_, _ = s.Write([]byte(r.text)) // a formatter has nobody to tell of it
}

func redactor(secrets []string) func(string) string {
	forms := secretForms(secrets)
	pairs := make([]string, 0, 2*len(forms))
	for _, form := range forms {
		pairs = append(pairs, form, redacted)
	}
	replacer := strings.NewReplacer(pairs...)
	return func(text string) string {
		return redactURLs(replacer.Replace(text))
	}
}

// secretForms are the secrets as a text may hold them, the longest first: the
// replacer takes the first that fits, and one secret may begin another.
func secretForms(secrets []string) []string {
	var forms []string
	for _, s := range secrets {
		if s != "" {
			forms = append(forms, escapes(s)...)
		}
	}
	slices.SortFunc(forms, func(a, b string) int {
		if len(a) != len(b) {
			return len(b) - len(a)
		}
		return strings.Compare(a, b)
	})
	return slices.Compact(forms)
}

func escapes(secret string) []string {
	quoted, err := json.Marshal(secret)
	if err != nil {
		quoted = []byte(strconv.Quote(secret)) // a string always marshals
	}
	ascii := strconv.QuoteToASCII(secret)
	goQuoted := strconv.Quote(secret)
	inner := func(s string) string { return s[1 : len(s)-1] }
	query, path := url.QueryEscape(secret), url.PathEscape(secret)
	b := []byte(secret)
	return []string{
		secret, inner(string(quoted)), inner(ascii), inner(goQuoted),
		strings.ReplaceAll(secret, "/", `\/`),
		query, path, lowerEscapes(query), lowerEscapes(path),
		base64.StdEncoding.EncodeToString(b), base64.RawStdEncoding.EncodeToString(b),
		base64.URLEncoding.EncodeToString(b), base64.RawURLEncoding.EncodeToString(b),
	}
}

// lowerEscapes writes %2F as %2f, as some libraries do.
func lowerEscapes(escaped string) string {
	b := []byte(escaped)
	for i := 0; i+2 < len(b); i++ {
		if b[i] == '%' {
			copy(b[i+1:i+3], strings.ToLower(string(b[i+1:i+3])))
			i += 2
		}
	}
	return string(b)
}

var (
	// A URL's scheme and slashes (also escaped for JSON), then user and "@".
	userPattern = regexp.MustCompile(`(?i)(\b[a-z][a-z0-9+.-]*:(?:\\?/){2})[^\s/?#"'<>@\\]*@`)
	// A URL up to its query, or any "?" followed by name=value: a path alone.
	queryPattern = regexp.MustCompile(
		`(?i)(\b[a-z][a-z0-9+.-]*:(?:\\?/){2}(?:\\/|[^\s?"'<>\\])*)\?` + queryTail + `*` +
			`|\?` + queryTail + `*=` + queryTail + `*`)
)

// queryTail is one character of a query; a backslash only as JSON escapes an
// ampersand or a slash.
const queryTail = `(?:\\u[0-9a-fA-F]{4}|\\/|[^\s"'<>\\])`

// redactURLs removes users and query strings. A query ends at white space, a
// quote or an angle bracket, but not at an ampersand escaped for JSON.
func redactURLs(text string) string {
	if strings.Contains(text, "@") {
		text = userPattern.ReplaceAllString(text, "${1}"+redacted+"@")
	}
	if strings.Contains(text, "?") {
		text = queryPattern.ReplaceAllString(text, "${1}?"+redacted)
	}
	return text
}
