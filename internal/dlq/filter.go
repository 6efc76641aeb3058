package dlq

import (
	"slices"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/topology"
)

// Filter chooses letters. An empty list chooses any; several conditions must
// all be met.
type Filter struct {
	Codes   []errors.Code
	Classes []errors.Class
	Apps    []string
	Jobs    []string
	Before  time.Time // failed before; zero: any time
	After   time.Time // failed at or after; zero: any time
	Newest  bool      // newest first; otherwise oldest first
}

// subjects is the part of the filter that the server does.
func (f Filter) subjects(names topology.Names) []string {
	if len(f.Codes) == 0 && len(f.Classes) == 0 {
		return nil
	}
	classes, codes := f.Classes, f.Codes
	if len(classes) == 0 {
		classes = []errors.Class{""}
	}
	if len(codes) == 0 {
		codes = []errors.Code{""}
	}
	var subjects []string
	for _, class := range classes {
		for _, code := range codes {
			subjects = append(subjects, names.DLQFilter(string(class), string(code)))
		}
	}
	slices.Sort(subjects)
	return slices.Compact(subjects)
}

// keeps is the part that is done here.
func (f Filter) keeps(e Entry) bool {
	return (len(f.Apps) == 0 || slices.Contains(f.Apps, e.AppID)) &&
		(len(f.Jobs) == 0 || slices.Contains(f.Jobs, e.JobID)) &&
		(f.Before.IsZero() || e.FailedAt.Before(f.Before)) &&
		(f.After.IsZero() || !e.FailedAt.Before(f.After))
}
