package jobspec

import (
	"testing"
)

func TestIDsOfTheBackendMayBeAnyText(t *testing.T) {
	for _, body := range []string{
		`{"avatar_id":"avatar/123","app_id":"app & id","audio":{"object":"o"}}`,
		`{"avatar_id":"a/../b?x=1#y","app_id":".a.","audio":{"object":"o"}}`,
		`{"avatar_id":"\\ \"é世","app_id":"é/世 %2F+","audio":{"object":"o"}}`,
	} {
		if _, err := Decode(nil, []byte(body)); err != nil {
			t.Errorf("%s: %v", body, err)
		}
	}
}

func TestAgoraNeedsAChannelOnly(t *testing.T) {
	for _, agora := range []string{
		`{"channel_name":"c"}`, `{"channel_name":"c","uid":0}`, `{"channel_name":"c","token":"","publisher_id":""}`,
		`{"channel_name":"c","token":"t"}`, `{"channel_name":"c","uid":7,"publisher_id":"7"}`,
	} {
		if _, err := Decode(nil, []byte(`{"avatar_id":"a","audio":{"object":"o"},"output":{"agora":`+agora+`}}`)); err != nil {
			t.Errorf("%s: %v", agora, err)
		}
	}
}
