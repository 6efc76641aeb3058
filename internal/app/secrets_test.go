package app_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	"avatarworker/internal/config"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/session/avatarpb"
)

// What must never be shown.
const (
	secretKey     = "sk-Api-Key-9f8e7d6c5b"
	secretToken   = "eyJ.Session-Token-1a2b3c4d.sig"
	secretEgress  = "Egress-Token-5e6f7a8b9c"
	secretQuery   = "X-Amz-Signature=0a1b2c3d4e5f6071"
	secretPass    = "Url-Password-77aa88bb"
	secretWithEsc = "Tok en+with/escapes=99"
)

// echo is a backend that answers with everything it was sent, as a careless one
// may: in errors of the token call, of the upgrade, of the handshake and of the
// session.
func echo(t testing.TB) *httptest.Server {
	said := func(r *http.Request) string {
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<16))
		if err != nil {
			t.Error(err)
		}
		return fmt.Sprintf("you said %s %s?%s with %v and %s", r.Method, r.URL.Path, r.URL.RawQuery, r.Header, body)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/console/session-tokens", func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.Header.Get("X-Api-Key"), "-refused") {
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprintf(w, `{"errors":[{"status":400,"code":"ERR %s","title":"key %s","detail":%q}]}`, r.Header.Get("X-Api-Key"), r.Header.Get("X-Api-Key"), said(r))
			return
		}
		fmt.Fprintf(w, `{"sessionToken":%q}`, secretToken)
	})
	mux.HandleFunc("GET /v2/driveningress/websocket", func(w http.ResponseWriter, r *http.Request) {
		text := said(r)
		if r.URL.Query().Get("id") == "upgrade" {
			w.WriteHeader(http.StatusInternalServerError)
			fmt.Fprintf(w, `{"message":%q}`, text)
			return
		}
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			t.Error(err)
			return
		}
		echoSession(t, c, r.URL.Query().Get("id"), text)
	})
	mux.HandleFunc("GET /speech.wav", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprint(w, said(r))
	})
	srv := httptest.NewServer(mux)
	t.Cleanup(srv.Close)
	return srv
}

func echoSession(t testing.TB, c *websocket.Conn, avatar, text string) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	defer func() { _ = c.CloseNow() }() // closed already, mostly
	_, configure, err := c.Read(ctx)
	if err != nil {
		t.Error(err)
		return
	}
	send := func(m *avatarpb.Message) {
		data, err := proto.Marshal(m)
		if err == nil {
			err = c.Write(ctx, websocket.MessageBinary, data)
		}
		if err != nil {
			t.Error(err)
		}
	}
	refusal := &avatarpb.Message{Type: avatarpb.MessageType_MESSAGE_TYPE_SERVER_ERROR, Data: &avatarpb.Message_ServerError{
		ServerError: &avatarpb.ServerError{ConnectionId: "conn", Code: 13, Message: text + strings.ToValidUTF8(string(configure), "?")},
	}}
	if avatar == "handshake" {
		send(refusal)
		return
	}
	send(&avatarpb.Message{Type: avatarpb.MessageType_MESSAGE_TYPE_SERVER_CONFIRM_SESSION, Data: &avatarpb.Message_ServerConfirmSession{
		ServerConfirmSession: &avatarpb.ServerConfirmSession{ConnectionId: "conn"},
	}})
	if _, _, err := c.Read(ctx); err != nil { // the first speech
		t.Error(err)
	}
	if avatar == "close" {
		_ = c.Close(4999, secretToken+" "+secretEgress) // the worker hangs up on its side
		return
	}
	send(refusal)
}

func TestSecretsAreShownNowhereAlsoWhenTheBackendEchoesThem(t *testing.T) {
	t.Parallel()
	for _, auth := range []string{"header", "query"} {
		t.Run(auth, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, nil)
			backend := echo(t)
			log := &buffer{}
			w := f.worker(worker{log: log, config: func(c *config.Config) {
				c.App.APIKey = secretKey
				c.Apps["refused"] = &config.App{ID: "refused", APIKey: secretKey + "-refused"}
				c.Backend.ConsoleURL, c.Backend.IngressURL = backend.URL+"/v1/console", backend.URL+"/v2/driveningress"
				c.Backend.Auth = auth
				c.Retry.MaxAttempts, c.Circuit.Failures = 2, 1000
				c.Audio.AllowPrivateURLs = true
				c.Admin.Addr = "127.0.0.1:0"
			}})
			ids := f.publishSecrets(backend.URL)
			for _, id := range ids {
				if r := f.outcome(id); r.State != lifecycle.StateDeadLettered {
					t.Errorf("%s ended %s", id, r.State)
				}
			}
			shown := f.everythingShown()
			shown["metrics"] = page(t, "http://"+w.app.AdminAddr().String()+"/metrics")
			w.stop()
			shown["log"] = log.String()
			for where, text := range shown {
				for _, secret := range []string{secretKey, secretToken, secretEgress, secretQuery, "0a1b2c3d4e5f6071", secretPass, secretWithEsc, "Tok+en%2Bwith%2Fescapes%3D99"} {
					if i := strings.Index(text, secret); i >= 0 {
						t.Errorf("%s shows %q: …%s…", where, secret, text[max(0, i-200):min(len(text), i+80)])
					}
				}
			}
			if !strings.Contains(shown["log"], "you said") || !strings.Contains(shown["metrics"], "avatar_worker_") {
				t.Error("nothing was echoed, or no metrics: the test looks at the wrong place")
			}
		})
	}
}

// publishSecrets publishes a job for each way in which secrets may come back.
func (f *fleet) publishSecrets(backend string) (ids []string) {
	url := backend + "/speech.wav?" + secretQuery + "&x=1"
	lk := fields{"livekit": fields{"url": "wss://rooms.example.com/?" + secretQuery, "room_name": "r", "publisher_id": "p", "api_token": secretEgress}}
	for id, extra := range map[string]fields{
		"token":     {"app_id": "refused", "output": lk},
		"upgrade":   {"output": lk},
		"handshake": {"output": agora(secretEgress)},
		"escapes":   {"output": agora(secretWithEsc)},
		"runtime":   {"output": lk},
		"close":     {"output": lk},
		"url":       {"audio": fields{"url": url}},
	} {
		avatar := id
		if id == "escapes" {
			avatar = "handshake"
		}
		extra["labels"] = fields{"team": "a"}
		f.publish(id, avatar, extra)
		ids = append(ids, id)
	}
	// Not valid, with a token and a login in the wrong place.
	// A message that is not a valid job has its id from its headers.
	for id, body := range map[string]string{
		"invalid": `{"avatar_id":"ok","audio":{"inline":"AAAA"},"output":{"livekit":{"url":"wss://x.example/?` + secretQuery + `","room_name":"","api_token":"` + secretEgress + `"}}}`,
		"login":   `{"avatar_id":"ok","audio":{"url":"` + strings.Replace(url, "http://", "http://user:"+secretPass+"@", 1) + `"}}`,
	} {
		f.publishRaw(&nats.Msg{Subject: f.names.Jobs("default"), Header: nats.Header{"Nats-Msg-Id": {id}}, Data: []byte(body)})
		ids = append(ids, id)
	}
	return ids
}

// everythingShown is all text that the worker wrote to NATS, but for the bodies
// of dead letters, which are the jobs' own.
func (f *fleet) everythingShown() map[string]string {
	f.t.Helper()
	out := map[string]string{}
	for _, msg := range f.all(f.names.EventsStream(), ">") {
		out["event "+msg.Subject()] += fmt.Sprint(msg.Headers()) + string(msg.Data()) + "\n"
	}
	for _, msg := range f.all(f.names.DLQStream(), ">") {
		out["dead letter "+msg.Subject()] += fmt.Sprint(msg.Headers()) + "\n"
	}
	for _, bucket := range []string{f.names.StateBucket(), f.names.FleetBucket()} {
		kv, err := f.js.KeyValue(f.ctx, bucket)
		if err != nil {
			f.t.Fatal(err)
		}
		keys, err := kv.Keys(f.ctx)
		if err != nil {
			f.t.Fatal(err)
		}
		for _, key := range keys {
			entry, err := kv.Get(f.ctx, key)
			if err == nil {
				out[bucket+" "+key] = string(entry.Value())
			} else if !strings.Contains(err.Error(), jetstream.ErrKeyNotFound.Error()) {
				f.t.Fatal(err)
			}
		}
	}
	return out
}

func page(t testing.TB, url string) string {
	t.Helper()
	client := http.Client{Timeout: 10 * time.Second}
	defer client.CloseIdleConnections()
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := resp.Body.Close(); err != nil {
			t.Error(err)
		}
	}()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}
