package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"time"

	"avatarworker/internal/errors"
)

// soakBatch is how many jobs the soak publishes at a time.
const soakBatch = 1000

// soak runs n short sessions through the whole worker and prints its memory and
// goroutines on the way.
func soak(ctx context.Context, n int, profiles string, out io.Writer) (err error) {
	s := &stage{}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.withNATS(ctx); err != nil {
		return err
	}
	if err := s.withBackend(ctx, params{Frames: 1}); err != nil {
		return err
	}
	c, err := s.with(ctx, params{Role: "worker", Concurrency: 4 * concurrency, Profiles: profiles})
	if err != nil {
		return err
	}
	r := relay{output: "discard"}
	begun := time.Now()
	shown := 0
	for done := 0; done < n; {
		batch := min(soakBatch, n-done)
		if _, err := runSessions(ctx, s, c, r, batch, "soak"+strconv.Itoa(done)+"-"); err != nil {
			return err
		}
		done += batch
		// The first line comes when pools and caches are filled.
		if done < min(n, 5*soakBatch) || (done < n && done-shown < n/10) {
			continue
		}
		shown = done
		st, err := c.stats(true)
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "%7d sessions, %6.0f/s: %6.2f MiB heap and stacks, %6.1f MiB resident, %d goroutines\n", done,
			float64(done)/time.Since(begun).Seconds(), float64(st.Memory)/(1<<20), float64(st.Resident)/(1<<20), st.Goroutines)
	}
	return nil
}
