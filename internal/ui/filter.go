package ui

import (
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/status"
)

const (
	pageSize = 50
	// maxRows bounds how far a list can be paged through: filters narrow it down.
	maxRows = 10_000
	// maxValues bounds the values of one filter, and maxValue each of them, in bytes.
	maxValues = 32
	maxValue  = 512
)

// jobFilter is the form that chooses jobs, as it was filled in.
type jobFilter struct {
	States                           []string
	Queue, App, Avatar, Code         string // several are separated by commas
	Labels                           []string
	Older, Newer                     string // a time, or how long ago
	Sort                             string
	By                               string // what the jobs are counted by; "": they are listed
	Page                             int    // from 1
	Problems                         []string
	AllStates, AllSorts, KnownQueues []string
}

// values reads the values of a field, given several times or with commas.
func values(text string) []string {
	var list []string
	for value := range strings.SplitSeq(text, ",") {
		if value = strings.TrimSpace(value); value != "" {
			list = append(list, value)
		}
	}
	return list
}

// field is what was typed into a field, bounded; given several times, all of it.
func field(q url.Values, name string) string {
	list := q[name]
	return strings.TrimSpace(strings.Join(list[:min(len(list), maxValues)], ","))
}

// pastTime reads a time, or how long ago it was.
func pastTime(text string, now time.Time) (time.Time, bool) {
	if text == "" {
		return time.Time{}, true
	}
	if days, ok := strings.CutSuffix(text, "d"); ok {
		if n, err := strconv.ParseUint(days, 10, 16); err == nil {
			return now.AddDate(0, 0, -int(n)), true
		}
	}
	if d, err := time.ParseDuration(text); err == nil && d >= 0 {
		return now.Add(-d), true
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04", "2006-01-02 15:04", "2006-01-02"} {
		if t, err := time.Parse(layout, text); err == nil {
			return t, true
		}
	}
	return time.Time{}, false
}

const badTime = "%s %q: want a time such as 2026-03-01T12:00:00Z, or how long ago such as 90m or 3d"

// parseJobs reads a filter of jobs. What is wrong with it is in Problems.
func parseJobs(v url.Values, now time.Time) (f jobFilter, q status.Query) {
	f = jobFilter{
		Queue: field(v, "queue"), App: field(v, "app"), Avatar: field(v, "avatar"), Code: field(v, "code"),
		Older: field(v, "older"), Newer: field(v, "newer"), Sort: v.Get("sort"), By: strings.TrimSpace(v.Get("by")), Page: pageNumber(v),
	}
	problem := func(format string, args ...any) { f.Problems = append(f.Problems, fmt.Sprintf(format, args...)) }
	for _, s := range status.States() {
		f.AllStates = append(f.AllStates, string(s))
	}
	for _, o := range status.Orders() {
		f.AllSorts = append(f.AllSorts, string(o))
	}
	for _, state := range values(field(v, "state")) {
		if !slices.Contains(f.AllStates, state) {
			problem("There is no state %q.", cutText(state, 40))
			continue
		}
		f.States = append(f.States, state)
		q.States = append(q.States, lifecycle.State(state))
	}
	q.Queues, q.Apps, q.Avatars = values(f.Queue), values(f.App), values(f.Avatar)
	for _, code := range values(f.Code) {
		q.Codes = append(q.Codes, errors.Code(code))
	}
	for _, pair := range v["label"] {
		if pair = strings.TrimSpace(pair); pair == "" {
			continue
		}
		f.Labels = append(f.Labels, pair)
		key, value, ok := strings.Cut(pair, "=")
		if before, twice := q.Labels[key]; !ok || key == "" || twice && before != value || len(f.Labels) > maxValues {
			problem("Label %q: want NAME=VALUE, and one value of each name.", cutText(pair, 80))
			continue
		}
		if q.Labels == nil {
			q.Labels = make(map[string]string)
		}
		q.Labels[key] = value
	}
	var ok bool
	if q.Before, ok = pastTime(f.Older, now); !ok {
		problem(badTime, "Older than", cutText(f.Older, 40))
	}
	if q.After, ok = pastTime(f.Newer, now); !ok {
		problem(badTime, "Newer than", cutText(f.Newer, 40))
	}
	if q.Order = status.Order(f.Sort); f.Sort == "" {
		f.Sort, q.Order = string(status.ByAge), status.ByAge
	} else if !slices.Contains(status.Orders(), q.Order) {
		problem("There is no order %q.", cutText(f.Sort, 40))
	}
	if _, err := status.ParseBy(f.By); err != nil {
		problem("Jobs can't be counted by %q: want queue, app, avatar, code or label:NAME.", cutText(f.By, 80))
	}
	for _, text := range append([]string{f.Queue, f.App, f.Avatar, f.Code, f.By}, f.Labels...) {
		if len(text) > maxValue*4 {
			problem("A filter is too long.")
		}
	}
	return f, q
}

// narrows reports whether anything is filtered.
func (f *jobFilter) narrows() bool {
	return len(f.States)+len(f.Labels) > 0 || f.Queue+f.App+f.Avatar+f.Code+f.Older+f.Newer+f.By != ""
}

// Narrows is for templates.
func (f jobFilter) Narrows() bool { return f.narrows() }

// Query is the filter as a query, for another page of the same list.
func (f jobFilter) Query(page int) string {
	q := url.Values{}
	add := func(name string, values ...string) {
		for _, value := range values {
			if value != "" {
				q.Add(name, value)
			}
		}
	}
	add("state", f.States...)
	add("queue", f.Queue)
	add("app", f.App)
	add("avatar", f.Avatar)
	add("code", f.Code)
	add("label", f.Labels...)
	add("older", f.Older)
	add("newer", f.Newer)
	if f.Sort != string(status.ByAge) {
		add("sort", f.Sort)
	}
	add("by", f.By)
	if page > 1 {
		q.Set("page", strconv.Itoa(page))
	}
	return q.Encode()
}

// Words is what is filtered: "label customer=acme, state held or running". "": nothing.
func (f jobFilter) Words() string { return inWords(f.Query(1)) }

// inWords is a query in words.
func inWords(query string) string {
	v, err := url.ParseQuery(query)
	if err != nil {
		return ""
	}
	var texts []string
	for _, name := range slices.Sorted(maps.Keys(v)) {
		text := strings.Join(v[name], " or ")
		switch name {
		case "label":
			text = strings.Join(v[name], " and ")
		case "state":
			text = strings.ReplaceAll(text, "_", " ")
		case "sort":
			name = "order"
		case "by":
			name = "counted by"
		}
		texts = append(texts, name+" "+text)
	}
	return strings.Join(texts, ", ")
}

// Of leads to the jobs of a group: those with that key in what the jobs are counted by.
// "" if no filter chooses them.
func (f jobFilter) Of(key string) string {
	by := status.By(f.By)
	f.By = ""
	if key == "" || say(key) != key || strings.Contains(key, ",") && by.Label() == "" {
		return ""
	}
	switch by {
	case status.ByQueue:
		f.Queue = key
	case status.ByApp:
		f.App = key
	case status.ByAvatar:
		f.Avatar = key
	case status.ByCode:
		f.Code = key
	default:
		f.Labels = append(slices.Clone(f.Labels), by.Label()+"="+key)
		slices.Sort(f.Labels)
		f.Labels = slices.Compact(f.Labels)
	}
	return f.Link(1)
}

// Link leads to another page of the same list.
func (f jobFilter) Link(page int) string { return withQuery("/jobs", f.Query(page)) }

// withQuery is a whole link: a template escapes what it finds after a question mark.
func withQuery(path, query string) string {
	if query == "" {
		return path
	}
	return path + "?" + query
}

// Has reports whether a state is chosen.
func (f jobFilter) Has(state string) bool { return slices.Contains(f.States, state) }

func pageNumber(v url.Values) int {
	n, err := strconv.Atoi(v.Get("page"))
	if err != nil || n < 1 {
		return 1
	}
	return min(n, maxRows/pageSize)
}

// letterFilter is the form that chooses dead letters.
type letterFilter struct {
	Code, Class, App, Job string
	Before, After         string
	Page                  int
	Problems              []string
	AllCodes, AllClasses  []string
}

func parseLetters(v url.Values, now time.Time) (f letterFilter, q dlq.Filter) {
	f = letterFilter{
		Code: field(v, "code"), Class: field(v, "class"), App: field(v, "app"), Job: field(v, "job"),
		Before: field(v, "before"), After: field(v, "after"), Page: pageNumber(v),
	}
	problem := func(format string, args ...any) { f.Problems = append(f.Problems, fmt.Sprintf(format, args...)) }
	for _, code := range errors.Codes() {
		f.AllCodes = append(f.AllCodes, string(code))
	}
	for _, class := range errors.Classes() {
		f.AllClasses = append(f.AllClasses, string(class))
	}
	for _, code := range values(f.Code) {
		q.Codes = append(q.Codes, errors.Code(code))
	}
	for _, class := range values(f.Class) {
		q.Classes = append(q.Classes, errors.Class(class))
	}
	if len(q.Codes) > maxValues || len(q.Classes) > maxValues {
		problem("There are too many codes or classes.")
		q.Codes, q.Classes = nil, nil
	}
	q.Apps, q.Jobs, q.Newest = values(f.App), values(f.Job), true
	var ok bool
	if q.Before, ok = pastTime(f.Before, now); !ok {
		problem(badTime, "Failed before", cutText(f.Before, 40))
	}
	if q.After, ok = pastTime(f.After, now); !ok {
		problem(badTime, "Failed after", cutText(f.After, 40))
	}
	return f, q
}

// Narrows reports whether anything is filtered.
func (f letterFilter) Narrows() bool {
	return f.Code+f.Class+f.App+f.Job+f.Before+f.After != ""
}

// Words is what is filtered.
func (f letterFilter) Words() string { return inWords(f.Query(1)) }

// Link leads to another page of the same list.
func (f letterFilter) Link(page int) string { return withQuery("/letters", f.Query(page)) }

// Query is the filter as a query, for another page of the same list.
func (f letterFilter) Query(page int) string {
	q := url.Values{}
	for _, pair := range [][2]string{{"code", f.Code}, {"class", f.Class}, {"app", f.App}, {"job", f.Job}, {"before", f.Before}, {"after", f.After}} {
		if pair[1] != "" {
			q.Set(pair[0], pair[1])
		}
	}
	if page > 1 {
		q.Set("page", strconv.Itoa(page))
	}
	return q.Encode()
}

// jobIDs checks the ids that a form names.
func jobIDs(ids []string) ([]string, bool) {
	if len(ids) > maxBulk {
		return nil, false
	}
	for _, id := range ids {
		if !jobspec.ValidID(id) {
			return nil, false
		}
	}
	return slices.Compact(slices.Clone(ids)), true
}

// sequences reads the sequences of dead letters that a form names.
func sequences(texts []string) ([]uint64, bool) {
	if len(texts) > maxBulk {
		return nil, false
	}
	var seqs []uint64
	for _, text := range texts {
		seq, err := strconv.ParseUint(text, 10, 64)
		if err != nil || seq == 0 {
			return nil, false
		}
		if !slices.Contains(seqs, seq) {
			seqs = append(seqs, seq)
		}
	}
	return seqs, true
}
