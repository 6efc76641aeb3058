package config

import (
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

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
