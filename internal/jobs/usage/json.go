package usage

import "avatarworker/internal/jsontext"

// sizeHint is about the size of a record, in bytes.
const sizeHint = 512

// AppendJSON appends what json.Marshal returns for the record.
func (r Record) AppendJSON(b []byte) ([]byte, error) {
	o := jsontext.Begin(b, jsontext.EscapeHTML)
	o.Text("job_id", r.JobID)
	o.Int("run", int64(r.Run))
	o.Int("session", int64(r.Session))
	o.Int("attempt", int64(r.Attempt))
	o.Text("app_id", r.AppID)
	o.Text("queue", r.Queue)
	o.Text("avatar_id", r.AvatarID)
	o.Texts("labels", r.Labels)
	o.Text("region", r.Region)
	o.Text("worker_id", r.WorkerID)
	o.Text("connection_id", r.ConnectionID)
	o.Time("confirmed_at", r.ConfirmedAt)
	o.Int("connected_ms", r.ConnectedMS)
	o.Int("credits", r.Credits)
	o.Text("outcome_code", r.OutcomeCode)
	o.Bool("estimated", r.Estimated)
	return o.End()
}

// AppendMembers appends the members that encoding/json writes for the session.
func (s Session) AppendMembers(o *jsontext.Object) {
	o.Int("session", int64(s.Session))
	o.Int("connected_ns", int64(s.Connected))
	o.Text("outcome_code", s.OutcomeCode)
	o.OptInt("attempt", int64(s.Attempt))
	o.OptText("app_id", s.AppID)
	o.OptText("region", s.Region)
	o.OptText("worker_id", s.WorkerID)
	o.OptText("connection_id", s.ConnectionID)
	o.OptTime("confirmed_at", s.ConfirmedAt)
	o.OptBool("estimated", s.Estimated)
	o.OptBool("stored", s.Stored)
}
