package api

import (
	"cmp"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"avatarworker/internal/cost"
	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/status"
)

const (
	defaultLimit = 50
	// maxLimit bounds an answer; older=… or before=… gives those that follow.
	maxLimit = 10_000
)

// query reads the parameters of a request. It remembers the first fault.
type query struct {
	values url.Values
	now    time.Time
	err    error
}

// parseQuery reads parameters of which only the named ones are allowed.
func parseQuery(raw string, now time.Time, names ...string) *query {
	values, err := url.ParseQuery(raw)
	q := &query{values: values, now: now}
	if err != nil {
		q.fail("the query can't be read: %s", err)
		return q
	}
	for name := range values {
		if !slices.Contains(names, name) {
			q.fail("there is no parameter %q here; want %s", name, strings.Join(names, ", "))
		}
	}
	return q
}

func (q *query) fail(format string, args ...any) {
	if q.err == nil {
		q.err = badRequest(format, args...)
	}
}

// list returns the values of a parameter: given several times, or with commas between
// them.
func (q *query) list(name string) (list []string) {
	for _, value := range q.values[name] {
		for part := range strings.SplitSeq(value, ",") {
			if part != "" {
				list = append(list, part)
			}
		}
	}
	return list
}

// one returns the value of a parameter that is given once at most.
func (q *query) one(name string) string {
	values := q.values[name]
	if len(values) > 1 {
		q.fail("%s: give it once", name)
	}
	if len(values) == 0 {
		return ""
	}
	return values[0]
}

func (q *query) limit() int {
	text := q.one("limit")
	if text == "" {
		return defaultLimit
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > maxLimit {
		q.fail("limit %q: want a number from 1 to %d", text, maxLimit)
		return defaultLimit
	}
	return n
}

// time reads a time, or how long ago it was.
func (q *query) time(name string) time.Time {
	text := q.one(name)
	if text == "" {
		return time.Time{}
	}
	if d, err := time.ParseDuration(text); err == nil && d >= 0 {
		return q.now.Add(-d)
	}
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		q.fail("%s %q: want a time such as 2026-03-01T12:00:00Z, or how long ago such as 90m", name, text)
	}
	return t
}

// day is a time, or the begin of a day (UTC).
func (q *query) day(name string) time.Time {
	if day, err := time.Parse(time.DateOnly, q.one(name)); err == nil {
		return day
	}
	return q.time(name)
}

func (q *query) bool(name string) bool {
	switch text := q.one(name); text {
	case "", "false":
		return false
	case "true":
		return true
	default:
		q.fail("%s %q: want true or false", name, text)
		return false
	}
}

// jobsQuery reads the parameters of a list of jobs.
func jobsQuery(raw string, now time.Time) (status.Query, error) {
	q := parseQuery(raw, now, "state", "queue", "app", "avatar", "label", "code", "older", "newer", "sort", "by", "limit")
	out := status.Query{
		Filter: status.Filter{Queues: q.list("queue"), Apps: q.list("app"), Avatars: q.list("avatar"), Before: q.time("older"), After: q.time("newer")},
		Order:  status.ByAge, Limit: q.limit(),
	}
	for _, name := range q.list("state") {
		state := lifecycle.State(name)
		if !slices.Contains(status.States(), state) {
			q.fail("state %q: want one of %s", name, join(status.States()))
		}
		out.States = append(out.States, state)
	}
	for _, name := range q.list("code") {
		out.Codes = append(out.Codes, errors.Code(name))
	}
	for _, pair := range q.values["label"] {
		key, value, ok := strings.Cut(pair, "=")
		if !ok || key == "" {
			q.fail("label %q: want KEY=VALUE", pair)
			continue
		}
		if out.Labels == nil {
			out.Labels = make(map[string]string)
		}
		if before, twice := out.Labels[key]; twice && before != value {
			q.fail("label %q: no job has two values of one label", pair)
		}
		out.Labels[key] = value
	}
	if text := q.one("sort"); text != "" {
		if out.Order = status.Order(text); !slices.Contains(status.Orders(), out.Order) {
			q.fail("sort %q: want one of %s", text, join(status.Orders()))
		}
	}
	var err error
	if out.By, err = status.ParseBy(q.one("by")); err != nil {
		q.fail("by: %s", err)
	}
	return out, q.err
}

// lettersQuery reads the parameters of a list of dead letters.
func lettersQuery(raw string, now time.Time) (f dlq.Filter, limit int, err error) {
	q := parseQuery(raw, now, "code", "class", "app", "job", "before", "after", "newest", "limit")
	f = dlq.Filter{Apps: q.list("app"), Jobs: q.list("job"), Before: q.time("before"), After: q.time("after"), Newest: q.bool("newest")}
	for _, code := range q.list("code") {
		f.Codes = append(f.Codes, errors.Code(code))
	}
	for _, name := range q.list("class") {
		class := errors.Class(name)
		if !slices.Contains(errors.Classes(), class) {
			q.fail("class %q: want one of %s", name, join(errors.Classes()))
		}
		f.Classes = append(f.Classes, class)
	}
	if n := max(len(f.Codes), 1) * max(len(f.Classes), 1); n > maxSubjects {
		q.fail("%d codes and %d classes: want at most %d combinations of them", len(f.Codes), len(f.Classes), maxSubjects)
	}
	return f, q.limit(), q.err
}

// maxSubjects bounds the subjects that the server has to look for.
const maxSubjects = 200

// costQuery reads the parameters of a sum of costs.
func costQuery(raw string, now time.Time) (cost.Query, error) {
	q := parseQuery(raw, now, "by", "since", "until")
	out := cost.Query{By: cmp.Or(q.one("by"), cost.ByApp), Since: q.day("since"), Until: q.day("until")}
	if !out.Since.IsZero() && !out.Until.IsZero() && !out.Since.Before(out.Until) {
		q.fail("since is not before until: no session is in that time")
	}
	return out, q.err
}

func join[T ~string](list []T) string {
	texts := make([]string, len(list))
	for i, v := range list {
		texts[i] = string(v)
	}
	return strings.Join(texts, ", ")
}

// noQuery refuses all parameters.
func noQuery(raw string) error {
	if q := parseQuery(raw, time.Time{}); q.err != nil {
		return fmt.Errorf("%w", badRequest("this path takes no parameters"))
	}
	return nil
}

func limitQuery(raw string) (int, error) {
	q := parseQuery(raw, time.Time{}, "limit")
	return q.limit(), q.err
}
