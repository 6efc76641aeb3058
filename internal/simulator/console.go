package simulator

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

const maxTokenLife = 24 * time.Hour

// serveToken answers POST session-tokens (docs/protocol.md, section 2).
func (s *Server) serveToken(w http.ResponseWriter, r *http.Request) {
	s.sessionLog.countTokenCall()
	ok := false
	// dropConnection panics; that is a refusal too.
	defer func() {
		if !ok {
			s.sessionLog.countTokenRefused()
		}
	}()
	key := r.Header.Get("X-Api-Key")
	if key == "" {
		writeTokenError(w, http.StatusUnauthorized, "MISSING_API_KEY", "Missing API key", "the header X-Api-Key is missing")
		return
	}
	var body struct {
		ExpireAt *int64 `json:"expireAt"`
		AppID    string `json:"appId"`
	}
	if err := json.NewDecoder(io.LimitReader(r.Body, 64<<10)).Decode(&body); err != nil {
		writeTokenError(w, http.StatusBadRequest, "INVALID_ARGUMENT", "Invalid request",
			"the body is to be JSON with expireAt as a number of seconds")
		return
	}
	if f, hit := s.tokenFault(key, body.AppID); hit {
		s.sessionLog.countFault(f.name)
		f.writeToken(w)
		return
	}
	now := s.now()
	if body.ExpireAt == nil {
		writeTokenError(w, http.StatusBadRequest, "INVALID_ARGUMENT", "Invalid request", "expireAt is missing")
		return
	}
	expiry := time.Unix(*body.ExpireAt, 0)
	if !expiry.After(now) || !expiry.Before(now.Add(maxTokenLife)) {
		writeTokenError(w, http.StatusBadRequest, "INVALID_ARGUMENT", "Invalid request",
			"expireAt has to lie in the future, less than 24 hours away")
		return
	}
	ok = true
	writeJSON(w, http.StatusOK, map[string]any{"sessionToken": s.tokens.mint(expiry)})
}

// tokenFault returns the fault of a token call: the key's own, or else the
// account's.
func (s *Server) tokenFault(key, appID string) (fault, bool) {
	words := strings.Split(key, "-")
	if words[0] == "fail" {
		words = words[1:]
	} else if words[0] != "status" {
		return s.accountFor(phaseToken, appID)
	}
	f, _, err := parseFault(words)
	if err != nil {
		// The key is a secret, perhaps a real one: don't quote it.
		return fault{
			name: "refused", status: http.StatusUnauthorized, jsonCode: "INVALID_API_KEY", title: "Invalid API key",
			text: "the key asks for a failure that the simulator does not have; GET / lists them",
		}, true
	}
	if f, err = f.in(phaseToken); err != nil {
		// A token call has no connectionClosed: a cut call is a failed
		// connection.
		return fault{name: f.name, kind: kindDrop}, true
	}
	return f, true
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	// Ignore the error: the client is gone.
	_ = json.NewEncoder(w).Encode(v)
}

// writeTokenError writes an error in the console's format.
func writeTokenError(w http.ResponseWriter, status int, code, title, detail string) {
	if code == "" {
		code = "ERR"
	}
	writeJSON(w, status, map[string]any{"errors": []any{map[string]any{
		"id": newID(time.Now()), "status": status, "code": code, "title": title, "detail": detail,
	}}})
}

// tokens makes and checks session tokens. A token contains its expiry and a
// signature, so nothing needs to be stored unless tokens are single-use.
type tokens struct {
	key    []byte
	single bool

	mu   sync.Mutex
	used map[string]time.Time // single-use tokens by signature, until they expire
}

func newTokens(single bool) *tokens {
	return &tokens{key: []byte(rand.Text()), single: single, used: map[string]time.Time{}}
}

func (t *tokens) mint(expiry time.Time) string {
	payload := fmt.Sprintf("%d.%s", expiry.Unix(), rand.Text())
	return payload + "." + t.sign(payload)
}

func (t *tokens) sign(payload string) string {
	h := hmac.New(sha256.New, t.key)
	h.Write([]byte(payload))
	return base64.RawURLEncoding.EncodeToString(h.Sum(nil))
}

// tokenState is the result of checking a token.
type tokenState int

const (
	tokenGood tokenState = iota
	tokenBad
	tokenExpired
)

// check reports whether a token opens a session now, and uses it up if tokens are
// single-use.
func (t *tokens) check(token string, now time.Time) tokenState {
	i := strings.LastIndexByte(token, '.')
	if i < 0 || !hmac.Equal([]byte(t.sign(token[:i])), []byte(token[i+1:])) {
		return tokenBad
	}
	seconds, _, _ := strings.Cut(token, ".")
	unix, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return tokenBad
	}
	expiry := time.Unix(unix, 0)
	if !now.Before(expiry) {
		return tokenExpired
	}
	if t.single && !t.use(token[i+1:], expiry, now) {
		return tokenBad
	}
	return tokenGood
}

func (t *tokens) use(signature string, expiry, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, was := t.used[signature]; was {
		return false
	}
	if len(t.used)%1024 == 1023 {
		for sig, e := range t.used {
			if !now.Before(e) {
				delete(t.used, sig)
			}
		}
	}
	t.used[signature] = expiry
	return true
}
