package config

import (
	"fmt"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Validate checks every rule, and returns an *Error with all that are broken.
// Load has done so; it is for a configuration that code has changed.
func (c *Config) Validate() error { return asError(c.problems()) }

func (c *Config) problems() []Problem {
	v := &validator{c: c}
	v.nats()
	v.streams()
	v.worker()
	v.retries()
	v.apps()
	v.limits()
	v.backend()
	v.audio()
	v.policy()
	v.cost()
	v.admin()
	v.ui()
	return v.found
}

type validator struct {
	c     *Config
	found []Problem
}

// fail reports a broken rule at the place where the key, or else what it is
// part of, was set.
func (v *validator) fail(key, format string, args ...any) {
	at := key
	for _, known := v.c.origins[at]; !known && at != ""; _, known = v.c.origins[at] {
		at = at[:max(0, strings.LastIndexAny(at, ".["))]
	}
	o := v.c.origins[at]
	v.found = append(v.found, Problem{Source: o.source, Line: o.line, Key: key, Message: fmt.Sprintf(format, args...)})
}

func (v *validator) between(key string, n, low, high int) {
	if n < low || n > high {
		v.fail(key, "is %d: give a number from %d to %d", n, low, high)
	}
}

func (v *validator) duration(key string, d, low, high time.Duration) {
	if d < low || d > high {
		v.fail(key, "is %s: give a duration from %s to %s", formatDuration(d), formatDuration(low), formatDuration(high))
	}
}

// durationOrNone allows 0, which switches the limit off.
func (v *validator) durationOrNone(key string, d, low, high time.Duration) {
	if d != 0 && (d < low || d > high) {
		v.fail(key, "is %s: give a duration from %s to %s, or 0 for no limit",
			formatDuration(d), formatDuration(low), formatDuration(high))
	}
}

func (v *validator) oneOf(key, value string, allowed ...string) {
	if !slices.Contains(allowed, value) {
		v.fail(key, "is %s: give one of %s", quote(value), strings.Join(allowed, ", "))
	}
}

func (v *validator) matches(key, value string, pattern *regexp.Regexp, want string) {
	if !pattern.MatchString(value) {
		v.fail(key, "is %s: %s", quote(value), want)
	}
}

var (
	token    = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)
	hostName = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,128}$`)
	region   = regexp.MustCompile(`^(auto|[a-z]+(-[a-z0-9]+)+)$`)
	// Tokens of a subject without wildcards.
	inboxPrefix = regexp.MustCompile(`^[^\s.*>\x00-\x1f]+(\.[^\s.*>\x00-\x1f]+)*$`)
	apiPrefix   = regexp.MustCompile(`^[^\s.*>\x00-\x1f]+(\.[^\s.*>\x00-\x1f]+)*\.?$`)
	// A cluster's name or a server's tag.
	placementName = regexp.MustCompile(`^[^\s,\x00-\x1f]{1,128}$`)
	dnsName       = regexp.MustCompile(`^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?$`)
)

const (
	tokenWant  = "use letters, digits, _ and - only, at most 64: it is one token of a subject"
	regionWant = "give lowercase words joined by hyphens, such as us-west, or auto"
	nameWant   = "use letters, digits, _, - and . only, at most 128"

	forever = 10 * 365 * day

	maxAppID     = 128
	maxLabelName = 256
)

func (v *validator) worker() {
	w := &v.c.Worker
	v.between("worker.concurrency", w.Concurrency, 1, 100_000)
	v.duration("worker.drain_timeout", w.DrainTimeout, 0, day)
	if w.Name != "" {
		v.matches("worker.name", w.Name, hostName, nameWant)
	}
	if len(w.Queues) == 0 {
		v.fail("worker.queues", "is empty: name at least one queue")
	}
	var names []string
	for i, q := range w.Queues {
		key := fmt.Sprintf("worker.queues[%d]", i)
		v.matches(key+".name", q.Name, token, tokenWant)
		v.between(key+".weight", q.Weight, 1, 1000)
		if slices.Contains(names, q.Name) {
			v.fail(key+".name", "is %s, which is in the list already: keep one", quote(q.Name))
		}
		names = append(names, q.Name)
	}
}

func (v *validator) retries() {
	r, c, a := &v.c.Retry, &v.c.Circuit, &v.c.Alerts
	v.between("retry.max_attempts", r.MaxAttempts, 1, 100)
	v.duration("retry.initial", r.Initial, time.Millisecond, day)
	v.duration("retry.max", r.Max, time.Millisecond, day)
	v.bounded("retry.initial", r.Initial, "retry.max", r.Max)
	v.duration("lease.ack_wait", v.c.Lease.AckWait, time.Second, time.Hour)

	v.between("circuit.failures", c.Failures, 1, 1000)
	v.duration("circuit.cooldown", c.Cooldown, 100*time.Millisecond, day)
	v.duration("circuit.max_cooldown", c.MaxCooldown, 100*time.Millisecond, day)
	v.bounded("circuit.cooldown", c.Cooldown, "circuit.max_cooldown", c.MaxCooldown)
	v.duration("circuit.max_hold", c.MaxHold, time.Second, 365*day)
	v.outlives("retry.max", r.Max)

	v.between("alerts.threshold", a.Threshold, 1, 100_000)
	v.duration("alerts.window", a.Window, time.Second, day)
}

// recordMargin is how much longer a job's record is kept than a job waits.
const recordMargin = time.Hour

// outlives refuses waits that a job's record does not outlive: who takes the job
// then would take it for a new one. A nats.state_ttl that is itself out of bounds has
// been reported.
func (v *validator) outlives(key string, wait time.Duration) {
	ttl := v.c.NATS.StateTTL
	if ttl < recordMargin || ttl >= wait+recordMargin {
		return
	}
	const ttlKey = "nats.state_ttl"
	if v.c.Source(ttlKey) == "" {
		v.fail(key, "is %s, so that a job's record would not outlive its wait: set %s (%s) to at least %s, or lower this",
			formatDuration(wait), ttlKey, formatDuration(ttl), formatDuration(wait+recordMargin))
		return
	}
	v.fail(ttlKey, "is %s, so that a job's record would not outlive a wait of %s (%s): set it to at least %s, or lower that",
		formatDuration(ttl), key, formatDuration(wait), formatDuration(wait+recordMargin))
}

// bounded refuses a wait that is longer than its bound. One that is set alone may be: then
// the other's default gives way.
func (v *validator) bounded(key string, wait time.Duration, boundKey string, bound time.Duration) {
	if wait > bound && v.c.Source(key) != "" && v.c.Source(boundKey) != "" {
		v.fail(key, "is %s, longer than %s (%s), which bounds every wait: lower it, or raise that", formatDuration(wait), boundKey, formatDuration(bound))
	}
}

func (v *validator) audio() {
	a := &v.c.Audio
	if a.MaxBytes < kib || a.MaxBytes > 4*gib {
		v.fail("audio.max_bytes", "is %s: give a size from 1KiB to 4GiB", a.MaxBytes)
	}
	v.duration("audio.fetch_timeout", a.FetchTimeout, 100*time.Millisecond, time.Hour)
	v.duration("audio.egress_margin", a.EgressMargin, 0, 10*time.Minute)
	v.duration("audio.chunk", a.Chunk, 10*time.Millisecond, 10*time.Second)
	v.oneOf("audio.pace", a.Pace, "fast", "realtime")
}

func (v *validator) policy() {
	for _, code := range sortedNames(v.c.Policy) {
		key, p := "policy."+code, v.c.Policy[code]
		if !slices.Contains(codes(), code) {
			message := "is not an error code: avatarworker errors lists them"
			if best := near(code, codes()); best != "" {
				message = "is not an error code: the nearest is " + best + " (avatarworker errors lists them)"
			}
			v.fail(key, "%s", message)
		}
		if p.Action != "" {
			v.oneOf(key+".action", p.Action, actions()...)
		}
		v.between(key+".attempts", p.Attempts, 0, 100)
	}
}

func (v *validator) admin() {
	v.c.Log.Level = strings.ToLower(v.c.Log.Level)
	v.oneOf("log.level", v.c.Log.Level, "trace", "debug", "info", "warn", "error")
	v.oneOf("log.format", v.c.Log.Format, "auto", "json", "console")
	for i, host := range v.c.Admin.Hosts {
		v.matches(fmt.Sprintf("admin.hosts[%d]", i), host, dnsName, "give a host's name without scheme and port, such as avatars.example.com")
	}
	v.listenAddr("admin.addr", v.c.Admin.Addr, "127.0.0.1:8080")
}

// listenAddr checks where something listens; "": nowhere.
func (v *validator) listenAddr(key, addr, example string) {
	if addr == "" {
		return
	}
	_, port, err := net.SplitHostPort(addr)
	n, portErr := strconv.Atoi(port)
	if err != nil || portErr != nil || n < 0 || n > 65535 {
		v.fail(key, "%s is not an address: write host:port, such as %s, or off", quote(addr), example)
	}
}
