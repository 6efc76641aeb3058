package admin

import (
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
)

func TestOnlyNamesOfOursAreServed(t *testing.T) {
	own, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	h := New(Options{Addr: "metrics.internal:8080", Hosts: []string{"Avatars.example.com"}}).Handler()
	for host, served := range map[string]bool{
		"127.0.0.1:8080": true, "127.0.0.1": true, "10.1.2.3:8080": true, "[::1]:8080": true, "[fd00::7]": true, // probes ask pods by address
		"localhost:8080": true, "LOCALHOST": true, "app.localhost:1": true, "": true,
		"metrics.internal:9": true, "avatars.example.com": true, "avatars.EXAMPLE.com.:443": true, own + ":8080": true,
		"evil.example": false, "evil.example:8080": false, "127.0.0.1.evil.example": false, "localhost.evil.example": false,
		"xavatars.example.com": false, "2130706433": false, "[evil.example]": false,
	} {
		for _, path := range []string{"/", "/livez", "/readyz", "/metrics", "/nowhere"} {
			r := httptest.NewRequest(http.MethodGet, path, nil)
			r.Host = host
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if (w.Code != http.StatusMisdirectedRequest) != served {
				t.Errorf("%s for %q: %d, want served %t", path, host, w.Code, served)
			}
			if !served && (strings.Contains(w.Body.String(), "evil") || !strings.Contains(w.Body.String(), "admin.hosts")) {
				t.Errorf("for %q it says %q", host, w.Body)
			}
		}
	}
}
