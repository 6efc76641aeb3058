package config

import "testing"

func TestPlainHTTPIsForThisMachineUnlessAllowed(t *testing.T) {
	for _, row := range []struct {
		host    string
		allowed bool
	}{
		{"127.0.0.1:9090", true},
		{"127.8.8.8", true},
		{"[::1]:9090", true},
		{"[::ffff:127.0.0.1]", true},
		{"localhost:9090", true},
		{"LOCALHOST.", true},
		{"simulator.localhost", true},
		{"0.0.0.0:9090", false},
		{"10.0.0.1", false},
		{"[fe80::1]", false},
		{"simulator:9090", false},
		{"localhost.example.com", false},
		{"127.0.0.1.example.com", false},
	} {
		for _, keys := range []map[string]string{
			{"backend.console_url": "http://" + row.host + "/v1/console"},
			{"backend.ingress_url": "ws://" + row.host + "/v2/driveningress"},
			{"backend.ingress_url": "http://" + row.host + "/v2/driveningress"},
			{"backend.region": "auto", "backend.bootstrap_url": "http://" + row.host + "/bootstrap"},
		} {
			if _, _, err := Load(Source{Overrides: keys}); (err == nil) != row.allowed {
				t.Errorf("%v: %v, want allowed %t", keys, err, row.allowed)
			}
			keys["backend.allow_plain_http"] = "true"
			if _, _, err := Load(Source{Overrides: keys}); err != nil {
				t.Errorf("%v: %v", keys, err)
			}
		}
	}
}
