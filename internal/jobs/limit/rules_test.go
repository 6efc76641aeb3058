package limit

import (
	"regexp"
	"testing"
)

// bucketKey is what a key of a bucket may be made of.
var bucketKey = regexp.MustCompile(`^[-/_=.a-zA-Z0-9]+$`)

// Names and values of labels are any text: their keys have to be keys of a
// bucket, and different for different texts.
func TestEveryLabelHasAKeyOfItsOwn(t *testing.T) {
	t.Parallel()
	labels := []string{"room", "room.a", "room/a", "room a", "room=20a", "räum", "a*", "a>", "label.x", "app_id"}
	seen := make(map[string]string)
	for _, name := range labels {
		l := New(Options{Rules: []Rule{{Key: "label." + name, Max: 1}}})
		for _, value := range append(labels, "room/room") {
			names := l.Names(Job{Labels: map[string]string{name: value}})
			if len(names) != 1 {
				t.Fatalf("label %q=%q is under %v", name, value, names)
			}
			key := limitKey{names[0], 1}.key()
			if limit, n, ok := ParseKey(key); !bucketKey.MatchString(key) || !ok || limit != names[0] || n != 1 {
				t.Errorf("label %q=%q has the key %q, which is read as %s %d", name, value, key, limit, n)
			}
			if other := seen[key]; other != "" {
				t.Errorf("label %q=%q has the key of %s", name, value, other)
			}
			seen[key] = name + "=" + value
		}
	}
}

func TestAJobIsUnderTheLimitsOfWhatItSays(t *testing.T) {
	t.Parallel()
	l := New(Options{Apps: map[string]int{"a": 4}, Rules: []Rule{{Key: "app_id", Max: 2}, {Key: "queue", Max: 9}, {Key: "label.room", Max: 1}}})
	got := l.limitsOf(Job{App: "a", Queue: "vip", Labels: map[string]string{"tier": "gold"}})
	want := []jobLimit{{"app_id/a", 2}, {"queue/vip", 9}}
	if len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("got %v, want %v: the lower of two maxima, and no limit by a label that the job does not have", got, want)
	}
}
