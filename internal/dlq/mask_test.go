package dlq

import (
	"bytes"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"google.golang.org/protobuf/proto"

	"avatarworker/internal/jobs/jobpb"
)

func TestTokenOfAProtobufJobIsHiddenWhateverItsHeaderSays(t *testing.T) {
	t.Parallel()
	whole, err := proto.Marshal(&jobpb.Job{AvatarId: "a", Output: &jobpb.Output{Livekit: &jobpb.LiveKitOutput{RoomName: "r", ApiToken: "hush"}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, header := range []nats.Header{
		nil,
		{"Content-Type": {"application/protobuf"}},
		{"content-type": {"Application/Protobuf"}},
		{"Content-Type": {"application/x-protobuf"}},
	} {
		for _, body := range [][]byte{whole, whole[:len(whole)-1], append(bytes.Clone(whole), 0x0a, 5)} {
			if shown := string(maskedBody(header, body)); strings.Contains(shown, "hus") {
				t.Errorf("%v: a secret is shown: %s", header, shown)
			}
		}
		if shown := string(maskedBody(header, whole)); header != nil && !strings.Contains(shown, `"room_name":"r"`) {
			t.Errorf("%v: not read as protobuf: %s", header, shown)
		}
	}
}

func TestTokensAndQueriesAreHiddenInsideAnyValue(t *testing.T) {
	t.Parallel()
	for _, body := range []string{
		`{"output":{"livekit":{"api_token":"hush"}}}`,
		`{"output":{"agora":{"apiToken":"hush"}}}`,
		`[{"Token":"hush"},{"tokens":["plain"],"API_TOKEN":["hush"]}]`,
		`{"audio":{"url":"https://h/a.wav?sig=hush"}}`,
		`{"token":"hush`,
	} {
		if shown := string(maskedBody(nil, []byte(body))); strings.Contains(shown, "hush") {
			t.Errorf("a secret is shown: %s", shown)
		}
	}
}
