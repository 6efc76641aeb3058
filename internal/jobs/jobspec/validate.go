package jobspec

import (
	"fmt"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobpb"
)

// Bounds of a job's fields, in bytes. They limit what is repeated in every record
// and event.
const (
	maxAvatarID   = 256
	maxAppID      = 128
	maxRegion     = 63 // one label of a host name
	maxUtterances = 1000
	maxLabels     = 16
	maxLabel      = 256
	maxParams     = 64 // extra_params and extra_attributes
	maxParamKey   = 256
	maxParamValue = 4096
	maxObjectName = 512
	maxURL        = 8192
	maxRoomName   = 512
	maxToken      = 16 << 10
)

const wantYears = "want a time of the years 2 to 9999 in UTC"

const idWanted = "1 to 64 of A-Z a-z 0-9 _ -"

var (
	// A region is part of the backend's host names (docs/protocol.md,
	// section 1), so a job must not be able to name another host with it.
	regionPattern = regexp.MustCompile(`^[a-z][a-z0-9]*(-[a-z0-9]+)+$`)
	bucketPattern = regexp.MustCompile(`^[A-Za-z0-9_-]{1,128}$`)
)

// Validate checks what the schema alone can't express. The error is nil or names
// every wrong field, with code invalidJob and phase job.
func Validate(job *jobpb.Job) *errors.Error { return validate(job, nil) }

// validate is Validate. empty returns the fields that are given and empty; nil: that
// is not known.
func validate(job *jobpb.Job, empty func() map[string]bool) *errors.Error {
	var p problems
	p.names(job)
	p.speech(job, empty)
	p.output(job.GetOutput())
	p.bounds(job)
	if len(p) > 0 {
		return invalidJob(p)
	}
	return nil
}

func (p *problems) names(job *jobpb.Job) {
	if id := job.GetId(); id != "" && !ValidID(id) {
		p.add("id", "want %s, got %s", idWanted, quote(id))
	}
	if id := job.GetAvatarId(); id == "" {
		p.add("avatar_id", "is required")
	} else {
		p.backendName(id, "avatar_id", maxAvatarID)
	}
	p.backendName(job.GetAppId(), "app_id", maxAppID)
	if r := job.GetRegion(); r != "" && (len(r) > maxRegion || !regionPattern.MatchString(r)) {
		p.add("region", `want lower-case words joined by hyphens such as "us-west", got %s`, quote(r))
	}
}

// backendName checks an ID issued by the backend: any text that is valid as an
// HTTP header value and, escaped, in a URL's query.
func (p *problems) backendName(id, path string, most int) {
	switch {
	case len(id) > most:
		p.add(path, "at most %d bytes, got %d", most, len(id))
	case strings.ContainsFunc(id, unicode.IsControl):
		p.add(path, "no control characters, got %s", quote(id))
	case strings.TrimSpace(id) != id:
		p.add(path, "no space at its ends, got %s", quote(id))
	}
}

// speech checks that the job has exactly one source of speech.
func (p *problems) speech(job *jobpb.Job, empty func() map[string]bool) {
	var given []string
	if job.GetAudio() != nil {
		given = append(given, "audio")
		p.audio(job.GetAudio(), "audio", empty)
	}
	if n := len(job.GetUtterances()); n > 0 {
		given = append(given, "utterances")
		if n > maxUtterances {
			p.add("utterances", "at most %d, got %d; split the job", maxUtterances, n)
		}
		for i, a := range job.GetUtterances()[:min(n, maxUtterances)] {
			p.audio(a, fmt.Sprintf("utterances[%d]", i), empty)
		}
	}
	if job.GetLive() != nil {
		given = append(given, "live")
		p.live(job.GetLive())
	}
	p.exactlyOne("", given, "audio, utterances, live")
}

// exactlyOne reports choices of which none or several were made.
func (p *problems) exactlyOne(path string, given []string, choices string) {
	switch len(given) {
	case 0:
		p.add(path, "exactly one of %s is needed, none is given", choices)
	case 1:
	default:
		p.add(path, "exactly one of %s is needed, got %s", choices, strings.Join(given, " and "))
	}
}

func (p *problems) audio(a *jobpb.Audio, path string, empty func() map[string]bool) {
	var given []string
	if a.Inline != nil {
		given = append(given, "inline")
		if len(a.Inline) == 0 {
			p.add(path+".inline", "is empty")
		}
	}
	if a.GetObject() != "" {
		given = append(given, "object")
		p.audioObject(a.GetObject(), path+".object")
	}
	if a.GetUrl() != "" {
		given = append(given, "url")
		if u := p.url(a.GetUrl(), path+".url", "http", "https"); u != nil && u.User != nil {
			p.add(path+".url", "the URL carries a user name or password: none is sent. Use a URL that is signed in its query")
		}
	}
	if len(given) == 0 && empty != nil {
		fields := empty()
		for _, field := range []string{"object", "url"} {
			if fields[path+"."+field] {
				given = append(given, field)
				p.add(path+"."+field, "is empty")
			}
		}
	}
	p.exactlyOne(path, given, "inline, object, url")
	p.oneOf(a.GetFormat(), path+".format", FormatWAV, FormatPCM, FormatOggOpus)
	switch rate := a.GetSampleRate(); {
	case rate < 0:
		p.add(path+".sample_rate", "want Hz, got %d", rate)
	case rate == 0 && a.GetFormat() == FormatPCM:
		p.add(path+".sample_rate", "is required with format %s, which does not say its rate", FormatPCM)
	}
}

func (p *problems) audioObject(ref, path string) {
	bucket, name, qualified := strings.Cut(ref, "/")
	switch {
	case !qualified:
		p.objectName(ref, path)
	case !bucketPattern.MatchString(bucket):
		p.add(path, "want a name, or bucket/name with a bucket of A-Z a-z 0-9 _ -, got %s", quote(ref))
	case name == "":
		p.add(path, "has no name after the bucket, got %s", quote(ref))
	default:
		p.objectName(name, path)
	}
}

func (p *problems) objectName(name, path string) {
	switch {
	case len(name) > maxObjectName:
		p.add(path, "at most %d bytes, got %d", maxObjectName, len(name))
	case strings.ContainsFunc(name, unicode.IsControl):
		p.add(path, "no control characters, got %s", quote(name))
	case strings.TrimSpace(name) != name:
		p.add(path, "no space at its ends, got %s", quote(name))
	}
}

// url returns the URL, nil if it is wrong. It never quotes it: its query may hold a
// signature.
func (p *problems) url(text, path string, schemes ...string) *url.URL {
	if len(text) > maxURL {
		p.add(path, "at most %d bytes, got %d", maxURL, len(text))
		return nil
	}
	u, err := url.Parse(text)
	switch {
	case err != nil:
		p.add(path, "not a URL")
	case !slices.Contains(schemes, u.Scheme):
		p.add(path, "want a URL that starts with one of %s://", strings.Join(schemes, "://, "))
	case u.Hostname() == "":
		p.add(path, "the URL has no host")
	case !validPort(u.Port()):
		p.add(path, "the URL's port is not a number of 1 to 65535")
	default:
		return u
	}
	return nil
}

func validPort(port string) bool {
	n, err := strconv.ParseUint(port, 10, 16)
	return port == "" || err == nil && n > 0
}

func (p *problems) oneOf(value, path string, choices ...string) {
	if value != "" && !slices.Contains(choices, value) {
		p.add(path, "want one of %s, got %s", strings.Join(choices, ", "), quote(value))
	}
}

func (p *problems) live(l *jobpb.Live) {
	if l.GetSampleRate() <= 0 {
		p.add("live.sample_rate", "is required: the speech's rate in Hz, got %d", l.GetSampleRate())
	}
	p.oneOf(l.GetFormat(), "live.format", FormatPCM, FormatOggOpus)
	if _, err := parseMaxSilence(l.GetMaxSilence()); err != nil {
		p.add("live.max_silence", "%s", err)
	}
}

func (p *problems) output(o *jobpb.Output) {
	if o == nil {
		return // the default, frames
	}
	if given := outputKinds(o); len(given) != 1 {
		p.exactlyOne("output", given, strings.Join(Outputs(), ", "))
	}
	p.objectName(o.GetObject().GetName(), "output.object.name")
	if l := o.GetLivekit(); l != nil {
		p.livekit(l)
	}
	if a := o.GetAgora(); a != nil {
		p.required(a.GetChannelName(), "output.agora.channel_name", maxRoomName)
		p.short(a.GetToken(), "output.agora.token", maxToken)
		p.short(a.GetPublisherId(), "output.agora.publisher_id", maxRoomName)
	}
}

// livekit asks for the credentials without which the backend refuses the
// session (docs/protocol.md, section 7).
func (p *problems) livekit(l *jobpb.LiveKitOutput) {
	if l.GetUrl() == "" {
		p.add("output.livekit.url", "is required")
	} else {
		p.url(l.GetUrl(), "output.livekit.url", "wss", "ws", "https", "http")
	}
	p.required(l.GetRoomName(), "output.livekit.room_name", maxRoomName)
	p.required(l.GetApiToken(), "output.livekit.api_token", maxToken)
	p.short(l.GetPublisherId(), "output.livekit.publisher_id", maxRoomName)
	if l.GetIdleTimeout() < 0 {
		p.add("output.livekit.idle_timeout", "want seconds, or 0 for the backend's default, got %d", l.GetIdleTimeout())
	}
	p.params(l.GetExtraAttributes(), "output.livekit.extra_attributes")
}

func (p *problems) required(value, path string, most int) {
	if value == "" {
		p.add(path, "is required")
	}
	p.short(value, path, most)
}

// short checks a text's length. It never quotes the value, which may be a token.
func (p *problems) short(value, path string, most int) {
	switch {
	case len(value) > most:
		p.add(path, "at most %d bytes, got %d", most, len(value))
	case strings.ContainsFunc(value, unicode.IsControl):
		p.add(path, "no control characters; is there a line break at its end?")
	}
}

func (p *problems) bounds(job *jobpb.Job) {
	if job.GetMaxAttempts() < 0 {
		p.add("max_attempts", "want 1 or more, or 0 for the worker's default, got %d", job.GetMaxAttempts())
	}
	p.oneOf(job.GetOnRedelivery(), "on_redelivery", OnRedeliveryResume, OnRedeliveryRestart, OnRedeliveryGiveUp)
	switch d := job.GetDeadline(); {
	case d == nil:
	case d.CheckValid() != nil:
		p.add("deadline", wantYears)
	case d.AsTime().Year() < 2:
		p.add("deadline", "year 1 is how a time that was never set is written, got %s; set it or leave it out", d.AsTime().Format(time.RFC3339))
	}
	p.params(job.GetExtraParams(), "extra_params")
	p.labels(job.GetLabels())
}

func (p *problems) params(params map[string]string, path string) {
	if len(params) == 0 {
		return
	}
	if len(params) > maxParams {
		p.add(path, "at most %d, got %d", maxParams, len(params))
		return
	}
	for _, key := range slices.Sorted(maps.Keys(params)) {
		if key == "" || len(key) > maxParamKey || len(params[key]) > maxParamValue {
			p.add(path, "want keys of 1 to %d bytes and values of at most %d, got %s with %d bytes",
				maxParamKey, maxParamValue, quote(key), len(params[key]))
		}
	}
}

func (p *problems) labels(labels map[string]string) {
	if len(labels) == 0 {
		return
	}
	if len(labels) > maxLabels {
		p.add("labels", "at most %d, got %d", maxLabels, len(labels))
		return
	}
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		value := labels[key]
		switch {
		case key == "":
			p.add("labels", "a label needs a name")
		case len(key) > maxLabel:
			p.add("labels", "names are at most %d bytes, got %s with %d", maxLabel, quote(key), len(key))
		case len(value) > maxLabel:
			p.add("labels."+errors.Cut(key, 64), "at most %d bytes, got %d", maxLabel, len(value))
		case !utf8.ValidString(key) || !utf8.ValidString(value):
			// Decoded jobs are always UTF-8; jobs built in Go may not be.
			p.add("labels", "%s is not UTF-8", quote(key))
		}
	}
}
