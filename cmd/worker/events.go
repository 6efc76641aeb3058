package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
	"avatarworker/internal/status"
	"avatarworker/internal/streams"
	"avatarworker/internal/terminal"
)

// eventFilter is what the flags of events choose.
type eventFilter struct {
	job   string
	code  string
	kinds []string
	since time.Duration // 0: from now on
	once  bool          // what there is, and no more
}

func newEventsCommand(c *cli) *cobra.Command {
	var (
		f                          eventFilter
		asJSON, errs, alerts, jobs bool
	)
	cmd := &cobra.Command{
		Use: "events", Short: "Follow errors, alerts and job events", Args: noArgs,
		Long: `Follows error events, alerts and job events as they come, until interrupted.
--json prints one object a line: {"subject","id","type","time","job_id","data"}.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, k := range []struct {
				on   bool
				kind string
			}{{errs, status.KindErrors}, {alerts, status.KindAlerts}, {jobs, status.KindJobs}} {
				if k.on {
					f.kinds = append(f.kinds, k.kind)
				}
			}
			if f.since < 0 {
				return usagef("--since %s: want a positive duration", f.since)
			}
			if f.job != "" {
				if err := checkJobID(f.job); err != nil {
					return err
				}
			}
			if f.code != "" {
				c.warnUnknown(errors.Code(f.code))
			}
			return c.events(cmd.Context(), f, asJSON)
		},
	}
	fl := cmd.Flags()
	fl.DurationVar(&f.since, "since", 0, "begin this long `AGO` (default: now; with --no-follow: the beginning)")
	filterVar(fl, &f.job, "job", "events of the job with this `ID` only")
	filterVar(fl, &f.code, "code", "events with this error `CODE` only")
	fl.BoolVar(&errs, "errors", false, "error events: one for each failed attempt, and one for each job given up without an attempt")
	fl.BoolVar(&alerts, "alerts", false, "alerts")
	fl.BoolVar(&jobs, "jobs", false, "job events: started, completed, …")
	fl.BoolVar(&f.once, "no-follow", false, "print past events and end")
	jsonFlag(cmd, &asJSON)
	return cmd
}

func (c *cli) events(ctx context.Context, f eventFilter, asJSON bool) error {
	l, err := c.connect(ctx, "events")
	if err != nil {
		return err
	}
	defer l.close()
	stream, err := l.js.Stream(ctx, l.names.EventsStream())
	if err != nil {
		return l.names.Unavailable("stream "+l.names.EventsStream(), err)
	}
	show := func(e status.Event) error {
		switch {
		case !f.keeps(e):
			return nil
		case asJSON:
			return c.printLine(e)
		}
		return c.printEvent(e)
	}
	if f.once {
		return c.pastEvents(ctx, stream, f, status.Subjects(l.names, f.kinds, f.job), show)
	}
	err = c.followEvents(ctx, stream, f, status.Subjects(l.names, f.kinds, f.job), show)
	if ctx.Err() != nil {
		return nil // it was interrupted, which is how it ends
	}
	return err
}

// start says where in the stream to begin.
func (f eventFilter) start(now time.Time) (jetstream.DeliverPolicy, *time.Time) {
	switch {
	case f.since > 0:
		from := now.Add(-f.since)
		return jetstream.DeliverByStartTimePolicy, &from
	case f.once:
		return jetstream.DeliverAllPolicy, nil
	}
	return jetstream.DeliverNewPolicy, nil
}

func (f eventFilter) keeps(e status.Event) bool {
	if f.job != "" && e.JobID != f.job {
		return false
	}
	if f.code == "" {
		return true
	}
	var body struct {
		Code string `json:"code"`
		What string `json:"what"` // of an alert about a worker's key: the code
	}
	return json.Unmarshal(e.Data, &body) == nil && (body.Code == f.code || body.What == f.code)
}

func (c *cli) pastEvents(ctx context.Context, stream jetstream.Stream, f eventFilter, subjects []string, show func(status.Event) error) error {
	cfg := jetstream.ConsumerConfig{FilterSubjects: subjects}
	cfg.DeliverPolicy, cfg.OptStartTime = f.start(c.now())
	var failed error
	err := streams.Scan(ctx, stream, cfg, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) bool {
		failed = show(status.NewEvent(msg.Subject(), msg.Headers(), msg.Data(), meta.Sequence.Stream, meta.Timestamp))
		return failed == nil
	})
	return errors.Join(err, failed)
}

func (c *cli) followEvents(ctx context.Context, stream jetstream.Stream, f eventFilter, subjects []string, show func(status.Event) error) error {
	cfg := jetstream.OrderedConsumerConfig{FilterSubjects: subjects}
	cfg.DeliverPolicy, cfg.OptStartTime = f.start(c.now())
	return streams.Follow(ctx, stream, cfg, func(msg jetstream.Msg, meta *jetstream.MsgMetadata) error {
		return show(status.NewEvent(msg.Subject(), msg.Headers(), msg.Data(), meta.Sequence.Stream, meta.Timestamp))
	})
}

// printEvent writes an event as one line for people.
func (c *cli) printEvent(e status.Event) error {
	_, err := fmt.Fprintln(c.stdout, c.eventLine(c.stdout, e, ""))
	return err
}

// eventTime is how the time of an event is shown.
const eventTime = "2006-01-02T15:04:05.000Z"

// eventLine is an event as one line, for w; about comes before what it says.
func (c *cli) eventLine(w io.Writer, e status.Event, about string) string {
	name := terminal.Plain(e.Type)
	for _, prefix := range []string{"avatar.job.", "avatar.session.", "avatar."} {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			name = rest
			break
		}
	}
	colour := map[string]terminal.Colour{
		"error": terminal.Red, event.TypeDeadLettered: terminal.Red, event.TypeCompleted: terminal.Green, event.TypeExpired: terminal.Yellow,
		event.TypeRetrying: terminal.Yellow, event.TypeHeld: terminal.Yellow, "alert." + event.AlertRecurring: terminal.Red,
		"alert." + event.AlertCircuitOpened: terminal.Red, "alert." + event.AlertCircuitClosed: terminal.Green,
		"alert." + event.AlertStorage: terminal.Red, "alert." + event.AlertWorkerKey: terminal.Red, "alert." + event.AlertUnsettled: terminal.Red,
	}[name]
	label := fmt.Sprintf("%-22s", terminal.OrDash(name))
	if colour != "" {
		label = c.colour(w, colour, label)
	}
	return fmt.Sprintf("%s  %s %s  %s", e.Time.Format(eventTime), label, terminal.OrDash(terminal.Plain(e.JobID)), about+terminal.Plain(describeEvent(e)))
}

// eventFields are the fields that a line shows, of any event that has them.
type eventFields struct {
	Queue      string     `json:"queue"`
	AvatarID   string     `json:"avatar_id"`
	AppID      string     `json:"app_id"`
	Worker     string     `json:"worker"`
	Attempt    int        `json:"attempt"`
	Attempts   int        `json:"attempts"`
	Max        int        `json:"max_attempts"`
	Code       string     `json:"code"`
	What       string     `json:"what"`
	Class      string     `json:"class"`
	Phase      string     `json:"phase"`
	Message    string     `json:"message"`
	Title      string     `json:"server_title"`
	Detail     string     `json:"server_detail"`
	Reason     string     `json:"reason"`
	RetryAt    *time.Time `json:"retry_at"`
	Total      int        `json:"utterances_total"`
	SessionMS  int64      `json:"session_ms"`
	Crashes    int        `json:"crashes"`
	Recording  string     `json:"recording"`
	DeadLetter string     `json:"dead_letter"`
	Count      int        `json:"count"`
	Window     string     `json:"window"`
	Deadline   *time.Time `json:"deadline"`
	LastError  *struct {
		Code    string `json:"code"`
		Message string `json:"message"`
		Title   string `json:"server_title"`
		Detail  string `json:"server_detail"`
	} `json:"last_error"` // of an outcome
	StreamSeq  uint64 `json:"stream_seq"` // of a duplicate
	KeptSeq    uint64 `json:"kept_seq"`
	Run        int    `json:"run"`
	CurrentRun int    `json:"current_run"`
}

// describeDuplicate says which message was dropped, and which one counts.
func describeDuplicate(f eventFields) string {
	text := fmt.Sprintf("dropped message %d of run %d", f.StreamSeq, f.Run)
	if f.KeptSeq > 0 {
		text += fmt.Sprintf(", kept message %d", f.KeptSeq)
		if f.CurrentRun > 0 {
			text += fmt.Sprintf(" of run %d", f.CurrentRun)
		}
	}
	return text
}

// whole is a time to the second; "" if there is none.
func whole(at *time.Time) string {
	if at == nil {
		return ""
	}
	return at.UTC().Format(time.RFC3339)
}

// maxMessage is how much of an error's text a line shows.
const maxMessage = 200

func describeEvent(e status.Event) string {
	var f eventFields
	if json.Unmarshal(e.Data, &f) != nil {
		return terminal.Short(string(e.Data), maxMessage)
	}
	var parts []string
	if strings.HasSuffix(e.Type, "."+event.TypeDuplicate) {
		parts = append(parts, describeDuplicate(f))
	}
	add := func(on bool, format string, args ...any) {
		if on {
			parts = append(parts, fmt.Sprintf(format, args...))
		}
	}
	add(f.Code != "" && f.Class != "", "%s (%s)", f.Code, f.Class)
	add(f.Code != "" && f.Class == "", "%s", f.Code)
	add(f.What != "", "%s", f.What)
	add(f.Phase != "", "in %s", f.Phase)
	add(f.Count > 0, "%d within %s", f.Count, f.Window)
	add(e.JobID != "" && f.AvatarID != "", "avatar %s", f.AvatarID)
	add((e.JobID == "" || f.What != "") && f.AppID != "", "app %s", f.AppID)
	add(f.Queue != "", "queue %s", f.Queue)
	add(f.Attempt > 0 && f.Attempts == 0 && f.Max > 0, "attempt %d/%d", f.Attempt, f.Max)
	add(f.Attempt > 0 && f.Attempts == 0 && f.Max == 0, "attempt %d", f.Attempt)
	add(f.Attempts > 0, "%s", terminal.Count(f.Attempts, "attempt"))
	add(f.Crashes > 0, "after %s", crashes(f.Crashes))
	add(f.Total > 0, "%s", terminal.Count(f.Total, "utterance"))
	add(f.SessionMS > 0, "connected %s", (time.Duration(f.SessionMS) * time.Millisecond).String())
	add(f.Recording != "", "recording %s", f.Recording)
	add(f.Reason != "", "%s", f.Reason)
	add(f.Deadline != nil && !f.Deadline.IsZero(), "deadline %s", whole(f.Deadline))
	add(f.Worker != "", "on %s", f.Worker)
	text := strings.Join(parts, ", ")
	if f.Message != "" {
		text += ": " + terminal.Short(status.Cause(f.Message, f.Title, f.Detail), maxMessage)
	}
	if e := f.LastError; e != nil {
		text += fmt.Sprintf("; the last failure was %s: %s", e.Code, terminal.Short(status.Cause(e.Message, e.Title, e.Detail), maxMessage))
	}
	if f.RetryAt != nil {
		text += "; again by " + f.RetryAt.UTC().Format("15:04:05Z")
	}
	return text
}
