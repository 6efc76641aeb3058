// Package budget bounds what the sessions of an app, or of all jobs with one value
// of a label, may cost in a day or a month. What was spent is followed from the
// ledger's counters; what is running is reserved in one key of the bucket of job
// records for each app or value, changed by compare-and-set, so that workers that
// start sessions at the same time know of each other. The reservations of a worker
// count as long as its lease stands.
//
// It owns these keys and the settings of budgets in the fleet's bucket.
package budget

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/kv"
	"avatarworker/internal/retry"
	"avatarworker/internal/topology"
)

// Prefix begins the keys of reservations in the bucket of job records, and those of
// settings in the fleet's. No job id has a dot.
const Prefix = "budget."

// Periods of a budget, UTC.
const (
	Day   = "day"
	Month = "month"
)

// Periods lists the periods.
func Periods() []string { return []string{Day, Month} }

// Check returns an error if a rule has a period that is none of Periods.
func Check(rules []Rule) error {
	for _, r := range rules {
		if !slices.Contains(Periods(), r.Per) {
			return fmt.Errorf("the budget for %s is per %q: want one of %s", r.Key, r.Per, strings.Join(Periods(), ", "))
		}
	}
	return nil
}

// Begin returns when the oldest of the rules' periods that now lies in began; now if
// there are no rules.
func Begin(rules []Rule, now time.Time) time.Time {
	begin := now.UTC()
	for _, r := range rules {
		if from, _ := r.bounds(now); from.Before(begin) {
			begin = from
		}
	}
	return begin
}

// Rule is one budget: for every app, or for every value of a label.
type Rule struct {
	Key     string // app_id or label.<name>
	Credits int64
	Per     string  // Day or Month
	Warn    float64 // share of Credits at which Warned is called; 0: none
}

// SettingKey is the key in the fleet's bucket under which the credits of a rule can
// be set at run time; its value is a Setting.
func SettingKey(key, per string) string {
	return Prefix + topology.Token(key) + "." + topology.Token(per)
}

// Setting replaces the credits of a rule at run time.
type Setting struct {
	Credits int64 `json:"credits"`
}

// Job is what a budget looks at.
type Job struct {
	App    string
	Labels map[string]string
}

// Value is the job's under a rule's key; false: it has none, and the rule is not
// for it.
func (j Job) Value(key string) (string, bool) {
	if name, ok := strings.CutPrefix(key, "label."); ok {
		value, ok := j.Labels[name]
		return usage.LabelValue(value), ok
	}
	return j.App, true
}

// Refusal says why a session may not start.
type Refusal struct {
	Key      string // app_id or label.<name>
	Value    string
	Per      string
	Credits  int64 // of the budget
	Spent    int64
	Reserved int64     // for sessions that run
	Until    time.Time // the end of the period
}

// String is the refusal for people.
func (r Refusal) String() string {
	text := fmt.Sprintf("the budget of %d credits per %s for %s %q is spent (%d credits)", r.Credits, r.Per, r.Key, r.Value, r.Spent)
	if r.Spent < r.Credits {
		text = fmt.Sprintf("of the budget of %d credits per %s for %s %q %d are spent, and the rest is reserved for sessions that run", r.Credits, r.Per, r.Key, r.Value, r.Spent)
	}
	return text + "; jobs of it wait until " + r.Until.Format(time.RFC3339) + " or until it is raised (avatarworker cost budget)"
}

const (
	// spentPause is about how long a job of a budget that is spent waits before it is
	// looked at again: the budget may have been raised.
	spentPause = 5 * time.Second
	// reservedPause is for a budget that others may leave something of.
	reservedPause = time.Second
)

// Pause is about how long the job waits before it is looked at again.
func (r Refusal) Pause() time.Duration {
	if r.Spent < r.Credits {
		return reservedPause
	}
	return spentPause
}

// Warning is a budget of which a share is spent. Over: all of it.
type Warning struct {
	Refusal
	Over  bool
	Since time.Time // the begin of the period
}

// What names the warning among those of one budget and period.
func (w Warning) What() string {
	if w.Over {
		return "spent"
	}
	return "warning"
}

// String is the warning for people.
func (w Warning) String() string {
	text := "jobs of it are held once it is"
	if w.Over {
		text = "jobs of it are held until then or until it is raised (avatarworker cost budget)"
	}
	return fmt.Sprintf("%d of the %d credits per %s for %s %q are spent, with the period ending at %s: %s",
		w.Spent, w.Credits, w.Per, w.Key, w.Value, w.Until.Format(time.RFC3339), text)
}

// Options are what Budgets are made of. All are required.
type Options struct {
	Rules  []Rule
	JS     jetstream.JetStream
	Names  topology.Names
	State  *kv.Store          // the bucket of job records
	Fleet  jetstream.KeyValue // the settings
	Least  int64              // credits that a session costs at least
	Worker func() string      // the id of the worker's lease; "" while it has none
	Stands func(ctx context.Context, workerID string) (bool, error)
	// Labels are those by which the counters add up, sorted.
	Labels  []string
	Written func() uint64    // the sequence of the newest usage record that this worker wrote
	Now     func() time.Time // by the server's clock
	Warned  func(Warning)    // may be called by every worker for the same
	Log     zerolog.Logger
}

// Budgets is one worker's view of what is spent, kept current by following the usage
// records. A nil *Budgets has no rules: Peek and Reserve refuse nothing.
type Budgets struct {
	o       Options
	life    context.Context // of the writes that give reservations back
	end     context.CancelFunc
	wg      sync.WaitGroup
	writing sync.Mutex // held while a key of reservations is changed here

	mu       sync.Mutex
	spent    map[account]int64
	upto     map[string]uint64   // the record up to which a counter that was read is complete, by subject
	warned   map[account]float64 // the share last warned of
	settings map[string]int64    // credits set at run time, by key
	seq      uint64              // of the newest usage record that was followed
	listed   bool                // what there was has been read
	changed  chan struct{}       // closed and replaced when something changes
}

// account is what is spent under one rule.
type account struct {
	rule   int
	value  string
	period string // its first day
}

// New returns Budgets that know of nothing spent yet.
func New(o Options) *Budgets {
	b := &Budgets{o: o, settings: make(map[string]int64)}
	b.life, b.end = context.WithCancel(context.Background())
	b.forget()
	return b
}

func (b *Budgets) forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.spent, b.upto, b.warned = make(map[account]int64), make(map[string]uint64), make(map[account]float64)
	b.seq, b.listed = 0, false
	if b.changed == nil {
		b.changed = make(chan struct{})
	}
}

// periodOf is the period that a day (YYYY-MM-DD) belongs to: its first day.
func (r Rule) periodOf(day string) string {
	if r.Per == Day || len(day) < len("2006-01") {
		return day
	}
	return day[:len("2006-01")] + "-01"
}

// bounds are the begin and end of the period that a time lies in.
func (r Rule) bounds(at time.Time) (begin, end time.Time) {
	at = at.UTC()
	if r.Per == Day {
		begin = at.Truncate(24 * time.Hour)
		return begin, begin.AddDate(0, 0, 1)
	}
	begin = time.Date(at.Year(), at.Month(), 1, 0, 0, 0, 0, time.UTC)
	return begin, begin.AddDate(0, 1, 0)
}

// Peek returns the budget that keeps the job from starting as far as this worker
// knows; nil: none.
func (b *Budgets) Peek(job Job) *Refusal {
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.listed {
		return nil // Reserve waits for it
	}
	return b.refusal(job, "", 0)
}

// refusal is the first budget that has no room for one more session beside those
// reserved under key; "": under any. The caller holds b.mu.
func (b *Budgets) refusal(job Job, key string, reserved int64) *Refusal {
	now := b.o.Now()
	for i, r := range b.o.Rules {
		value, ok := job.Value(r.Key)
		if !ok || key != "" && r.Key != key {
			continue
		}
		begin, end := r.bounds(now)
		found := Refusal{
			Key: r.Key, Value: value, Per: r.Per, Credits: b.credits(r), Reserved: reserved * b.o.Least, Until: end,
			Spent: b.spent[account{i, value, usage.Day(begin)}],
		}
		if found.Spent+max(found.Reserved+b.o.Least, 1) > found.Credits {
			return &found
		}
	}
	return nil
}

func (b *Budgets) credits(r Rule) int64 {
	if credits, ok := b.settings[SettingKey(r.Key, r.Per)]; ok {
		return credits
	}
	return r.Credits
}

// reservations is the value of a key: the sessions that workers run under it.
type reservations struct {
	Running map[string]int `json:"running"`
	// Upto is the sequence of the usage record up to which everything is recorded
	// that sessions no longer in Running have cost.
	Upto uint64 `json:"upto"`
}

func (r reservations) all() (n int64) {
	for _, running := range r.Running {
		n += int64(running)
	}
	return n
}

// Reserve reserves one session under each budget of the job. release is to be called
// once, after what the session cost is in the ledger. A refusal is not an error.
func (b *Budgets) Reserve(ctx context.Context, job Job) (release func(), refusal *Refusal, err error) {
	if b == nil {
		return func() {}, nil, nil
	}
	worker := b.o.Worker()
	var held []string
	release = func() {
		if len(held) > 0 {
			b.wg.Go(func() { b.giveBack(held, worker) })
		}
	}
	for _, key := range b.keys() {
		value, ok := job.Value(key)
		if !ok {
			continue
		}
		name := Prefix + topology.Token(key) + "." + topology.Token(value)
		refusal, err := b.reserve(ctx, name, key, job, worker)
		switch {
		case err != nil:
			release()
			return nil, nil, err
		case refusal != nil: // at once: another job may start on what this one does not need
			b.giveBack(held, worker)
			return nil, refusal, nil
		}
		held = append(held, name)
	}
	return release, nil, nil
}

// keys lists what budgets are for, once each.
func (b *Budgets) keys() []string {
	var keys []string
	for _, r := range b.o.Rules {
		if !slices.Contains(keys, r.Key) {
			keys = append(keys, r.Key)
		}
	}
	return keys
}

// followTimeout bounds the wait for the usage records that others have written.
const followTimeout = 5 * time.Second

func (b *Budgets) reserve(ctx context.Context, name, key string, job Job, worker string) (*Refusal, error) {
	for {
		refusal, err := b.tryReserve(ctx, name, key, job, worker)
		if !errors.Is(err, kv.ErrConflict) {
			return refusal, err
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
}

func (b *Budgets) tryReserve(ctx context.Context, name, key string, job Job, worker string) (*Refusal, error) {
	b.writing.Lock()
	defer b.writing.Unlock()
	var r reservations
	revision, err := b.o.State.Get(ctx, name, &r)
	if err != nil {
		return nil, err
	}
	if err := b.followed(ctx, r.Upto); err != nil {
		return nil, err
	}
	if b.refused(job, key, r) != nil && len(r.Running) > 0 {
		if err := b.dropLost(ctx, &r); err != nil {
			return nil, err
		}
	}
	if refusal := b.refused(job, key, r); refusal != nil {
		return refusal, nil
	}
	if r.Running == nil {
		r.Running = make(map[string]int)
	}
	r.Running[worker]++
	_, err = b.o.State.Put(ctx, name, r, revision)
	return nil, err
}

func (b *Budgets) refused(job Job, key string, r reservations) *Refusal {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.refusal(job, key, r.all())
}

// dropLost drops the reservations of workers whose lease is gone.
func (b *Budgets) dropLost(ctx context.Context, r *reservations) error {
	for _, worker := range slices.Sorted(maps.Keys(r.Running)) {
		stands, err := b.o.Stands(ctx, worker)
		if err != nil {
			return err
		}
		if !stands {
			delete(r.Running, worker)
		}
	}
	return nil
}

// followed waits until the usage records have been followed to a sequence.
func (b *Budgets) followed(ctx context.Context, seq uint64) error {
	ctx, cancel := context.WithTimeoutCause(ctx, followTimeout, errBehind)
	defer cancel()
	for {
		b.mu.Lock()
		there, changed := b.listed && b.seq >= seq, b.changed
		b.mu.Unlock()
		if there {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if b.remade(seq) {
				return nil
			}
			return context.Cause(ctx)
		}
	}
}

// remade reports whether the stream of usage records has no such sequence any more, and
// everything in it has been followed.
func (b *Budgets) remade(seq uint64) bool {
	ctx, cancel := context.WithTimeout(b.life, followTimeout)
	defer cancel()
	stream, err := b.o.JS.Stream(ctx, b.o.Names.UsageStream())
	if err != nil {
		return false
	}
	last := stream.CachedInfo().State.LastSeq
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.listed && last < seq && b.seq >= last
}

var errBehind = errors.New("what budgets have left is not known: the usage records could not be read in time")

// giveBack takes a session's reservations back. What is left of one that can't be
// written goes with the worker's lease.
func (b *Budgets) giveBack(names []string, worker string) {
	for _, name := range names {
		err := retry.Until(b.life, retry.Backoff{Initial: kv.RetryPause / 10, Max: time.Second}, nil, func() error {
			b.writing.Lock()
			defer b.writing.Unlock()
			var r reservations
			revision, err := b.o.State.Get(b.life, name, &r)
			if err != nil || r.Running[worker] == 0 { // its lease was lost meanwhile
				return err
			}
			if r.Running[worker]--; r.Running[worker] == 0 {
				delete(r.Running, worker)
			}
			r.Upto = max(r.Upto, b.o.Written())
			_, err = b.o.State.Put(b.life, name, r, revision)
			return err
		})
		if err != nil {
			b.o.Log.Warn().Err(err).Str("key", name).Msg("could not give a budget's reservation back; it ends with this worker's lease")
		}
	}
}

// endTimeout bounds giving reservations back when the worker stops.
const endTimeout = 10 * time.Second

// Run follows the usage records and settings until ctx ends, then waits for reservations
// on their way back.
func (b *Budgets) Run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { b.repeat(ctx, "what is spent of budgets", b.follow) })
	wg.Go(func() { b.repeat(ctx, "the settings of budgets", b.followSettings) })
	wg.Wait()
	stop := time.AfterFunc(endTimeout, b.end)
	b.wg.Wait()
	stop.Stop()
	b.end()
}

func (b *Budgets) repeat(ctx context.Context, what string, follow func(context.Context) error) {
	for ctx.Err() == nil {
		err := follow(ctx)
		if ctx.Err() != nil {
			return
		}
		b.o.Log.Warn().Err(err).Msg("can't follow " + what + "; beginning again")
		_ = retry.Pause(ctx, time.Second, nil) // the loop looks at ctx
	}
}

func (b *Budgets) follow(ctx context.Context) error {
	b.forget()
	cfg := jetstream.OrderedConsumerConfig{FilterSubjects: []string{b.o.Names.AllUsage()}}
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
	consumer, err := stream.OrderedConsumer(ctx, cfg)
	if err != nil {
		return err
	}
	if consumer.CachedInfo().NumPending == 0 {
		b.learnedAll(last)
	}
	messages, err := consumer.Messages()
	if err != nil {
		return err
	}
	defer messages.Stop()
	for {
		msg, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			return err
		}
		meta, err := msg.Metadata()
		if err != nil {
			return err
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

// learn takes a usage record in.
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
	if !b.listed || a.period != usage.Day(begin) {
		return nil // what was there has been warned of
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
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.listed {
		b.listed = true
		for a := range b.spent { // those that are over their limit already are no news
			_ = b.warning(a)
		}
	}
	b.seq = max(b.seq, seq)
	b.notify()
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
	defer func() { _ = watch.Stop() }() // it may have ended by itself
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
	defer b.mu.Unlock()
	b.settings = maps.Clone(settings)
	b.notify()
}

// Spending is one account as it stands.
type Spending struct {
	Key     string    `json:"key"`
	Value   string    `json:"value"`
	Per     string    `json:"per"`
	Credits int64     `json:"credits"`
	Spent   int64     `json:"spent"`
	Until   time.Time `json:"until"`
}

// Standing returns what is spent of each budget in the period that now lies in, the
// largest share first. sums are the ledger's, of days; settings what was set at run
// time, by key.
func Standing(rules []Rule, sums []usage.Sum, settings map[string]int64, now time.Time) []Spending {
	spent := make(map[account]int64)
	for _, s := range sums {
		for i, r := range rules {
			if value, ok := (Job{App: s.App, Labels: s.Labels}).Value(r.Key); ok {
				spent[account{i, value, r.periodOf(s.Period)}] += s.Credits
			}
		}
	}
	list := []Spending{}
	for a, credits := range spent {
		r := rules[a.rule]
		if begin, end := r.bounds(now); a.period == usage.Day(begin) {
			limit := r.Credits
			if set, ok := settings[SettingKey(r.Key, r.Per)]; ok {
				limit = set
			}
			list = append(list, Spending{r.Key, a.value, r.Per, limit, credits, end})
		}
	}
	slices.SortFunc(list, func(a, b Spending) int {
		return cmp.Or(cmp.Compare(float64(b.Spent)/float64(max(b.Credits, 1)), float64(a.Spent)/float64(max(a.Credits, 1))),
			cmp.Compare(a.Key, b.Key), cmp.Compare(a.Value, b.Value), cmp.Compare(a.Per, b.Per))
	})
	return list
}
