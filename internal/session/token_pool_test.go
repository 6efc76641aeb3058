package session

import (
	"fmt"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// usedTokens are those that sessions were opened with, in order.
func usedTokens(b *backend) []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var used []string
	for _, r := range b.requests {
		if key := r.Header.Get("X-Session-Key"); key != "" {
			used = append(used, key)
		}
	}
	return used
}

func TestTokensMintedAheadOpenOneSessionEach(t *testing.T) {
	b := &backend{}
	inMemory(t, b, Options{TokenPool: 2}, func(c *Client) {
		mustOpen(t, c, params()) // finds the pool empty
		synctest.Wait()
		if n := b.minted.Load(); n != 3 {
			t.Fatalf("%d tokens minted: one was needed, and two ahead", n)
		}
		for range 3 {
			mustOpen(t, c, params())
			synctest.Wait()
		}
		if n := b.minted.Load(); n != 6 {
			t.Errorf("%d tokens minted, not one for each session and two ahead", n)
		}
		seen := map[string]bool{}
		for _, token := range usedTokens(b) {
			if seen[token] {
				t.Errorf("%s opened two sessions", token)
			}
			seen[token] = true
		}
		if len(seen) != 4 {
			t.Errorf("%d sessions were opened: %v", len(seen), seen)
		}
	})
}

func TestTokensMintedAheadAreNotUsedAfterHalfTheirLifetime(t *testing.T) {
	b := &backend{}
	inMemory(t, b, Options{TokenPool: 1, TokenTTL: time.Hour}, func(c *Client) {
		mustOpen(t, c, params()).Close()
		synctest.Wait()
		minted := b.minted.Load()
		time.Sleep(30 * time.Minute)
		mustOpen(t, c, params()).Close()
		synctest.Wait()
		used := usedTokens(b)
		last := used[len(used)-1]
		for old := int64(1); old <= minted; old++ {
			if last == fmt.Sprintf("token-%d", old) {
				t.Errorf("%s was used, which is past half its lifetime", last)
			}
		}
	})
}

func TestRefusedTokenTakesThoseMintedAheadWithIt(t *testing.T) {
	b := &backend{}
	var mu sync.Mutex // over what the handler reads
	ahead := map[string]bool{}
	b.upgrade = func(w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		return ahead[r.Header.Get("X-Session-Key")] && refuse(400, `{"message":"Invalid session token"}`)(w, r)
	}
	inMemory(t, b, Options{TokenPool: 2}, func(c *Client) {
		mustOpen(t, c, params())
		synctest.Wait()
		mu.Lock()
		for n := range b.minted.Load() {
			ahead[fmt.Sprintf("token-%d", n+1)] = true
		}
		delete(ahead, usedTokens(b)[0])
		mu.Unlock()
		mustOpen(t, c, params()) // refused with the first minted ahead, then let in
		synctest.Wait()
		mustOpen(t, c, params())
		for i, token := range usedTokens(b) {
			if i > 1 && ahead[token] {
				t.Error("a token minted with one that was refused was used after it")
			}
		}
	})
}

func TestWithoutPoolNoTokenIsMintedAhead(t *testing.T) {
	b := &backend{}
	inMemory(t, b, Options{}, func(c *Client) {
		mustOpen(t, c, params())
		mustOpen(t, c, params())
		synctest.Wait()
		if n := b.minted.Load(); n != 2 {
			t.Errorf("%d tokens minted for two sessions", n)
		}
	})
}
