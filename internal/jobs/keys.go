package jobs

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"avatarworker/internal/errors"
	"avatarworker/internal/retry"
)

const (
	// keyLook is how often a refused key is tried again.
	keyLook = 30 * time.Second
	// keyTimeout bounds minting one token.
	keyTimeout = 15 * time.Second
	// keysAtOnce bounds the tokens minted side by side at the start.
	keysAtOnce = 8
)

// keys are this worker's own API keys. One that the backend refuses here, and not
// to other workers, is this worker's fault: it takes no jobs of that app.
type keys struct {
	check   func(ctx context.Context, app string) error // mints a token
	apps    []string                                    // that there are keys for
	others  func(app string) bool                       // another worker's key for the app is good
	changed func(app string, refused error)             // nil: it is good again
	log     zerolog.Logger

	mu  sync.Mutex
	bad map[string]error
}

// start mints one token for each app: that costs nothing, and shows a key that is
// refused before a job meets it. What else fails says nothing of the key.
func (k *keys) start(ctx context.Context) {
	slots := make(chan struct{}, keysAtOnce)
	var wg sync.WaitGroup
	for _, app := range k.apps {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			k.look(ctx, app)
		})
	}
	wg.Wait()
}

// run tries refused keys again until ctx ends: a key file may have been mended.
func (k *keys) run(ctx context.Context) {
	for retry.Pause(ctx, keyLook, nil) == nil {
		for _, app := range k.refusedApps() {
			k.look(ctx, app)
		}
	}
}

func (k *keys) look(ctx context.Context, app string) {
	ctx, cancel := context.WithTimeout(ctx, keyTimeout)
	defer cancel()
	err := k.check(ctx, app)
	if err == nil || keyRefused(err) {
		k.note(app, err)
	}
}

// keyRefused reports whether err is the backend's refusal of an API key.
func keyRefused(err error) bool {
	e := errors.Of(err)
	return e != nil && e.Phase == errors.PhaseToken && e.HTTPStatus == http.StatusUnauthorized
}

// blames reports whether a failure is the fault of this worker's own key, and
// notes it.
func (k *keys) blames(ctx context.Context, app string, fault *errors.Error) bool {
	if !keyRefused(fault) || !k.others(app) {
		return false
	}
	k.note(app, fault)
	return true
}

func (k *keys) note(app string, err error) {
	k.mu.Lock()
	before := k.bad[app]
	if err == nil {
		delete(k.bad, app)
	} else {
		if k.bad == nil {
			k.bad = make(map[string]error)
		}
		k.bad[app] = err
	}
	k.mu.Unlock()
	if (before == nil) != (err == nil) {
		k.changed(app, err)
	}
}

func (k *keys) refused(app string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.bad[app] != nil
}

func (k *keys) refusedApps() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Sorted(maps.Keys(k.bad))
}

// noneLeft reports whether every key of this worker is refused.
func (k *keys) noneLeft() bool { return len(k.apps) > 0 && len(k.refusedApps()) == len(k.apps) }

// err names the refused keys; nil: there are none.
func (k *keys) err() error {
	apps := k.refusedApps()
	if len(apps) == 0 {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return fmt.Errorf("the backend refuses this worker's API key for app %q, so it takes none of its jobs: correct the key: %w", apps[0], k.bad[apps[0]])
}
