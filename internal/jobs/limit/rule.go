package limit

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// labels begins the key of a rule that counts by a label.
const labels = "label."

// Rule limits the sessions of all jobs that have the same value under Key.
type Rule struct {
	Key string // one of Keys, or label.<name>
	Max int
}

// Check returns an error if no job has a value under the rule's key: the rule
// would limit nothing.
func (r Rule) Check() error {
	if _, ok := (Job{}).Value(r.Key); !ok {
		return fmt.Errorf("session limit by %q: give one of %s, or label.<name>", r.Key, strings.Join(Keys(), ", "))
	}
	return nil
}

// Job is the part of a job that limits depend on.
type Job struct {
	ID, App, Avatar, Region, Queue string
	Labels                         map[string]string
}

// fields are what a rule may count by, besides labels.
var fields = map[string]func(Job) string{
	"app_id":    func(j Job) string { return j.App },
	"avatar_id": func(j Job) string { return j.Avatar },
	"region":    func(j Job) string { return j.Region },
	"queue":     func(j Job) string { return j.Queue },
}

// Keys lists what a rule may count by, besides labels.
func Keys() []string { return slices.Sorted(maps.Keys(fields)) }

// Value returns what the job has under the key of a rule; "" if it has no such
// label. It returns false for a key that no rule may have.
func (j Job) Value(key string) (value string, ok bool) {
	if name, isLabel := strings.CutPrefix(key, labels); isLabel {
		return j.Labels[name], name != ""
	}
	field, ok := fields[key]
	if !ok {
		return "", false
	}
	return field(j), true
}
