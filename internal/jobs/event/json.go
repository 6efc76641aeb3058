package event

import (
	"bytes"
	"encoding/json"

	"avatarworker/internal/jsontext"
)

// appender is a body that writes its own JSON: those of the events of every job.
type appender interface {
	AppendJSON(b []byte) ([]byte, error)
}

var (
	_ appender = Started{}
	_ appender = Completed{}
)

// sizeHint is about the size of a body, in bytes.
const sizeHint = 512

// marshal writes JSON for people: <, > and & stay as they are.
func marshal(v any) ([]byte, error) {
	if a, ok := v.(appender); ok {
		return a.AppendJSON(make([]byte, 0, sizeHint))
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

func (f JobFields) appendTo(o *jsontext.Object) {
	o.Text("job_id", f.JobID)
	o.Int("run", int64(f.Run))
	o.Text("queue", f.Queue)
	o.OptText("app_id", f.AppID)
	o.OptText("avatar_id", f.AvatarID)
	o.OptText("region", f.Region)
	o.Text("worker", f.Worker)
	o.Text("worker_id", f.WorkerID)
	o.OptInt("attempt", int64(f.Attempt))
	o.OptInt("session", int64(f.Session))
	if len(f.Labels) > 0 {
		o.Texts("labels", f.Labels)
	}
	o.Time("time", f.Time)
}

// AppendMembers appends the members that encoding/json writes for the utterance.
func (u Utterance) AppendMembers(o *jsontext.Object) {
	o.Text("req_id", u.ReqID)
	o.Int("frames", int64(u.Frames))
	o.Int("bytes", u.Bytes)
	o.Int("audio_ms", u.AudioMS)
	o.Int("first_frame_ms", u.FirstFrameMS)
	o.Int("duration_ms", u.DurationMS)
	o.OptBool("interrupted", u.Interrupted)
	o.OptText("converted", u.Converted)
}

// AppendJSON appends what encoding/json writes for the body.
func (f Started) AppendJSON(b []byte) ([]byte, error) {
	o := jsontext.Begin(b, jsontext.EscapeNone)
	f.appendTo(&o)
	o.OptInt("max_attempts", int64(f.MaxAttempts))
	o.Text("output", f.Output)
	o.OptInt("checkpoint", int64(f.Checkpoint))
	o.OptInt("crashes", int64(f.Crashes))
	return o.End()
}

// AppendJSON appends what encoding/json writes for the body.
func (f Completed) AppendJSON(b []byte) ([]byte, error) {
	o := jsontext.Begin(b, jsontext.EscapeNone)
	f.appendTo(&o)
	o.Int("attempts", int64(f.Attempts))
	o.TextList("connection_ids", f.ConnectionIDs)
	jsontext.List(&o, "utterances", f.Utterances)
	o.Int("utterances_total", int64(f.UtterancesTotal))
	o.Int("session_ms", f.SessionMS)
	o.OptText("recording", f.Recording)
	return o.End()
}
