package telemetry

import (
	"slices"
	"sync"

	"avatarworker/internal/errors"
)

// other stands for every value that a label does not know: a label whose
// values come from outside would grow without bound.
const other = "other"

func known(value string, values []string) string {
	if slices.Contains(values, value) {
		return value
	}
	return other
}

func codeLabel(code errors.Code) string {
	switch {
	case code == "":
		return "ok"
	case code.Known():
		return string(code)
	}
	return other
}

func classLabel(class errors.Class) string {
	switch class {
	case "":
		return "none"
	case errors.ClassTransient, errors.ClassServer, errors.ClassProtocol, errors.ClassUnknown, errors.ClassAuth,
		errors.ClassConfig, errors.ClassBilling, errors.ClassJob, errors.ClassInternal:
		return string(class)
	}
	return other
}

func phaseLabel(phase errors.Phase) string {
	switch {
	case phase == "":
		return "none"
	case slices.Contains(errors.Phases(), phase):
		return string(phase)
	}
	return other
}

// firstSeen admits the first so many values and no more: regions come from
// jobs and from the backend, without a list of them.
type firstSeen struct {
	mu     sync.Mutex
	most   int
	values map[string]bool
}

func newFirstSeen(most int) *firstSeen {
	return &firstSeen{most: most, values: map[string]bool{}}
}

func (f *firstSeen) label(value string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.values[value] {
		if len(f.values) >= f.most {
			return other
		}
		f.values[value] = true
	}
	return value
}
