// Package errors names every failure of a session, decides which one an answer
// of the backend is, and what the worker does about it. It is a leaf: it
// imports nothing of ours, and it is the only importer of the standard errors
// package, whose functions it re-exports. It owns codes, classes and actions, and
// must not know what runs a job.
package errors

import (
	stderrors "errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Is reports whether an error in err's chain matches target.
func Is(err, target error) bool { return stderrors.Is(err, target) }

// As finds the first error in err's chain that target can hold, and sets it.
func As(err error, target any) bool { return stderrors.As(err, target) }

// Join wraps the errors that are not nil; nil if there is none.
func Join(errs ...error) error { return stderrors.Join(errs...) }

// New returns an error with that text.
func New(text string) error { return stderrors.New(text) }

// Unwrap returns the error that err wraps, or nil.
func Unwrap(err error) error { return stderrors.Unwrap(err) }

// Newf returns an Error whose message is the formatted text. Like fmt.Errorf it
// takes %w: the wrapped error becomes the cause.
func Newf(code Code, phase Phase, format string, args ...any) *Error {
	text := fmt.Errorf(format, args...)
	return &Error{Code: code, Phase: phase, Message: text.Error(), Err: stderrors.Unwrap(text)}
}

// Wrap returns an Error caused by err. Its message is the given one followed by
// the cause's text without URL query strings, so that an event which carries
// only the message says everything. A nil err gives an Error without a cause.
func Wrap(code Code, phase Phase, err error, message string) *Error {
	e := &Error{Code: code, Phase: phase, Message: message, Err: err}
	if err == nil {
		return e
	}
	cause := RedactText(err.Error())
	if message == "" {
		e.Message = cause
	} else {
		e.Message = message + ": " + cause
	}
	return e
}

// Of returns the Error in err's chain. Any other error is a fault of the worker
// itself: code internal, phase job. Of(nil) is nil.
func Of(err error) *Error {
	if err == nil {
		return nil
	}
	var e *Error
	if As(err, &e) && e != nil {
		return e
	}
	return Wrap(CodeInternal, PhaseJob, err, "")
}

// Unwrap returns the cause, or nil.
func (e *Error) Unwrap() error {
	if e == nil {
		return nil
	}
	return e.Err
}

// maxShown bounds each text in Error(): a backend may answer with a whole page.
// The fields themselves are never cut, for a cut secret could not be redacted.
const maxShown = 400

// Error is one line: code, phase, message and the fields that are known. It
// never shows a URL's query string; other secrets are Redact's to remove.
func (e *Error) Error() string {
	if e == nil {
		return "<nil>"
	}
	var b strings.Builder
	b.WriteString(string(e.Code))
	if e.Phase != "" {
		b.WriteString(" (" + string(e.Phase) + ")")
	}
	if text := e.text(); text != "" {
		b.WriteString(": " + shown(text))
	}
	if fields := e.fields(); len(fields) > 0 {
		b.WriteString(" [" + strings.Join(fields, " ") + "]")
	}
	return b.String()
}

// text is the message, with the cause where the message does not contain it.
func (e *Error) text() string {
	r := newRedactor(nil)
	message := r.bounded(e.Message, r.own)
	if e.Err == nil {
		return message
	}
	cause := r.bounded(e.Err.Error(), r.own)
	switch {
	case message == "":
		return cause
	case strings.Contains(message, cause):
		return message
	}
	return message + ": " + cause
}

func (e *Error) fields() []string {
	var out []string
	r := newRedactor(nil)
	number := func(name string, n int) {
		if n != 0 {
			out = append(out, name+"="+strconv.Itoa(n))
		}
	}
	text := func(name, value string) {
		if value != "" {
			out = append(out, name+"="+strconv.Quote(shown(r.bounded(value, r.own))))
		}
	}
	number("http_status", e.HTTPStatus)
	text("server_code", e.ServerCode)
	text("server_title", e.ServerTitle)
	text("server_detail", e.ServerDetail)
	text("connection_id", e.ConnectionID)
	text("req_id", e.ReqID)
	number("close_code", e.CloseCode)
	text("close_reason", e.CloseReason)
	text("region", e.Region)
	if e.RetryAfter > 0 {
		out = append(out, "retry_after="+e.RetryAfter.String())
	}
	return out
}

// shown is text on one line, cut to about maxShown bytes.
func shown(text string) string {
	text = strings.Join(strings.Fields(strings.ToValidUTF8(text, "\uFFFD")), " ")
	return Cut(text, maxShown+len(ellipsis))
}

const ellipsis = "…"

// Cut returns text unchanged if it has at most limit bytes. Otherwise it returns
// the beginning of text and an ellipsis, together at most limit bytes and without
// half a character at the cut. limit is at least 3, the bytes of the ellipsis.
func Cut(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	end := max(limit-len(ellipsis), 0)
	for end > 0 && !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + ellipsis
}
