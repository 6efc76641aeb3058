package config

import (
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
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
