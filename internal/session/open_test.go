package session

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/session/avatarpb"
)

func TestUpgradeAndConfigurationCarryWhatTheyShould(t *testing.T) {
	for _, auth := range []Auth{AuthHeader, AuthQuery} {
		t.Run(string(auth), func(t *testing.T) {
			var config *avatarpb.ClientConfigureSession
			var body []byte
			b := &backend{session: func(p *peer) { p.confirm(); config = p.config }}
			b.token = func(w http.ResponseWriter, r *http.Request) {
				body, _ = io.ReadAll(r.Body)
				fmt.Fprint(w, `{"sessionToken":"token-1"}`)
			}
			var now time.Time
			inMemory(t, b, Options{Auth: auth, TokenTTL: 2 * time.Hour}, func(c *Client) {
				p := params()
				p.AvatarID, p.AppID = "a/b c", "app & id é"
				p.ExtraParams = map[string]string{"server_post_process": "false"}
				p.Agora = &Agora{ChannelName: "ch", Token: "agora-token", UID: 7, PublisherID: "pub"}
				p.Config = func(context.Context) (AudioConfig, error) {
					return AudioConfig{SampleRate: 24000, Bitrate: 32000, Format: FormatOggOpus}, nil
				}
				now = time.Now()
				mustOpen(t, c, p).Close()
				wantClosed1000(t, b, 1)
			})
			mint, up := b.requests[0], b.requests[1]
			if mint.Method != http.MethodPost || mint.Header.Get("X-Api-Key") != "the-api-key" || mint.Header.Get("Content-Type") != "application/json" {
				t.Errorf("token request %s %v", mint.Method, mint.Header)
			}
			var asked struct{ ExpireAt int64 }
			if err := json.Unmarshal(body, &asked); err != nil || asked.ExpireAt != now.Add(2*time.Hour).Unix() {
				t.Errorf("token body %s, %v", body, err)
			}
			q := up.URL.Query()
			got := []string{q.Get("id"), up.Header.Get("X-App-ID"), up.Header.Get("X-Session-Key"), q.Get("appId"), q.Get("sessionKey")}
			want := []string{"a/b c", "app & id é", "token-1", "", ""}
			if auth == AuthQuery {
				want = []string{"a/b c", "", "", "app & id é", "token-1"}
			}
			if strings.Join(got, "|") != strings.Join(want, "|") {
				t.Errorf("upgrade has %q, want %q", got, want)
			}
			if config.SampleRate != 24000 || config.Bitrate != 32000 || config.AudioFormat != avatarpb.AudioFormat_AUDIO_FORMAT_OGG_OPUS ||
				config.EgressType != avatarpb.EgressType_EGRESS_TYPE_AGORA || config.AgoraEgress.GetUid() != 7 || config.AgoraEgress.GetToken() != "agora-token" ||
				config.ExtraParams["server_post_process"] != "false" {
				t.Errorf("configuration %v", config)
			}
		})
	}
}

// answer answers any request alike.
func answer(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "7")
		w.WriteHeader(status)
		fmt.Fprint(w, body)
	}
}

func refuse(status int, body string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool { answer(status, body)(w, r); return true }
}

func TestOpenFailures(t *testing.T) {
	const tk, co, hs = errors.PhaseToken, errors.PhaseConnect, errors.PhaseHandshake
	silent := func(http.ResponseWriter, *http.Request) { time.Sleep(time.Minute) }
	say := func(m *avatarpb.Message) func(*peer) { return func(p *peer) { p.read(); p.send(m) } }
	for _, tc := range []struct {
		name   string
		b      *backend
		code   errors.Code
		phase  errors.Phase
		minted int
		took   time.Duration
	}{
		{"token refused under HTTP 200", &backend{token: answer(200, `{"errors":[{"status":400,"code":"INVALID_ARGUMENT","detail":"expireAt must lie in the future"}]}`)}, errors.CodeInvalidRequest, tk, 1, 0},
		{"no token under HTTP 200", &backend{token: answer(200, `{}`)}, errors.CodeProtocolError, tk, 1, 0},
		{"token answer above 1 MiB", &backend{token: answer(200, `{"sessionToken":"`+strings.Repeat("x", 1<<20)+`"}`)}, errors.CodeProtocolError, tk, 1, 0},
		{"401 to the API key", &backend{token: answer(401, "no")}, errors.CodeSessionTokenExpired, tk, 1, 0},
		{"a redirect is not followed", &backend{token: func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://elsewhere/v1/console/session-tokens", http.StatusTemporaryRedirect)
		}}, errors.CodeUnknown, tk, 1, 0},
		{"token call without an answer", &backend{token: silent}, errors.CodeConnectionFailed, tk, 1, 10 * time.Second},
		{"upgrade without an answer", &backend{upgrade: func(http.ResponseWriter, *http.Request) bool { time.Sleep(time.Minute); return true }}, errors.CodeConnectionFailed, co, 1, 10 * time.Second},
		{"upgrade refused: avatar", &backend{upgrade: refuse(404, `{"message":"Avatar not found"}`)}, errors.CodeAvatarNotFound, co, 1, 0},
		{"upgrade refused: credits", &backend{upgrade: refuse(402, `{"message":"session denied: credits exhausted"}`+"\n")}, errors.CodeCreditsExhausted, co, 1, 0},
		{"token refused twice", &backend{upgrade: refuse(400, `{"message":"Invalid session token"}`+"\n")}, errors.CodeSessionTokenInvalid, co, 2, 0},
		{"never confirmed", &backend{session: func(p *peer) { p.read(); p.read() }}, errors.CodeConnectionFailed, hs, 1, 10 * time.Second},
		{"text in the handshake", &backend{session: func(p *peer) { p.read(); _ = p.c.Write(context.Background(), 1, []byte("hi")) }}, errors.CodeProtocolError, hs, 1, 0},
		{"no envelope in the handshake", &backend{session: func(p *peer) { p.read(); p.sendRaw([]byte{0xff}) }}, errors.CodeProtocolError, hs, 1, 0},
		{"another type in the handshake", &backend{session: func(p *peer) { p.read(); p.sendRaw(frame(p.t, "x", true, "y")) }}, errors.CodeProtocolError, hs, 1, 0},
		{"a confirm without an id", &backend{session: say(confirmMessage(""))}, errors.CodeProtocolError, hs, 1, 0},
		{"an early close", &backend{session: func(p *peer) { p.read(); p.c.Close(1000, "") }}, errors.CodeConnectionClosed, hs, 1, 0},
		{"a cut in the handshake", &backend{session: func(p *peer) { p.read(); p.c.CloseNow() }}, errors.CodeConnectionClosed, hs, 1, 0},
		{"unsupported rate", &backend{session: say(errorMessage(0, "unsupported sample rate 12345"))}, errors.CodeUnsupportedSampleRate, hs, 1, 0},
		{"a bad room token", &backend{session: say(errorMessage(16, "unauthorized: invalid token"))}, errors.CodeInvalidEgressConfig, hs, 1, 0},
		{"token refused in the handshake, twice", &backend{session: say(errorMessage(0, "session token expired"))}, errors.CodeSessionTokenExpired, hs, 2, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inMemory(t, tc.b, Options{}, func(c *Client) {
				start := time.Now()
				_, err := c.Open(context.Background(), params())
				e := wantError(t, err, tc.code, tc.phase)
				if e.Region != DefaultRegion {
					t.Errorf("region %q", e.Region)
				}
				if e.HTTPStatus >= 400 && e.RetryAfter != 7*time.Second {
					t.Errorf("Retry-After is lost: %+v", e)
				}
				if took := time.Since(start); took < tc.took || took > tc.took+time.Second {
					t.Errorf("took %s, want %s", took, tc.took)
				}
				if got := int(tc.b.minted.Load()); got != tc.minted {
					t.Errorf("%d tokens were minted, want %d", got, tc.minted)
				}
			})
		})
	}
}

func TestRefusedTokenIsMintedOnceMore(t *testing.T) {
	b := &backend{}
	b.upgrade = func(w http.ResponseWriter, r *http.Request) bool {
		return r.Header.Get("X-Session-Key") == "token-1" && refuse(400, `{"message":"Invalid session token"}`)(w, r)
	}
	inMemory(t, b, Options{}, func(c *Client) {
		configs := 0
		p := params()
		p.Config = func(context.Context) (AudioConfig, error) { configs++; return AudioConfig{SampleRate: 8000}, nil }
		mustOpen(t, c, p)
		if b.minted.Load() != 2 || b.upgrades.Load() != 2 || configs != 1 {
			t.Errorf("minted %d, upgrades %d, configs %d", b.minted.Load(), b.upgrades.Load(), configs)
		}
	})
}

func TestAPIKeyIsReadAgainAfter401(t *testing.T) {
	b := &backend{token: func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Api-Key") == "old" {
			answer(401, "no")(w, r)
			return
		}
		fmt.Fprint(w, `{"sessionToken":"t"}`)
	}}
	inMemory(t, b, Options{}, func(c *Client) {
		keys := []string{"old", "new"}
		p := params()
		p.APIKey = func() (string, error) { k := keys[0]; keys = keys[1:]; return k, nil }
		mustOpen(t, c, p)
	})
}

func TestConfigRunsWhileTheTokenIsMintedAndItsErrorOpensNoSession(t *testing.T) {
	asked := make(chan struct{})
	b := &backend{token: func(w http.ResponseWriter, _ *http.Request) {
		<-asked // only answered once Config runs
		fmt.Fprint(w, `{"sessionToken":"t"}`)
	}}
	inMemory(t, b, Options{}, func(c *Client) {
		asked = make(chan struct{})
		boom := errors.New("no such object")
		p := params()
		p.Config = func(context.Context) (AudioConfig, error) { close(asked); return AudioConfig{}, boom }
		if _, err := c.Open(context.Background(), p); !errors.Is(err, boom) {
			t.Errorf("error %v", err)
		}
		if b.upgrades.Load() != 0 {
			t.Error("a session was dialled for speech that is not there")
		}
	})
}

func TestCancelledOpenLeavesNothing(t *testing.T) {
	cause := errors.New("cancelled by its owner")
	hang := func(http.ResponseWriter, *http.Request) bool { time.Sleep(time.Minute); return true }
	for name, b := range map[string]*backend{
		"in the token call": {token: func(w http.ResponseWriter, r *http.Request) { hang(w, r) }},
		"in the upgrade":    {upgrade: hang},
		"in the handshake":  {session: func(p *peer) { p.read(); p.read() }},
	} {
		t.Run(name, func(t *testing.T) {
			inMemory(t, b, Options{}, func(c *Client) {
				ctx, cancel := context.WithCancelCause(context.Background())
				time.AfterFunc(time.Second, func() { cancel(cause) })
				start := time.Now()
				if _, err := c.Open(ctx, params()); !errors.Is(err, cause) {
					t.Errorf("error %v", err)
				}
				if took := time.Since(start); took > 2*time.Second {
					t.Errorf("returned after %s", took)
				}
				opened := 0
				if b.session != nil {
					opened = 1
				}
				wantClosed1000(t, b, opened)
			})
		})
	}
}

func TestASessionThatIsConfirmedWhileItIsCancelledIsKnown(t *testing.T) {
	for name, end := range map[string]func(c *Client, cancel func()){
		"its context ends":     func(_ *Client, cancel func()) { cancel() },
		"the client is closed": func(c *Client, _ func()) { go c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			b := &backend{session: func(p *peer) { time.Sleep(2 * time.Second); p.confirm() }}
			inMemory(t, b, Options{}, func(c *Client) {
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				time.AfterFunc(2*time.Second-crossingWait/2, func() { end(c, cancel) })
				s, err := c.Open(ctx, params())
				if err != nil {
					t.Fatalf("the backend bills a session of which nothing is known: %v", err)
				}
				<-s.closed
				if s.ConnectionID() == "" || s.Connected() < 0 || s.Connected() > time.Second {
					t.Errorf("connection %q, connected for %s", s.ConnectionID(), s.Connected())
				}
				if _, err := s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0)}); err == nil {
					t.Error("a closed session speaks")
				}
				wantClosed1000(t, b, 1)
			})
		})
	}
}

func TestASessionThatEndsWithItsConfirmationIsKnown(t *testing.T) {
	b := &backend{session: func(p *peer) { p.confirm(); p.c.CloseNow(); p.sawClose = 1000 }}
	inMemory(t, b, Options{}, func(c *Client) {
		s, err := c.Open(context.Background(), params())
		if err != nil {
			t.Fatalf("the backend bills a session of which nothing is known: %v", err)
		}
		if s.ConnectionID() == "" {
			t.Error("no connection id")
		}
	})
}

func TestNextRegionIsTriedOnlyWhereNoConnectionCanBeMade(t *testing.T) {
	for _, tc := range []struct {
		name   string
		down   string // hosts that can't be reached contain this
		b      *backend
		region string
		code   errors.Code
	}{
		{"console down", "console.us-west", &backend{}, "ap-northeast", ""},
		{"ingress down", "api.us-west", &backend{}, "ap-northeast", ""},
		{"two regions down", "us-west ap-northeast", &backend{}, "cn-beijing", ""},
		{"all down", "us-west ap-northeast cn-beijing", &backend{}, "", errors.CodeConnectionFailed},
		{"a refusal is an answer", "", &backend{token: answer(500, "")}, "", errors.CodeServerError},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.b.dial = func(host string) error {
				for _, down := range strings.Fields(tc.down) {
					if strings.Contains(host, down) {
						return errors.New("connection refused")
					}
				}
				return nil
			}
			// The addresses that are composed are https: memory has no TLS.
			o := Options{Fallback: []string{"us-west", "ap-northeast", "cn-beijing"}, Endpoints: Endpoints{BootstrapURL: "http://boot/bootstrap"}}
			inMemory(t, tc.b, o, func(c *Client) {
				s, err := c.Open(context.Background(), params())
				if tc.code != "" {
					wantError(t, err, tc.code, errors.PhaseToken)
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if s.Region() != tc.region {
					t.Errorf("region %q, want %q", s.Region(), tc.region)
				}
			})
		})
	}
}

func TestAutoRegionComesFromBootstrapAndNeverFailsASession(t *testing.T) {
	var mu sync.Mutex // over what the handler reads
	current, calls, down := "ap-northeast", 0, false
	set := func(f func()) { mu.Lock(); defer mu.Unlock(); f() }
	b := &backend{}
	b.bootstrap = func(w http.ResponseWriter, r *http.Request) {
		var answer string
		var slow bool
		set(func() { calls++; answer, slow = current, down })
		if slow {
			time.Sleep(time.Minute)
		}
		var q map[string]string
		if err := json.NewDecoder(r.Body).Decode(&q); err != nil || q["app_id"] != "app-1" || q["region"] != "auto" {
			t.Errorf("bootstrap request %v, %v", q, err)
		}
		fmt.Fprintf(w, `{"region":{"current":%q,"candidates":["us-west"]}}`, answer)
	}
	inMemory(t, b, Options{Endpoints: Endpoints{BootstrapURL: "http://boot/bootstrap"}}, func(c *Client) {
		open := func(want string, wantCalls int) {
			t.Helper()
			p := params()
			p.Region = AutoRegion
			s := mustOpen(t, c, p)
			defer s.Close()
			mu.Lock()
			defer mu.Unlock()
			if s.Region() != want || calls != wantCalls {
				t.Errorf("region %q after %d calls, want %q after %d", s.Region(), calls, want, wantCalls)
			}
		}
		open("ap-northeast", 1)
		set(func() { current = "cn-beijing" })
		time.Sleep(299 * time.Second)
		open("ap-northeast", 1) // still cached
		time.Sleep(2 * time.Second)
		open("cn-beijing", 2)
		time.Sleep(301 * time.Second)
		set(func() { down = true })
		start := time.Now()
		open("cn-beijing", 3) // the last one known
		if took := time.Since(start); took != 5*time.Second {
			t.Errorf("the bootstrap call was given %s", took)
		}
		set(func() { down, current = false, "../evil" })
		time.Sleep(time.Minute)
		open("cn-beijing", 4)
	})
	set(func() { down, calls = true, 0 })
	inMemory(t, b, Options{Endpoints: Endpoints{BootstrapURL: "http://boot/bootstrap"}}, func(c *Client) {
		p := params()
		p.Region = AutoRegion
		if s := mustOpen(t, c, p); s.Region() != DefaultRegion {
			t.Errorf("region %q without any answer", s.Region())
		}
	})
	set(func() { calls = 0 })
	inMemory(t, b, Options{}, func(c *Client) {
		p := params()
		p.Region = AutoRegion
		mustOpen(t, c, p)
		mu.Lock()
		defer mu.Unlock()
		if calls != 0 {
			t.Error("the bootstrap call was made although both URLs are given")
		}
	})
}

func TestSecretsAppearInNoError(t *testing.T) {
	const key, token, lk, extra = "KEY-aaaa", "TOKEN-bbbb", "LK-cccc", "EXTRA-dddd"
	all := strings.Join([]string{key, token, lk, extra}, " ")
	echo := fmt.Sprintf(`{"message":%q}`, "bad: "+all+" at https://x/y?sessionKey="+token)
	for name, b := range map[string]*backend{
		"token refusal":   {token: answer(403, echo)},
		"upgrade refusal": {upgrade: refuse(403, echo)},
		"cut refusal":     {upgrade: refuse(403, strings.Repeat("x", 1024-8)+token+all)},
		"handshake error": {session: func(p *peer) { p.read(); p.send(errorMessage(0, all)) }},
		"runtime error":   {session: func(p *peer) { p.confirm(); p.speech(); p.send(errorMessage(0, all)); p.read() }},
		"close reason":    {session: func(p *peer) { p.confirm(); p.speech(); p.c.Close(4000, all) }},
		"dial failure":    {dial: func(host string) error { return errors.New("can't dial " + all) }},
	} {
		for _, auth := range []Auth{AuthHeader, AuthQuery} {
			t.Run(name+"/"+string(auth), func(t *testing.T) {
				if b.token == nil {
					b.token = answer(200, `{"sessionToken":"`+token+`"}`)
				}
				inMemory(t, b, Options{Auth: auth}, func(c *Client) {
					p := params()
					p.APIKey = func() (string, error) { return key, nil }
					p.LiveKit = &LiveKit{URL: "wss://lk", RoomName: "r", APIToken: lk}
					p.Secrets = []string{extra, ""}
					s, err := c.Open(context.Background(), p)
					if err == nil {
						_, err = s.Speak(context.Background(), Utterance{Speech: speechOf(1, 0)})
					}
					if err == nil {
						t.Fatal("nothing failed")
					}
					text := fmt.Sprintf("%v %+v %#v", err, *errors.Of(err), *errors.Of(err))
					for _, secret := range []string{key, token, lk, extra, "sessionKey=", "TOKEN-b"} {
						// A token that was never given out is not ours to know.
						if strings.Contains(text, secret) && (!strings.HasPrefix(token, secret) || errors.Of(err).Phase != errors.PhaseToken) {
							t.Errorf("%q is in %s", secret, text)
						}
					}
				})
			})
		}
	}
}

func TestBadParamsAreNamed(t *testing.T) {
	for want, change := range map[string]func(*Params){
		"app id":    func(p *Params) { p.AppID = "" },
		"avatar_id": func(p *Params) { p.AvatarID = "" },
		"livekit":   func(p *Params) { p.LiveKit, p.Agora = &LiveKit{}, &Agora{} },
		"us west":   func(p *Params) { p.Region = "us west" },
	} {
		b := &backend{}
		inMemory(t, b, Options{}, func(c *Client) {
			p := params()
			change(&p)
			_, err := c.Open(context.Background(), p)
			if e := wantError(t, err, errors.CodeInvalidJob, errors.PhaseJob); !strings.Contains(e.Message, want) {
				t.Errorf("%q does not name %s", e.Message, want)
			}
		})
	}
}

func TestClosedClientOpensNothingAndClosesWhatIsOpen(t *testing.T) {
	b := &backend{}
	inMemory(t, b, Options{}, func(c *Client) {
		mustOpen(t, c, params())
		s := mustOpen(t, c, params())
		got := make(chan error, 1)
		go func() {
			_, err := s.Speak(context.Background(), Utterance{Speech: make(liveSpeech)})
			got <- err
		}()
		synctest.Wait()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if err := <-got; !errors.Is(err, ErrClosed) {
			t.Errorf("Speak gives %v", err)
		}
		wantClosed1000(t, b, 2)
		if _, err := c.Open(context.Background(), params()); err == nil {
			t.Error("a closed client opened a session")
		}
	})
}
