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
	switch {
	case errors.Is(err, errNoJob): // there is nothing that --no-check could publish
		return nil, fmt.Errorf("%s %w", name, err)
	case err != nil:
		return nil, unpublished(err)
	}
	return parts, nil
}

// errNoJob is the error of a file without anything in it.
var errNoJob = errors.New("holds no job: want a JSON object. Nothing was published")

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

// maxFaults bounds how many wrong jobs of a file are reported.
const maxFaults = 100

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
	lines, counted := 0, int64(0) // before the part, and up to where
	for dec.More() {
		from := dec.InputOffset()
		from += int64(len(data[from:]) - len(bytes.TrimLeft(data[from:], between)))
		var value json.RawMessage
		decodeErr := dec.Decode(&value)
		end := int64(len(data))
		if decodeErr == nil {
			end = dec.InputOffset()
		}
		lines += bytes.Count(data[counted:from], []byte("\n"))
		counted = from
		part := jobPart{where: fmt.Sprintf("%s, job %d (line %d)", name, len(parts)+1, 1+lines)}
		if decodeErr != nil && len(parts) == 0 && !list {
			part.where = name // there may be no second one
		}
		if jobspec.CheckJSON(data[from:end]) != nil {
			faults = append(faults, part.located(errors.New(jobspec.CheckJSON(placed(data, from, end, lines)).Message)))
		} else if err := errors.Join(decodeErr, json.Unmarshal(value, &part.fields)); err != nil {
			faults = append(faults, part.located(err))
		}
		if decodeErr != nil || len(faults) == maxFaults {
			return nil, errors.Join(faults...) // the jobs after this can't be distinguished, or it is enough
		}
		parts = append(parts, part)
	}
	if rest := dec.InputOffset(); !list && len(bytes.TrimSpace(data[rest:])) > 0 { // a bracket too many
		faults = append(faults, notAJob(name, jobspec.CheckJSON(placed(data, rest, int64(len(data)), bytes.Count(data[:rest], []byte("\n"))))))
	}
	switch {
	case len(faults) > 0:
		return nil, errors.Join(faults...)
	case len(parts) == 0:
		return nil, errNoJob
	}
	return parts, nil
}

// placed returns a part of data after as many empty lines and spaces as stand before it,
// so that lines and columns in error messages are those of the whole file.
func placed(data []byte, from, end int64, lines int) []byte {
	column := int(from) - (bytes.LastIndexByte(data[:from], '\n') + 1)
	out := make([]byte, 0, lines+column+int(end-from))
	out = append(out, bytes.Repeat([]byte("\n"), lines)...)
	out = append(out, bytes.Repeat([]byte(" "), column)...)
	return append(out, data[from:end]...)
}
