package ui

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"mime"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
)

// policy lets a page use what this server gives and nothing else. No script or
// style is in a page itself.
const policy = "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"

// secured sets the headers of every answer.
func secured(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", policy)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "same-origin") // with no-referrer a browser sends no Origin with our own forms
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Permissions-Policy", "camera=(), microphone=(), geolocation=()")
		h.Set("Cache-Control", "no-store")
		next.ServeHTTP(w, r)
	})
}

const (
	// maxQuery bounds a query, in bytes.
	maxQuery = 8 << 10
	// maxBody bounds a form: a job may have a MiB, and twice that in a form.
	maxBody = 4 << 20
)

// bounded refuses what is too long to be one of our requests, and bounds its time.
func bounded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if len(r.URL.RawQuery) > maxQuery || len(r.URL.Path) > maxQuery {
			http.Error(w, "the address is too long: use fewer filters", http.StatusRequestURITooLong)
			return
		}
		if r.Body != nil {
			r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		}
		next.ServeHTTP(w, r)
	})
}

// guard knows who may see and change what.
type guard struct {
	auth  Auth
	now   func() time.Time
	log   zerolog.Logger
	cross *http.CrossOriginProtection
	key   [32]byte // of the forms' tokens; a restart makes a new one

	mu       sync.Mutex
	token    string
	password string
	readAt   time.Time
}

// userKey is the key of a request's user in its context.
type userKey struct{}

// userOf returns the user of a request, for logs and the page; "" if no login is
// required.
func userOf(r *http.Request) string {
	user, _ := r.Context().Value(userKey{}).(string)
	return user
}

// login serves next to those who may see the page.
func (g *guard) login(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if g.auth.none() {
			next.ServeHTTP(w, r)
			return
		}
		user, ok := g.user(r)
		if !ok {
			if g.auth.Secrets != nil {
				w.Header().Add("WWW-Authenticate", `Basic realm="avatarworker", charset="UTF-8"`)
				w.Header().Add("WWW-Authenticate", `Bearer realm="avatarworker"`)
			}
			http.Error(w, "log in to see this page", http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), userKey{}, user)))
	})
}

// maxUser bounds a user's name, in bytes.
const maxUser = 256

// user is who asks; ok is false where that was not shown.
func (g *guard) user(r *http.Request) (name string, ok bool) {
	if g.auth.TrustedHeader != "" && g.fromProxy(r) {
		// Two of them: one may be the client's own.
		if values := r.Header.Values(g.auth.TrustedHeader); len(values) == 1 && values[0] != "" && len(values[0]) <= maxUser {
			return values[0], true
		}
	}
	if g.auth.Secrets == nil {
		return "", false
	}
	token, password := g.secrets()
	if scheme, given, found := strings.Cut(r.Header.Get("Authorization"), " "); found && strings.EqualFold(scheme, "Bearer") {
		return "token", same(given, token)
	}
	user, given, found := r.BasicAuth()
	if !found {
		return "", false
	}
	// All are compared, so that the time says nothing.
	byToken, byUser, byPassword := same(given, token), same(user, g.auth.User), same(given, password)
	switch {
	case byToken:
		return cutText(user, maxUser), true // a browser has no other way to give it
	case byUser && byPassword:
		return user, true
	}
	return "", false
}

// same compares a given secret with the one that is wanted in constant time. An
// empty one is never right.
func same(given, want string) bool {
	a, b := sha256.Sum256([]byte(given)), sha256.Sum256([]byte(want))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1 && want != ""
}

// secretsAge is how long secrets that were read are used.
const secretsAge = 5 * time.Second

// secrets are the token and the password now. Where they can't be read any more the
// last ones count.
func (g *guard) secrets() (token, password string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if now := g.now(); g.readAt.IsZero() || now.Sub(g.readAt) >= secretsAge {
		g.readAt = now
		token, password, err := g.auth.Secrets()
		if err != nil {
			g.log.Error().Err(err).Msg("the page's secrets can't be read: those read before count")
		} else {
			g.token, g.password = token, password
		}
	}
	return g.token, g.password
}

// fromProxy reports whether a request's connection comes from a trusted proxy.
func (g *guard) fromProxy(r *http.Request) bool {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return false
	}
	addr := from.Addr().Unmap().WithZone("")
	for _, network := range g.auth.Proxies {
		if network.Contains(addr) {
			return true
		}
	}
	return false
}

// cookieName is the name of the cookie that forms are bound to.
const cookieName = "avatarworker_session"

// session is the session's cookie; fresh reports that it was made now.
func (g *guard) session(w http.ResponseWriter, r *http.Request) (id string, fresh bool) {
	if cookie, err := r.Cookie(cookieName); err == nil && validSession(cookie.Value) {
		return cookie.Value, false
	}
	id = rand.Text() + rand.Text()
	secure := r.TLS != nil || g.auth.TrustedHeader != "" && g.fromProxy(r) && r.Header.Get("X-Forwarded-Proto") == "https"
	//nolint:gosec // Secure where the way here is TLS; on loopback it is not
	http.SetCookie(w, &http.Cookie{Name: cookieName, Value: id, Path: "/", HttpOnly: true, SameSite: http.SameSiteStrictMode, Secure: secure})
	return id, true
}

// validSession reports whether a cookie may be one of ours.
func validSession(id string) bool {
	return len(id) >= 32 && len(id) <= 128 && !strings.ContainsFunc(id, func(r rune) bool {
		return (r < 'A' || r > 'Z') && (r < '0' || r > '9')
	})
}

// formToken is the token of the forms that a session's user gets.
func (g *guard) formToken(session, user string) string {
	mac := hmac.New(sha256.New, g.key[:])
	mac.Write([]byte(session + "\x00" + user))
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// tokenField is the field of a form that has its token, and tokenHeader the header
// that does for the API.
const (
	tokenField  = "token"
	tokenHeader = "X-CSRF-Token" //nolint:gosec // a header's name
)

// ownToken reports whether a request that changes something has its session's token.
func (g *guard) ownToken(r *http.Request, given string) bool {
	cookie, err := r.Cookie(cookieName)
	if err != nil || !validSession(cookie.Value) {
		return false
	}
	return subtle.ConstantTimeCompare([]byte(given), []byte(g.formToken(cookie.Value, userOf(r)))) == 1
}

// sameOrigin reports whether a request that changes something comes from our own
// page, as far as the browser says where it comes from.
func (g *guard) sameOrigin(r *http.Request) bool {
	if g.cross.Check(r) != nil {
		return false
	}
	switch r.Header.Get("Sec-Fetch-Site") {
	case "", "same-origin", "none":
	default:
		return false
	}
	origin := r.Header.Get("Origin")
	if origin == "" {
		return true
	}
	u, err := url.Parse(origin)
	return err == nil && u.Host != "" && strings.EqualFold(u.Host, r.Host)
}

// api guards the API: what changes something needs write, and must not be another
// site's form or script that uses the browser's login.
func (g *guard) api(write bool, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead && r.Method != http.MethodOptions {
			switch {
			case !write:
				apiError(w, http.StatusForbidden, "nothing can be changed here: ui.write is off")
				return
			case !g.sameOrigin(r):
				apiError(w, http.StatusForbidden, "the request comes from another site")
				return
			case !g.deliberate(r):
				apiError(w, http.StatusUnsupportedMediaType, "a change needs Content-Type: application/json, a bearer token, or the header "+tokenHeader)
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

// deliberate reports whether a request can't be a form of another site: those send
// no JSON, no custom header and no bearer token.
func (g *guard) deliberate(r *http.Request) bool {
	if scheme, _, _ := strings.Cut(r.Header.Get("Authorization"), " "); strings.EqualFold(scheme, "Bearer") {
		return true
	}
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err == nil && kind == "application/json" {
		return true
	}
	return g.ownToken(r, r.Header.Get(tokenHeader))
}

// apiError answers a request to the API that is refused.
func apiError(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write([]byte(`{"error":"` + text + `"}` + "\n")) // the texts above need no escapes
}

// cutText is a text of at most n bytes.
func cutText(text string, n int) string {
	if len(text) <= n {
		return text
	}
	return strings.ToValidUTF8(text[:n], "")
}
