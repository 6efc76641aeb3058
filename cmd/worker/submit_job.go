package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"avatarworker/internal/audio"
	"avatarworker/internal/client"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobspec"
)

// jobFlags are the fields of a job.
type jobFlags struct {
	avatar, app, region, id string
	speech                  []speechFlag // in the order of the command line
	sampleRate              int
	format                  string
	maxSilence              string
	output, outputName      string
	egress                  egressFlags
	labels, extra           []string
	deadline                string
	maxAttempts             int
	onRedelivery            string
}

// speechFlag is one --audio or --audio-url.
type speechFlag struct{ file, url string }

type egressFlags struct {
	url, room, token, tokenFile, publisher string
	uid                                    uint32
	idleTimeout                            int
	attributes                             []string
}

func (j *jobFlags) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&j.avatar, "avatar", "", "`ID` of the avatar")
	f.StringVar(&j.app, "app", "", "`ID` of the app whose credentials to use (default: the worker's app.id)")
	f.StringVar(&j.region, "region", "", "`REGION` instead of the worker's")
	f.StringVar(&j.id, "id", "", "the job's `ID` (default: one is made)")
	speech := func(of func(value string) speechFlag) func(string) error {
		return func(value string) error {
			if value == "" {
				return errEmpty
			}
			j.speech = append(j.speech, of(value))
			return nil
		}
	}
	f.Func("audio", "speech in `FILE`, which is uploaded; several are spoken in order", speech(func(v string) speechFlag { return speechFlag{file: v} }))
	f.Func("audio-url", "speech at `URL`, which the worker fetches", speech(func(v string) speechFlag { return speechFlag{url: v} }))
	f.IntVar(&j.sampleRate, "sample-rate", 0, "of the speech, in `HZ`; needed for raw PCM")
	f.StringVar(&j.format, "format", "", "`FORMAT` of the speech: wav, pcm_s16le or ogg_opus (default: by content)")
	f.StringVar(&j.maxSilence, "max-silence", "", "with --live: end the session after this `TIME` without speech")
	f.StringVar(&j.output, "output", "", "`KIND` of output, where frames go: "+strings.Join(jobspec.Outputs(), ", ")+" (default frames)")
	f.StringVar(&j.outputName, "output-name", "", "`NAME` of the recording, with --output object (default: the job's id)")
	f.StringArrayVar(&j.labels, "label", nil, "a `KEY=VALUE` that is copied into every event; may be repeated")
	f.StringArrayVar(&j.extra, "extra", nil, "a `KEY=VALUE` of extra_params for the backend; may be repeated")
	f.StringVar(&j.deadline, "deadline", "", "latest `TIME` to start the job (RFC 3339, or from now such as 10m)")
	f.IntVar(&j.maxAttempts, "max-attempts", 0, "at most `N` attempts in all, within the worker's limit")
	f.StringVar(&j.onRedelivery, "on-redelivery", "", "`POLICY` of a later session for what was spoken before: resume, restart or give_up")
	e := &j.egress
	f.StringVar(&e.url, "egress-url", "", "`URL` of LiveKit")
	f.StringVar(&e.room, "egress-room", "", "`NAME` of the LiveKit room or the Agora channel")
	f.StringVar(&e.token, "egress-token", "", "`TOKEN` of LiveKit or Agora; other users of this machine can see it; see --egress-token-file")
	f.StringVar(&e.tokenFile, "egress-token-file", "", "`FILE` with the token")
	f.StringVar(&e.publisher, "egress-publisher", "", "publisher `ID`")
	f.Uint32Var(&e.uid, "egress-uid", 0, "Agora `UID`")
	f.IntVar(&e.idleTimeout, "egress-idle-timeout", 0, "LiveKit idle timeout in `SECONDS`")
	f.StringArrayVar(&e.attributes, "egress-attribute", nil, "a `KEY=VALUE` of LiveKit's extra_attributes; may be repeated")
}

// document is a job on its way to be published.
type document struct {
	id      string
	where   string                     // in a file of several: "jobs.ndjson, job 2 (line 5)"
	fields  map[string]json.RawMessage // nil: the file is not a JSON object, and is published as it is
	data    []byte
	uploads []client.Upload
	now     time.Time
}

// documents makes the jobs out of the file, which may hold several, and the flags
// that were given.
func (c *cli) documents(s *submission, given func(flag string) bool) ([]*document, error) {
	parts := []jobPart{{fields: make(map[string]json.RawMessage)}}
	if s.file != "" {
		var err error
		if parts, err = c.readJobs(s); err != nil {
			return nil, err
		}
	}
	var docs []*document
	for _, part := range parts {
		doc := &document{where: part.where, fields: part.fields, data: part.raw, now: c.now()}
		if err := c.complete(doc, s, given); err != nil {
			return nil, part.located(err)
		}
		docs = append(docs, doc)
	}
	return docs, nil
}

// complete adds what the flags say.
func (c *cli) complete(doc *document, s *submission, given func(flag string) bool) error {
	if doc.fields == nil {
		if doc.id = s.id; doc.id == "" {
			doc.id = client.NewJobID()
		}
		return nil
	}
	for name, value := range map[string]string{
		"avatar_id": s.avatar, "app_id": s.app, "region": s.region, "id": s.id, "on_redelivery": s.onRedelivery,
	} {
		if value != "" {
			doc.set(name, value)
		}
	}
	if given("max-attempts") {
		doc.set("max_attempts", s.maxAttempts)
	}
	if doc.id = doc.textOf("id"); doc.id == "" {
		if string(doc.fields["id"]) == `""` && !s.noCheck {
			return errors.New(`id is "": want a job id, or leave it out`)
		}
		doc.id = client.NewJobID()
		doc.set("id", doc.id)
	}
	err := errors.Join(
		doc.pairs("labels", "--label", s.labels), doc.pairs("extra_params", "--extra", s.extra),
		doc.deadline(s.deadline), doc.speech(s), doc.output(s),
	)
	if err != nil {
		return err
	}
	doc.data = encode(doc.fields)
	return nil
}

func (d *document) set(name string, value any) { d.fields[name] = encode(value) }

// textOf is a field that is a text; "" where it is absent or something else.
func (d *document) textOf(name string) string {
	var text string
	if json.Unmarshal(d.fields[name], &text) != nil {
		return ""
	}
	return text
}

// pairs adds key=value flags to a map of the job.
func (d *document) pairs(field, flag string, pairs []string) error {
	if len(pairs) == 0 {
		return nil
	}
	values := map[string]any{}
	if old := d.fields[field]; old != nil && json.Unmarshal(old, &values) != nil {
		return fmt.Errorf("%s of the file is not an object, so %s can't add to it", field, flag)
	}
	added, err := keyValues(flag, pairs)
	if err != nil {
		return err
	}
	for key, value := range added {
		values[key] = value
	}
	d.set(field, values)
	return nil
}

func keyValues(flag string, pairs []string) (map[string]string, error) {
	values := make(map[string]string, len(pairs))
	for _, pair := range pairs {
		key, value, ok := strings.Cut(pair, "=")
		if !ok || key == "" {
			return nil, usagef("%s %q: want KEY=VALUE", flag, pair)
		}
		values[key] = value
	}
	return values, nil
}

func (d *document) deadline(text string) error {
	if text == "" {
		return nil
	}
	if after, err := time.ParseDuration(text); err == nil {
		d.set("deadline", d.now.Add(after).UTC().Format(time.RFC3339Nano))
		return nil
	}
	if _, err := time.Parse(time.RFC3339, strings.ToUpper(text)); err != nil {
		return usagef("--deadline %q: want a time such as 2026-03-01T12:00:00Z, or from now such as 10m", text)
	}
	d.set("deadline", text)
	return nil
}

// speech turns --audio and --audio-url into audio or utterances.
func (d *document) speech(s *submission) error {
	if len(s.speech) == 0 {
		return nil
	}
	var spoken []map[string]any
	for _, sp := range s.speech {
		a := map[string]any{}
		if s.format != "" {
			a["format"] = s.format
		}
		if s.sampleRate != 0 {
			a["sample_rate"] = s.sampleRate
		}
		if sp.url != "" {
			a["url"] = sp.url
		} else {
			if sp.file == "-" {
				return usagef("--audio -: want a file; --live - publishes speech from stdin")
			}
			if info, err := os.Stat(sp.file); err != nil {
				return fmt.Errorf("--audio %s: %w", sp.file, plainFile(err))
			} else if !info.Mode().IsRegular() {
				return fmt.Errorf("%s is not a regular file; to publish speech from stdin use --live -", sp.file)
			}
			up := client.NewUpload(sp.file)
			d.uploads = append(d.uploads, up)
			a["object"] = up.Object
		}
		spoken = append(spoken, a)
	}
	delete(d.fields, "audio")
	delete(d.fields, "utterances")
	delete(d.fields, "live")
	if len(spoken) == 1 {
		d.set("audio", spoken[0])
	} else {
		d.set("utterances", spoken)
	}
	return nil
}

// speechLimits are what workers take as speech.
type speechLimits struct {
	convert  bool
	maxBytes int64
}

// speechLimits are the strictest of the workers that serve the queue: the job may
// come to any of them. Where none publishes its limits, this command's own
// configuration is used.
func (c *cli) speechLimits(ctx context.Context, l *link, queue string) speechLimits {
	workers, err := l.serving(ctx, queue)
	if err != nil {
		l.log.Debug().Err(err).Msg("reading which workers there are")
	}
	var limits speechLimits
	for _, w := range workers {
		switch own := (speechLimits{w.AudioConvert, w.AudioMaxBytes}); {
		case own.maxBytes == 0: // a version that does not say
		case limits.maxBytes == 0:
			limits = own
		default:
			limits = speechLimits{limits.convert && own.convert, min(limits.maxBytes, own.maxBytes)}
		}
	}
	if limits.maxBytes > 0 {
		return limits
	}
	c.note("no worker of queue %s publishes its limits for speech: the files are checked by audio.convert and audio.max_bytes as configured here", queue)
	return speechLimits{l.cfg.Audio.Convert, int64(l.cfg.Audio.MaxBytes)}
}

// checkUploads finds what a worker would refuse in the files of --audio.
func (c *cli) checkUploads(ctx context.Context, l *link, s *submission, uploads []client.Upload) error {
	if s.noCheck || len(uploads) == 0 {
		return nil
	}
	limits := c.speechLimits(ctx, l, s.queue)
	opener := audio.New(audio.Options{MaxBytes: limits.maxBytes, Convert: limits.convert})
	defer opener.Close()
	for _, up := range uploads {
		info, err := os.Stat(up.File)
		if err != nil {
			return err
		}
		if info.Size() > limits.maxBytes {
			return fmt.Errorf("%s has %d bytes, more than audio.max_bytes (%d); --no-check uploads it anyway", up.File, info.Size(), limits.maxBytes)
		}
		data, err := os.ReadFile(up.File)
		if err != nil {
			return err
		}
		err = opener.Check(audio.Spec{Inline: data, HasInline: true, Format: s.format, SampleRate: s.sampleRate, Field: speechField})
		if err != nil {
			return fmt.Errorf("a worker would refuse %s: %s; --no-check uploads it anyway", up.File, inFlags(err))
		}
	}
	return nil
}

// speechField is the field that the audio package names in its errors, which
// inFlags translates into the flags of the command line.
const speechField = "audio"

func inFlags(err error) string {
	return strings.NewReplacer(
		speechField+".inline: ", "", speechField+".sample_rate", "--sample-rate", speechField+".format", "--format",
	).Replace(errors.Of(err).Message)
}

func (d *document) output(s *submission) error {
	o := map[string]any{}
	egress := s.output == jobspec.OutputLiveKit || s.output == jobspec.OutputAgora
	switch {
	case s.outputName != "" && s.output != jobspec.OutputObject:
		return usagef("--output-name needs --output object")
	case s.egress.given() && !egress:
		return usagef("--egress-… need --output livekit or agora")
	}
	switch s.output {
	case "":
		return nil
	case jobspec.OutputFrames, jobspec.OutputDiscard:
	case jobspec.OutputObject:
		if s.outputName != "" {
			o["name"] = s.outputName
		}
	case jobspec.OutputLiveKit, jobspec.OutputAgora:
		var err error
		if o, err = s.egress.fields(s.output); err != nil {
			return err
		}
	default:
		return oneOf("output", s.output, jobspec.Outputs())
	}
	d.set("output", map[string]any{s.output: o})
	return nil
}

func (e *egressFlags) given() bool {
	return e.url+e.room+e.token+e.tokenFile+e.publisher != "" || e.uid != 0 || e.idleTimeout != 0 || len(e.attributes) > 0
}

func (e *egressFlags) fields(kind string) (map[string]any, error) {
	token := e.token
	if e.tokenFile != "" {
		data, err := os.ReadFile(e.tokenFile)
		if err != nil {
			return nil, err
		}
		token = string(bytes.TrimSpace(data))
	}
	attributes, err := keyValues("--egress-attribute", e.attributes)
	if err != nil {
		return nil, err
	}
	all := map[string]any{"url": e.url, "room_name": e.room, "api_token": token, "publisher_id": e.publisher, "idle_timeout": e.idleTimeout}
	if len(attributes) > 0 {
		all["extra_attributes"] = attributes
	}
	if kind == jobspec.OutputAgora {
		all = map[string]any{"channel_name": e.room, "token": token, "uid": e.uid, "publisher_id": e.publisher}
	}
	for name, value := range all {
		if text := fmt.Sprint(value); text == "" || text == strconv.Itoa(0) {
			delete(all, name)
		}
	}
	return all, nil
}

// job checks the document as a worker would. It returns nil without an error for
// an invalid job that --no-check publishes anyway.
func (d *document) job(noCheck bool) (*jobspec.Job, error) {
	body, invalid := jobspec.Decode(nil, d.data)
	job := &jobspec.Job{Job: body, ID: d.id}
	if invalid == nil && !noCheck {
		invalid = errors.Of(checkSpeech(job))
	}
	switch {
	case invalid == nil:
		return job, nil
	case noCheck:
		return nil, nil //nolint:nilnil // see above
	}
	return nil, jobPart{where: d.where}.located(fmt.Errorf("not a valid job: %s", invalid.Message))
}

// checkSpeech returns what every worker would refuse about a job's speech. It reads
// no objects or URLs.
func checkSpeech(job *jobspec.Job) error {
	if live := job.GetLive(); live != nil {
		format := audio.PCM
		if live.GetFormat() == jobspec.FormatOggOpus {
			format = audio.OggOpus
		}
		return audio.CheckRate("live.sample_rate", format, int(live.GetSampleRate()))
	}
	opener := audio.New(audio.Options{MaxBytes: math.MaxInt64, Convert: true}) // some worker may be configured so
	defer opener.Close()
	for _, s := range job.AudioSpecs() {
		if err := opener.Check(audio.Spec{
			Inline: s.Inline, HasInline: s.HasInline, Object: s.Object, URL: s.URL,
			Format: s.Format, SampleRate: s.SampleRate, Field: s.Field,
		}); err != nil {
			return err
		}
	}
	return nil
}
