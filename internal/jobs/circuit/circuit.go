// Package circuit keeps one circuit for each app and region, shared by the whole
// fleet. It opens when starting sessions of the app is pointless; the app's jobs
// then wait, and one job at a time is let through as a probe.
//
// A circuit is an entry in AVATAR_FLEET that workers change by compare-and-set
// and follow by a watch, so that checking a closed circuit costs nothing. The
// package owns these entries and must not know what a session is. All times in
// them are the server's. A probe belongs to its worker while that worker's lease
// is valid. docs/jobs.md says when circuits open and close.
package circuit

import (
	"slices"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/topology"
)

// States of a circuit.
const (
	Closed  = "closed"
	Open    = "open"
	Probing = "probing"
)

// Kinds of alerts, as in the subject and the ce-type of their events.
const (
	AlertOpened = "circuit_opened"
	AlertClosed = "circuit_closed"
)

const (
	// closedLife is how long a closed circuit is kept after its last change.
	closedLife = time.Hour
	// openLife is the same for an open circuit, which each probe writes again.
	openLife = 25 * time.Hour
	// goodSessions in a row reset the cooldown to Config.Cooldown.
	goodSessions = 10
	// maxWait bounds the wait before a held job tries again.
	maxWait = time.Minute
	// minWait keeps ten thousand held jobs from trying again all the time.
	minWait = 100 * time.Millisecond
	// maxYield bounds how long a job whose probe failed leaves the next probe to
	// other jobs.
	maxYield = 15 * time.Second
	// maxUnpublished bounds the alerts kept while the stream of events is away.
	maxUnpublished = 32
)

// Prefix begins the keys of circuits in AVATAR_FLEET.
const Prefix = "circuit."

// Config says when a circuit opens and for how long.
type Config struct {
	Failures    int           // in a row, over different jobs; those of a proxy over any
	Cooldown    time.Duration // before the first probe; doubles with each that fails
	MaxCooldown time.Duration // of doubling; below Cooldown it does not double
}

// longer returns the cooldown after a failed probe.
func (c Config) longer(cooldown time.Duration) time.Duration {
	return max(cooldown, min(2*cooldown, c.MaxCooldown))
}

// Circuit is the state of sessions of one app in one region.
type Circuit struct {
	App             string        `json:"app_id"`
	Region          string        `json:"region"` // empty where circuits are per app
	State           string        `json:"state"`
	Code            errors.Code   `json:"code,omitempty"`     // what opened it
	Failures        []string      `json:"failures,omitempty"` // jobs that failed in a row
	Cooldown        time.Duration `json:"cooldown_ns"`
	OpenedAt        time.Time     `json:"opened_at,omitzero"`
	RetryAt         time.Time     `json:"retry_at,omitzero"` // when a probe may start
	ProbeJob        string        `json:"probe_job,omitempty"`
	ProbeWorker     string        `json:"probe_worker,omitempty"` // the id of its lease
	Probes          int           `json:"probes,omitempty"`       // begun so far: names each of them
	LastProbe       string        `json:"last_probe,omitempty"`   // job whose probe did not close it
	WorkingSessions int           `json:"good,omitempty"`         // sessions since it closed
}

// Alert reports that a circuit opened or closed.
type Alert struct {
	Kind     string        `json:"kind"` // AlertOpened or AlertClosed
	App      string        `json:"-"`
	Region   string        `json:"-"`              // empty where circuits are per app
	Code     errors.Code   `json:"code,omitempty"` // what opened it
	OpenedAt time.Time     `json:"opened_at"`      // with Kind, App and Region names the alert
	At       time.Time     `json:"at"`
	Failures int           `json:"failures,omitempty"` // in a row, over different jobs
	Cooldown time.Duration `json:"cooldown_ns,omitempty"`
}

// entry is a circuit as it is stored in the bucket.
type entry struct {
	Circuit
	Unpublished []Alert `json:"untold,omitempty"` // oldest first

	revision uint64 // in the bucket; 0: not there
	// local: this worker alone has changed it, because the bucket could not be
	// written. base is the revision that it would have replaced.
	local bool
	base  uint64
}

func key(app, region string) string {
	return Prefix + topology.Token(app) + "." + topology.Token(region)
}

// clone returns a copy whose lists can be changed.
func (e entry) clone() entry {
	e.Failures, e.Unpublished = slices.Clone(e.Failures), slices.Clone(e.Unpublished)
	return e
}

// life returns how long the server keeps the entry. An entry with unpublished
// alerts is kept until they are published.
func (e *entry) life() time.Duration {
	switch {
	case len(e.Unpublished) > 0:
		return 0
	case e.isOpen():
		return max(openLife, 2*e.Cooldown)
	default:
		return closedLife
	}
}

// isOpen reports whether the app's jobs wait, except for the probe.
func (e *entry) isOpen() bool { return e.State == Open || e.State == Probing }

// sameProbe reports whether both are being probed, and by the same probe.
func (e *entry) sameProbe(other entry) bool {
	return e.State == Probing && other.State == Probing && e.ProbeWorker == other.ProbeWorker && e.Probes == other.Probes
}

// due reports whether an open circuit lets the job through as a probe. The job of
// the last probe lets others go first: the fault may be the job's and not the
// app's.
func (e *entry) due(job string, now time.Time) bool {
	at := e.RetryAt
	if job == e.LastProbe {
		at = at.Add(min(e.Cooldown/4, maxYield))
	}
	return e.State == Open && !now.Before(at)
}

// probe starts a probe, replacing the one in progress if there is one.
func (e *entry) probe(job, worker string) {
	e.State, e.ProbeJob, e.ProbeWorker = Probing, job, worker
	e.Probes++
}

// fail adds a failure to a closed circuit and opens it when there are enough. It
// reports whether anything changed.
func (e *entry) fail(job string, d errors.Decision, config Config, now time.Time) bool {
	known := slices.Contains(e.Failures, job) && !d.Proxy // a job is never at fault for a proxy
	if !known {
		e.Failures = append(e.Failures, job)
	}
	if !d.OpensCircuit && len(e.Failures) < config.Failures {
		return !known
	}
	if e.Cooldown == 0 {
		e.Cooldown = config.Cooldown
	}
	e.Code, e.OpenedAt = d.Code, now
	e.reopen(now, e.Cooldown)
	e.addAlert(Alert{Kind: AlertOpened, At: now, Failures: len(e.Failures), Cooldown: e.Cooldown})
	return true
}

// reopen ends a probe, if there is one, and starts a cooldown.
func (e *entry) reopen(now time.Time, cooldown time.Duration) {
	e.State, e.Cooldown, e.RetryAt, e.WorkingSessions = Open, cooldown, now.Add(cooldown), 0
	e.LastProbe, e.ProbeJob, e.ProbeWorker = e.ProbeJob, "", ""
}

// abort ends a probe without a result. If it did not reach the backend, the next
// one may start at once.
func (e *entry) abort(now time.Time, reached bool) {
	e.reopen(now, e.Cooldown)
	if !reached {
		e.RetryAt = now
	}
}

func (e *entry) close(now time.Time) {
	e.State, e.ProbeJob, e.ProbeWorker = Closed, "", ""
	e.addAlert(Alert{Kind: AlertClosed, At: now})
	e.succeed()
}

// remembers reports whether a working session changes a closed circuit.
func (e *entry) remembers() bool { return len(e.Failures) > 0 || e.Cooldown > 0 }

// succeed counts a working session.
func (e *entry) succeed() {
	e.Failures = nil
	if e.WorkingSessions++; e.WorkingSessions >= goodSessions {
		e.WorkingSessions, e.Cooldown = 0, 0
	}
}

// addAlert stores an alert until it is published.
func (e *entry) addAlert(a Alert) {
	a.Code, a.OpenedAt = e.Code, e.OpenedAt
	e.Unpublished = append(e.Unpublished, a)
	e.Unpublished = e.Unpublished[max(0, len(e.Unpublished)-maxUnpublished):]
}

// removeAlerts removes the alerts that were published, and reports whether there
// were any.
func (e *entry) removeAlerts(published []Alert) bool {
	before := len(e.Unpublished)
	e.Unpublished = slices.DeleteFunc(e.Unpublished, func(a Alert) bool {
		return slices.ContainsFunc(published, func(b Alert) bool { return a.Kind == b.Kind && a.OpenedAt.Equal(b.OpenedAt) })
	})
	return len(e.Unpublished) != before
}
