package usage

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nuid"

	"avatarworker/internal/ack"
	"avatarworker/internal/errors"
	"avatarworker/internal/failpoint"
	"avatarworker/internal/leader"
	"avatarworker/internal/topology"
)

const (
	// headerIncrement is what a counter adds.
	headerIncrement = "Nats-Incr"
	// headerUpto is of a counter's message: the usage record up to which the counter
	// is complete, "<stream>.<sequence>".
	headerUpto = "Avatar-Upto"
)

// position is a usage record's: the stream, by when it was made, and the sequence.
// One of another stream counts as the first record of this one.
type position struct {
	epoch int64 // Unix time in ms
	seq   uint64
}

func (p position) String() string {
	return strconv.FormatInt(p.epoch, 10) + "." + strconv.FormatUint(p.seq, 10)
}

// parsePosition returns the sequence if the text is a position in the same stream,
// else 0.
func parsePosition(text string, epoch int64) uint64 {
	first, second, _ := strings.Cut(text, ".")
	seq, err := strconv.ParseUint(second, 10, 64)
	if err != nil || first != strconv.FormatInt(epoch, 10) {
		return 0
	}
	return seq
}

// Sum is what the sessions of a group add up to.
type Sum struct {
	Group
	Totals
}

// Counter is the present value of one counter.
type Counter struct {
	Subject string
	Totals
	// Upto is the sequence of the usage record up to which the counter is complete;
	// 0: it has none of this stream.
	Upto uint64
	Seq  uint64 // of its newest message
}

// Counters adds usage records to the counters of days and months. It may be done by
// several at once, and repeated: each counter says up to which record it is
// complete, and the id of an increment names where it goes on from.
type Counters struct {
	js      jetstream.JetStream
	sender  *ack.Sender
	names   topology.Names
	labels  []string
	records jetstream.Stream
	epoch   int64

	end  uint64 // the sequence that the newest usage record had when that was asked last
	base uint64 // up to which every counter is complete, when that was asked last
	back bool   // the stream has gone back: it was restored from a backup
	// looks is how often the stream is asked again before that is believed.
	looks int

	upto  map[string]uint64 // what is known of counters, by subject
	known time.Time         // when that was true at the latest
}

// knownFor is how long what is known of counters is taken to be true: much shorter
// than the server recognises the id of an increment.
const knownFor = 10 * time.Minute

// ErrNoCounters means that there is no stream of counters: the server is too old for
// it, or no worker has made it yet.
var ErrNoCounters = errors.New("there are no counters")

// OpenCounters opens the counters. labels are the names by which days and months are
// added up, sorted. The error is ErrNoCounters if there are none.
func OpenCounters(ctx context.Context, js jetstream.JetStream, names topology.Names, labels []string) (*Counters, error) {
	stream := func(name string) (s jetstream.Stream, err error) {
		err = leader.Try(ctx, name, func(ctx context.Context) (err error) {
			s, err = js.Stream(ctx, name)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("stream %s: %w", name, err)
		}
		return s, nil
	}
	records, err := stream(names.UsageStream())
	if err != nil {
		return nil, err
	}
	totals, err := stream(names.TotalsStream())
	if errors.Is(err, jetstream.ErrStreamNotFound) || err == nil && !totals.CachedInfo().Config.AllowMsgCounter {
		return nil, ErrNoCounters
	}
	if err != nil {
		return nil, err
	}
	return &Counters{js: js, sender: ack.NewSender(js.Conn()), names: names, labels: labels, upto: make(map[string]uint64), looks: maxBehind,
		records: records, epoch: records.CachedInfo().Created.UnixMilli(), end: records.CachedInfo().State.LastSeq}, nil
}

const (
	// behindPause is the wait before a stream is asked again that says that it has fewer
	// records than a counter, and maxBehind how often that is done: only a newly elected
	// leader can be behind. For one who adds, and would add records twice, it is
	// maxBehindAdding.
	behindPause     = 100 * time.Millisecond
	maxBehind       = 2
	maxBehindAdding = 30
)

// Upto is the sequence of the usage record up to which every counter is complete. Of a
// stream that was restored from a backup it is the last record at most: those that follow
// count, also where they have the sequences of records that were lost.
func (c *Counters) Upto(ctx context.Context) (uint64, error) {
	upto, err := c.last(ctx, c.names.TotalsUpto(setOf(c.labels)))
	if err != nil {
		return 0, err
	}
	c.base = min(upto, c.end)
	return c.base, nil
}

// begin is Upto for one who adds. It writes down where the counters go on from in a
// stream that has gone back.
func (c *Counters) begin(ctx context.Context) (uint64, error) {
	c.looks = maxBehindAdding
	upto, err := c.Upto(ctx)
	if err != nil || !c.back {
		return upto, err
	}
	subject := c.names.TotalsUpto(setOf(c.labels))
	var p publication
	p.send(c.sender, &nats.Msg{Subject: subject, Header: nats.Header{
		headerIncrement: {Totals{}.Number().String()}, headerUpto: {position{c.epoch, upto}.String()},
	}}, "restored."+nuid.Next())
	if _, err := p.stored(ctx, c.js.Conn(), 0); err != nil {
		return 0, fmt.Errorf("counter %s: %w", subject, err)
	}
	return upto, nil
}

// position returns the sequence of a position. It finds out whether the stream has gone
// back since that was written: the sequence is above c.end then.
func (c *Counters) position(ctx context.Context, text string) (uint64, error) {
	seq := parsePosition(text, c.epoch)
	for n := 0; seq > c.end; n++ {
		info, err := c.records.Info(ctx)
		if err != nil {
			return 0, fmt.Errorf("stream %s: %w", c.names.UsageStream(), err)
		}
		if c.end = info.State.LastSeq; seq <= c.end {
			break
		}
		if c.back = c.back || n >= c.looks; c.back {
			break
		}
		pause(ctx, behindPause)
	}
	return seq, nil
}

// complete is position for one counter. One that was written before the stream has gone
// back is as complete as all are.
func (c *Counters) complete(ctx context.Context, text string) (uint64, error) {
	seq, err := c.position(ctx, text)
	if err == nil && seq > c.end {
		seq = c.base
	}
	return seq, err
}

// last reads from the leader up to which record a counter is complete.
func (c *Counters) last(ctx context.Context, subject string) (uint64, error) {
	msg, err := leader.Last(ctx, c.js, c.names.TotalsStream(), subject)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("counter %s: %w", subject, err)
	}
	return c.position(ctx, msg.Header.Get(headerUpto))
}

// Read calls f with the present counters under filters.
func (c *Counters) Read(ctx context.Context, filters []string, f func(Counter)) error {
	cfg := jetstream.OrderedConsumerConfig{FilterSubjects: filters, DeliverPolicy: jetstream.DeliverLastPerSubjectPolicy}
	return scan(ctx, c.js, c.names.TotalsStream(), cfg, func(msg jetstream.Msg) error {
		t, err := ParseCounter(msg.Data())
		if err != nil {
			return fmt.Errorf("%s in stream %s: %w", msg.Subject(), c.names.TotalsStream(), err)
		}
		meta, err := msg.Metadata()
		if err != nil {
			return err
		}
		upto, err := c.complete(ctx, msg.Headers().Get(headerUpto))
		if err == nil {
			f(Counter{Subject: msg.Subject(), Totals: t, Upto: upto, Seq: meta.Sequence.Stream})
		}
		return err
	})
}

// part is what one record adds to a counter.
type part struct {
	seq uint64
	add Totals
}

// groupKey is what the counters of records without labels depend on.
type groupKey struct {
	year, day  int // UTC
	app, queue string
}

func groupOf(r Record) groupKey {
	at := r.ConfirmedAt.UTC()
	return groupKey{at.Year(), at.YearDay(), r.AppID, r.Queue}
}

// Add adds records that follow each other, oldest first, and notes that every counter
// is complete up to upto. What a counter has already is left out.
func (c *Counters) Add(ctx context.Context, records []Stored, from, upto uint64) error {
	parts := make(map[string][]part)
	var (
		group    groupKey
		subjects []string
	)
	for i := range records {
		for _, e := range records[i].Entries() {
			// Without labels to add up by, most records follow one of the same counter.
			if now := groupOf(e.Record); subjects == nil || now != group || len(c.labels) > 0 {
				group, subjects = now, Subjects(c.names, e.Record, c.labels)
			}
			for _, subject := range subjects {
				parts[subject] = append(parts[subject], part{records[i].Seq, e.Totals})
			}
		}
	}
	if err := c.add(ctx, parts); err != nil {
		return err
	}
	failpoint.Here("totals")
	if upto <= from {
		return nil
	}
	// Its number is of no use, but a counter has to have one.
	return c.add(ctx, map[string][]part{c.names.TotalsUpto(setOf(c.labels)): {{upto, Totals{}}}})
}

// maxTries bounds how often an addition is tried again because other workers add to the
// same counter.
const maxTries = 10

func (c *Counters) add(ctx context.Context, parts map[string][]part) error {
	for range maxTries {
		missed, err := c.tryAdd(ctx, parts)
		if err != nil {
			clear(c.upto) // some may be stored
			return err
		}
		if len(missed) == 0 {
			return nil
		}
		parts = missed
	}
	return errors.New("others add to the same counters all the time")
}

// tryAdd sends an increment for each counter, and returns the parts of those to which
// another worker has added meanwhile.
func (c *Counters) tryAdd(ctx context.Context, parts map[string][]part) (missed map[string][]part, err error) {
	type sent struct {
		subject string
		to      uint64
		publication
	}
	if time.Since(c.known) > knownFor { // this worker may have been frozen
		clear(c.upto)
	}
	c.known = time.Now()
	var waiting []sent
	for subject, list := range parts {
		known, ok := c.upto[subject]
		if !ok {
			if known, err = c.last(ctx, subject); err != nil {
				return nil, err
			}
			if known > c.end {
				known = c.base
			}
			c.upto[subject] = known
		}
		var sum Totals
		to := uint64(0)
		for _, p := range list {
			if p.seq > known {
				sum, to = sum.Plus(p.add), max(to, p.seq)
			}
		}
		if to == 0 {
			continue
		}
		msg := &nats.Msg{Subject: subject, Header: nats.Header{
			headerIncrement: {sum.Number().String()}, headerUpto: {position{c.epoch, to}.String()},
		}}
		increment := sent{subject: subject, to: to}
		increment.send(c.sender, msg, subject+"@"+position{c.epoch, known}.String())
		waiting = append(waiting, increment)
	}
	missed = make(map[string][]part)
	for _, s := range waiting {
		stored, failed := s.stored(ctx, c.js.Conn(), 0)
		switch {
		case failed != nil:
			err = errors.Join(err, fmt.Errorf("counter %s: %w", s.subject, failed))
		case stored.Duplicate: // ours, whose answer was lost, or another worker's
			delete(c.upto, s.subject)
			missed[s.subject] = parts[s.subject]
		default:
			c.upto[s.subject] = s.to
		}
	}
	return missed, err
}

// Correct adds a difference to a counter as it was read. Two that correct it from the
// same state do it once.
func (c *Counters) Correct(ctx context.Context, have Counter, add Totals) error {
	msg := &nats.Msg{Subject: have.Subject, Header: nats.Header{
		headerIncrement: {add.Number().String()}, headerUpto: {position{c.epoch, have.Upto}.String()},
	}}
	var correction publication
	correction.send(c.sender, msg, fmt.Sprintf("rebuild.%s.%d", have.Subject, have.Seq))
	_, err := correction.stored(ctx, c.js.Conn(), 0)
	if err != nil {
		return fmt.Errorf("counter %s: %w", have.Subject, err)
	}
	return nil
}

// maxParts bounds how many records are added at once.
const maxParts = 4096

// CatchUp adds all records that are stored now. foreign is given what is not a usage
// record.
func (c *Counters) CatchUp(ctx context.Context, foreign func(error)) error {
	from, err := c.begin(ctx)
	if err == nil {
		_, err = c.catchUp(ctx, from, foreign)
	}
	return err
}

// catchUp adds the records after from, and returns up to which one.
func (c *Counters) catchUp(ctx context.Context, from uint64, foreign func(error)) (upto uint64, err error) {
	var batch []Stored
	upto = from
	flush := func(to uint64) error {
		err := c.Add(ctx, batch, upto, to)
		if err == nil {
			batch, upto = batch[:0], to
		}
		return err
	}
	last, err := After(ctx, c.js, c.names.UsageStream(), c.names.AllUsage(), from, func(s Stored) error {
		if batch = append(batch, s); len(batch) >= maxParts {
			return flush(s.Seq)
		}
		return nil
	}, foreign)
	if err != nil || last <= upto {
		return upto, err
	}
	return upto, flush(last)
}
