package dlq

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/kv"
	"avatarworker/internal/leader"
)

const (
	// maxClaims bounds what is kept for one job id.
	maxClaims = 128
	// claimTime bounds the reading and writing of a claim; the server does not
	// answer a write that it does not permit.
	claimTime = 15 * time.Second
	claimTry  = 2 * time.Second
)

// runs decides which run a letter is replayed as.
type runs struct {
	s      *Store
	letter Letter
	bucket jetstream.KeyValue
	store  *kv.Store
	life   time.Duration    // how long the bucket keeps a claim; 0: for ever
	now    func() time.Time // by the server's clock

	state    lifecycle.Claims
	revision uint64
}

func (s *Store) stateBucket(ctx context.Context) (jetstream.KeyValue, error) {
	name := s.names.StateBucket()
	bucket, err := s.js.KeyValue(ctx, name)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return nil, fmt.Errorf("bucket %s not found, which records what has been replayed: start a worker, which makes it", name)
	}
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", name, err)
	}
	return bucket, nil
}

func (s *Store) openRuns(ctx context.Context, l Letter) (*runs, error) {
	bucket, err := s.stateBucket(ctx)
	if err != nil {
		return nil, err
	}
	status, err := bucket.Status(ctx)
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", bucket.Bucket(), err)
	}
	r := &runs{s: s, letter: l, bucket: bucket, store: kv.NewStore(s.js, bucket, claimTry), life: status.TTL(), now: s.now}
	if r.now == nil {
		r.now = serverClock(status)
	}
	return r, nil
}

// serverClock goes on from the time at which the server answered.
func serverClock(status jetstream.KeyValueStatus) func() time.Time {
	read := time.Now()
	at := read
	if s, ok := status.(*jetstream.KeyValueBucketStatus); ok && !s.StreamInfo().TimeStamp.IsZero() {
		at = s.StreamInfo().TimeStamp
	}
	return func() time.Time { return at.Add(time.Since(read)) }
}

func (r *runs) key() string { return lifecycle.ClaimPrefix + r.letter.JobID }

func (r *runs) isOwn(c lifecycle.Claim) bool {
	return c.Letter == r.letter.Seq && c.StoredAt.Equal(r.letter.StoredAt)
}

// recorded is what counts of the job's record.
type recorded struct {
	Run           int `json:"run"`            // 0: the job has no record (any more)
	CancelThrough int `json:"cancel_through"` // see lifecycle.Record
}

func (r *runs) recorded(ctx context.Context) (record recorded, err error) {
	if _, err := r.store.Get(ctx, r.letter.JobID, &record); err != nil {
		return record, fmt.Errorf("record of job %s: %w", r.letter.JobID, err)
	}
	return record, nil
}

// look returns the letter's claim, or the one that it would make, and reports
// whether the job was published by it.
func (r *runs) look(ctx context.Context) (own lifecycle.Claim, done bool, err error) {
	l := r.letter
	own = lifecycle.Claim{Run: l.Run + 1, Letter: l.Seq, StoredAt: l.StoredAt}
	recorded, err := r.recorded(ctx)
	if err != nil {
		return own, false, err
	}
	r.state = lifecycle.Claims{}
	if r.revision, err = r.store.Get(ctx, r.key(), &r.state); err != nil {
		return own, false, fmt.Errorf("replays of job %s: %w", l.JobID, err)
	}
	highest := max(l.Run, recorded.Run)
	first := false // reports whether the letter's first choice is another's
	for _, c := range r.state.Claims {
		switch {
		case r.isOwn(c) && c.StreamSeq == 0 && c.Run > recorded.Run && c.Run <= recorded.CancelThrough:
			// Cancelled since it was claimed: who replays the letter again means another run.
		case r.isOwn(c):
			return c, c.StreamSeq != 0 || recorded.Run >= c.Run, nil
		case c.Run == own.Run:
			first = true
		}
		highest = max(highest, c.Run)
	}
	if err := r.waitForOthers(ctx); err != nil {
		return own, false, err
	}
	if recorded.Run > l.Run && !first {
		// Replayed by a build that made no claims, or published by hand.
		if r.life > 0 && r.now().Sub(l.StoredAt) > r.life {
			return own, false, fmt.Errorf("dead letter %d: job %s is at run %d already, and whether that came from this letter is not known any more: remove the letter, or publish its job under another id",
				l.Seq, l.JobID, recorded.Run)
		}
		return own, true, nil
	}
	if highest >= jobspec.MaxRun {
		return own, false, fmt.Errorf("dead letter %d: job %s has had run %d, the last that a job may have: publish the job under another id", l.Seq, l.JobID, jobspec.MaxRun)
	}
	own.Run = highest + 1
	return own, false, nil
}

// waitForOthers fails while the replay of another letter of the job may be
// under way: a later run must not be published before an earlier one.
func (r *runs) waitForOthers(ctx context.Context) error {
	for _, c := range r.state.Claims {
		if c.StreamSeq != 0 || r.isOwn(c) {
			continue
		}
		msg, err := leader.Message(ctx, r.s.js, r.s.names.DLQStream(), c.Letter)
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
		case err != nil:
			return fmt.Errorf("dead letter %d: %w", c.Letter, err)
		case msg.Time.Equal(c.StoredAt):
			return fmt.Errorf("dead letter %d: the replay of dead letter %d, of the same job %s, has begun and is not finished: replay or remove that one first",
				r.letter.Seq, c.Letter, r.letter.JobID)
		}
	}
	return nil
}

// claim writes down the run that the letter is replayed as, one after the run
// given (0: any). corrected is the digest of what is not published.
func (r *runs) claim(ctx context.Context, after int, corrected string) (own lifecycle.Claim, done bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, claimTime)
	defer cancel()
	for {
		own, done, err = r.look(ctx)
		if err != nil || done {
			return own, done, err
		}
		i := slices.IndexFunc(r.state.Claims, r.isOwn)
		if i >= 0 && own.Run == r.state.Claims[i].Run && own.Run > after {
			return own, false, nil
		}
		if i >= 0 {
			r.state.Claims = slices.Delete(r.state.Claims, i, i+1)
		}
		for _, c := range r.state.Claims {
			after = max(after, c.Run)
		}
		own.Run = max(own.Run, after+1)
		if own.Run > jobspec.MaxRun {
			return own, false, fmt.Errorf("dead letter %d: job %s has no run left: publish the job under another id", r.letter.Seq, r.letter.JobID)
		}
		own.At, own.Corrected = r.now().UTC(), corrected
		r.state.Claims = append(r.state.Claims, own)
		if err = r.write(ctx); !errors.Is(err, kv.ErrConflict) {
			return own, false, err
		}
	}
}

// before returns the sequence of the run before own's that was replayed from
// another letter and is still in the jobs stream, 0 if there is none.
func (r *runs) before(ctx context.Context, own lifecycle.Claim) (uint64, error) {
	var last lifecycle.Claim
	for _, c := range r.state.Claims {
		if c.Run < own.Run && c.Run > last.Run && c.StreamSeq != 0 {
			last = c
		}
	}
	if last.StreamSeq == 0 {
		return 0, nil
	}
	msg, err := leader.Message(ctx, r.s.js, r.s.names.JobsStream(), last.StreamSeq)
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound):
		return 0, nil
	case err != nil:
		return 0, fmt.Errorf("replaying job %s: %w", r.letter.JobID, err)
	case msg.Header.Get(HeaderJobID) != r.letter.JobID || number(msg.Header, HeaderRun) != last.Run:
		return 0, nil // the stream was made again
	}
	return last.StreamSeq, nil
}

// published notes where in the jobs stream the letter's job is, as that run, and what it
// was corrected from.
func (r *runs) published(ctx context.Context, run int, seq uint64, corrected string) error {
	ctx, cancel := context.WithTimeout(ctx, claimTime)
	defer cancel()
	for {
		i := slices.IndexFunc(r.state.Claims, r.isOwn)
		if i < 0 || r.state.Claims[i].Run != run || r.state.Claims[i].StreamSeq != 0 {
			return nil
		}
		c := &r.state.Claims[i]
		c.StreamSeq, c.At, c.Corrected = seq, r.now().UTC(), corrected
		err := r.write(ctx)
		if !errors.Is(err, kv.ErrConflict) {
			return err
		}
		r.state = lifecycle.Claims{}
		if r.revision, err = r.store.Get(ctx, r.key(), &r.state); err != nil {
			return fmt.Errorf("replays of job %s: %w", r.letter.JobID, err)
		}
	}
}

func (r *runs) write(ctx context.Context) error {
	if over := len(r.state.Claims) - maxClaims; over > 0 {
		r.state.Claims = slices.Delete(r.state.Claims, 0, over)
	}
	revision, err := r.store.Put(ctx, r.key(), r.state, r.revision)
	if err != nil {
		return fmt.Errorf("note the replay of job %s (it needs the permission to publish to $KV.%s.%s*): %w",
			r.letter.JobID, r.s.names.StateBucket(), lifecycle.ClaimPrefix, err)
	}
	r.revision = revision
	return nil
}
