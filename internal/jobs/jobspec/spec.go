// Package jobspec reads jobs as they are published: it decodes, explains and
// validates them, and gives each message its identity and trace context. It owns the
// rules for a job's fields and headers. It must not know how a job is run.
package jobspec

import (
	"fmt"
	"net/url"
	"strconv"
	"time"

	"avatarworker/internal/jobs/jobpb"
)

// Values of a job's fields.
const (
	FormatWAV     = "wav"
	FormatPCM     = "pcm_s16le"
	FormatOggOpus = "ogg_opus"

	OutputFrames  = "frames"
	OutputObject  = "object"
	OutputLiveKit = "livekit"
	OutputAgora   = "agora"
	OutputDiscard = "discard"

	OnRedeliveryResume  = "resume"
	OnRedeliveryRestart = "restart"
	OnRedeliveryGiveUp  = "give_up"
)

// Bounds of live.max_silence. A silent session is paid for, so it can't wait
// forever.
const (
	defaultMaxSilence = 30 * time.Second
	minMaxSilence     = time.Second
	maxMaxSilence     = 10 * time.Minute
)

// AudioSpec is the source of one utterance's speech. Exactly one of Inline,
// Object and URL is set.
type AudioSpec struct {
	Field      string // its path in the job, for error texts: "utterances[2]"
	Inline     []byte
	HasInline  bool
	Object     string // "name" or "bucket/name"
	URL        string // secret in its query
	Format     string // "": by content
	SampleRate int    // Hz; 0: not said
}

// AudioSpecs lists the utterances in order. A live job has none.
func (j *Job) AudioSpecs() []AudioSpec {
	if a := j.GetAudio(); a != nil {
		return []AudioSpec{audioSpec("audio", a)}
	}
	specs := make([]AudioSpec, 0, len(j.GetUtterances()))
	for i, a := range j.GetUtterances() {
		specs = append(specs, audioSpec(fmt.Sprintf("utterances[%d]", i), a))
	}
	return specs
}

func audioSpec(field string, a *jobpb.Audio) AudioSpec {
	return AudioSpec{
		Field:      field,
		Inline:     a.GetInline(),
		HasInline:  a.Inline != nil,
		Object:     a.GetObject(),
		URL:        a.GetUrl(),
		Format:     a.GetFormat(),
		SampleRate: int(a.GetSampleRate()),
	}
}

// DropInline frees the inline speech of an utterance (numbered from 1) once it
// was sent; the message still contains it.
func (j *Job) DropInline(utterance int) {
	a := j.GetAudio()
	if a == nil {
		a = j.GetUtterances()[utterance-1]
	}
	if a.Inline != nil {
		a.Inline = []byte{}
	}
}

// outputs are the kinds of output in the order of Outputs. Each is one field of
// the message Output, and at most one of them is set in a valid job.
var outputs = []struct {
	kind  string
	given func(*jobpb.Output) bool
}{
	{OutputFrames, func(o *jobpb.Output) bool { return o.GetFrames() != nil }},
	{OutputObject, func(o *jobpb.Output) bool { return o.GetObject() != nil }},
	{OutputLiveKit, func(o *jobpb.Output) bool { return o.GetLivekit() != nil }},
	{OutputAgora, func(o *jobpb.Output) bool { return o.GetAgora() != nil }},
	{OutputDiscard, func(o *jobpb.Output) bool { return o.GetDiscard() != nil }},
}

// Outputs lists the kinds of output. It is the only list: what else depends on the
// kind is tested against it.
func Outputs() []string {
	kinds := make([]string, len(outputs))
	for i, o := range outputs {
		kinds[i] = o.kind
	}
	return kinds
}

// OutputKind returns the kind of the job's output, one of Outputs.
func (j *Job) OutputKind() string {
	if kinds := outputKinds(j.GetOutput()); len(kinds) > 0 {
		return kinds[0]
	}
	return OutputFrames
}

// outputKinds lists the outputs that are set: at most one in a valid job.
func outputKinds(o *jobpb.Output) []string {
	var kinds []string
	for _, k := range outputs {
		if k.given(o) {
			kinds = append(kinds, k.kind)
		}
	}
	return kinds
}

// RecordingName returns the name of the object for the output "object" (by
// default the job's ID), or "" for other outputs.
func (j *Job) RecordingName() string {
	switch o := j.GetOutput().GetObject(); {
	case o == nil:
		return ""
	case o.GetName() != "":
		return o.GetName()
	}
	return j.ID
}

// RedeliveryPolicy is what a later session does about utterances already spoken:
// "resume" (the default), "restart" or "give_up".
func (j *Job) RedeliveryPolicy() string {
	if r := j.GetOnRedelivery(); r != "" {
		return r
	}
	return OnRedeliveryResume
}

// NotAfter is the deadline; the zero time means that there is none.
func (j *Job) NotAfter() time.Time {
	if d := j.GetDeadline(); d != nil {
		return d.AsTime()
	}
	return time.Time{}
}

// LiveFormat is the format of a live job's chunks; raw PCM by default.
func (j *Job) LiveFormat() string {
	if f := j.GetLive().GetFormat(); f != "" {
		return f
	}
	return FormatPCM
}

// MaxSilence is how long a live job may be silent before it ends.
func (j *Job) MaxSilence() time.Duration {
	d, err := parseMaxSilence(j.GetLive().GetMaxSilence())
	if err != nil {
		return defaultMaxSilence // not in a valid job
	}
	return d
}

// parseMaxSilence reads a Go duration or a plain number of seconds.
func parseMaxSilence(text string) (time.Duration, error) {
	if text == "" {
		return defaultMaxSilence, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		// A number alone is seconds, as in other APIs' durations.
		if _, numErr := strconv.ParseFloat(text, 64); numErr == nil {
			d, err = time.ParseDuration(text + "s")
		}
	}
	if err != nil {
		return 0, fmt.Errorf(`want a duration such as "30s", got %s`, quote(text))
	}
	if d < minMaxSilence || d > maxMaxSilence {
		return 0, fmt.Errorf("want %s to %s, got %s", minMaxSilence, "10m", quote(text))
	}
	return d, nil
}

// Secrets lists what must never be shown: egress tokens, and the queries and
// passwords of URLs. Pass it to errors.RedactText.
func (j *Job) Secrets() []string {
	var secrets []string
	add := func(secret string) {
		if len(secret) >= 4 { // shorter ones protect nothing, and replacing them would garble a text
			secrets = append(secrets, secret)
		}
	}
	addURL := func(text string) {
		if text == "" {
			return
		}
		if u, err := url.Parse(text); err == nil {
			password, _ := u.User.Password()
			add(u.RawQuery)
			add(password)
		}
	}
	add(j.GetOutput().GetLivekit().GetApiToken())
	add(j.GetOutput().GetAgora().GetToken())
	addURL(j.GetOutput().GetLivekit().GetUrl())
	for _, spec := range j.AudioSpecs() {
		addURL(spec.URL)
	}
	return secrets
}

// Job is one valid session job with its identity.
type Job struct {
	*jobpb.Job

	ID        string // never changes; see identify
	Run       int    // 1, and one more for each replay
	Queue     string // the last token of Subject
	Subject   string
	StreamSeq uint64 // sequence of the message in the jobs stream
	Published time.Time

	TraceParent string // W3C, from the message's headers; may be empty
	TraceState  string
}

// Identity is what is known of a message even if it is not a valid job.
type Identity struct {
	ID        string
	Run       int
	Queue     string
	Subject   string
	StreamSeq uint64
}
