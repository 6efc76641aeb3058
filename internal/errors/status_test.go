package errors

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
)

// openAPI is the error envelope of the backend's Open API.
func openAPI(code string) string {
	return `{"error":{"code":"` + code + `","message":"Something about ` + code + `","request_id":"req_7f3a"}}`
}

func TestTokenCallIsJudgedByItsStatusWhateverItsTextSays(t *testing.T) {
	tab := table(t, nil)
	for _, c := range []struct {
		name   string
		phase  Phase
		status int
		body   string
		code   Code
		class  Class
		action Action
	}{
		{"401 envelope", PhaseToken, 401, openAPI("unauthorized"), CodeInvalidEgressConfig, ClassAuth, ActionDeadLetter},
		{"401 envelope, code first", PhaseToken, 401, `{"error":{"code":"unauthenticated","message":"no","request_id":"r"}}`, CodeSessionTokenExpired, ClassAuth, ActionDeadLetter},
		{"401 bare", PhaseToken, 401, "", CodeSessionTokenExpired, ClassAuth, ActionDeadLetter},
		{"401 in errors", PhaseToken, 200, `{"errors":[{"status":401,"code":"UNAUTHENTICATED"}]}`, CodeInvalidEgressConfig, ClassAuth, ActionDeadLetter},
		{"403 envelope", PhaseToken, 403, openAPI("forbidden"), CodeInvalidRequest, ClassAuth, ActionDeadLetter},
		{"403 unauthorized", PhaseToken, 403, openAPI("unauthorized"), CodeInvalidEgressConfig, ClassAuth, ActionDeadLetter},
		{"403 bare", PhaseToken, 403, "", CodeInvalidRequest, ClassAuth, ActionDeadLetter},
		{"403 with a server code", PhaseToken, 403, `{"code":3,"message":"livekit"}`, CodeInvalidEgressConfig, ClassAuth, ActionDeadLetter},
		{"402 stays billing", PhaseToken, 402, openAPI("unauthorized"), CodeBillingRequired, ClassBilling, ActionHold},
		{"403 credits exhausted stays billing", PhaseToken, 403, `{"message":"credits exhausted"}`, CodeCreditsExhausted, ClassBilling, ActionHold},
		{"429 envelope", PhaseToken, 429, openAPI("rate_limit_exceeded"), CodeInvalidRequest, ClassTransient, ActionRetry},
		{"429 unauthorized", PhaseToken, 429, openAPI("unauthorized"), CodeInvalidEgressConfig, ClassTransient, ActionRetry},
		{"500 unauthorized", PhaseToken, 500, openAPI("unauthorized"), CodeInvalidEgressConfig, ClassTransient, ActionRetry},
		{"502 with a server code", PhaseToken, 502, `{"code":3}`, CodeInvalidRequest, ClassTransient, ActionRetry},
		{"500 of a token", PhaseToken, 500, `{"message":"session token expired"}`, CodeSessionTokenExpired, ClassTransient, ActionRetry},
		{"500 in errors", PhaseToken, 200, `{"errors":[{"status":500,"code":"INVALID_ARGUMENT"}]}`, CodeInvalidRequest, ClassTransient, ActionRetry},
		{"500 not configured", PhaseToken, 500, `{"message":"egress client is not configured on server"}`, CodeEgressUnavailable, ClassTransient, ActionRetry},
		{"500 bare", PhaseToken, 500, "", CodeServerError, ClassServer, ActionRetry},
		{"400 stays the request's", PhaseToken, 400, openAPI("invalid_expiry"), CodeInvalidRequest, ClassConfig, ActionDeadLetter},
		{"401 at the upgrade", PhaseConnect, 401, openAPI("unauthorized"), CodeInvalidEgressConfig, ClassAuth, ActionDeadLetter},
		{"403 at the upgrade", PhaseConnect, 403, "", CodeInvalidRequest, ClassAuth, ActionDeadLetter},
		{"500 at the upgrade", PhaseConnect, 500, openAPI("unauthorized"), CodeInvalidEgressConfig, ClassTransient, ActionRetry},
		{"403 at the upgrade, of an avatar", PhaseConnect, 403, `{"message":"Avatar not found"}`, CodeAvatarNotFound, ClassConfig, ActionDeadLetter},
		{"500 at the upgrade, of a rate", PhaseConnect, 500, `{"message":"unsupported sample rate"}`, CodeUnsupportedSampleRate, ClassConfig, ActionDeadLetter},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := FromHTTP(c.phase, c.status, nil, []byte(c.body))
			d := tab.Decide(e, false)
			if d.Code != c.code || d.Class != c.class || d.Action != c.action || d.Attempts != 0 {
				t.Errorf("decided %+v, want %s %s %s", d, c.code, c.class, c.action)
			}
			if status := fmt.Sprintf("HTTP %d", c.status); c.status != 200 && !strings.Contains(e.Message, status) {
				t.Errorf("message %q does not say %s", e.Message, status)
			}
			if wantsKey := c.phase == PhaseToken && c.class == ClassAuth; strings.Contains(e.Message, "API key") != wantsKey {
				t.Errorf("message %q: it names the API key: want %v", e.Message, wantsKey)
			}
			if appWide := c.class != ClassConfig && c.class != ClassBilling; c.phase == PhaseToken && d.AppWide != appWide {
				t.Errorf("concerns the whole app: %v, want %v", d.AppWide, appWide)
			}
		})
	}
}

func TestRequestIDOfTheBackendIsKept(t *testing.T) {
	header := http.Header{"X-Request-Id": {"req_header"}}
	for _, c := range []struct {
		name, body, want string
		header           http.Header
	}{
		{"envelope", openAPI("unauthorized"), "req_7f3a", header},
		{"list", `{"errors":[{"status":401,"request_id":"req_list"}]}`, "req_list", header},
		{"flat", `{"request_id":"req_flat"}`, "req_flat", header},
		{"header", ``, "req_header", header},
		{"no text", `{"error":{"request_id":7}}`, "req_header", header},
		{"none", `{}`, "", nil},
		{"several lines", `{"request_id":"a\nb\u0000c\u202e"}`, "a b c", nil},
		{"endless", `{"request_id":"` + strings.Repeat("é", 1000) + `"}`, strings.Repeat("é", 64), nil},
	} {
		for _, phase := range []Phase{PhaseToken, PhaseConnect} {
			e := FromHTTP(phase, 401, c.header, []byte(c.body))
			if e.RequestID != c.want || c.want != "" && !strings.Contains(e.Message, c.want) {
				t.Errorf("%s in %s: %q in %q, want %q", c.name, phase, e.RequestID, e.Message, c.want)
			}
		}
	}
}

func TestProxysAnswerIsConnectionFailedAndNamesTheProxyWithoutItsLogin(t *testing.T) {
	tab := table(t, nil)
	for _, status := range []int{403, 407, 502, 503} {
		e := FromProxy(PhaseToken, "http://user:hunter2@proxy.example:3128", status, http.Header{"Retry-After": {"7"}})
		d := tab.Decide(e, false)
		if d.Code != CodeConnectionFailed || d.Class != ClassTransient || d.Action != ActionRetry || d.NotBefore == 0 {
			t.Errorf("%d: decided %+v", status, d)
		}
		if !strings.Contains(e.Message, "proxy.example:3128") || strings.Contains(e.Error(), "hunter2") || strings.Contains(e.Message, "user:") {
			t.Errorf("%d: %v", status, e)
		}
	}
}

func TestProxyThatWantsALoginIsNeverTheBackend(t *testing.T) {
	for _, phase := range []Phase{PhaseToken, PhaseConnect} {
		e := FromHTTP(phase, 407, nil, []byte(openAPI("unauthorized")))
		if d := table(t, nil).Decide(e, false); d.Code != CodeConnectionFailed || d.Action != ActionRetry || !strings.Contains(e.Message, "proxy") {
			t.Errorf("%s: %+v of %v", phase, d, e)
		}
	}
}

// The SDKs differ; Python's is followed.
func TestServerErrorWithCode400IsServerError(t *testing.T) {
	for _, phase := range []Phase{PhaseHandshake, PhaseRuntime} {
		if got := FromServerError(phase, 400, "livekit").Code; got != CodeServerError {
			t.Errorf("%s: %s", phase, got)
		}
	}
}
