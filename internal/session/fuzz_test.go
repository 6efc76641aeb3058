package session

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"testing"
)

func FuzzBootstrapAnswer(f *testing.F) {
	f.Add([]byte(`{"region":{"current":"ap-northeast","candidates":["us-west"]},"time_sync":{"server_receive_ms":1}}`))
	f.Add([]byte(`{"region":{"current":"../evil"}}`))
	f.Add([]byte(`{"region":[[[[`))
	f.Fuzz(func(t *testing.T, answer []byte) {
		region, err := parseBootstrap(answer)
		if (err == nil) != (region != "") || err == nil && checkRegion(region) != nil {
			t.Fatalf("%q, %v", region, err)
		}
	})
}

// What answers an upgrade or a CONNECT may be anybody.
func FuzzAnswerToAnUpgrade(f *testing.F) {
	f.Add([]byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\r\nmore"))
	f.Add([]byte("HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.0 502 \r\n\r\n"))
	f.Fuzz(func(t *testing.T, answer []byte) {
		here, there := memoryPipe()
		there.(*memoryConn).out.data = bytes.Clone(answer)
		there.Close()
		req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "http://h/", http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		x := &exchange{conn: swallow{here.(*memoryConn)}, bufs: newBufferPool()}
		resp, err := x.RoundTrip(req)
		switch {
		case err != nil:
		case resp.StatusCode != http.StatusSwitchingProtocols:
			if len(x.refusal) > refusalLimit {
				t.Fatalf("%d bytes of a refusal", len(x.refusal))
			}
		default:
			rest, err := io.ReadAll(resp.Body)
			if err != nil || !bytes.HasSuffix(answer, rest) {
				t.Fatalf("%q is not the end of %q, %v", rest, answer, err)
			}
		}
	})
}

// swallow takes whatever is written.
type swallow struct{ *memoryConn }

func (swallow) Write(p []byte) (int, error) { return len(p), nil }
