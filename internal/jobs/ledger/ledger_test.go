package ledger

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/jobs/usage"
	"avatarworker/internal/kv"
)

var (
	began        = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	errCancelled = errors.New("cancelled")
	errDrained   = errors.New("drained")
	errLost      = errors.New("lost")
	errStorage   = errors.New("full")
	errFull      = errors.New("the stream is full")
	errAway      = errors.New("no answer")
)

// fake is a ledger in memory.
type fake struct {
	stored    map[string]usage.Record
	corrected map[string]usage.Record // by the ID of the estimate
	err       error                   // of each write
	unread    int                     // so many times Find fails
}

var _ Ledger = (*fake)(nil)

func (f *fake) Sequence() uint64                         { return uint64(len(f.stored)) }
func (f *fake) Credits(connected time.Duration) int64    { return usage.Tariff{}.Credits(connected) }
func (f *fake) Own(_, _ uint64) ([]usage.Stored, bool)   { return nil, false }
func (f *fake) find(r usage.Record) (usage.Record, bool) { s, ok := f.stored[r.ID()]; return s, ok }
func (f *fake) Store(ctx context.Context, r usage.Record) (bool, error) {
	return f.Send(r)(ctx, time.Second)
}

func (f *fake) Send(r usage.Record) func(context.Context, time.Duration) (bool, error) {
	if f.err != nil {
		return func(context.Context, time.Duration) (bool, error) { return false, f.err }
	}
	_, duplicate := f.find(r)
	if !duplicate {
		f.stored[r.ID()] = r
	}
	return func(context.Context, time.Duration) (bool, error) { return !duplicate, f.err }
}

func (f *fake) Correct(_ context.Context, estimate, r usage.Record) error {
	if !estimate.Estimated || r.Estimated || estimate.ID() != r.ID() {
		return fmt.Errorf("%+v does not correct %+v", r, estimate)
	}
	f.corrected[estimate.ID()] = r
	return f.err
}

func (f *fake) Find(_ context.Context, r usage.Record, _ time.Time) (estimate, exactly *usage.Record, err error) {
	if f.unread > 0 {
		f.unread--
		return nil, nil, errAway
	}
	found, ok := f.find(r)
	switch {
	case !ok:
		return nil, nil, nil
	case found.Estimated:
		return &found, nil, nil
	default:
		return nil, &found, nil
	}
}

// bucket is a bucket in memory.
type bucket struct {
	values    map[string][]byte
	revisions map[string]uint64
	before    func() // each Put
}

var _ Bucket = (*bucket)(nil)

func (b *bucket) Get(_ context.Context, key string, v any) (uint64, error) {
	data, ok := b.values[key]
	if !ok {
		return 0, nil
	}
	return b.revisions[key], json.Unmarshal(data, v)
}

func (b *bucket) Put(_ context.Context, key string, v any, revision uint64) (uint64, error) {
	if f := b.before; f != nil {
		b.before = nil
		f()
	}
	if b.revisions[key] != revision {
		return 0, kv.ErrConflict
	}
	b.revisions[key]++
	var err error
	b.values[key], err = json.Marshal(v)
	return b.revisions[key], err
}

// desk is a Writer with what it writes to.
type desk struct {
	*Writer
	ledger *fake
	bucket *bucket
	used   int // sessions that were reported
}

func newDesk() *desk {
	d := &desk{
		ledger: &fake{stored: make(map[string]usage.Record), corrected: make(map[string]usage.Record)},
		bucket: &bucket{values: make(map[string][]byte), revisions: make(map[string]uint64)},
	}
	d.Writer = New(Options{
		Ledger: d.ledger, Bucket: d.bucket,
		Causes: Causes{Cancelled: errCancelled, Released: []error{errDrained}, Lost: errLost, Storage: errStorage},
		Used:   func(string, string, time.Duration, int64) { d.used++ },
	})
	return d
}

func (d *desk) store(r *lifecycle.Record, sent *Sent) error {
	return d.Store(r, sent, func(write func(context.Context, time.Duration) error) error {
		return write(context.Background(), time.Minute)
	})
}

// closed is the record of a job whose session with that number was closed after 7 s.
func closed(session int) *lifecycle.Record {
	r := running(session)
	r.Connected("c", "us-west", began)
	r.Closed(7*time.Second, usage.CodeCompleted)
	return r
}

func running(session int) *lifecycle.Record {
	return &lifecycle.Record{
		JobID: "J", Run: 1, StreamSeq: 7, Session: session, Attempt: 1, State: lifecycle.StateRunning,
		AppID: "app", Queue: "default", WorkerID: "w", StartedAt: began,
	}
}

// lost is the record of a job that goes on after its session was lost: the next is
// under way.
func lost(session int) *lifecycle.Record {
	r := running(session)
	r.Connected("c", "us-west", began)
	r.Lost(began.Add(30 * time.Second))
	r.Session++
	return r
}

func TestASessionHasTheCodeOfItsEnd(t *testing.T) {
	failed := errors.Newf(errors.CodeServerError, errors.PhaseRuntime, "gone")
	d := newDesk()
	for _, c := range []struct {
		err, cause error
		want       string
	}{
		{nil, nil, usage.CodeCompleted},
		{nil, errDrained, usage.CodeCompleted}, // it was quicker
		{failed, errCancelled, usage.CodeCancelled},
		{failed, errDrained, usage.CodeReleased},
		{failed, fmt.Errorf("lease: %w", errLost), usage.CodeReleased},
		{failed, lifecycle.ErrSuperseded, usage.CodeReleased},
		{fmt.Errorf("checkpoint: %w", lifecycle.ErrSuperseded), nil, usage.CodeReleased},
		{fmt.Errorf("frames: %w", errStorage), nil, usage.CodeStorage},
		{fmt.Errorf("frames: %w", errStorage), errDrained, usage.CodeReleased},
		{failed, nil, string(errors.CodeServerError)},
	} {
		if got := d.Code(c.err, c.cause); got != c.want {
			t.Errorf("%v, cancelled by %v: %s, want %s", c.err, c.cause, got, c.want)
		}
	}
}

func TestASessionIsReportedOnceHoweverOftenItIsWritten(t *testing.T) {
	d := newDesk()
	r := closed(1)
	sent := d.Send(r, nil)
	for range 2 { // what follows from the record is repeated
		if err := d.store(r, &sent); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.store(r, new(Sent)); err != nil { // by another worker
		t.Fatal(err)
	}
	if len(d.ledger.stored) != 1 || d.ledger.stored["J.run1.s1"].Credits != 2 || d.used != 1 {
		t.Errorf("reported %d times: %+v", d.used, d.ledger.stored)
	}
}

func TestOnlyWhatIsNotKnownToBeStoredIsWritten(t *testing.T) {
	d := newDesk()
	r := lost(1)
	r.UsageStored()
	r.Connected("c2", "us-west", began.Add(time.Minute))
	r.Closed(time.Second, usage.CodeCompleted)
	if err := d.store(r, new(Sent)); err != nil {
		t.Fatal(err)
	}
	if _, again := d.ledger.stored["J.run1.s1"]; again || len(d.ledger.stored) != 1 {
		t.Errorf("%+v", d.ledger.stored)
	}
}

func TestARecordThatCannotBeWrittenIsSaidAndWrittenAgain(t *testing.T) {
	d := newDesk()
	d.ledger.err = errFull
	r := closed(1)
	sent := d.Send(r, nil)
	if err := d.store(r, &sent); !errors.Is(err, errFull) || d.used != 0 {
		t.Fatalf("%v; reported %d times", err, d.used)
	}
	d.ledger.err = nil
	if err := d.store(r, new(Sent)); err != nil || d.used != 1 { // the next delivery
		t.Errorf("%v; reported %d times", err, d.used)
	}
}

func TestASessionIsSentAtItsEndUnlessItsJobMayBeAnothers(t *testing.T) {
	for name, c := range map[string]struct {
		r     *lifecycle.Record
		cause error
		want  int
	}{
		"closed":          {closed(1), nil, 1},
		"drained":         {closed(1), errDrained, 1},
		"lease lost":      {closed(1), errLost, 0},
		"superseded":      {closed(1), lifecycle.ErrSuperseded, 0},
		"never confirmed": {running(1), nil, 0},
		"an estimate":     {lost(1), nil, 0},
	} {
		d := newDesk()
		if d.Send(c.r, c.cause); len(d.ledger.stored) != c.want {
			t.Errorf("%s: %+v", name, d.ledger.stored)
		}
	}
}

func TestWithoutALedgerNothingIsWritten(t *testing.T) {
	w := New(Options{})
	sent := w.Send(closed(1), nil)
	err := w.Store(closed(1), &sent, func(func(context.Context, time.Duration) error) error { t.Error("a write"); return nil })
	if err != nil || w.Correct(context.Background(), closed(1), &sent) != nil || w.Owed(lost(1)) {
		t.Error(err)
	}
}

func TestALostSessionIsWrittenWhileTheNextRuns(t *testing.T) {
	for name, c := range map[string]struct {
		err    error
		change func(*lifecycle.Record) // meanwhile
		stored bool
	}{
		"written":          {nil, func(*lifecycle.Record) {}, true},
		"fails":            {errFull, func(*lifecycle.Record) {}, false},
		"settled before":   {nil, func(r *lifecycle.Record) { r.Release("drain") }, false},
		"the next started": {nil, func(r *lifecycle.Record) { r.Session++ }, false},
	} {
		d := newDesk()
		d.ledger.err = c.err
		r := lost(1)
		now := r.Clone()
		c.change(now)
		if !d.Owed(r) || d.Owed(running(1)) {
			t.Fatal("the lost session is not owed, or one that runs is")
		}
		if err := d.StoreLost(context.Background(), r, func(f func(*lifecycle.Record)) { f(now) }); !errors.Is(err, c.err) {
			t.Errorf("%s: %v", name, err)
		}
		if got := now.Usage[0].Stored; got != c.stored {
			t.Errorf("%s: noted as stored %t", name, got)
		}
	}
}

func TestAnEstimateIsCorrectedWhereverItIs(t *testing.T) {
	estimate := func(d *desk) usage.Record { return d.record(lost(1), lost(1).Usage[0]) }
	record := func(r *lifecycle.Record) func(*desk) {
		return func(d *desk) { _, _ = d.bucket.Put(context.Background(), "J", r, 0) }
	}
	next := lost(1)
	next.Run = 2
	for name, c := range map[string]struct {
		before            func(*desk)
		sent              bool
		stored, corrected bool // exactly, as a record of its own; in place of the estimate
	}{
		"in the ledger":            {before: func(d *desk) { d.ledger.stored["J.run1.s1"] = estimate(d) }, corrected: true},
		"there before it was sent": {before: func(d *desk) { d.ledger.stored["J.run1.s1"] = estimate(d) }, sent: true, corrected: true},
		"will be written":          {before: record(lost(1)), corrected: true},
		"was sent first":           {before: record(lost(1)), sent: true, stored: true},
		"handed back, no crash":    {before: record(running(2)), stored: true},
		"record of the next run":   {before: record(next), stored: true},
		"no record":                {before: func(*desk) {}, stored: true},
		"known exactly":            {before: func(d *desk) { d.ledger.stored["J.run1.s1"] = d.record(closed(1), closed(1).Usage[0]) }, stored: true},
	} {
		d := newDesk()
		c.before(d)
		var sent Sent
		if c.sent {
			sent = d.Send(closed(1), nil)
		}
		if err := d.Correct(context.Background(), closed(1), &sent); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		first, ok := d.ledger.stored["J.run1.s1"]
		correction, corrected := d.ledger.corrected["J.run1.s1"]
		if stored := ok && !first.Estimated; stored != c.stored || corrected != c.corrected || corrected && correction.ConnectedMS != 7000 {
			t.Errorf("%s: stored %+v, corrected by %+v", name, first, correction)
		}
	}
}

// A worker that was frozen may wake up while NATS is away.
func TestACorrectionIsTriedUntilTheLedgerAnswers(t *testing.T) {
	d := newDesk()
	d.ledger.stored["J.run1.s1"] = d.record(lost(1), lost(1).Usage[0])
	d.ledger.unread = 2
	if err := d.Correct(context.Background(), closed(1), new(Sent)); err != nil {
		t.Fatal(err)
	}
	if correction, ok := d.ledger.corrected["J.run1.s1"]; !ok || correction.ConnectedMS != 7000 {
		t.Errorf("corrected: %+v", d.ledger.corrected)
	}
}

func TestACorrectionThatFailsIsSaid(t *testing.T) {
	d := newDesk()
	d.ledger.err = errFull
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if err := d.Correct(ctx, closed(1), new(Sent)); !errors.Is(err, errFull) || d.used != 0 {
		t.Errorf("%v; reported %d times", err, d.used)
	}
	if err := d.Correct(context.Background(), running(1), new(Sent)); err != nil {
		t.Errorf("a session that was never confirmed: %v", err)
	}
}

func TestOneWorkerAddsAsLongAsItsLeaseIsValid(t *testing.T) {
	d := newDesk()
	valid := map[string]bool{"w1": true, "w2": true}
	leaseValid := func(_ context.Context, id string) (bool, error) { return valid[id], nil }
	expect := func(own string, want bool) {
		t.Helper()
		if got, err := takeTurn(context.Background(), d.bucket, own, leaseValid); got != want || err != nil {
			t.Errorf("%s: %t, %v", own, got, err)
		}
	}
	if mine, err := takeTurn(context.Background(), d.bucket, "", leaseValid); mine || !errors.Is(err, usage.ErrNotYet) {
		t.Errorf("without a lease: %t, %v", mine, err)
	}
	expect("w1", true)
	expect("w1", true)
	expect("w2", false)
	valid["w1"] = false
	d.bucket.before = func() { expect("w3", true) } // quicker
	expect("w2", false)
	expect("w1", true) // w3 has no lease
	if _, err := takeTurn(context.Background(), d.bucket, "w2", func(context.Context, string) (bool, error) { return false, errFull }); !errors.Is(err, errFull) {
		t.Errorf("the lease can't be read: %v", err)
	}
}
