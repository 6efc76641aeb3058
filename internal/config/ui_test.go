package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestThePageIsOnlyServedOffLoopbackWithALogin(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("correct horse battery\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		ui   UI
		want string // of the error; "": none
	}{
		{"loopback", UI{Addr: "127.0.0.1:1"}, ""},
		{"loopback in IPv6", UI{Addr: "[::1]:1"}, ""},
		{"localhost", UI{Addr: "localhost:1"}, ""},
		{"off", UI{}, ""},
		{"all addresses", UI{Addr: ":1"}, "ui.addr"},
		{"all addresses of IPv4", UI{Addr: "0.0.0.0:1"}, "ui.addr"},
		{"all addresses of IPv6", UI{Addr: "[::]:1"}, "ui.addr"},
		{"a name", UI{Addr: "host.example:1"}, "ui.addr"},
		{"a user alone", UI{Addr: ":1", Auth: UIAuth{User: "u"}}, "ui.addr"},
		{"a token", UI{Addr: ":1", Auth: UIAuth{TokenFile: secret}}, ""},
		{"a token that is not there", UI{Addr: ":1", Auth: UIAuth{TokenFile: secret + "2"}}, "ui.auth.token_file"},
		{"a login", UI{Addr: ":1", Auth: UIAuth{User: "u", PasswordFile: secret}}, ""},
		{"a password without user", UI{Addr: ":1", Auth: UIAuth{PasswordFile: secret}}, "ui.auth.password_file"},
		{"a header of anybody", UI{Addr: ":1", TrustedHeader: "X-User"}, "ui.trusted_proxies"},
		{"a proxy's header", UI{Addr: ":1", TrustedHeader: "X-User", TrustedProxies: []string{"10.0.0.0/8"}}, ""},
		{"a proxy without header", UI{Addr: "127.0.0.1:1", TrustedProxies: []string{"10.0.0.0/8"}}, "ui.trusted_header"},
	} {
		c := Defaults()
		c.UI = tc.ui
		err := c.RequireUI()
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", tc.name, err)
		}
		if err != nil && strings.Contains(err.Error(), "correct horse") {
			t.Errorf("%s: the error shows the secret", tc.name)
		}
	}
	token, _, err := (&UIAuth{TokenFile: secret}).Secrets()
	if err != nil || token != "correct horse battery" {
		t.Errorf("token %q, %v", token, err)
	}
}
