package ui

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"avatarworker/internal/dlq"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobspec"
)

// lettersData is a list of dead letters.
type lettersData struct {
	Filter letterFilter
	Rows   []dlq.Entry
	More   bool
	Capped bool
	First  int
	Counts []dlq.Count
}

func (s *Server) letters(q *request) {
	filter, query := parseLetters(q.r.URL.Query(), q.view.Now)
	q.view.Title, q.view.Section, q.view.Live = "Dead letters", "letters", true
	if len(filter.Problems) > 0 {
		q.view.Data = lettersData{Filter: filter}
		q.render(http.StatusBadRequest, "letters")
		return
	}
	from := (filter.Page - 1) * pageSize
	list, more, err := s.o.Reader.Letters(q.ctx, query, from+pageSize)
	if err != nil {
		q.unreadable(err)
		return
	}
	d := lettersData{Filter: filter, More: more, First: from + 1}
	if from < len(list) {
		d.Rows = list[from:]
	}
	if d.More && from+pageSize >= maxRows {
		d.More, d.Capped = false, true
	}
	if f, err := s.o.Reader.Fleet(q.ctx); err == nil {
		d.Counts = f.DeadLetters
	}
	q.view.Data = d
	q.render(http.StatusOK, "letters")
}

// letterData is one dead letter, with the form that corrects it.
type letterData struct {
	Letter  dlq.Masked
	Body    string // of the job, as it is shown
	Edit    string // of the job, as it is edited; "": it can't be
	Error   string // the error event
	Headers []header
	Paths   []string // of the job's fields
	Sets    []setting
	Ignore  bool
	Problem string // what is wrong with the correction
	Gone    bool
	Suggest string // the field that this code is about
}

type header struct{ Name, Value string }

// setting is one field of the correction's form.
type setting struct{ Path, Value string }

func (s *Server) letter(q *request) {
	seq, err := strconv.ParseUint(q.r.PathValue("seq"), 10, 64)
	if err != nil || seq == 0 {
		q.fail(http.StatusNotFound, "There is no such dead letter.", "The page of dead letters lists them.")
		return
	}
	l, err := s.o.Reader.Letter(q.ctx, seq)
	q.view.Section = "letters"
	switch {
	case errors.Is(err, dlq.ErrNoLetter):
		q.fail(http.StatusNotFound, fmt.Sprintf("Dead letter %d is gone.", seq), "It was replayed or removed, or it aged out. The page of dead letters lists those there are.")
		return
	case err != nil:
		q.unreadable(err)
		return
	}
	q.showLetter(http.StatusOK, newLetterData(l))
}

// settingRows is how many fields the correction's form has.
const settingRows = 3

func newLetterData(l dlq.Letter) letterData {
	d := letterData{Letter: l.Masked(), Suggest: suggested(l.Code)}
	d.Body, d.Error = pretty(d.Letter.Body), pretty(d.Letter.Error)
	if len(d.Letter.Error) == 0 {
		d.Error = ""
	}
	if edit, err := dlq.EditJSON(l); err == nil {
		d.Edit = string(edit)
		d.Paths = paths(edit)
	}
	for _, name := range slices.Sorted(maps.Keys(d.Letter.Headers)) {
		d.Headers = append(d.Headers, header{name, strings.Join(d.Letter.Headers[name], ", ")})
	}
	d.Sets = make([]setting, settingRows)
	d.Sets[0].Path = d.Suggest
	return d
}

// suggested is the field of a job that failures with a code are mostly about.
func suggested(code errors.Code) string {
	switch code {
	case errors.CodeAvatarNotFound:
		return "avatar_id"
	case errors.CodeAppIDUnrecognized, errors.CodeAppIDMismatch:
		return "app_id"
	case errors.CodeAudioUnavailable:
		return "audio.url"
	case errors.CodeUnsupportedSampleRate:
		return "audio.sample_rate"
	default:
		return ""
	}
}

// maxPaths bounds the fields that are suggested.
const maxPaths = 100

// paths are the fields of a job, as a correction names them.
func paths(job []byte) []string {
	var v any
	if json.Unmarshal(job, &v) != nil {
		return nil
	}
	var list []string
	var walk func(prefix string, v any)
	walk = func(prefix string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for _, name := range slices.Sorted(maps.Keys(v)) {
				path := strings.ReplaceAll(name, ".", `\.`)
				if prefix != "" {
					path = prefix + "." + path
				}
				walk(path, v[name])
			}
		case []any:
			for i, entry := range v {
				walk(prefix+"."+strconv.Itoa(i), entry)
			}
		default:
			if len(list) < maxPaths {
				list = append(list, prefix)
			}
		}
	}
	walk("", v)
	return list
}

func (q *request) showLetter(code int, d letterData) {
	q.view.Title = fmt.Sprintf("Dead letter %d", d.Letter.Seq)
	q.view.Section, q.view.Data = "letters", d
	if q.r.Method != http.MethodGet { // the form is where it came from
		q.view.Path = fmt.Sprintf("/letters/%d", d.Letter.Seq)
	}
	q.render(code, "letter")
}

// correction is how the jobs of dead letters are corrected, as a form says.
type correction struct {
	Sets   []setting
	Body   string
	Ignore bool // replay also what is past its deadline
}

// Given reports whether anything is corrected.
func (c correction) Given() bool { return len(c.Sets) > 0 || c.Body != "" }

func readCorrection(form url.Values) correction {
	c := correction{Ignore: form.Get("ignore_deadline") != ""}
	names, texts := form["path"], form["value"]
	for i, path := range names {
		// A field that is suggested may be left empty; null removes one.
		if path = strings.TrimSpace(path); path == "" || i >= len(texts) || texts[i] == "" || i >= maxValues {
			continue
		}
		c.Sets = append(c.Sets, setting{path, texts[i]})
	}
	if form.Get("edit") != "" {
		// A browser writes each line end of a form as CR LF.
		c.Body = strings.ReplaceAll(form.Get("body"), "\r\n", "\n")
	}
	return c
}

// options are those of a replay. The error says what is wrong with the correction.
func (c correction) options(dryRun bool) (dlq.ReplayOptions, error) {
	o := dlq.ReplayOptions{IgnoreDeadline: c.Ignore, DryRun: dryRun}
	if c.Body != "" {
		if len(c.Sets) > 0 {
			return o, errors.New("either set fields, or edit the whole job: not both")
		}
		o.Correct = func(l dlq.Letter) ([]byte, error) { return dlq.Unmask(l, []byte(c.Body)) }
		return o, nil
	}
	if len(c.Sets) == 0 {
		return o, nil
	}
	var settings []dlq.Setting
	for _, set := range c.Sets {
		s, err := dlq.ParseSetting(set.Path + "=" + set.Value)
		if err != nil {
			return o, err
		}
		settings = append(settings, s)
	}
	o.Correct = func(l dlq.Letter) ([]byte, error) {
		body, err := dlq.BodyJSON(l)
		if err != nil {
			return nil, err
		}
		return dlq.Apply(body, settings)
	}
	return o, nil
}

// previewRow is what a replay would do with one letter.
type previewRow struct {
	Seq           uint64
	JobID         string
	Run           int
	Code          errors.Code
	Status        dlq.Status
	Error         string
	Before, After string // of the job, where it is corrected
	Changes       []change
}

// change is one field that a correction changes.
type change struct{ Path, Before, After string }

// changesOf are the fields in which two jobs differ, with secrets hidden.
func changesOf(before, after []byte) []change {
	flat := func(data []byte) map[string]string {
		var v any
		m := make(map[string]string)
		if json.Unmarshal(dlq.MaskJSON(data), &v) != nil {
			return m
		}
		var walk func(path string, v any)
		walk = func(path string, v any) {
			switch v := v.(type) {
			case map[string]any:
				for name, value := range v {
					walk(strings.TrimPrefix(path+"."+name, "."), value)
				}
			case []any:
				for i, value := range v {
					walk(path+"."+strconv.Itoa(i), value)
				}
			default:
				text, err := json.Marshal(v)
				if err == nil {
					m[path] = string(text)
				}
			}
		}
		walk("", v)
		return m
	}
	a, b := flat(before), flat(after)
	names := maps.Clone(a)
	maps.Copy(names, b)
	var list []change
	for _, path := range slices.Sorted(maps.Keys(names)) {
		if a[path] != b[path] && len(list) < maxPaths {
			list = append(list, change{path, a[path], b[path]})
		}
	}
	return list
}

// previewData is what a replay would do.
type previewData struct {
	Rows       []previewRow
	Correction correction
	Ready      int // that would be replayed
	Back       string
	More       bool // the filter chooses more than are replayed at a time
}

// validJob reports whether a letter names a job whose page there may be.
func validJob(id string) bool { return jobspec.ValidID(id) }
