package session

import (
	"strings"
	"testing"
)

func TestAddressesAreComposed(t *testing.T) {
	for _, tc := range []struct {
		name          string
		e             Endpoints
		region        string
		token, socket string
	}{
		{"a region", Endpoints{}, "us-west", "https://console.us-west.spatius.ai/v1/console/session-tokens", "wss://api.us-west.spatius.ai/v2/driveningress/websocket?id=a"},
		{"a Chinese region", Endpoints{}, "cn-beijing", "https://console.cn-beijing.spatialwalk.top/v1/console/session-tokens", "wss://api.cn-beijing.spatialwalk.top/v2/driveningress/websocket?id=a"},
		{
			"configured, http", Endpoints{ConsoleURL: "http://h:1/v1/console/", IngressURL: "http://h:1/v2/driveningress//"}, "us-west",
			"http://h:1/v1/console/session-tokens", "ws://h:1/v2/driveningress/websocket?id=a",
		},
		{
			"configured with the last element", Endpoints{ConsoleURL: "https://h/v1/console/session-tokens", IngressURL: "https://h/v2/driveningress/websocket/"}, "us-west",
			"https://h/v1/console/session-tokens", "wss://h/v2/driveningress/websocket?id=a",
		},
		{
			"configured with a query", Endpoints{ConsoleURL: "wss://h/v1/console", IngressURL: "wss://h/x?k=v"}, "us-west",
			"https://h/v1/console/session-tokens", "wss://h/x/websocket?id=a&k=v",
		},
		{
			"configured with the last element and a query", Endpoints{ConsoleURL: "https://h/v1/console/session-tokens?a=b%20c", IngressURL: "wss://h/v2/driveningress/websocket/?keep=1&id=other#top"}, "us-west",
			"https://h/v1/console/session-tokens?a=b%20c", "wss://h/v2/driveningress/websocket?id=a&keep=1",
		},
		{"one configured", Endpoints{ConsoleURL: "http://h/v1/console"}, "ap-northeast", "http://h/v1/console/session-tokens", "wss://api.ap-northeast.spatius.ai/v2/driveningress/websocket?id=a"},
	} {
		token, err := tc.e.tokenURL(tc.region)
		if err != nil || token.String() != tc.token {
			t.Errorf("%s: token at %q, %v", tc.name, token, err)
		}
		socket, err := tc.e.socketURL(tc.region, "a")
		if err != nil || socket.String() != tc.socket {
			t.Errorf("%s: socket at %q, %v", tc.name, socket, err)
		}
	}
}

func TestAvatarIDsAreEscaped(t *testing.T) {
	for _, id := range []string{"avatar/123", "a/../b", "a?b#c&id=d", "é 世+%2F"} {
		u, err := (Endpoints{IngressURL: "wss://h/v2/driveningress?keep=1"}).socketURL("us-west", id)
		if err != nil {
			t.Fatal(err)
		}
		if got := u.Query(); u.Path != "/v2/driveningress/websocket" || got.Get("id") != id || got.Get("keep") != "1" || u.Fragment != "" {
			t.Errorf("%q: %s", id, u)
		}
	}
}

func TestBadAddressesAreNamedAndNotRepeated(t *testing.T) {
	for _, bad := range []string{"ftp://h/secret", "secret", "http://[secret", "http:///secret", "://secret", "http://h/?secret;x", "http://h/?secret=%zz"} {
		if _, err := (Endpoints{ConsoleURL: bad}).tokenURL("us-west"); err == nil || !strings.Contains(err.Error(), "backend.console_url") || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: %v", bad, err)
		}
		if _, err := (Endpoints{IngressURL: bad}).socketURL("us-west", "a"); err == nil || !strings.Contains(err.Error(), "backend.ingress_url") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestRegionNamesAreChecked(t *testing.T) {
	for _, good := range []string{"us-west", "ap-northeast", "cn-beijing", "eu-central-1"} {
		if err := checkRegion(good); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"", "us", "US-west", "us-west.evil.com", "us_west", "-us", "us-", "us--west", "us/west", "auto"} {
		if checkRegion(bad) == nil {
			t.Errorf("%q is taken for a region", bad)
		}
	}
}
