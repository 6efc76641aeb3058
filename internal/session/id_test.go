package session

import (
	"context"
	"net/http"
	"strings"
	"testing"

	"avatarworker/internal/errors"
	"avatarworker/internal/session/avatarpb"
)

func TestIDsOfTheBackendAreCutWhereTheyEnter(t *testing.T) {
	huge := strings.Repeat("é", 1<<20)
	b := &backend{session: func(p *peer) {
		p.read()
		p.send(confirmMessage(huge))
		p.speech()
		refusal := errorMessage(4001, "credits exhausted")
		e := refusal.GetServerError()
		e.ConnectionId, e.ReqId = huge, huge
		p.send(refusal)
	}}
	inMemory(t, b, Options{}, func(c *Client) {
		s := mustOpen(t, c, params())
		if id := s.ConnectionID(); id != huge[:maxID] {
			t.Errorf("the connection id has %d bytes", len(id))
		}
		_, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0), OnFrame: func(Frame) error { return nil }})
		e := wantError(t, err, errors.CodeCreditsExhausted, errors.PhaseRuntime)
		if e.ConnectionID != huge[:maxID] || e.ReqID != huge[:maxID] {
			t.Errorf("the error has ids of %d and %d bytes", len(e.ConnectionID), len(e.ReqID))
		}
	})
	b = &backend{session: func(p *peer) {
		p.read()
		p.send(confirmMessage("x" + huge)) // the cut falls into a character
	}}
	inMemory(t, b, Options{}, func(c *Client) {
		if id := mustOpen(t, c, params()).ConnectionID(); id != "x"+huge[:maxID-2] {
			t.Errorf("the connection id is %q", id)
		}
	})
}

func TestOnlyASimulatedBackendChoosesTheReqID(t *testing.T) {
	const console, path = "http://backend/v1/console", "/v2/driveningress"
	long := strings.Repeat("x", maxID+1)
	for _, tc := range []struct {
		name    string
		ingress string
		asked   string
		obeyed  bool
	}{
		{"a configured address", "http://backend" + path, "recorded", true},
		{"one composed from the region", "", "recorded", false},
		{"the vendor's own, configured", "wss://api.us-west.spatius.ai" + path, "recorded", false},
		{"the vendor's own in China", "https://API.cn-beijing.spatialwalk.top." + path, "recorded", false},
		{"one that only ends alike", "http://notspatius.ai" + path, "recorded", true},
		{"an id that is none", "http://backend" + path, long, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var spoken *avatarpb.Message
			b := &backend{
				upgrade: func(w http.ResponseWriter, _ *http.Request) bool {
					w.Header().Set(replayHeader, tc.asked)
					return false
				},
				session: func(p *peer) {
					p.confirm()
					id, _, all := p.speech()
					spoken = all[0]
					p.sendRaw(frame(p.t, id, true, "one"))
				},
			}
			inMemory(t, b, Options{Endpoints: Endpoints{ConsoleURL: console, IngressURL: tc.ingress}}, func(c *Client) {
				s := mustOpen(t, c, params())
				done, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0), OnFrame: func(Frame) error { return nil }})
				if err != nil {
					t.Fatal(err)
				}
				if id := spoken.GetClientAudioInput().GetReqId(); id != done.ReqID || (id == tc.asked) != tc.obeyed {
					t.Errorf("spoken under %q", id)
				}
			})
		})
	}
}
