package lifecycle

import (
	"slices"

	"avatarworker/internal/jsontext"
)

// utteranceBytes is about what an utterance takes in a record.
const utteranceBytes = 160

// AppendJSON appends what json.Marshal returns for the record, which is written
// twice for every job.
func (r *Record) AppendJSON(b []byte) ([]byte, error) {
	b = slices.Grow(b, len(r.Utterances)*utteranceBytes)
	o := jsontext.Begin(b, jsontext.EscapeHTML)
	o.Text("job_id", r.JobID)
	o.Int("run", int64(r.Run))
	o.Uint("stream_seq", r.StreamSeq)
	o.Int("session", int64(r.Session))
	o.Text("state", string(r.State))
	o.Text("queue", r.Queue)
	o.Text("app_id", r.AppID)
	o.Text("avatar_id", r.AvatarID)
	o.OptText("region", r.Region)
	o.Int("attempt", int64(r.Attempt))
	o.Int("max_attempts", int64(r.MaxAttempts))
	o.Int("crashes", int64(r.Crashes))
	o.OptInt("crashes_past", int64(r.CrashesPast))
	o.Text("worker_id", r.WorkerID)
	o.Bool("cancel_requested", r.CancelRequested)
	o.Time("created_at", r.CreatedAt)
	o.Time("updated_at", r.UpdatedAt)
	if r.NextAttemptAt != nil {
		o.Time("next_attempt_at", *r.NextAttemptAt)
	}
	o.OptTime("started_at", r.StartedAt)
	o.OptText("connection_id", r.ConnectionID)
	if r.LastError != nil {
		o.Value("last_error", r.LastError)
	}
	o.Int("checkpoint", int64(r.Checkpoint))
	o.OptText("outcome", string(r.Outcome))

	o.OptText("reason", r.Reason)
	o.OptBool("no_attempt", r.NoAttempt)
	o.OptInt("budget_from", int64(r.BudgetFrom))
	if len(r.Failures) > 0 {
		o.Value("failures", r.Failures)
	}
	o.OptInt("speaking", int64(r.Speaking))
	o.OptUint("live_seq", r.LiveSeq)
	o.OptUint("live_begun", r.LiveBegun)
	o.OptInt("holds", int64(r.Holds))
	if r.HeldSince != nil {
		o.Time("held_since", *r.HeldSince)
	}
	o.OptInt("held_for_ns", int64(r.HeldFor))
	o.OptText("held_code", string(r.HeldCode))
	o.OptText("held_reason", r.HeldReason)
	o.OptText("held_why", r.HeldWhy)
	o.OptInt("unsettled", int64(r.Unsettled))
	o.OptInt("refusals", int64(r.Refusals))
	if len(r.ConnectionIDs) > 0 {
		o.TextList("connection_ids", r.ConnectionIDs)
	}
	if len(r.Utterances) > 0 {
		jsontext.List(&o, "utterances", r.Utterances)
	}
	o.OptInt("utterances_total", int64(r.UtterancesDone))
	o.OptInt("session_ns", int64(r.SessionTime))
	o.OptText("recording", r.Recording)
	if r.Recorded != nil {
		o.Value("recorded", r.Recorded)
	}
	if len(r.Labels) > 0 {
		o.Texts("labels", r.Labels)
	}
	o.OptTime("published_at", r.PublishedAt)
	o.OptTime("confirmed_at", r.ConfirmedAt)
	if len(r.Usage) > 0 {
		jsontext.List(&o, "usage", r.Usage)
	}
	o.OptUint("letters_before", r.LettersBefore)
	o.OptInt("cancel_through", int64(r.CancelThrough))
	return o.End()
}
