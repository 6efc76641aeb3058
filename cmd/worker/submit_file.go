package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"unicode/utf8"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobspec"
)

// jobPart is one job of a FILE.
type jobPart struct {
	where  string                     // "" where it is the only one
	fields map[string]json.RawMessage // nil: it is published as it is
	raw    []byte
}

// located says of which job an error is.
func (p jobPart) located(err error) error {
	if p.where == "" {
		return err
	}
	return fmt.Errorf("%s: %w", p.where, err)
}

// readJobs reads FILE: a job, an array of jobs, or jobs one after the other as
// in NDJSON. With --no-check a FILE that is not one JSON object is published
// byte for byte.
func (c *cli) readJobs(s *submission) ([]jobPart, error) {
	in, name, err := c.input([]string{s.file})
	if err != nil {
		return nil, err
	}
	defer in.Close() // it was only read
	data, err := io.ReadAll(in)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	var one map[string]json.RawMessage
	isOne := json.Unmarshal(data, &one) == nil && one != nil
	var parts []jobPart
	switch {
	case isOne && s.noCheck:
		return []jobPart{{fields: one}}, nil
	case s.noCheck:
		return []jobPart{{raw: data}}, nil
	case isOne:
		parts, err = []jobPart{{fields: one}}, notAJob(name, jobspec.CheckJSON(data))
	default:
		parts, err = splitJobs(name, data)
	}
	if err != nil {
		return nil, unpublished(err)
	}
	return parts, nil
}

// notAJob returns nil if err is nil.
func notAJob(name string, err *errors.Error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %s", name, err.Message)
}

// looksLikeSpeech names what a file seems to be that is not text, or returns "".
func looksLikeSpeech(data []byte) string {
	kind := http.DetectContentType(data)
	major, _, _ := strings.Cut(kind, "/")
	switch {
	case major == "audio" || major == "video" || kind == "application/ogg":
		return "speech (" + kind + ")"
	case !utf8.Valid(data) && !bytes.HasPrefix(bytes.TrimSpace(data), []byte("{")):
		return "binary data"
	}
	return ""
}

// splitJobs takes a file of several jobs apart. The error says which is wrong,
// with line and column where it is not JSON.
func splitJobs(name string, data []byte) ([]jobPart, error) {
	if bytes.HasPrefix(data, []byte("\xff\xfe")) || bytes.HasPrefix(data, []byte("\xfe\xff")) {
		return nil, fmt.Errorf("%s is UTF-16 text: save it as UTF-8 without a byte order mark", name)
	}
	if speech := looksLikeSpeech(data); speech != "" {
		return nil, fmt.Errorf("%s is %s, not a job: did you mean --audio?", name, speech)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	between := " \t\r\n"
	list := bytes.HasPrefix(bytes.TrimSpace(data), []byte("["))
	if list {
		between += ","
		if !json.Valid(data) {
			return nil, notAJob(name, jobspec.CheckJSON(data))
		}
		if _, err := dec.Token(); err != nil { // the bracket
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	var parts []jobPart
	var faults []error
	for dec.More() {
		from := dec.InputOffset()
		from += int64(len(data[from:]) - len(bytes.TrimLeft(data[from:], between)))
		var value json.RawMessage
		decodeErr := dec.Decode(&value)
		end := int64(len(data))
		if decodeErr == nil {
			end = dec.InputOffset()
		}
		part := jobPart{where: fmt.Sprintf("%s, job %d (line %d)", name, len(parts)+1, 1+bytes.Count(data[:from], []byte("\n")))}
		if decodeErr != nil && len(parts) == 0 && !list {
			part.where = name // there may be no second one
		}
		if wrong := jobspec.CheckJSON(blanked(data[:end], from)); wrong != nil {
			faults = append(faults, part.located(errors.New(wrong.Message)))
		} else if err := errors.Join(decodeErr, json.Unmarshal(value, &part.fields)); err != nil {
			faults = append(faults, part.located(err))
		}
		if decodeErr != nil {
			return nil, errors.Join(faults...) // the jobs after this can't be distinguished
		}
		parts = append(parts, part)
	}
	if rest := dec.InputOffset(); !list && len(bytes.TrimSpace(data[rest:])) > 0 { // a bracket too many
		faults = append(faults, notAJob(name, jobspec.CheckJSON(blanked(data, rest))))
	}
	switch {
	case len(faults) > 0:
		return nil, errors.Join(faults...)
	case len(parts) == 0:
		return nil, fmt.Errorf("%s holds no job: want a JSON object", name)
	}
	return parts, nil
}

// blanked is data with all before from made blank, so that what is said of lines
// and columns is true of the whole.
func blanked(data []byte, from int64) []byte {
	out := bytes.Clone(data)
	for i := range out[:from] {
		if out[i] != '\n' {
			out[i] = ' '
		}
	}
	return out
}
