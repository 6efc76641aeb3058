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
	"unicode"
	"unicode/utf8"
)

// redacted replaces a secret.
const redacted = "[redacted]"

// maxText bounds each text of a redacted Error, in bytes.
const maxText = 32 << 10

// minSecret is the length, in bytes, from which a secret is recognised anywhere
// in a text. A shorter one is compared with whole tokens only.
const minSecret = 8

// Redact returns a copy of e in which no text, the cause's included, holds one
// of the secrets or a URL's query string (see RedactText), or has more than
// 32 KiB. A secret of less than 8 bytes that is a plain word or number is looked
// for in what the backend said and not in the worker's own texts, where it is
// only a word. Is still finds the cause; As and Unwrap no longer do, for the
// cause has the unredacted text. Redact of nil is nil.
func (e *Error) Redact(secrets ...string) *Error {
	if e == nil {
		return nil
	}
	r := newRedactor(secrets)
	out := *e
	for _, text := range []*string{&out.Message, &out.Region} {
		*text = r.bounded(*text, r.own)
	}
	for _, text := range []*string{
		&out.ServerCode, &out.ServerTitle, &out.ServerDetail,
		&out.ConnectionID, &out.ReqID, &out.RequestID, &out.CloseReason,
	} {
		*text = r.bounded(*text, r.foreign)
	}
	if e.Err != nil {
		out.Err = &redactedError{text: r.bounded(e.Err.Error(), r.own), is: e.Err}
	}
	return &out
}

// RedactText returns text with "[redacted]" for each secret, also where it is
// escaped for JSON or a URL or encoded in base64, and with "?[redacted]" for
// each URL's query string and "[redacted]@" for its user. A secret of less than
// 8 bytes counts only where it is a whole token: it is not next to a letter, a
// digit, "_" or "-". Empty secrets are ignored.
func RedactText(text string, secrets ...string) string {
	return newRedactor(secrets).foreign(text)
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
	_, _ = s.Write([]byte(r.text)) // a formatter can't return an error
}

// redactor removes secrets from texts.
type redactor struct {
	long    *strings.Replacer // nil: none
	short   []string          // whole tokens
	words   []string          // those of short that our own texts may use as a word or number
	longest int               // bytes of the longest form
}

func newRedactor(secrets []string) *redactor {
	r := &redactor{}
	var long, short, words []string
	for _, s := range secrets {
		switch {
		case s == "":
		case len(s) >= minSecret:
			long = append(long, s)
		case plainWord(s):
			words = append(words, s)
		default:
			short = append(short, s)
		}
	}
	r.short, r.words = secretForms(short), secretForms(words)
	forms := secretForms(long)
	if len(forms) == 0 {
		return r
	}
	r.longest = len(forms[0])
	pairs := make([]string, 0, 2*len(forms))
	for _, form := range forms {
		pairs = append(pairs, form, redacted)
	}
	r.long = strings.NewReplacer(pairs...)
	return r
}

// own redacts a text that the worker or a library wrote.
func (r *redactor) own(text string) string { return redactURLs(r.secrets(text)) }

// foreign redacts a text that came from outside.
func (r *redactor) foreign(text string) string {
	text = r.secrets(text)
	for _, token := range r.words {
		text = replaceToken(text, token)
	}
	return redactURLs(text)
}

// secrets takes the long ones out first: a short one may be a part of them.
func (r *redactor) secrets(text string) string {
	if r.long != nil {
		text = r.long.Replace(text)
	}
	for _, token := range r.short {
		text = replaceToken(text, token)
	}
	return text
}

// bounded redacts the first maxText bytes of a text. Where it is cut, it gives
// up what may be the beginning of a secret or of a URL's user.
func (r *redactor) bounded(text string, redact func(string) string) string {
	if len(text) <= maxText {
		return redact(text)
	}
	text = redact(strings.ToValidUTF8(text[:maxText], ""))
	text = text[:max(0, len(text)-max(r.longest, minSecret))]
	word := strings.LastIndexAny(text, " \t\r\n\"'<>") + 1
	if i := max(strings.LastIndex(text[word:], "//"), strings.LastIndex(text[word:], `\/`)); i >= 0 {
		text = text[:word+i]
	}
	return strings.ToValidUTF8(text, "") + "…"
}

// plainWord reports whether a secret has only letters or only digits.
func plainWord(secret string) bool {
	other := func(class func(rune) bool) bool {
		return strings.ContainsFunc(secret, func(c rune) bool { return !class(c) })
	}
	return !other(unicode.IsLetter) || !other(unicode.IsDigit)
}

// replaceToken replaces token where it is next to no character of a token.
func replaceToken(text, token string) string {
	if !strings.Contains(text, token) {
		return text
	}
	var b strings.Builder
	for from := 0; ; {
		i := strings.Index(text[from:], token)
		if i < 0 {
			b.WriteString(text[from:])
			return b.String()
		}
		start, end := from+i, from+i+len(token)
		before, _ := utf8.DecodeLastRuneInString(text[:start])
		after, _ := utf8.DecodeRuneInString(text[end:])
		if tokenRune(before) || tokenRune(after) {
			_, size := utf8.DecodeRuneInString(text[start:])
			b.WriteString(text[from : start+size])
			from = start + size
			continue
		}
		b.WriteString(text[from:start] + redacted)
		from = end
	}
}

func tokenRune(c rune) bool {
	return c == '_' || c == '-' || c != utf8.RuneError && (unicode.IsLetter(c) || unicode.IsDigit(c))
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
