package config

import (
	"fmt"
	"math"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"time"

	"avatarworker/internal/errors"
)

// Secret is a text that is never shown: every way of printing it gives
// "[hidden]". Reveal gives the text.
type Secret string

const hidden = "[hidden]"

// Reveal returns the secret itself, for the one place that sends it.
func (s Secret) Reveal() string { return string(s) }

// String is "[hidden]", or "" for no secret.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return hidden
}

// GoString hides the secret from %#v.
func (s Secret) GoString() string { return strconv.Quote(s.String()) }

// MarshalText hides the secret from JSON and logs.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Size is a number of bytes.
type Size int64

var sizeUnits = []struct {
	suffix string
	bytes  Size
}{{"TiB", gib << 10}, {"GiB", gib}, {"MiB", mib}, {"KiB", kib}}

// String is the size in the largest unit that divides it.
func (s Size) String() string {
	for _, u := range sizeUnits {
		if s != 0 && s%u.bytes == 0 {
			return strconv.FormatInt(int64(s/u.bytes), 10) + u.suffix
		}
	}
	return strconv.FormatInt(int64(s), 10)
}

func parseSize(text string) (Size, error) {
	digits, unit := text, Size(1)
	for _, u := range sizeUnits {
		if rest, ok := strings.CutSuffix(text, u.suffix); ok {
			digits, unit = strings.TrimSpace(rest), u.bytes
			break
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err == nil && (n > math.MaxInt64/int64(unit) || n < math.MinInt64/int64(unit)) {
		err = strconv.ErrRange
	}
	if err != nil {
		return 0, badNumber(err, quote(text), "is not a size: write bytes, or a whole number with KiB, MiB, GiB or TiB")
	}
	return Size(n) * unit, nil
}

// Queue is one queue that a worker serves. Weight is its share of the starts
// compared with the other queues.
type Queue struct {
	Name   string `yaml:"name"`
	Weight int    `yaml:"weight"`
}

// String is name or name:weight, as the environment gives it.
func (q Queue) String() string {
	if q.Weight == 1 {
		return q.Name
	}
	return fmt.Sprintf("%s:%d", q.Name, q.Weight)
}

func parseQueue(text string) (Queue, error) {
	name, weight, found := strings.Cut(text, ":")
	q := Queue{Name: strings.TrimSpace(name), Weight: 1}
	if !found {
		return q, nil
	}
	n, err := strconv.Atoi(strings.TrimSpace(weight))
	if err != nil {
		return q, badNumber(err, quote(text), "is not a queue: write name or name:weight, the weight a whole number")
	}
	q.Weight = n
	return q, nil
}

// String is key=credits/per, or key=credits/per@warn, as the environment gives it.
func (b Budget) String() string {
	text := fmt.Sprintf("%s=%d/%s", b.Key, b.Credits, b.Per)
	if b.Warn != defaultWarn {
		text += "@" + strconv.FormatFloat(b.Warn, 'g', -1, 64)
	}
	return text
}

// defaultWarn is the share of a budget at which an alert is published.
const defaultWarn = 0.8

// MaxBudget is the largest budget, in credits.
const MaxBudget = 1_000_000_000

func parseBudget(text string) (Budget, error) {
	shown := quote(text)
	if !strings.Contains(text, "://") {
		shown = quoteCut(text) // what is before its @ is not a login
	}
	const want = "is not a budget: write key=credits/per, as in app_id=1000/day, or key=credits/per@warn"
	body, warn, hasWarn := strings.Cut(text, "@")
	key, amount, ok := strings.Cut(body, "=")
	credits, per, hasPer := strings.Cut(amount, "/")
	n, err := strconv.Atoi(credits)
	if !ok || !hasPer || err != nil {
		return Budget{}, badNumber(err, shown, want)
	}
	b := Budget{Key: key, Credits: n, Per: per, Warn: defaultWarn}
	if hasWarn {
		if b.Warn, err = strconv.ParseFloat(warn, 64); err != nil {
			return Budget{}, badNumber(err, shown, want)
		}
	}
	return b, nil
}

// SessionLimit bounds the sessions that the whole fleet holds at once of all
// jobs with the same value under Key.
type SessionLimit struct {
	Key string `yaml:"key"` // one of LimitKeys, or label.<name>
	Max int    `yaml:"max"`
}

// String is key:max, as the environment gives it.
func (l SessionLimit) String() string { return fmt.Sprintf("%s:%d", l.Key, l.Max) }

// parseSessionLimit takes what follows the last colon for the number: the name of
// a label may have colons.
func parseSessionLimit(text string) (SessionLimit, error) {
	colon := strings.LastIndexByte(text, ':')
	most, err := strconv.Atoi(strings.TrimSpace(text[colon+1:]))
	if colon < 0 || err != nil {
		return SessionLimit{}, badNumber(err, quote(text), "is not a session limit: write key:max, the maximum a whole number, such as label.room:1")
	}
	return SessionLimit{Key: strings.TrimSpace(text[:colon]), Max: most}, nil
}

// parseText turns text into a value of type t: one of the types that a key of
// Config has.
func parseText(t reflect.Type, text string) (any, error) {
	switch reflect.Zero(t).Interface().(type) {
	case string:
		return text, nil
	case Secret:
		return Secret(text), nil
	case bool:
		return parseBool(text)
	case *bool:
		b, err := parseBool(text)
		return &b, err
	case int:
		n, err := strconv.Atoi(text)
		if err != nil {
			return nil, badNumber(err, quote(text), "is not a whole number")
		}
		return n, nil
	case float64:
		f, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return nil, badNumber(err, quote(text), "is not a number")
		}
		return f, nil
	case time.Duration:
		d, err := time.ParseDuration(text)
		if err != nil {
			return nil, fmt.Errorf("%s is not a duration: write a number with its unit, such as 100ms, 30s, 5m or 168h", quote(text))
		}
		return d, nil
	case Size:
		return parseSize(text)
	case Queue:
		return parseQueue(text)
	case SessionLimit:
		return parseSessionLimit(text)
	case []string:
		return splitList(text, func(s string) (string, error) { return s, nil })
	case Budget:
		return parseBudget(text)
	case []Budget:
		return splitList(text, parseBudget)
	case []Queue:
		return splitList(text, parseQueue)
	case []SessionLimit:
		return splitList(text, parseSessionLimit)
	}
	return nil, fmt.Errorf("a value of type %s can't be read from text", t)
}

// badNumber is the error about text with a number that err says could not be read.
// want says what the text is not, and what to write.
func badNumber(err error, text, want string) error {
	if errors.Is(err, strconv.ErrRange) {
		return fmt.Errorf("%s: the number is out of range", text)
	}
	return fmt.Errorf("%s %s", text, want)
}

func parseBool(text string) (bool, error) {
	switch text {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, fmt.Errorf("%s is neither true nor false", quote(text))
}

func splitList[T any](text string, parse func(string) (T, error)) ([]T, error) {
	var list []T
	for item := range strings.SplitSeq(text, ",") {
		item = strings.TrimSpace(item)
		if item == "" {
			return nil, fmt.Errorf("%s has an empty entry: separate entries by single commas", quote(text))
		}
		v, err := parse(item)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	return list, nil
}

// formatDuration is Duration.String without the zero units: 168h, not 168h0m0s.
func formatDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

var (
	userInfo       = regexp.MustCompile(`(?s)://.*@`)
	schemelessInfo = regexp.MustCompile(`(?s)^.*@`)
	nextURL        = regexp.MustCompile(`,\s*[a-z]+://`) // in a list; other commas may be a password's
)

// redact hides what a URL, or each of a list, may carry of secrets: user,
// password, query.
func redact(text string) string {
	var shown strings.Builder
	from := 0
	for _, next := range nextURL.FindAllStringIndex(text, -1) {
		shown.WriteString(redactURL(text[from:next[0]]))
		shown.WriteByte(',')
		from = next[0] + 1
	}
	shown.WriteString(redactURL(text[from:]))
	return shown.String()
}

func redactURL(text string) string {
	if !strings.Contains(text, "://") && !strings.Contains(text, "@") {
		return text
	}
	text = userInfo.ReplaceAllString(text, "://hidden@")
	if !strings.Contains(text, "://") {
		text = schemelessInfo.ReplaceAllString(text, "hidden@")
	}
	if before, _, has := strings.Cut(text, "?"); has {
		return before + "?hidden"
	}
	return text
}

// quote quotes a value for a message: redacted, and cut where it is long.
func quote(text string) string { return quoteCut(redact(text)) }

func quoteCut(text string) string {
	const most = 60
	if runes := []rune(text); len(runes) > most {
		text = string(runes[:most]) + "…"
	}
	return strconv.Quote(text)
}
