package dlq

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
)

// ReplayedRun is a run of a job that came from a dead letter.
type ReplayedRun struct {
	Run        int       `json:"run"`
	DeadLetter uint64    `json:"dead_letter"` // its sequence; the letter is gone
	At         time.Time `json:"at,omitzero"` // zero: replayed by a version that did not note it
	// Corrected is the digest of the bytes that the letter had, where another job was
	// published in their place. Original returns them.
	Corrected string `json:"corrected,omitempty"`
}

// ErrNoOriginal is in the chain of an error about a run that has no original.
var ErrNoOriginal = errors.New("it was not corrected, or its original is gone after nats.state_ttl")

// roomForOriginals is the part of the bucket's limit, in percent, up to which originals
// are stored: the records of all jobs are in the same bucket.
const roomForOriginals = 75

// originalKey is where the original of a run is kept. No job id has a "=". It is one
// token after lifecycle.ClaimPrefix, as the permissions of operators have it.
func originalKey(jobID string, run int) string {
	return lifecycle.ClaimPrefix + jobID + "=" + strconv.Itoa(run)
}

// keepOriginal stores the letter before another job is published in its place as that
// run. It stays as long as the job's record and claims, and is not seen by those who
// only read events: a job may hold tokens.
func (r *runs) keepOriginal(ctx context.Context, run int) error {
	ctx, cancel := context.WithTimeout(ctx, claimTime)
	defer cancel()
	value, err := packOriginal(r.letter)
	if err != nil {
		return fmt.Errorf("keeping the original of job %s: %w", r.letter.JobID, err)
	}
	status, err := r.bucket.Status(ctx)
	if err != nil {
		return fmt.Errorf("bucket %s: %w", r.bucket.Bucket(), err)
	}
	limit := status.Config().MaxBytes
	if limit > 0 && (int64(status.Bytes())+int64(len(value)))*100 > limit*roomForOriginals { // #nosec G115 -- sizes of a bucket
		return fmt.Errorf("keeping the original of job %s: bucket %s would be more than %d %% full, and the records of all jobs are in it: raise streams.state.max_bytes and run 'avatarworker setup --apply'",
			r.letter.JobID, r.bucket.Bucket(), roomForOriginals)
	}
	if _, err := r.bucket.Put(ctx, originalKey(r.letter.JobID, run), value); err != nil {
		return fmt.Errorf("keeping the original of job %s (it needs the permission to publish to $KV.%s.%s*): %w",
			r.letter.JobID, r.bucket.Bucket(), lifecycle.ClaimPrefix, err)
	}
	return nil
}

// packOriginal compresses the letter: a line of JSON, and the job's bytes after it.
func packOriginal(l Letter) ([]byte, error) {
	data := l.Data
	l.Data = nil
	head, err := json.Marshal(l)
	if err != nil {
		return nil, err
	}
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	for _, part := range [][]byte{head, {'\n'}, data} {
		if _, err := z.Write(part); err != nil {
			return nil, err
		}
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return packed.Bytes(), nil
}

func unpackOriginal(packed []byte) (Letter, error) {
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return Letter{}, err
	}
	plain, err := io.ReadAll(io.LimitReader(z, maxUnzippedBody+1))
	if err = errors.Join(err, z.Close()); err != nil {
		return Letter{}, err
	}
	if len(plain) > maxUnzippedBody {
		return Letter{}, fmt.Errorf("it has more than %d MiB, which no job has", maxUnzippedBody>>20)
	}
	head, data, _ := bytes.Cut(plain, []byte("\n"))
	var l Letter
	if err := json.Unmarshal(head, &l); err != nil {
		return Letter{}, err
	}
	l.Data = data
	return l, nil
}

// Replays returns the runs of a job that came from dead letters, by run. Any replica may
// answer: it is for people to look at.
func (s *Store) Replays(ctx context.Context, jobID string) ([]ReplayedRun, error) {
	bucket, err := s.stateBucket(ctx)
	if err != nil {
		return nil, err
	}
	return replaysIn(ctx, bucket, jobID)
}

func replaysIn(ctx context.Context, bucket jetstream.KeyValue, jobID string) ([]ReplayedRun, error) {
	entry, err := bucket.Get(ctx, lifecycle.ClaimPrefix+jobID)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return nil, nil
	}
	var state lifecycle.Claims
	if err == nil {
		err = json.Unmarshal(entry.Value(), &state)
	}
	if err != nil {
		return nil, fmt.Errorf("replays of job %s: %w", jobID, err)
	}
	var list []ReplayedRun
	for _, c := range state.Claims {
		list = append(list, ReplayedRun{Run: c.Run, DeadLetter: c.Letter, At: c.At, Corrected: c.Corrected})
	}
	return list, nil
}

// Original returns the dead letter that a run was corrected from, with the job's own
// bytes. run 0 is the last run that was corrected. ErrNoOriginal is in the chain of the
// error if there is none.
func (s *Store) Original(ctx context.Context, jobID string, run int) (l Letter, of ReplayedRun, err error) {
	bucket, err := s.stateBucket(ctx)
	if err != nil {
		return l, of, err
	}
	list, err := replaysIn(ctx, bucket, jobID)
	if err != nil {
		return l, of, err
	}
	for _, r := range list {
		if r.Corrected != "" && (run == 0 || r.Run == run) && r.Run > of.Run {
			of = r
		}
	}
	switch {
	case of.Run == 0 && run > 0:
		return l, of, fmt.Errorf("original of job %s, run %d: %w", jobID, run, ErrNoOriginal)
	case of.Run == 0:
		return l, of, fmt.Errorf("original of job %s: %w", jobID, ErrNoOriginal)
	}
	entry, err := bucket.Get(ctx, originalKey(jobID, of.Run))
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		err = ErrNoOriginal
	}
	if err == nil {
		l, err = unpackOriginal(entry.Value())
	}
	if err != nil {
		return l, of, fmt.Errorf("original of job %s, run %d: %w", jobID, of.Run, err)
	}
	return l, of, nil
}
