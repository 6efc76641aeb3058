package session

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
)

const (
	bootstrapTimeout = 5 * time.Second
	bootstrapTTL     = 300 * time.Second
	// bootstrapRetry is the pause after a bootstrap server did not reply, so that
	// not every session waits for it.
	bootstrapRetry = 30 * time.Second
	bootstrapLimit = 64 << 10
)

// bootstrap asks for the nearest region, for each app ID at most once per
// bootstrapTTL (docs/protocol.md, section 1). It never fails a session.
type bootstrap struct {
	http *http.Client
	url  string

	mu   sync.Mutex
	apps map[string]*regionEntry
}

// regionEntry is what is known for one app ID. Holding busy allows a request.
type regionEntry struct {
	busy   chan struct{}
	region string // "" before the first answer
	until  time.Time
}

func newBootstrap(hc *http.Client, url string) *bootstrap {
	return &bootstrap{http: hc, url: url, apps: make(map[string]*regionEntry)}
}

// region returns the nearest region, or the last known one if there is no reply,
// or else DefaultRegion. It fails only if ctx ends.
func (b *bootstrap) region(ctx context.Context, appID string, log zerolog.Logger) (string, error) {
	e := b.entry(appID)
	select {
	case e.busy <- struct{}{}:
		defer func() { <-e.busy }()
	case <-ctx.Done():
		return "", cancelled(ctx, "waiting for the bootstrap call")
	}
	if time.Now().Before(e.until) {
		return orDefault(e.region, DefaultRegion), nil
	}
	region, err := b.ask(ctx, appID)
	if ctx.Err() != nil {
		return "", cancelled(ctx, "bootstrap call")
	}
	if err != nil {
		region = orDefault(e.region, DefaultRegion)
		log.Warn().Err(withoutURL(err)).Str("region", region).Msg("the bootstrap call returned no region; using the last known one")
		e.until = time.Now().Add(bootstrapRetry)
		return region, nil
	}
	e.region, e.until = region, time.Now().Add(bootstrapTTL)
	return region, nil
}

func (b *bootstrap) entry(appID string) *regionEntry {
	b.mu.Lock()
	defer b.mu.Unlock()
	e := b.apps[appID]
	if e == nil {
		e = &regionEntry{busy: make(chan struct{}, 1)}
		b.apps[appID] = e
	}
	return e
}

func (b *bootstrap) ask(ctx context.Context, appID string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, bootstrapTimeout)
	defer cancel()
	body, err := json.Marshal(map[string]string{
		"app_id": appID, "sdk_version": "avatarworker", "region": AutoRegion, "platform": "server",
	})
	if err != nil {
		return "", err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, b.url, bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := b.http.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }() // nothing is lost with a body that was read
	answer, err := io.ReadAll(io.LimitReader(resp.Body, bootstrapLimit))
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("HTTP %d", resp.StatusCode)
	}
	return parseBootstrap(answer)
}

// parseBootstrap reads the region of an answer.
func parseBootstrap(answer []byte) (string, error) {
	var a struct {
		Region struct {
			Current string `json:"current"`
		} `json:"region"`
	}
	if err := json.Unmarshal(answer, &a); err != nil {
		// Not err itself, which may quote the answer.
		return "", errors.New("the reply can't be parsed")
	}
	if err := checkRegion(a.Region.Current); err != nil {
		return "", err
	}
	return a.Region.Current, nil
}
