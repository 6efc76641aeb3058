package key

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"avatarworker/internal/errors"
)

// backend accepts and refuses keys, and records what Keys reports.
type backend struct {
	mu      sync.Mutex
	answer  map[string]error // by app; absent: the key is accepted
	checked map[string]int
	good    map[string]bool // by app: another worker's key is accepted
	changes []string
	atOnce  int
	most    int
	block   chan struct{} // nil: checks return at once
}

func newBackend() *backend {
	return &backend{answer: make(map[string]error), checked: make(map[string]int), good: make(map[string]bool)}
}

func (b *backend) keys(apps ...string) *Keys {
	return New(Options{
		Check: b.check, Apps: apps,
		Others: func(app string) bool { return b.good[app] },
		Changed: func(app string, refused error) {
			b.mu.Lock()
			defer b.mu.Unlock()
			state := " good"
			if refused != nil {
				state = " refused"
			}
			b.changes = append(b.changes, app+state)
		},
	})
}

func (b *backend) check(ctx context.Context, app string) error {
	b.mu.Lock()
	b.checked[app]++
	b.atOnce++
	b.most = max(b.most, b.atOnce)
	err := b.answer[app]
	b.mu.Unlock()
	if b.block != nil {
		select {
		case <-b.block:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	b.mu.Lock()
	b.atOnce--
	b.mu.Unlock()
	return err
}

func (b *backend) set(app string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.answer[app] = err
}

func (b *backend) reported() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.changes)
}

func unauthorized() *errors.Error {
	return &errors.Error{Code: errors.CodeSessionTokenInvalid, Phase: errors.PhaseToken, HTTPStatus: http.StatusUnauthorized, Message: "no such key"}
}

func TestStartFindsTheKeysThatTheBackendRefuses(t *testing.T) {
	b := newBackend()
	b.answer["bad"] = unauthorized()
	b.answer["down"] = &errors.Error{Code: errors.CodeConnectionFailed, Phase: errors.PhaseToken, HTTPStatus: http.StatusBadGateway}
	b.answer["late"] = &errors.Error{Code: errors.CodeSessionTokenInvalid, Phase: errors.PhaseConnect, HTTPStatus: http.StatusUnauthorized}
	k := b.keys("good", "bad", "down", "late")
	k.Start(t.Context())
	if apps := k.RefusedApps(); !slices.Equal(apps, []string{"bad"}) {
		t.Errorf("refused: %v", apps)
	}
	if k.Refused("good") || !k.Refused("bad") || k.NoneLeft() {
		t.Errorf("good %v, bad %v, none left %v", k.Refused("good"), k.Refused("bad"), k.NoneLeft())
	}
	if err := k.Err(); err == nil || !strings.Contains(err.Error(), `"bad"`) || !strings.Contains(err.Error(), "correct the key") || !errors.Is(err, b.answer["bad"]) {
		t.Errorf("got %v", err)
	}
	if got := b.reported(); !slices.Equal(got, []string{"bad refused"}) {
		t.Errorf("reported %v", got)
	}
}

func TestStartChecksABoundedNumberOfKeysAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBackend()
		b.block = make(chan struct{})
		apps := strings.Split("a b c d e f g h i j k l m n o p q r s t", " ")
		k := b.keys(apps...)
		done := make(chan struct{})
		go func() { k.Start(t.Context()); close(done) }()
		synctest.Wait()
		b.mu.Lock()
		if b.most != maxChecks {
			t.Errorf("%d checks at a time, want %d", b.most, maxChecks)
		}
		b.mu.Unlock()
		close(b.block)
		<-done
		if len(b.checked) != len(apps) || b.most > maxChecks {
			t.Errorf("%d apps checked, %d at a time", len(b.checked), b.most)
		}
	})
}

func TestCheckThatDoesNotReturnSaysNothingOfTheKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBackend()
		b.block = make(chan struct{})
		k, began := b.keys("app"), time.Now()
		k.Start(t.Context())
		if took := time.Since(began); took != checkTimeout || k.Refused("app") {
			t.Errorf("took %s, refused: %v", took, k.Refused("app"))
		}
	})
}

func TestCorrectedKeyIsGoodAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBackend()
		b.answer["app"] = unauthorized()
		k := b.keys("app", "other")
		k.Start(t.Context())
		ctx, cancel := context.WithCancel(t.Context())
		go k.Run(ctx)
		// The backend is away at the first look: the key stays refused.
		b.set("app", &errors.Error{Code: errors.CodeConnectionFailed, Phase: errors.PhaseToken})
		time.Sleep(checkInterval + time.Second) //nolint:forbidigo // fake clock
		if !k.Refused("app") {
			t.Error("a check without an answer made the key good")
		}
		b.set("app", nil)
		time.Sleep(checkInterval) //nolint:forbidigo // fake clock
		if k.Refused("app") || k.Err() != nil {
			t.Errorf("still refused: %v", k.Err())
		}
		if got := b.reported(); !slices.Equal(got, []string{"app refused", "app good"}) {
			t.Errorf("reported %v", got)
		}
		time.Sleep(3 * checkInterval) //nolint:forbidigo // fake clock
		b.mu.Lock()
		if b.checked["other"] != 1 || b.checked["app"] != 3 {
			t.Errorf("checked %v: keys that are good are not checked again", b.checked)
		}
		b.mu.Unlock()
		cancel()
		synctest.Wait()
	})
}

func TestBlamesOnlyARefusedKeyThatOthersHaveGood(t *testing.T) {
	fault := func(change func(*errors.Error)) *errors.Error {
		e := unauthorized()
		change(e)
		return e
	}
	for name, tc := range map[string]struct {
		fault  *errors.Error
		others bool
		want   bool
	}{
		"refused here only":                {unauthorized(), true, true},
		"refused everywhere":               {unauthorized(), false, false},
		"no fault":                         {nil, true, false},
		"forbidden":                        {fault(func(e *errors.Error) { e.HTTPStatus = http.StatusForbidden }), true, false},
		"a token that the ingress refuses": {fault(func(e *errors.Error) { e.Phase = errors.PhaseConnect }), true, false},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBackend()
			b.good["app"] = tc.others
			k := b.keys("app")
			for range 2 {
				if got := k.Blames("app", tc.fault); got != tc.want {
					t.Errorf("got %v", got)
				}
			}
			if k.Refused("app") != tc.want || k.NoneLeft() != tc.want {
				t.Errorf("refused %v, none left %v", k.Refused("app"), k.NoneLeft())
			}
			if got := b.reported(); len(got) > 1 || (len(got) == 1) != tc.want {
				t.Errorf("reported %v: a change is reported once", got)
			}
		})
	}
}

func TestWorkerWithoutKeysHasNoneLeftToLose(t *testing.T) {
	if newBackend().keys().NoneLeft() {
		t.Error("a worker without apps has lost all its keys")
	}
}
