package header

import (
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
)

func TestAFlagIsReadInEverySpellingAndNothingElseIsASilentNo(t *testing.T) {
	for _, name := range []string{"Avatar-End", "avatar-end", "AVATAR-END", "avatar-End"} {
		for want, values := range map[bool][]string{
			true:  {"true", "True", "TRUE", "1", "yes", "Yes", "on", "ON", "t", " true "},
			false: {"false", "False", "FALSE", "0", "no", "NO", "off", "f"},
		} {
			for _, value := range values {
				if got, err := Flag(nats.Header{name: {value}}, "Avatar-End"); err != nil || got != want {
					t.Errorf("%s: %q: got %v, %v", name, value, got, err)
				}
			}
		}
		for _, value := range []string{"", "2", "maybe", "truee", "null", "y e s", strings.Repeat("x", 1000)} {
			_, err := Flag(nats.Header{name: {value}}, "Avatar-End")
			if err == nil || !strings.Contains(err.Error(), "header Avatar-End: want true or false") || len(err.Error()) > 120 {
				t.Errorf("%s: %.50q: got %v", name, value, err)
			}
		}
	}
	for _, h := range []nats.Header{nil, {}, {"Avatar-End": nil}, {"Avatar-Ended": {"true"}}} {
		if on, err := Flag(h, "Avatar-End"); on || err != nil {
			t.Errorf("%v: got %v, %v", h, on, err)
		}
	}
}

func TestAFlagThatIsGivenAsTrueAndAsFalseIsAnError(t *testing.T) {
	for _, h := range []nats.Header{
		{"Avatar-End": {"false", "true"}},
		{"Avatar-End": {"true"}, "avatar-end": {"0"}},
	} {
		if _, err := Flag(h, "Avatar-End"); err == nil || !strings.Contains(err.Error(), "header Avatar-End: given as true and as false") {
			t.Errorf("%v: got %v", h, err)
		}
	}
	if on, err := Flag(nats.Header{"Avatar-End": {"true", "1"}, "AVATAR-END": {"yes"}}, "Avatar-End"); !on || err != nil {
		t.Errorf("got %v, %v", on, err)
	}
}

func TestTheExactNameWinsAndElseTheFirstByName(t *testing.T) {
	h := nats.Header{"avatar-run": {"3"}, "Avatar-Run": {"2"}, "AVATAR-RUN": {"4"}}
	if got := Value(h, "Avatar-Run"); got != "2" {
		t.Errorf("got %s", got)
	}
	delete(h, "Avatar-Run")
	if got := Value(h, "Avatar-Run"); got != "4" {
		t.Errorf("got %s", got)
	}
}
