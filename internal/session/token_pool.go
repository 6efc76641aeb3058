package session

import (
	"sync"
	"time"
)

// tokenPool keeps session tokens minted ahead, so that a session starts without
// waiting for the console. Each token opens one session, as the vendor's
// documents require (docs/protocol.md, section 2), and none is used after half
// its lifetime. The pool is off unless Options.TokenPool is set.
type tokenPool struct {
	size int           // tokens kept for each use
	ttl  time.Duration // of a token

	mu      sync.Mutex
	kept    map[tokenUse][]keptToken // oldest first
	filling map[tokenUse]bool        // being filled
}

// tokenUse is what a token is valid for. The key is part of it: another key's
// tokens may belong to another account.
type tokenUse struct{ app, region, key string }

type keptToken struct {
	token  string
	minted time.Time
}

func newTokenPool(size int, ttl time.Duration) *tokenPool {
	return &tokenPool{size: size, ttl: ttl, kept: make(map[tokenUse][]keptToken), filling: make(map[tokenUse]bool)}
}

// take returns a token that is young enough, or false if there is none.
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

// keep stores the tokens of a use, or removes the use if there are none: apps and
// keys come and go.
func (p *tokenPool) keep(use tokenUse, list []keptToken) {
	if len(list) == 0 {
		delete(p.kept, use)
		return
	}
	p.kept[use] = list
}

// drop removes a use's tokens: the backend has refused one.
func (p *tokenPool) drop(use tokenUse) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.kept, use)
}

// beginFill reports whether the caller is to fill the pool. If so, it must call
// endFill.
func (p *tokenPool) beginFill(use tokenUse) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.filling[use] || len(p.kept[use]) >= p.size {
		return false
	}
	p.filling[use] = true
	return true
}

func (p *tokenPool) endFill(use tokenUse) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.filling, use)
}

// add stores a token. It returns false if no more are needed.
func (p *tokenPool) add(use tokenUse, token string, minted time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.expire(use, minted)
	p.kept[use] = append(p.kept[use], keptToken{token, minted})
	return len(p.kept[use]) < p.size
}

// refill mints tokens in the background, only for a use that is active. If it
// fails, the next session mints its own token.
func (c *Client) refill(use tokenUse) {
	if !c.tokens.beginFill(use) {
		return
	}
	if c.beginOpen() != nil { // closed
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

// fromPool returns a token minted ahead and has it replaced. It returns false if
// there is no pool or the pool is empty.
func (c *Client) fromPool(use tokenUse) (string, bool) {
	if c.tokens.size == 0 {
		return "", false
	}
	token, ok := c.tokens.take(use, time.Now())
	c.refill(use)
	return token, ok
}
