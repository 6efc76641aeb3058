package budget

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/retry"
)

func (b *Budgets) forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.spent, b.upto = make(map[account]int64), make(map[string]uint64)
	b.seq, b.listed = 0, false
	if b.changed == nil {
		b.changed, b.warned = make(chan struct{}), make(map[account]float64)
	}
}

// unknown notes why what is spent could not be read.
func (b *Budgets) unknown(why error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.known() { // else it was, until now
		b.fault = why
	}
}

func (b *Budgets) repeat(ctx context.Context, what string, follow func(context.Context) error, failed func(error)) {
	for ctx.Err() == nil {
		err := follow(ctx)
		if ctx.Err() != nil {
			return
		}
		failed(err)
		b.o.Log.Warn().Err(err).Msg("can't follow " + what + "; beginning again")
		_ = retry.Pause(ctx, time.Second, nil) // the loop checks ctx
	}
}

// heartbeat is how often the server confirms that the consumer still waits, and
// forgottenAfter when it removes one that nothing reads.
const (
	heartbeat      = 5 * time.Second
	forgottenAfter = 30 * time.Second
)

// follow does not use the client's ordered consumer: in a stream that was made again, or
// restored, that one waits for the sequence that it had reached before.
func (b *Budgets) follow(ctx context.Context) error {
	b.forget()
	cfg := jetstream.ConsumerConfig{
		FilterSubject: b.o.Names.AllUsage(), AckPolicy: jetstream.AckNonePolicy, MaxDeliver: -1,
		MemoryStorage: true, Replicas: 1, InactiveThreshold: forgottenAfter,
	}
	upto, err := b.readCounters(ctx)
	switch {
	case errors.Is(err, usage.ErrNoCounters): // then the records of the periods are read
		from := b.begin().Add(-time.Minute)
		cfg.DeliverPolicy, cfg.OptStartTime = jetstream.DeliverByStartTimePolicy, &from
	case err != nil:
		return err
	default:
		cfg.DeliverPolicy, cfg.OptStartSeq = jetstream.DeliverByStartSequencePolicy, upto+1
	}
	stream, err := b.o.JS.Stream(ctx, b.o.Names.UsageStream())
	if err != nil {
		return err
	}
	last := stream.CachedInfo().State.LastSeq
	consumer, err := stream.CreateConsumer(ctx, cfg)
	if err != nil {
		return err
	}
	if consumer.CachedInfo().NumPending == 0 {
		b.learnedAll(last)
	}
	messages, err := consumer.Messages(jetstream.PullHeartbeat(heartbeat), jetstream.WithMessagesErrOnMissingHeartbeat(true))
	if err != nil {
		return err
	}
	defer messages.Stop()
	for delivered := uint64(1); ; delivered++ {
		msg, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			return err
		}
		meta, err := msg.Metadata()
		if err != nil {
			return err
		}
		if meta.Sequence.Consumer != delivered {
			return fmt.Errorf("%d usage records did not arrive", meta.Sequence.Consumer-delivered)
		}
		// What is not a usage record costs nothing.
		if r, err := usage.Parse(msg.Headers(), msg.Data(), meta.Sequence.Stream); err == nil {
			b.learn(&r)
		}
		if meta.NumPending == 0 {
			b.learnedAll(max(last, meta.Sequence.Stream))
		} else {
			b.followedTo(meta.Sequence.Stream)
		}
	}
}

// begin is when the oldest of the current periods began.
func (b *Budgets) begin() time.Time {
	return Begin(b.o.Rules, b.o.Now())
}

// readCounters reads what is spent in the current periods, and returns the sequence
// of the usage record from which on the records are to be followed.
func (b *Budgets) readCounters(ctx context.Context) (upto uint64, err error) {
	counters, err := usage.OpenCounters(ctx, b.o.JS, b.o.Names, b.o.Labels)
	if err != nil {
		return 0, err
	}
	if upto, err = counters.Upto(ctx); err != nil {
		return 0, err
	}
	err = counters.Read(ctx, b.filters(), func(c usage.Counter) {
		g, ok := usage.GroupOf(b.o.Names, c.Subject)
		if !ok {
			return
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		b.upto[c.Subject] = c.Upto
		for i, r := range b.o.Rules {
			if value, ok := (Job{App: g.App, Labels: g.Labels}).Value(r.Key); ok && b.family(r) == g.Family {
				b.spent[account{i, value, r.periodOf(g.Period)}] += c.Credits
			}
		}
	})
	return upto, err
}

// family is that of the counters which add up what a rule is for.
func (b *Budgets) family(r Rule) string {
	if strings.HasPrefix(r.Key, "label.") {
		return usage.ByLabels(b.o.Labels)
	}
	return usage.ByDay
}

// filters match the counters of the current periods. A session of tomorrow may be in
// them already: the clocks differ.
func (b *Budgets) filters() []string {
	families := make(map[string]bool)
	for _, r := range b.o.Rules {
		families[b.family(r)] = true
	}
	var filters []string
	end := b.o.Now().AddDate(0, 0, 1)
	for family := range families {
		for day := b.begin().UTC(); !day.After(end); day = day.AddDate(0, 0, 1) {
			filters = append(filters, b.o.Names.TotalsFilter(family, usage.Day(day)))
		}
	}
	return slices.Sorted(slices.Values(filters))
}

// learn adds a usage record to what is spent.
func (b *Budgets) learn(s *usage.Stored) {
	b.mu.Lock()
	var warnings []Warning
	for _, e := range s.Entries() {
		for i, r := range b.o.Rules {
			value, ok := (Job{App: e.Record.AppID, Labels: e.Record.Labels}).Value(r.Key)
			if !ok || s.Seq <= b.upto[b.counter(r, e.Record)] {
				continue
			}
			a := account{i, value, r.periodOf(e.Record.Day())}
			b.spent[a] += e.Totals.Credits
			warnings = append(warnings, b.warning(a)...)
		}
	}
	b.mu.Unlock()
	for _, w := range warnings {
		b.o.Warned(w)
	}
}

// counter is the subject of the counter that a record was added to, for a rule.
func (b *Budgets) counter(r Rule, u usage.Record) string {
	if len(b.upto) == 0 {
		return ""
	}
	for _, subject := range usage.Subjects(b.o.Names, u, b.o.Labels) {
		if strings.HasPrefix(subject, strings.TrimSuffix(b.o.Names.TotalsFilter(b.family(r), ""), ">")) {
			return subject
		}
	}
	return ""
}

// followedTo notes that everything up to a sequence is known.
func (b *Budgets) followedTo(seq uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.seq = max(b.seq, seq)
	b.notify()
}

// warning returns what is to be warned of now that an account has changed.
func (b *Budgets) warning(a account) []Warning {
	r := b.o.Rules[a.rule]
	begin, end := r.bounds(b.o.Now())
	if !b.known() || a.period != usage.Day(begin) {
		return nil
	}
	credits := b.credits(r)
	share := 0.0
	switch spent := b.spent[a]; {
	case spent >= credits:
		share = 1
	case r.Warn > 0 && float64(spent) >= r.Warn*float64(credits):
		share = r.Warn
	}
	if share <= b.warned[a] {
		b.warned[a] = share // below again: it was raised
		return nil
	}
	b.warned[a] = share
	return []Warning{{Over: share == 1, Since: begin, Refusal: Refusal{
		Key: r.Key, Value: a.value, Per: r.Per, Credits: credits, Spent: b.spent[a], Until: end,
	}}}
}

// learnedAll notes that everything up to a sequence is known, and what there was
// when the following began.
func (b *Budgets) learnedAll(seq uint64) {
	for _, w := range b.learned(seq) {
		b.o.Warned(w)
	}
}

func (b *Budgets) learned(seq uint64) (warnings []Warning) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.listed {
		b.listed = true
		warnings = b.review()
	}
	b.seq = max(b.seq, seq)
	b.notify()
	return warnings
}

// known reports whether both what is spent and what was set has been read. The caller
// holds b.mu.
func (b *Budgets) known() bool { return b.listed && b.settings != nil }

// review returns what is to be warned of now that all of it is known, or that budgets
// were set. The caller holds b.mu.
func (b *Budgets) review() (warnings []Warning) {
	if b.known() {
		b.fault = nil
	}
	for a := range b.spent {
		warnings = append(warnings, b.warning(a)...)
	}
	return warnings
}

func (b *Budgets) notify() {
	close(b.changed)
	b.changed = make(chan struct{})
}

// followSettings follows what was set at run time.
func (b *Budgets) followSettings(ctx context.Context) error {
	watch, err := b.o.Fleet.Watch(ctx, Prefix+">")
	if err != nil {
		return err
	}
	defer watch.Stop()
	found, listing := make(map[string]int64), true
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case entry, open := <-watch.Updates():
			switch {
			case !open:
				return errors.New("the watch ended")
			case entry == nil:
				listing = false
			case entry.Operation() != jetstream.KeyValuePut:
				delete(found, entry.Key())
			default:
				if credits, ok := parseSetting(entry.Value()); ok {
					found[entry.Key()] = credits
				}
			}
			if !listing {
				b.set(found)
			}
		}
	}
}

func (b *Budgets) set(settings map[string]int64) {
	b.mu.Lock()
	b.settings = maps.Clone(settings)
	warnings := b.review()
	b.notify()
	b.mu.Unlock()
	for _, w := range warnings {
		b.o.Warned(w)
	}
}

// unset notes why what was set could not be read. Without a bucket nothing was set;
// otherwise a budget may be lower than configured, and its jobs are held.
func (b *Budgets) unset(why error) {
	b.mu.Lock()
	never := b.settings == nil
	b.mu.Unlock()
	switch {
	case !never:
	case errors.Is(why, jetstream.ErrStreamNotFound):
		b.set(map[string]int64{})
	default:
		b.unknown(fmt.Errorf("what was set with 'cost budget' can't be read: %w", why))
	}
}
