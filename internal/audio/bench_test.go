package audio

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
	"time"
)

// serverVariable in the environment makes this test binary the benchmark's
// server.
const serverVariable = "AUDIO_TEST_SERVER"

// tenMinutes is how many bytes of samples ten minutes at 16 kHz have.
const tenMinutes = 10 * 60 * 16000 * 2

// serveTenMinutes runs the server in a process of its own, so that its memory
// is not counted. It ends when its standard input does.
func serveTenMinutes() error {
	header := plainWAV(nil)
	header.dataSize = tenMinutes
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		head := header.bytes()
		w.Header().Set("Content-Length", fmt.Sprint(len(head)+tenMinutes))
		if _, err := w.Write(head); err != nil {
			return
		}
		block := make([]byte, 32000)
		for range tenMinutes / len(block) {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	}))
	defer server.Close()
	fmt.Println(server.URL)
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

func startServer(b testing.TB) string {
	b.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), serverVariable+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := in.Close(); err != nil {
			b.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			b.Error(err)
		}
	})
	var url string
	if _, err := fmt.Fscanln(out, &url); err != nil || !strings.HasPrefix(url, "http://") {
		b.Fatalf("the server said %q, %v", url, err)
	}
	return url
}

// readAll reads a speech to its end and returns its length and the most memory
// that the process held from the operating system beyond before.
func readAll(b testing.TB, o *Opener, url string) (length time.Duration, extra uint64) {
	b.Helper()
	debug.FreeOSMemory()
	before := held()
	s, err := o.Open(b.Context(), at(url))
	if err != nil {
		b.Fatal(err)
	}
	for n := 0; ; n++ {
		_, l, err := s.Next(b.Context())
		if err == io.EOF {
			break
		}
		if err != nil {
			b.Fatal(err)
		}
		length += l
		if now := held(); n%100 == 0 && now > before {
			extra = max(extra, now-before)
		}
	}
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	return length, extra
}

func held() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.Sys - m.HeapReleased
}

// BenchmarkTenMinuteWAVFromURL prints the extra memory of one such speech and
// fails at 8 MiB.
func BenchmarkTenMinuteWAVFromURL(b *testing.B) {
	url := startServer(b)
	o := newOpener(b, Options{AllowPrivateURLs: true})
	var most uint64
	b.SetBytes(tenMinutes)
	for b.Loop() {
		length, extra := readAll(b, o, url)
		if length != 10*time.Minute {
			b.Fatalf("received %s", length)
		}
		most = max(most, extra)
	}
	b.ReportMetric(float64(most)/(1<<20), "extra-MiB")
	if most >= 8<<20 {
		b.Errorf("%d bytes of extra memory: 8 MiB are allowed", most)
	}
}
