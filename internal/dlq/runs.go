package dlq

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/jobspec"
	"avatarworker/internal/kv"
	"avatarworker/internal/leader"
)

const (
	// claimPrefix precedes a job id in the bucket of records. No job id has
	// a dot.
	claimPrefix = "replay."
	// maxClaims bounds what is kept for one job id.
	maxClaims = 128
	// claimTime bounds the reading and writing of a claim; the server does not
	// answer a write that it does not permit.
	claimTime = 15 * time.Second
	claimTry  = 2 * time.Second
)

// claim says which dead letter a run of a job is replayed from. It is written
// before the job is published. So a replay that is repeated finds its own run,
// also when its message has been run and is gone, and another letter of the same
// job takes another run.
type claim struct {
	Run      int       `json:"run"`
	Letter   uint64    `json:"dead_letter"`
	StoredAt time.Time `json:"stored_at"` // of the letter
	// StreamSeq is the sequence of the published job in the jobs stream; 0: it
	// may not have been published.
	StreamSeq uint64 `json:"stream_seq,omitempty"`
	// At is when it was replayed, and Corrected the digest of the letter's own bytes
	// where another job is published in their place. Until StreamSeq is known they say
	// what was meant.
	At        time.Time `json:"at,omitzero"`
	Corrected string    `json:"corrected,omitempty"`
}

// claims are those of one job id, oldest first.
type claims struct {
	Claims []claim `json:"claims"`
}

// runs decides which run a letter is replayed as.
type runs struct {
	s      *Store
	letter Letter
	bucket jetstream.KeyValue
	store  *kv.Store
	life   time.Duration // how long the bucket keeps a claim; 0: for ever

	state    claims
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
	return &runs{s: s, letter: l, bucket: bucket, store: kv.NewStore(s.js, bucket, claimTry), life: status.TTL()}, nil
}

func (r *runs) key() string { return claimPrefix + r.letter.JobID }

func (r *runs) isOwn(c claim) bool {
	return c.Letter == r.letter.Seq && c.StoredAt.Equal(r.letter.StoredAt)
}

// recorded returns the run that the job's record is at, 0 if it has none (any
// more).
func (r *runs) recorded(ctx context.Context) (int, error) {
	var record struct {
		Run int `json:"run"`
	}
	if _, err := r.store.Get(ctx, r.letter.JobID, &record); err != nil {
		return 0, fmt.Errorf("record of job %s: %w", r.letter.JobID, err)
	}
	return record.Run, nil
}

// look returns the letter's claim, or the one that it would make, and reports
// whether the job was published by it.
func (r *runs) look(ctx context.Context) (own claim, done bool, err error) {
	l := r.letter
	own = claim{Run: l.Run + 1, Letter: l.Seq, StoredAt: l.StoredAt}
	recorded, err := r.recorded(ctx)
	if err != nil {
		return own, false, err
	}
	r.state = claims{}
	if r.revision, err = r.store.Get(ctx, r.key(), &r.state); err != nil {
		return own, false, fmt.Errorf("replays of job %s: %w", l.JobID, err)
	}
	highest := max(l.Run, recorded)
	first := false // reports whether the letter's first choice is another's
	for _, c := range r.state.Claims {
		switch {
		case r.isOwn(c):
			return c, c.StreamSeq != 0 || recorded >= c.Run, nil
		case c.Run == own.Run:
			first = true
		}
		highest = max(highest, c.Run)
	}
	if err := r.waitForOthers(ctx); err != nil {
		return own, false, err
	}
	if recorded > l.Run && !first {
		// Replayed by a build that made no claims, or published by hand.
		if r.life > 0 && r.s.now().Sub(l.StoredAt) > r.life {
			return own, false, fmt.Errorf("dead letter %d: job %s is at run %d already, and whether that came from this letter is not known any more: remove the letter, or publish its job under another id",
				l.Seq, l.JobID, recorded)
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
		if c.StreamSeq != 0 {
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
func (r *runs) claim(ctx context.Context, after int, corrected string) (own claim, done bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, claimTime)
	defer cancel()
	for {
		own, done, err = r.look(ctx)
		if err != nil || done {
			return own, done, err
		}
		i := slices.IndexFunc(r.state.Claims, r.isOwn)
		if i >= 0 && own.Run > after {
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
		own.At, own.Corrected = r.s.now().UTC(), corrected
		r.state.Claims = append(r.state.Claims, own)
		if err = r.write(ctx); !errors.Is(err, kv.ErrConflict) {
			return own, false, err
		}
	}
}

// before returns the sequence of the run before own's that was replayed from
// another letter and is still in the jobs stream, 0 if there is none.
func (r *runs) before(ctx context.Context, own claim) (uint64, error) {
	var last claim
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

// published notes where in the jobs stream the letter's job is, and what it was
// corrected from.
func (r *runs) published(ctx context.Context, seq uint64, corrected string) error {
	ctx, cancel := context.WithTimeout(ctx, claimTime)
	defer cancel()
	for {
		i := slices.IndexFunc(r.state.Claims, r.isOwn)
		if i < 0 || r.state.Claims[i].StreamSeq != 0 {
			return nil
		}
		c := &r.state.Claims[i]
		c.StreamSeq, c.At, c.Corrected = seq, r.s.now().UTC(), corrected
		err := r.write(ctx)
		if !errors.Is(err, kv.ErrConflict) {
			return err
		}
		r.state = claims{}
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
			r.letter.JobID, r.s.names.StateBucket(), claimPrefix, err)
	}
	r.revision = revision
	return nil
}
