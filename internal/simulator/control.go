package simulator

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// accountFault is the current fault of the whole account.
type accountFault struct {
	fault *fault
	phase string // asked for; empty: where the backend gives it
	appID string // empty: every app
}

// Control is the body of /control, in both directions.
type Control struct {
	// Fault is a code of the backend, "status-<n>" or "status-<n>-<seconds>";
	// empty: none.
	Fault string `json:"fault"`
	AppID string `json:"app_id,omitempty"` // empty: every app
	Phase string `json:"phase,omitempty"`  // empty: where the backend gives it
}

// SetFault makes every new session fail until it is called with an empty Control.
// Open sessions go on.
func (s *Server) SetFault(c Control) error {
	var a accountFault
	if c.Fault != "" {
		f, rest, err := parseFault(strings.Split(c.Fault, "-"))
		if err != nil {
			return fmt.Errorf("fault: %w", err)
		}
		if len(rest) > 0 {
			return fmt.Errorf("fault: %q: nothing may follow %s", c.Fault, f.name)
		}
		if c.Phase != "" {
			if f, err = f.in(c.Phase); err != nil {
				return fmt.Errorf("phase: %w", err)
			}
		}
		a = accountFault{fault: &f, phase: c.Phase, appID: c.AppID}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.account = a
	return nil
}

// Fault returns the account's fault as SetFault set it.
func (s *Server) Fault() Control {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.account.fault == nil {
		return Control{}
	}
	return Control{Fault: s.account.fault.name, AppID: s.account.appID, Phase: s.account.phase}
}

// accountFor returns the account's fault for a call: phaseToken for a token call;
// otherwise the fault of a new session in any phase. A bad API key shows in the
// token call, an outage there and at the upgrade.
func (s *Server) accountFor(call, appID string) (fault, bool) {
	s.mu.Lock()
	a := s.account
	s.mu.Unlock()
	if a.fault == nil || (a.appID != "" && a.appID != appID) {
		return fault{}, false
	}
	f := *a.fault
	outage := f.name == "connectionFailed" || strings.HasPrefix(f.name, "status-")
	badKey := f.name == "sessionTokenExpired"
	switch {
	case a.phase != "":
		// A token call does not name its app, so the fault of one app shows at
		// the upgrade.
		if a.phase == phaseToken && a.appID != "" && call == phaseConnect {
			g, err := f.in(phaseConnect)
			return g, err == nil
		}
		return f, (call == phaseToken) == (a.phase == phaseToken)
	case call == phaseToken:
		f.phase = phaseToken
		return f, outage || badKey
	}
	return f, true
}

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+consolePath+"/session-tokens", s.serveToken)
	mux.HandleFunc("GET "+ingressPath+"/websocket", s.serveIngress)
	mux.HandleFunc("POST /control", s.serveSetControl)
	mux.HandleFunc("GET /control", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, s.Fault())
	})
	mux.HandleFunc("GET /book", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, SessionLogPage{Totals: s.Totals(), List: s.SessionLog()})
	})
	mux.HandleFunc("DELETE /book", func(w http.ResponseWriter, _ *http.Request) {
		s.ResetSessionLog()
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		// Ignore the error: the client is gone.
		_, _ = io.WriteString(w, Help())
	})
	return mux
}

// SessionLogPage is the reply to GET /book: the totals, and the sessions as
// "list".
type SessionLogPage struct {
	Totals
	List []Session `json:"list"`
}

func (s *Server) serveSetControl(w http.ResponseWriter, r *http.Request) {
	d := json.NewDecoder(io.LimitReader(r.Body, 64<<10))
	d.DisallowUnknownFields()
	var c Control
	err := d.Decode(&c)
	if err == nil {
		err = s.SetFault(c)
	}
	if err != nil {
		writeJSON(w, http.StatusBadRequest, map[string]string{"error": err.Error()})
		return
	}
	writeJSON(w, http.StatusOK, s.Fault())
}

// Help describes the simulator's addresses, avatar IDs and API keys.
func Help() string {
	return `Simulated avatar backend.

  POST ` + consolePath + `/session-tokens     header X-Api-Key, body {"expireAt":<unix seconds>}
  GET  ` + ingressPath + `/websocket      ?id=<avatar id>; headers X-App-ID, X-Session-Key
  GET, POST /control                    {"fault":"creditsExhausted"}, {"fault":""}; also app_id, phase
  GET, DELETE /book                     the sessions as the backend saw them

Avatar ids (any of them may go on after a dash: ok-1, hang-a, flaky-serverError-2-b):
  ok…                 runs
  fail-<code>         fails each session with that code, where the backend gives it
  fail-status-<n>     refuses the upgrade with that HTTP status; -<seconds> adds Retry-After
  flaky-<code>-<n>    fails n sessions, then runs
  slow-<ms>           delays each frame
  hang                confirms, then sends nothing
  deaf                as hang, and leaves pings unanswered
  mute                never confirms
  drop-<n>            cuts the TCP connection after n frames, each session
  drop-once-<n>       the same, the first session only
  limit-<n>           ends each session after n frames: session time limit reached
  egress-end          runs; in egress it says over the socket when speech begins and ends
API keys: fail-<code>, status-<n>, status-<n>-<seconds of Retry-After>; any other is good.
Egress tokens that begin with "bad" are refused.
With --tls the addresses are https and wss, with a certificate made for this start.
A worker trusts it with SSL_CERT_FILE=<the file that is printed> in its environment;
the file is removed at the end.

Codes: ` + strings.Join(Codes(), ", ") + "\n"
}
