package jobspec

import (
	"runtime"
	"strings"
	"testing"
)

// allocated is what f allocates, in bytes: a measure of its work that a busy
// machine does not change.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

func TestWorkForABrokenJobGrowsWithItsLengthOnly(t *testing.T) {
	const size = 900 << 10 // about what a message may have
	fill := func(text string) string { return strings.Repeat(text, size/len(text)) }
	nest := func(open, end string) string {
		return strings.Repeat(open, 9000) + `"` + fill("x") + `"` + strings.Repeat(end, 9000)
	}
	job := func(fields string) string { return `{"avatar_id":"a","audio":{"object":"o"},` + fields + `}` }
	for name, body := range map[string]string{
		"nested arrays in an unknown field":    job(`"x":` + nest("[", "]")),
		"nested objects in a known field":      job(`"labels":` + nest(`{"a":`, "}")),
		"deeper than JSON may be":              fill("["),
		"unknown fields":                       "{" + fill(`"unknown":1,`) + `"x":1}`,
		"a field again and again":              "{" + fill(`"avatar_id":"a",`) + `"x":1}`,
		"a name as long as the job":            `{"` + fill("avatar_id") + `":1}`,
		"a value as long as the job":           job(`"max_attempts":"` + fill("9") + `"`),
		"a number as long as the job":          job(`"max_attempts":` + fill("9")),
		"labels of the wrong kind":             job(`"labels":{` + fill(`"a":1,`) + `"b":1}`),
		"as many labels as fit":                job(`"labels":{` + labels(size) + `}`),
		"utterances of the wrong kind":         `{"avatar_id":"a","utterances":[` + fill(`1,`) + `1]}`,
		"as many utterances as fit":            `{"avatar_id":"a","utterances":[` + fill(`{},`) + `{}]}`,
		"escapes":                              job(`"region":"` + fill(`\u0041`) + `"`),
		"half pairs":                           job(`"region":"` + fill(`\ud800`) + `"`),
		"base64 that is not":                   job(`"audio":{"inline":"` + fill("A") + `!"}`),
		"line breaks before the fault":         fill("\n") + "}",
		"deadlines":                            job(`"labels":{` + fill(`"deadline":"2026-01-01T00:00:00Z",`) + `"a":"b"},"deadline":"2026-01-01t00:00:00Z"`),
		"a deadline with a fraction that long": job(`"deadline":"2026-01-01T00:00:00.` + fill("0") + `Z"`),
	} {
		used := allocated(func() {
			if _, err := Decode(nil, []byte(body)); err == nil || len(err.Message) > 4096 {
				t.Errorf("%s: %.200v", name, err)
			}
		})
		if most := uint64(150 * len(body)); used > most {
			t.Errorf("%s: %d bytes were allocated for %d", name, used, len(body))
		}
	}
}

// labels are different ones, size bytes of them.
func labels(size int) string {
	var b strings.Builder
	for n := 0; b.Len() < size; n++ {
		b.WriteString(`"` + strings.Repeat("a", n%200) + string(rune('a'+n%26)) + string(rune('a'+n/26%26)) + `":"x",`)
	}
	return b.String() + `"z":"z"`
}
