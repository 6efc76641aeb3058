// Package key watches a worker's own API keys. One that the backend refuses to this
// worker, and not to others, is this worker's fault: it takes no jobs of that app.
// The package knows nothing of jobs.
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
	// keyLook is how often a refused key is tried again.
	keyLook = 30 * time.Second
	// keyTimeout bounds minting one token.
	keyTimeout = 15 * time.Second
	// startTimeout bounds the look at all keys at the start: a backend that is away
	// must not keep the worker from starting.
	startTimeout = 20 * time.Second
	// keysAtOnce bounds the tokens minted side by side at the start.
	keysAtOnce = 8
)

// Options are what Keys are made of. All are required.
type Options struct {
	Check func(ctx context.Context, app string) error // mints a token with the app's key
	Apps  []string                                    // that there are keys for
	// Others reports whether another worker's key for the app is good.
	Others func(app string) bool
	// Changed is called when a key is found to be refused, or good again (nil).
	Changed func(app string, refused error)
}

// Keys are one worker's keys. They are safe for concurrent use.
type Keys struct {
	o   Options
	mu  sync.Mutex
	bad map[string]error // by app
}

// New returns Keys that are taken for good until Start or a failure shows
// otherwise.
func New(o Options) *Keys { return &Keys{o: o, bad: make(map[string]error)} }

// Start mints one token for each app: that costs nothing, and shows a key that is
// refused before a job meets it. Other failures say nothing of the key.
func (k *Keys) Start(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	slots := make(chan struct{}, keysAtOnce)
	var wg sync.WaitGroup
	for _, app := range k.o.Apps {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			k.look(ctx, app)
		})
	}
	wg.Wait()
}

// Run tries refused keys again until ctx ends: a key file may have been corrected.
func (k *Keys) Run(ctx context.Context) {
	for retry.Pause(ctx, keyLook, nil) == nil {
		for _, app := range k.RefusedApps() {
			k.look(ctx, app)
		}
	}
}

func (k *Keys) look(ctx context.Context, app string) {
	ctx, cancel := context.WithTimeout(ctx, keyTimeout)
	defer cancel()
	err := k.o.Check(ctx, app)
	if err == nil || keyRefused(err) {
		k.note(app, err)
	}
}

// keyRefused reports whether err is the backend's refusal of an API key.
func keyRefused(err error) bool {
	e := errors.Of(err)
	return e != nil && e.Phase == errors.PhaseToken && e.HTTPStatus == http.StatusUnauthorized
}

// Blames reports whether a failure is the fault of this worker's own key, and notes
// it.
func (k *Keys) Blames(app string, fault *errors.Error) bool {
	if !keyRefused(fault) || !k.o.Others(app) {
		return false
	}
	k.note(app, fault)
	return true
}

func (k *Keys) note(app string, err error) {
	k.mu.Lock()
	before := k.bad[app]
	if err == nil {
		delete(k.bad, app)
	} else {
		k.bad[app] = err
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
	return k.bad[app] != nil
}

// RefusedApps lists the apps whose key is refused.
func (k *Keys) RefusedApps() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Sorted(maps.Keys(k.bad))
}

// NoneLeft reports whether every key of this worker is refused.
func (k *Keys) NoneLeft() bool { return len(k.o.Apps) > 0 && len(k.RefusedApps()) == len(k.o.Apps) }

// Err names the refused keys; nil: there are none.
func (k *Keys) Err() error {
	apps := k.RefusedApps()
	if len(apps) == 0 {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return fmt.Errorf("the backend refuses this worker's API key for app %q, so it takes none of its jobs: correct the key: %w", apps[0], k.bad[apps[0]])
}
