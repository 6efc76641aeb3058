package dlq

import (
	"bytes"
	"encoding/json"
	"maps"
	"strings"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
)

// shortText is the size in bytes below which no text of an event is cut further.
const shortText = 32

// cut is errors.Cut for text that may not be valid UTF-8.
func cut(text string, limit int) string {
	return errors.Cut(strings.ToValidUTF8(text, "\uFFFD"), limit)
}

// eventJSON gives the event as JSON of at most limit bytes: the longest texts
// are halved until it fits, and the labels left out if that is not enough.
func eventJSON(e event.Error, limit int) (string, error) {
	e.Labels = maps.Clone(e.Labels)
	for {
		text, err := marshal(e)
		if err != nil || len(text) <= limit {
			return text, err
		}
		if !halveLongest(&e) && !dropMost(&e) {
			return text, nil // nothing left to cut: fit decides what follows
		}
	}
}

func marshal(e event.Error) (string, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(e); err != nil {
		return "", err
	}
	return strings.TrimSuffix(b.String(), "\n"), nil
}

// texts are the event's texts that input from outside can make long. The job's id
// is not among them: it has at most 64 bytes, and says which job's event it is.
func texts(e *event.Error) []*string {
	return []*string{
		&e.Message, &e.ServerDetail, &e.ServerTitle, &e.CloseReason, &e.ServerCode,
		&e.ConnectionID, &e.ReqID, &e.AvatarID, &e.AppID, &e.Region, &e.Worker, &e.WorkerID, &e.Queue,
		(*string)(&e.Code), (*string)(&e.Class), (*string)(&e.Phase),
	}
}

// halveLongest reports whether there was a text long enough to cut.
func halveLongest(e *event.Error) bool {
	longest := &e.Message
	for _, t := range texts(e) {
		if len(*t) > len(*longest) {
			longest = t
		}
	}
	label := ""
	for name, value := range e.Labels {
		if old, ok := e.Labels[label]; !ok || len(value) > len(old) || len(value) == len(old) && name < label {
			label = name
		}
	}
	if value := e.Labels[label]; len(value) > len(*longest) && len(value) > shortText {
		e.Labels[label] = cut(value, max(len(value)/2, shortText))
		return true
	}
	if len(*longest) <= shortText {
		return false
	}
	*longest = cut(*longest, max(len(*longest)/2, shortText))
	return true
}

// dropMost leaves out the labels; without them it leaves only what says which
// job it was and what happened. False when that has been done.
func dropMost(e *event.Error) bool {
	if e.Labels != nil {
		e.Labels = nil
		return true
	}
	lean := event.Error{
		JobID: e.JobID, Run: e.Run, Attempt: e.Attempt, Code: e.Code, Class: e.Class, Phase: e.Phase,
		Action: errors.Action(cut(string(e.Action), shortText)), Message: e.Message, Time: e.Time,
	}
	if e.ServerTitle == "" && e.Worker == "" && e.Queue == "" && e.ConnectionID == "" && e.RetryAt == nil {
		return false
	}
	*e = lean
	return true
}
