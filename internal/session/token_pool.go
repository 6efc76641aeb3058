package session

import (
	"sync"
	"time"
)

// tokenPool keeps session tokens minted ahead, so that a session starts without
// waiting for the console. Each opens one session, as the documents want it
// (docs/protocol.md, section 2), and none is used after half its lifetime. It is
// off unless Options.TokenPool says otherwise.
type tokenPool struct {
	size int           // tokens kept for each use
	ttl  time.Duration // of a token

	mu    sync.Mutex
	kept  map[tokenUse][]keptToken // oldest first
	under map[tokenUse]bool        // being filled
}

// tokenUse is what a token is good for. The key is part of it: another key's
// tokens may be of another account.
type tokenUse struct{ app, region, key string }

type keptToken struct {
	token  string
	minted time.Time
}

func newTokenPool(size int, ttl time.Duration) *tokenPool {
	return &tokenPool{size: size, ttl: ttl, kept: make(map[tokenUse][]keptToken), under: make(map[tokenUse]bool)}
}

// take gives a token that is young enough; false: there is none.
func (p *tokenPool) take(use tokenUse, now time.Time) (string, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.expire(use, now)
	list := p.kept[use]
	if len(list) == 0 {
		return "", false
	}
	p.keep(use, list[1:])
	return list[0].token, true
}

// expire drops tokens that are past half their lifetime.
func (p *tokenPool) expire(use tokenUse, now time.Time) {
	list := p.kept[use]
	for len(list) > 0 && now.Sub(list[0].minted) >= p.ttl/2 {
		list = list[1:]
	}
	p.keep(use, list)
}

// keep leaves nothing of a use that has no tokens: apps and keys come and go.
func (p *tokenPool) keep(use tokenUse, list []keptToken) {
	if len(list) == 0 {
		delete(p.kept, use)
		return
	}
	p.kept[use] = list
}

// drop forgets a use's tokens: the backend has refused one.
func (p *tokenPool) drop(use tokenUse) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.kept, use)
}

// beginFill tells whether the caller is to fill the pool; it calls endFill then.
func (p *tokenPool) beginFill(use tokenUse) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.under[use] || len(p.kept[use]) >= p.size {
		return false
	}
	p.under[use] = true
	return true
}

func (p *tokenPool) endFill(use tokenUse) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.under, use)
}

// add keeps a token; false: that was the last one needed.
func (p *tokenPool) add(use tokenUse, token string, minted time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.expire(use, minted)
	p.kept[use] = append(p.kept[use], keptToken{token, minted})
	return len(p.kept[use]) < p.size
}

// refill mints tokens ahead, in the background: only a use that is alive asks
// for it. What fails is left to the next session, which mints its own.
func (c *Client) refill(use tokenUse) {
	if !c.tokens.beginFill(use) {
		return
	}
	if c.begin() != nil { // closed
		c.tokens.endFill(use)
		return
	}
	go func() {
		defer c.wg.Done()
		defer c.tokens.endFill(use)
		o := &opening{c: c, red: redactor{secrets: []string{use.key}, region: use.region}}
		for more := true; more; {
			minted := time.Now()
			token, err := o.askToken(c.life, use.region, use.key)
			if err != nil {
				if c.life.Err() == nil {
					c.o.Logger.Debug().Err(err).Str("app_id", use.app).Msg("no token could be minted ahead")
				}
				return
			}
			more = c.tokens.add(use, token, minted)
		}
	}()
}

// fromPool gives a token minted ahead and sees to its replacement; false: there
// is no pool, or nothing in it.
func (c *Client) fromPool(use tokenUse) (string, bool) {
	if c.tokens.size == 0 {
		return "", false
	}
	token, ok := c.tokens.take(use, time.Now())
	c.refill(use)
	return token, ok
}
