package config

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
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

func (v *validator) nats() {
	n := &v.c.NATS
	v.natsURLs(n.URL)
	v.matches("nats.prefix", n.Prefix, token, tokenWant)
	v.between("nats.replicas", n.Replicas, 1, 5)
	if n.Placement.Cluster != "" {
		v.matches("nats.placement.cluster", n.Placement.Cluster, placementName, "give the name of a NATS cluster, as its servers' cluster block has it")
	}
	for i, tag := range n.Placement.Tags {
		v.matches(fmt.Sprintf("nats.placement.tags[%d]", i), tag, placementName, "give a tag without spaces, as servers have it in server_tags")
	}
	v.oneOf("nats.storage", n.Storage, "file", "memory")
	if n.StoreDir == "" {
		v.fail("nats.store_dir", "is empty: name a directory")
	}
	v.duration("nats.state_ttl", n.StateTTL, time.Hour, forever)
	v.natsLogin()
	v.natsSubjects()
	if (n.TLS.Cert == "") != (n.TLS.Key == "") {
		key, other := "nats.tls.cert", "nats.tls.key"
		if n.TLS.Cert == "" {
			key, other = other, key
		}
		v.fail(key, "is set without %s: a certificate and its key come together", other)
	}
}

// natsSubjects checks what NATS subjects are made of.
func (v *validator) natsSubjects() {
	n := &v.c.NATS
	if n.Domain != "" {
		v.matches("nats.domain", n.Domain, token, "a domain is one word of letters, digits, _ and -, as the server's jetstream block names it")
	}
	if n.APIPrefix != "" {
		v.matches("nats.api_prefix", n.APIPrefix, apiPrefix, "write the first tokens of the API's subjects, such as $JS.hub.API")
	}
	if n.InboxPrefix != "" {
		v.matches("nats.inbox_prefix", n.InboxPrefix, inboxPrefix, "write tokens joined by dots without wildcards, such as _INBOX_worker")
	}
	if n.Domain != "" && n.APIPrefix != "" {
		v.fail("nats.api_prefix", "is set, and nats.domain too: keep one of them (a domain is the prefix $JS.<domain>.API)")
	}
}

func (v *validator) natsURLs(list string) {
	for i, text := range strings.Split(list, ",") {
		text = strings.TrimSpace(text)
		shown := quote(text)
		if strings.Contains(list, "@") && !strings.Contains(text, "@") {
			shown = fmt.Sprintf("address %d", i+1) // it may be a part of a password that has a comma
		}
		full := text
		if !strings.Contains(full, "://") {
			full = "nats://" + full // as the client reads it
		}
		u, err := url.Parse(full)
		if err != nil || u.Hostname() == "" || !slices.Contains([]string{"nats", "tls", "ws", "wss"}, u.Scheme) || badPort(u) {
			v.fail("nats.url", "%s is not a NATS URL: write nats://host:port (or tls://, ws://, wss://), several separated by commas", shown)
		} else if strings.Trim(u.Path, "/")+u.RawQuery+u.Fragment != "" {
			v.fail("nats.url", "%s has a path, a query or a fragment: give host and port only", shown)
		}
	}
}

func badPort(u *url.URL) bool {
	if u.Port() == "" {
		return strings.HasSuffix(u.Host, ":")
	}
	n, err := strconv.Atoi(u.Port())
	return err != nil || n < 1 || n > 65535
}

// natsLogin refuses a second way of logging in: the client would take one of
// them silently.
func (v *validator) natsLogin() {
	n := &v.c.NATS
	var ways []string
	for _, way := range []struct {
		key string
		set bool
	}{
		{"nats.creds", n.Creds != ""},
		{"nats.nkey", n.NKey != ""},
		{"nats.user", n.User != ""},
		{"nats.token", n.Token != ""},
		{"nats.token_file", n.TokenFile != ""},
	} {
		if way.set {
			ways = append(ways, way.key)
		}
	}
	if len(ways) > 1 && !slices.Equal(ways, []string{"nats.token", "nats.token_file"}) {
		v.fail(ways[1], "is set, and %s too: log in to NATS in one way", ways[0])
	}
	password := "nats.password"
	if n.Password == "" {
		password = "nats.password_file"
	}
	hasPassword := n.Password != "" || n.PasswordFile != ""
	switch {
	case hasPassword && n.User == "":
		v.fail(password, "is set without nats.user: give the user")
	case n.User != "" && !hasPassword:
		v.fail("nats.user", "is set without nats.password: give the password, or nats.password_file")
	}
}

func (v *validator) streams() {
	s := &v.c.Streams
	for _, l := range []struct {
		name   string
		limits Limits
	}{
		{"jobs", Limits{MaxBytes: s.Jobs.MaxBytes}},
		{"state", Limits{MaxBytes: s.State.MaxBytes}}, {"fleet", Limits{MaxBytes: s.Fleet.MaxBytes}},
		{"dlq", s.DLQ}, {"events", s.Events}, {"usage", s.Usage}, {"totals", s.Totals}, {"frames", s.Frames},
		{"audio", s.Audio}, {"audio_files", s.AudioFiles}, {"recordings", s.Recordings},
	} {
		v.durationOrNone("streams."+l.name+".max_age", l.limits.MaxAge, time.Minute, forever)
		if l.limits.MaxBytes != 0 && l.limits.MaxBytes < mib {
			v.fail("streams."+l.name+".max_bytes", "is %s: give at least 1MiB, or 0 for no limit", l.limits.MaxBytes)
		}
	}
}

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
	v.duration("lease.ack_wait", v.c.Lease.AckWait, time.Second, time.Hour)

	v.between("circuit.failures", c.Failures, 1, 1000)
	v.duration("circuit.cooldown", c.Cooldown, 100*time.Millisecond, day)
	v.duration("circuit.max_cooldown", c.MaxCooldown, 100*time.Millisecond, day)
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

func (v *validator) apps() {
	app := &v.c.App
	if app.ID != "" {
		v.appID("app.id", app.ID)
	}
	v.between("app.max_sessions", app.MaxSessions, 0, 100_000)
	for _, id := range sortedNames(v.c.Apps) {
		key, app := "apps."+id, v.c.Apps[id]
		v.appID(key, id)
		v.between(key+".max_sessions", app.MaxSessions, 0, 100_000)
		if app.APIKey == "" && app.APIKeyFile == "" {
			v.fail(key, "has no key: give api_key or api_key_file")
		}
		if id == v.c.App.ID {
			v.fail(key, "is app.id too: keep one of them")
		}
	}
}

// LimitKeys lists what a session limit may count by, besides label.<name>. It is the
// same as limit.Keys (test/contract compares them).
func LimitKeys() []string { return []string{"app_id", "avatar_id", "region", "queue"} }

// limits checks the session limits.
func (v *validator) limits() {
	var seen []string
	for i, l := range v.c.Limits {
		key := fmt.Sprintf("limits[%d]", i)
		v.limitKey(key+".key", l.Key)
		if slices.Contains(seen, l.Key) {
			v.fail(key+".key", "is %s, which is in the list already: keep one", quote(l.Key))
		}
		seen = append(seen, l.Key)
		v.between(key+".max", l.Max, 1, 100_000)
	}
}

func (v *validator) limitKey(at, key string) {
	name, isLabel := strings.CutPrefix(key, "label.")
	switch {
	case !isLabel && slices.Contains(LimitKeys(), key):
	case !isLabel:
		v.fail(at, "is %s: give one of %s, or label.<name>", quote(key), strings.Join(LimitKeys(), ", "))
	case name == "" || len(name) > maxLabelName || !utf8.ValidString(name):
		v.fail(at, "is %s: name a label after the dot, 1 to %d bytes, such as label.room", quote(key), maxLabelName)
	}
}

// appID takes any text that can be the value of an HTTP header; a job's app_id
// has the same rule.
func (v *validator) appID(key, id string) {
	if id == "" || len(id) > maxAppID || !utf8.ValidString(id) || strings.ContainsFunc(id, unicode.IsControl) || strings.TrimSpace(id) != id {
		v.fail(key, "is %s: give an app's id, 1 to %d bytes without control characters and without spaces at its ends", quote(id), maxAppID)
	}
}

func (v *validator) backend() {
	b := &v.c.Backend
	v.matches("backend.region", b.Region, region, regionWant)
	for i, r := range b.FallbackRegions {
		key := fmt.Sprintf("backend.fallback_regions[%d]", i)
		if v.matches(key, r, region, regionWant); r == "auto" {
			v.fail(key, "is auto: name a region")
		}
	}
	v.webURL("backend.console_url", b.ConsoleURL, true)
	v.webURL("backend.ingress_url", b.IngressURL, true)
	v.webURL("backend.bootstrap_url", b.BootstrapURL, b.Region != "auto")
	v.plainURLs()
	v.oneOf("backend.auth", b.Auth, "header", "query")
	// The backend takes an expiry of less than 24 h; a minute is for clocks
	// that differ (docs/protocol.md, section 2).
	v.duration("backend.token_ttl", b.TokenTTL, time.Minute, day-time.Minute)
	v.between("backend.token_pool", b.TokenPool, 0, 1000)
	v.duration("backend.connect_timeout", b.ConnectTimeout, 100*time.Millisecond, 5*time.Minute)
	v.duration("backend.handshake_timeout", b.HandshakeTimeout, 100*time.Millisecond, 5*time.Minute)
	v.duration("backend.stall_timeout", b.StallTimeout, 100*time.Millisecond, time.Hour)
	v.durationOrNone("backend.max_session", b.MaxSession, time.Second, forever)
}

func (v *validator) webURL(key, text string, optional bool) {
	if text == "" && optional {
		return
	}
	u, err := url.Parse(text)
	switch {
	case err != nil || u.Hostname() == "" || badPort(u) || !slices.Contains([]string{"http", "https", "ws", "wss"}, u.Scheme):
		v.fail(key, "%s is not a URL: write https://host/path (or http://, wss://, ws://)", quote(text))
	case u.User != nil || u.Fragment != "":
		v.fail(key, "%s has a user or a fragment: give host, path and, if need be, a query", quote(text))
	default:
		if _, err := url.ParseQuery(u.RawQuery); err != nil {
			v.fail(key, "%s has a query that can't be read: write name=value, joined by &, other characters escaped", quote(text))
		}
	}
}

// plainURLs refuses what would send the API key, session tokens or speech over
// a network in the clear.
func (v *validator) plainURLs() {
	b := &v.c.Backend
	if b.AllowPlainHTTP {
		return
	}
	for _, l := range []struct{ key, text, better string }{
		{"backend.console_url", b.ConsoleURL, "https"},
		{"backend.ingress_url", b.IngressURL, "wss"},
		{"backend.bootstrap_url", b.BootstrapURL, "https"},
	} {
		u, err := url.Parse(l.text)
		if err != nil || (u.Scheme != "http" && u.Scheme != "ws") || isLoopback(u.Hostname()) {
			continue
		}
		v.fail(l.key, "begins with %s:// and leaves this machine, so that the API key or session tokens could be read on the way: write %s://, or set backend.allow_plain_http",
			u.Scheme, l.better)
	}
}

// isLoopback reports whether a host of a URL is this machine by its name alone.
func isLoopback(host string) bool {
	if ip, err := netip.ParseAddr(host); err == nil {
		return ip.Unmap().IsLoopback()
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	return host == "localhost" || strings.HasSuffix(host, ".localhost")
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
			best, _ := nearest(code, codes())
			v.fail(key, "is not an error code: the nearest is %s (avatarworker errors lists them)", best)
		}
		if p.Action != "" {
			v.oneOf(key+".action", p.Action, actions()...)
		}
		v.between(key+".attempts", p.Attempts, 0, 100)
	}
}

// maxTotalLabels bounds the labels by which each day is added up, and so the length
// of a counter's subject.
const maxTotalLabels = 3

var labelName = regexp.MustCompile(`^[^\x00-\x1f]{1,64}$`)

func (v *validator) cost() {
	c := &v.c.Cost
	v.duration("cost.credit", c.Credit, time.Millisecond, day)
	v.between("cost.minimum", c.Minimum, 0, 1_000_000)
	for i, name := range c.Labels {
		key := fmt.Sprintf("cost.labels[%d]", i)
		v.matches(key, name, labelName, "give a label's name, 1 to 64 bytes without control characters")
		if slices.Contains(c.Labels[:i], name) {
			v.fail(key, "is %s, which is in the list already: keep one", quote(name))
		}
	}
	for i, b := range v.c.Budgets {
		key := fmt.Sprintf("budgets[%d]", i)
		v.budget(key, b)
		if slices.ContainsFunc(v.c.Budgets[:i], func(other Budget) bool { return other.Key == b.Key && other.Per == b.Per }) {
			v.fail(key, "is a second budget for %s per %s: keep one", quote(b.Key), b.Per)
		}
	}
	if labels := v.c.TotalLabels(); len(labels) > maxTotalLabels {
		v.fail("cost.labels", "with the labels of budgets makes %d (%s): give at most %d in all", len(labels), strings.Join(labels, ", "), maxTotalLabels)
	}
}

// BudgetPeriods lists what a budget may be per.
func BudgetPeriods() []string { return []string{"day", "month"} }

func (v *validator) budget(key string, b Budget) {
	name, isLabel := strings.CutPrefix(b.Key, "label.")
	if b.Key != "app_id" && (!isLabel || !labelName.MatchString(name)) {
		v.fail(key+".key", "is %s: give app_id or label.<name>", quote(b.Key))
	}
	v.between(key+".credits", b.Credits, 1, MaxBudget)
	v.oneOf(key+".per", b.Per, BudgetPeriods()...)
	if b.Warn < 0 || b.Warn >= 1 {
		v.fail(key+".warn", "is %g: give a share from 0 (no alert) to below 1", b.Warn)
	}
}

// TotalLabels lists the labels by which each day is added up: those of cost.labels
// and of budgets, sorted.
func (c *Config) TotalLabels() []string {
	names := slices.Clone(c.Cost.Labels)
	for _, b := range c.Budgets {
		if name, ok := strings.CutPrefix(b.Key, "label."); ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
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
