package simulator

import (
	"fmt"
	"net"
	"net/http"

	"github.com/coder/websocket"
)

// serveIngress upgrades a request to a session, or refuses it as the backend does
// (docs/protocol.md, section 3).
func (s *Server) serveIngress(w http.ResponseWriter, r *http.Request) {
	admitted := false
	// dropConnection panics; that is a refusal too.
	defer func() {
		if !admitted {
			s.sessionLog.countRefused()
		}
	}()
	app, token := r.Header.Get("X-App-ID"), r.Header.Get("X-Session-Key")
	query := r.URL.Query()
	if token == "" {
		app, token = query.Get("appId"), query.Get("sessionKey")
	}
	c := &session{srv: s, rec: &Session{AppID: app, AvatarID: query.Get("id")}}
	if !s.authorize(w, c, token) {
		return
	}
	c.rec.Opened = s.now()
	c.rec.ConnectionID = newID(c.rec.Opened)
	if s.replay != nil && !s.opts.ReplayPatch {
		c.rec.ConnectionID = s.opts.Replay.ConnectionID
		// The recorded envelopes contain the recorded req_id. A client that uses
		// it gets them byte for byte.
		w.Header().Set(ReplayHeader, s.opts.Replay.ReqID)
	}
	c.id = c.rec.ConnectionID
	if !s.sessionLog.admit(c.rec, s.opts.MaxSessions) {
		writeUpgradeError(w, http.StatusPaymentRequired, "session denied: concurrency")
		return
	}
	admitted = true
	c.run(w, r)
}

// authorize checks token, app, account and avatar in the backend's order and sets
// the session's behaviour. If it returns false, it has written the reply.
func (s *Server) authorize(w http.ResponseWriter, c *session, token string) bool {
	switch s.tokens.check(token, s.now()) {
	case tokenBad:
		writeUpgradeError(w, http.StatusBadRequest, "Invalid session token")
		return false
	case tokenExpired:
		writeUpgradeError(w, http.StatusUnauthorized, "Session token expired")
		return false
	case tokenGood:
	}
	if c.rec.AppID == "" {
		writeUpgradeError(w, http.StatusNotFound, "app id unrecognized")
		return false
	}
	b, known := parseAvatar(c.rec.AvatarID)
	if f, hit := s.accountFor(phaseConnect, c.rec.AppID); hit {
		b, known = failing(f), true
	}
	if !known {
		writeUpgradeError(w, http.StatusNotFound, "Avatar not found: "+c.rec.AvatarID)
		return false
	}
	c.behaviour = b
	if b.fault != nil && !s.takeFailure(c.rec.AvatarID, b.times) {
		c.behaviour.fault = nil
	}
	if f := c.behaviour.fault; f != nil && f.phase == phaseConnect {
		s.sessionLog.countFault(f.name)
		f.writeUpgrade(w)
		return false
	}
	return true
}

// takeFailure reports whether a fault hits one more session of an avatar ID, and
// counts it; times is 0 if it hits every session.
func (s *Server) takeFailure(avatarID string, times int) bool {
	if times == 0 {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failures[avatarID] >= times {
		return false
	}
	s.failures[avatarID]++
	return true
}

// writeUpgradeError refuses an upgrade in the observed format: a JSON message and
// a newline.
func writeUpgradeError(w http.ResponseWriter, status int, message string) {
	writeJSON(w, status, map[string]string{"message": message})
}

// run runs the session and returns when it is closed.
func (c *session) run(w http.ResponseWriter, r *http.Request) {
	code, by, registered := 1006, "server", false
	defer func() {
		ended := c.srv.now()
		if cut := c.cutAt.Load(); cut != nil {
			ended = *cut
		}
		c.srv.sessionLog.closed(c.rec, ended, code, by)
		if registered { // Stop waits until it is in the log
			c.srv.unregister(c)
		}
	}()
	nc, ok := r.Context().Value(connKey{}).(net.Conn)
	if !ok {
		c.srv.log.Error().Msg("simulator: the request's context has no connection")
		return
	}
	c.net = nc
	conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{
		InsecureSkipVerify: true, // the simulator needs no origin check
		OnPingReceived:     c.answerPing,
	})
	if err != nil {
		c.srv.log.Debug().Err(err).Str("avatar_id", c.rec.AvatarID).Msg("simulator: upgrade failed")
		return
	}
	c.conn = conn
	conn.SetReadLimit(maxMessage)
	if registered = c.srv.register(c); !registered {
		// Stop was called: close the connection like the listener.
		c.cutConn()
		return
	}
	c.startHeartbeat()
	err = c.serve()
	if n := websocket.CloseStatus(err); n != -1 {
		code = int(n)
	}
	by = "client"
	c.finish()
	c.srv.log.Debug().Str("connection_id", c.id).Str("avatar_id", c.rec.AvatarID).
		Str("end", fmt.Sprint(err)).Msg("simulator: session closed")
}
