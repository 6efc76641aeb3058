// Package key watches a worker's own API keys. If the backend refuses a key from
// this worker and accepts it from others, the fault is this worker's: it takes no
// jobs of that app. The package owns the state of the keys, and must not know
// about jobs or sessions.
package key

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/retry"
)

const (
	// checkInterval is how often a refused key is checked again.
	checkInterval = 30 * time.Second
	// checkTimeout bounds minting one token.
	checkTimeout = 15 * time.Second
	// startTimeout bounds the checks of Start: a backend that is away must not keep
	// the worker from starting.
	startTimeout = 20 * time.Second
	// maxChecks bounds the tokens minted concurrently by Start.
	maxChecks = 8
)

// Options configure Keys. All fields are required.
type Options struct {
	Check func(ctx context.Context, app string) error // mints a token with the app's key
	Apps  []string                                    // apps that have a key
	// Others reports whether another worker's key for the app is accepted.
	Others func(app string) bool
	// Changed is called when a key is found to be refused, or accepted again
	// (nil).
	Changed func(app string, refused error)
}

// Keys are one worker's keys. They are safe for concurrent use.
type Keys struct {
	o       Options
	mu      sync.Mutex
	refused map[string]error // by app
}

// New returns Keys that count as accepted until Start or a failure shows
// otherwise.
func New(o Options) *Keys { return &Keys{o: o, refused: make(map[string]error)} }

// Start mints one token for each app. That costs nothing, and shows which keys
// the backend refuses.
func (k *Keys) Start(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	slots := make(chan struct{}, maxChecks)
	var wg sync.WaitGroup
	for _, app := range k.o.Apps {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			k.check(ctx, app)
		})
	}
	wg.Wait()
}

// Run checks refused keys again until ctx ends: a key file may have been
// corrected.
func (k *Keys) Run(ctx context.Context) {
	for retry.Pause(ctx, checkInterval, nil) == nil {
		for _, app := range k.RefusedApps() {
			k.check(ctx, app)
		}
	}
}

func (k *Keys) check(ctx context.Context, app string) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	err := k.o.Check(ctx, app)
	if err == nil || Refuses(err) {
		k.set(app, err)
	}
}

// Refuses reports whether err is the backend's refusal of an API key.
func Refuses(err error) bool {
	e := errors.Of(err)
	return e != nil && e.Phase == errors.PhaseToken && e.HTTPStatus == http.StatusUnauthorized
}

// Blames reports whether a failure is the fault of this worker's own key, and if
// so marks the key as refused.
func (k *Keys) Blames(app string, fault *errors.Error) bool {
	if !Refuses(fault) || !k.o.Others(app) {
		return false
	}
	k.set(app, fault)
	return true
}

func (k *Keys) set(app string, err error) {
	k.mu.Lock()
	before := k.refused[app]
	if err == nil {
		delete(k.refused, app)
	} else {
		k.refused[app] = err
	}
	k.mu.Unlock()
	if (before == nil) != (err == nil) {
		k.o.Changed(app, err)
	}
}

// Refused reports whether the app's key is refused.
func (k *Keys) Refused(app string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.refused[app] != nil
}

// RefusedApps lists the apps whose key is refused.
func (k *Keys) RefusedApps() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Sorted(maps.Keys(k.refused))
}

// NoneLeft reports whether every key of this worker is refused.
func (k *Keys) NoneLeft() bool { return len(k.o.Apps) > 0 && len(k.RefusedApps()) == len(k.o.Apps) }

// Err returns an error that names a refused key, or nil if none is refused.
func (k *Keys) Err() error {
	apps := k.RefusedApps()
	if len(apps) == 0 {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return fmt.Errorf("the backend refuses this worker's API key for app %q, so it takes none of its jobs: correct the key: %w", apps[0], k.refused[apps[0]])
}
