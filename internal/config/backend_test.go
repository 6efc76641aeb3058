package config

import (
	"strings"
	"testing"
)

func TestURLsMayHaveAQueryWhichIsNeverShown(t *testing.T) {
	c, _, err := Load(Source{Environ: []string{
		"SPATIUS_INGRESS_ENDPOINT=wss://h/v2/driveningress?keep=hunter2", "SPATIUS_CONSOLE_ENDPOINT=https://h/v1/console?k=hunter2",
		"SPATIUS_APP_ID=app & id", "SPATIUS_API_KEY=any",
	}})
	if err != nil {
		t.Fatal(err)
	}
	if c.Backend.IngressURL != "wss://h/v2/driveningress?keep=hunter2" {
		t.Errorf("the query is lost: %s", c.Backend.IngressURL)
	}
	if _, ok := c.Credentials("app & id"); !ok {
		t.Error("no credentials")
	}
	var out strings.Builder
	if err := c.Print(&out); err != nil {
		t.Fatal(err)
	}
	if text := out.String(); strings.Contains(text, "hunter2") || !strings.Contains(text, "wss://h/v2/driveningress?hidden") {
		t.Errorf("printed as %s", text)
	}
}

func TestAppsMayHaveIDsOfAnyText(t *testing.T) {
	for _, id := range []string{"app & id", "a/b", ".a.", "é:世", `a"b'c`, "a[0].b"} {
		c, _, err := Load(Source{Environ: []string{`AVATAR_APPS={` + quoteYAML(id) + `: {api_key: secret-key-1}}`}})
		if err != nil {
			t.Errorf("%s: %v", id, err)
			continue
		}
		creds, ok := c.Credentials(id)
		if !ok {
			t.Errorf("%s: no credentials", id)
			continue
		}
		if key, err := creds.APIKey(); err != nil || key != "secret-key-1" {
			t.Errorf("%s: key %q, %v", id, key, err)
		}
	}
}

func quoteYAML(text string) string { return "'" + strings.ReplaceAll(text, "'", "''") + "'" }
