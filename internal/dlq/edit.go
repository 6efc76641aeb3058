package dlq

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"unicode"

	"avatarworker/internal/errors"
)

// ErrHidden is in the chain of an error about an edited job in which a hidden value
// is where there was none.
var ErrHidden = errors.New("there is a hidden value where the job has none")

// EditJSON is the letter's job as indented JSON for a person to edit: secrets are
// hidden and inline speech is shortened. Unmask turns what was edited into the job.
func EditJSON(l Letter) ([]byte, error) {
	body, err := BodyJSON(l)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := json.Indent(&out, maskedBody(nil, body), "", "  "); err != nil {
		return nil, err
	}
	return escapeSteering(out.Bytes()), nil
}

// escapeSteering writes characters that change how a text is shown as \u escapes.
// In valid JSON they occur in strings only.
func escapeSteering(data []byte) []byte {
	var out bytes.Buffer
	for _, r := range string(data) {
		switch {
		case r == '\u2028', r == '\u2029', r == '\ufeff', r >= 0x7f && r <= 0x9f, unicode.Is(unicode.Bidi_Control, r):
			fmt.Fprintf(&out, `\u%04x`, r)
		default:
			out.WriteRune(r)
		}
	}
	return out.Bytes()
}

// Unmask puts the letter's own values back where the edited job still has what
// EditJSON showed in their place. A value that was moved is found by its text if it
// is the only one. An edited text that is not JSON is returned as it is: validating
// the job says what is wrong with it.
func Unmask(l Letter, edited []byte) ([]byte, error) {
	body, err := BodyJSON(l)
	if err != nil {
		return edited, nil // there was nothing to hide: the job was given whole
	}
	own, ownErr := decodeAny(body)
	shown, shownErr := decodeAny(maskedBody(nil, body))
	job, jobErr := decodeAny(edited)
	if ownErr != nil || shownErr != nil || jobErr != nil {
		return edited, nil
	}
	u := unmasker{moved: make(map[string][]string)}
	u.learn(own, shown)
	if len(u.moved) == 0 {
		return edited, nil
	}
	job = u.restore(job, own, shown, nil)
	if u.err != nil {
		return nil, u.err
	}
	if !u.changed {
		return edited, nil
	}
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(job); err != nil {
		return nil, err
	}
	return bytes.TrimSpace(out.Bytes()), nil
}

func decodeAny(data []byte) (v any, err error) {
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.UseNumber()
	if err = decoder.Decode(&v); err == nil && decoder.More() {
		err = errors.New("more than one value")
	}
	return v, err
}

// unmasker restores values. moved has, by the text that was shown, the values that
// it hides.
type unmasker struct {
	moved   map[string][]string
	changed bool
	err     error
}

func (u *unmasker) learn(own, shown any) {
	switch own := own.(type) {
	case map[string]any:
		shown, _ := shown.(map[string]any)
		for name, value := range own {
			u.learn(value, shown[name])
		}
	case []any:
		shown, _ := shown.([]any)
		for i, value := range own {
			if i < len(shown) {
				u.learn(value, shown[i])
			}
		}
	case string:
		if text, ok := shown.(string); ok && text != own {
			u.moved[text] = append(u.moved[text], own)
		}
	}
}

// restore returns the edited value with hidden values put back; own and shown are
// the values at the same place.
func (u *unmasker) restore(edited, own, shown any, path []string) any {
	switch edited := edited.(type) {
	case map[string]any:
		ownMap, _ := own.(map[string]any)
		shownMap, _ := shown.(map[string]any)
		for name, value := range edited {
			edited[name] = u.restore(value, ownMap[name], shownMap[name], append(path, name))
		}
	case []any:
		ownList, _ := own.([]any)
		shownList, _ := shown.([]any)
		for i, value := range edited {
			var o, s any
			if i < len(ownList) && i < len(shownList) {
				o, s = ownList[i], shownList[i]
			}
			edited[i] = u.restore(value, o, s, append(path, fmt.Sprint(i)))
		}
	case string:
		return u.text(edited, own, shown, path)
	}
	return edited
}

func (u *unmasker) text(edited string, own, shown any, path []string) string {
	values := u.moved[edited]
	if own, ok := own.(string); ok && shown == any(edited) && own != edited {
		u.changed = true
		return own
	}
	switch {
	case len(values) == 1:
		u.changed = true
		return values[0]
	case len(values) > 1 || edited == hidden:
		u.err = fmt.Errorf("%s is %q: %w: write the whole value", strings.Join(path, "."), edited, ErrHidden)
	}
	return edited
}
