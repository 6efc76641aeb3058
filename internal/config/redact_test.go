package config

import (
	"strings"
	"testing"
)

func TestNoPartOfAPasswordIsShownHoweverTheURLIsWritten(t *testing.T) {
	for _, url := range []string{
		"nats://u:hush@h:x", "nats://u:hush hush@h:1", "nats://hush@h:x", "u:hush@h:x", "nats://u:hush,hush@h:1",
		"nats://u:hu#hush@h:x", "nats://u:hush@hush@h:x", "nats://a:1,nats://u:hush@h:x,nats://u:hush@h:2", "nats://u:hush\thush@h:x",
		"http://u:hush@h", "nats://h:1/x?k=hush", "nats://u:hush/hush@h:x",
	} {
		_, _, err := Load(Source{Environ: []string{"NATS_URL=" + url}})
		if err == nil || strings.Contains(err.Error(), "hush") {
			t.Errorf("%s: %v", url, err)
		}
		if shown := redact(url); strings.Contains(shown, "hush") {
			t.Errorf("%s is shown as %s", url, shown)
		}
	}
	list := "nats://u:hush@a:1,nats://b:2,tls://t@c:3"
	if got, want := redact(list), "nats://hidden@a:1,nats://b:2,tls://hidden@c:3"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
