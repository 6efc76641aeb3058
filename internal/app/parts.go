package app

import (
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.opentelemetry.io/otel/trace"

	"avatarworker/internal/audio"
	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/budget"
	"avatarworker/internal/jobs/fetch"
	"avatarworker/internal/jobs/limit"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/session"
	"avatarworker/internal/topology"
)

func (a *App) sessionOptions(tracer trace.Tracer) session.Options {
	b := a.c.Backend
	return session.Options{
		Logger: a.log, Tracer: tracer,
		Endpoints:     session.Endpoints{ConsoleURL: b.ConsoleURL, IngressURL: b.IngressURL, BootstrapURL: b.BootstrapURL},
		DefaultRegion: b.Region, Fallback: b.FallbackRegions,
		TokenTTL: b.TokenTTL, TokenPool: b.TokenPool, Auth: session.Auth(b.Auth),
		ConnectTimeout: b.ConnectTimeout, HandshakeTimeout: b.HandshakeTimeout, StallTimeout: b.StallTimeout,
		Pace: session.Pace(a.c.Audio.Pace), EgressMargin: a.c.Audio.EgressMargin,
	}
}

func (a *App) audioOptions(js jetstream.JetStream) audio.Options {
	c := a.c.Audio
	return audio.Options{
		MaxBytes: int64(c.MaxBytes), FetchTimeout: c.FetchTimeout, AllowPrivateURLs: c.AllowPrivateURLs,
		Convert: c.Convert, Chunk: c.Chunk, Objects: audio.JetStreamObjects(js), DefaultBucket: a.names.AudioFilesBucket(),
	}
}

func (a *App) apiKey(app string) (string, error) {
	creds, ok := a.c.Credentials(app)
	if !ok {
		return "", errors.Newf(errors.CodeInvalidJob, errors.PhaseJob, "no credentials for app %q", app)
	}
	return creds.APIKey()
}

func (a *App) knownApp(app string) bool {
	_, ok := a.c.Credentials(app)
	return ok
}

// lease is the shortest ack wait of the queues' consumers: a consumer that existed
// before keeps its own.
func lease(h topology.Handles, c *config.Config) time.Duration {
	shortest := c.Lease.AckWait
	for _, consumer := range h.Consumers {
		if info := consumer.CachedInfo(); info != nil && info.Config.AckWait > 0 {
			shortest = min(shortest, info.Config.AckWait)
		}
	}
	return shortest
}

func queues(c *config.Config) []fetch.Queue {
	list := make([]fetch.Queue, len(c.Worker.Queues))
	for i, q := range c.Worker.Queues {
		list[i] = fetch.Queue{Name: q.Name, Weight: q.Weight}
	}
	return list
}

func queueNames(c *config.Config) []string {
	list := make([]string, len(c.Worker.Queues))
	for i, q := range c.Worker.Queues {
		list[i] = q.Name
	}
	return list
}

func appIDs(c *config.Config) []string {
	var list []string
	if c.App.ID != "" {
		list = append(list, c.App.ID)
	}
	for id := range c.Apps {
		list = append(list, id)
	}
	slices.Sort(list)
	return list
}

func sessionLimits(c *config.Config) []limit.Rule {
	list := make([]limit.Rule, len(c.Limits))
	for i, l := range c.Limits {
		list[i] = limit.Rule{Key: l.Key, Max: l.Max}
	}
	return list
}

func maxSessions(c *config.Config) map[string]int {
	limits := make(map[string]int)
	for _, id := range appIDs(c) {
		if creds, ok := c.Credentials(id); ok && creds.MaxSessions > 0 {
			limits[id] = creds.MaxSessions
		}
	}
	return limits
}

// ledgerOptions are the ledger's under a configuration. A stream that existed keeps
// its own duplicate window.
func ledgerOptions(c *config.Config, js jetstream.JetStream, names topology.Names, h topology.Handles, now func() time.Time, unanswered func()) usage.Options {
	return usage.Options{
		JS: js, Names: names, Window: min(topology.UsageDuplicates, h.Usage.CachedInfo().Config.Duplicates), Now: now, Tariff: Tariff(c), Unanswered: unanswered,
	}
}

// Tariff is how connected time is counted under a configuration.
func Tariff(c *config.Config) usage.Tariff {
	return usage.Tariff{Credit: c.Cost.Credit, Minimum: int64(c.Cost.Minimum)}
}

// Budgets are the budgets of a configuration.
func Budgets(c *config.Config) []budget.Rule {
	var rules []budget.Rule
	for _, b := range c.Budgets {
		rules = append(rules, budget.Rule{Key: b.Key, Credits: int64(b.Credits), Per: b.Per, Warn: b.Warn})
	}
	return rules
}
