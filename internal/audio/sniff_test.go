package audio

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"unicode/utf16"

	"avatarworker/internal/audio/clip"
	"avatarworker/internal/audio/sniff"
	"avatarworker/internal/errors"
)

func field(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile("testdata/field/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return data[:len(data)&^1] // an odd number of bytes is refused anyway
}

func zipped(t testing.TB, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// noise is n bytes that look like nothing.
func noise(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// framed is a file of frames: each a header, then noise up to its size.
func framed(count, size int, header func(i int) []byte) []byte {
	var b []byte
	for i := range count {
		h := header(i)
		b = append(append(b, h...), noise(size-len(h), uint64(i))...)
	}
	return b
}

func same(header ...byte) func(int) []byte { return func(int) []byte { return header } }

func filesOfOtherKinds(t testing.TB) map[string][]byte {
	mp3 := field(t, "noid3.mp3")
	return map[string][]byte{
		"MPEG audio (MP3)":  mp3,
		"MPEG audio (MP3) ": mp3[150:2600], // cut out of a stream
		"(MP3)":             framed(9, 417, same(0xff, 0xfb, 0x90, 0x64)),
		"(MP3) with a tag":  append(framed(30, 96, same(0xff, 0xf3, 0x44, 0xc4)), "TAGa title"...),
		"MPEG audio":        framed(20, 576, same(0xff, 0xfd, 0xa4, 0x00)), // layer 2
		"AAC (ADTS)":        field(t, "x.aac"),
		"AAC (LATM)":        framed(30, 203, same(0x56, 0xe0, 200)),
		"AC-3":              framed(10, 256, same(0x0b, 0x77, 1, 2, 0x08, 0x40)),
		"transport stream": framed(40, 188, func(i int) []byte {
			return []byte{0x47, 0x01, 0x00, 0x10 | byte(i&0x0f)}
		}),
		"MP4":                   field(t, "x.m4a"),
		"QuickTime":             append([]byte("\x00\x00\x00\x08wide\x00\x00\x10\x00mdat"), noise(500, 1)...),
		"AIFF":                  field(t, "x.aiff"),
		"AU file":               field(t, "x.au"),
		"XML":                   field(t, "s3.xml"),
		"JSON":                  field(t, "tts.json"),
		"JSON ":                 []byte("\n [ {\"code\": 429, \"message\": \"zu viele Anfragen für heute\"} ]"),
		"web page":              []byte("<!DOCTYPE html><html><body>502 Bad Gateway</body></html>"),
		"XML document":          []byte("<ListBucketResult><Name>bucket</Name></ListBucketResult>"),
		"text":                  []byte("upstream connect error or disconnect/reset before headers"),
		"decode the base64":     []byte("data:audio/wav;base64,UklGRiQAAABXQVZFZm10IBAAAAABAAEA"),
		"a WAV file in base64":  []byte(base64.StdEncoding.EncodeToString(clip.WAV[:6000])),
		"an Ogg file in base64": []byte(base64.URLEncoding.EncodeToString(clip.Opus[:600])),
		"server-sent events":    []byte("data: {\"error\":{\"message\":\"the quota is used up\"}}\n\n"),
		"server-sent events ":   []byte("event: error\ndata: {\"message\":\"rate limited\"}\n\n"),
		"server-sent events  ":  []byte("data:{\"a\":1}\n\n"),
		"text    ":              []byte("Internal Server Error."),
		"text     ":             []byte("Not Found\n"),
		"text      ":            []byte("Внутренняя ошибка сервера. Повторите запрос позже"),
		"text       ":           []byte("サーバー内部でエラーが発生しました。しばらくしてからお試しください。"),
		"text        ":          []byte("内部エラー。"),
		"text         ":         []byte("Le serveur a rencontr\xe9 une erreur interne, r\xe9essayez plus tard\r\n"),
		"text          ":        []byte("\x83\x54\x81\x5b\x83\x6f\x81\x5b\x82\xc5\x83\x47\x83\x89\x81\x5b\x82\xaa\x94\xad\x90\xb6\x82\xb5\x82\xdc\x82\xb5\x82\xbd\x81\x42"), // Shift-JIS
		"text           ":       []byte("Accès refusé"),
		"JSON  ":                []byte("\"rate limited\"  "),
		"JSON   ":               []byte("{\"a\":1}\n{\"b\":2}\n"),
		"JSON    ":              []byte("null"),
		"JSON     ":             []byte("{\"ошибка\":\"сервер недоступен\"}"),
		"JSONP":                 []byte("cb({\"error\":429});"),
		"XML document ":         []byte("<Error>x</Error>"),
		"little-endian AU file": append([]byte("dns.\x18\x00\x00\x00\x00\x00\x10\x00\x03\x00\x00\x00\x80\x3e\x00\x00"), noise(600, 21)...),
		"MP4 ":                  append([]byte("\x00\x00\x00\x2csidx\x00\x00\x00\x00"), noise(600, 22)...),
		"MP4  ":                 append([]byte("\x00\x00\x02\x1cmoov\x00\x00\x00\x6cmvhd"), noise(600, 23)...),
		"MP4   ":                append([]byte("\x00\x00\x00\x01mdat\x00\x00\x00\x00\x00\x00\x10\x00"), noise(600, 24)...),
		"begins with 2 bytes before its header (RIFF)": append([]byte("\n\n"), clip.WAV[:4000]...),
		"begins with 3 bytes before its header (RIFF)": append([]byte("\xef\xbb\xbf"), clip.WAV[:4001]...),
		"begins with 2 bytes before its header (OggS)": append([]byte("\r\n"), clip.Opus...),
		"FLAC ":                   append([]byte("\r\nfLaC\x00\x00\x00\x22"), noise(600, 2)...),
		"playlist":                []byte("#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:2.0,\nsegment0.ts\n"),
		"gzip":                    zipped(t, clip.WAV)[:20000],
		"gzip ":                   zipped(t, []byte("short")),
		"Ogg file with Vorbis":    oggOf("\x01vorbis\x00\x00\x00\x00"),
		"Ogg file with FLAC":      oggOf("\x7fFLAC\x01\x00"),
		"Ogg file with Speex":     oggOf("Speex   1.2"),
		"FLAC":                    append([]byte("fLaC\x00\x00\x00\x22"), noise(600, 2)...),
		"ID3":                     append([]byte("ID3\x04\x00\x00\x00\x00\x02\x01TSSE\x00\x00\x00\x0f"), noise(600, 3)...),
		"WebM":                    append([]byte("\x1aE\xdf\xa3\x9fB\x86\x81\x01B\xf7\x81\x01B\x82\x84webm"), noise(600, 4)...),
		"ASF":                     append([]byte("\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c"), noise(600, 5)...),
		"AMR":                     append([]byte("#!AMR\n"), noise(600, 6)...),
		"CAF":                     append([]byte("caff\x00\x01\x00\x00desc"), noise(600, 7)...),
		"Wave64":                  append([]byte("riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"), noise(600, 8)...),
		"RF64":                    append([]byte("RF64\xff\xff\xff\xffWAVEds64"), noise(600, 9)...),
		"RIFX":                    append([]byte("RIFX\x00\x00\x10\x00WAVEfmt "), noise(600, 9)...),
		"zip":                     append([]byte("PK\x03\x04\x14\x00\x00\x00\x08\x00----crc-size-len\x0a\x00\x00\x00speech.wav"), noise(600, 10)...),
		"PDF":                     append([]byte("%PDF-1.7\n%\xe2\xe3\xcf\xd3"), noise(600, 11)...),
		"PNG":                     append([]byte("\x89PNG\r\n\x1a\n"), noise(600, 12)...),
		"WavPack":                 append([]byte("wvpk\x00\x10\x00\x00\x10\x04"), noise(600, 13)...),
		"DSD":                     append([]byte("FRM8\x00\x00\x00\x00\x00\x00\x10\x00DSD FVER"), noise(600, 15)...),
		"MP3 file":                append([]byte("APETAGEX\xd0\x07\x00\x00"), noise(600, 16)...),
		"HTTP answer":             append([]byte("HTTP/1.1 200 OK\r\nContent-Type: audio/wav\r\n\r\n"), noise(600, 17)...),
		"multipart":               append([]byte("------WebKitFormBoundary7MA4\r\nContent-Disposition: form-data; name=\"f\"\r\n\r\n"), noise(600, 18)...),
		"tar archive":             append(append(append([]byte("speech.wav"), make([]byte, 257-10)...), "ustar\x0000"...), noise(600, 19)...),
		"JSON (UTF-16)":           wide("{\"error\": {\"message\": \"the quota of this project is used up\"}}", binary.LittleEndian),
		"text (UTF-16)":           wide("upstream connect error or disconnect/reset before headers", binary.BigEndian),
		"header of another WAV":   append(make([]byte, 4000), clip.WAV[:4000]...),
		"header of another WAV  ": append(append([]byte{}, noise(9596, 14)...), clip.WAV[:4000]...), // across two chunks
	}
}

// wide is text in UTF-16 with the mark of its byte order.
func wide(text string, order binary.ByteOrder) []byte {
	b := make([]byte, 2, 2*len(text)+2)
	order.PutUint16(b, 0xfeff)
	for _, unit := range utf16.Encode([]rune(text)) {
		b = append(b, 0, 0)
		order.PutUint16(b[len(b)-2:], unit)
	}
	return b
}

func oggOf(packet string) []byte {
	page := make([]byte, oggHeaderSize, 4000)
	copy(page, "OggS\x00\x02")
	page[26] = 1
	page = seal(append(append(page, byte(len(packet))), packet...))
	return append(page, noise(600, 20)...)
}

func TestAFileThatIsNoPCMIsRefusedAndSaysWhatItSeemsToBe(t *testing.T) {
	o := newOpener(t, Options{})
	for what, data := range filesOfOtherKinds(t) {
		data = data[:len(data)&^1]
		for _, format := range []string{"", "pcm_s16le", "wav"} {
			if format == "wav" && strings.HasPrefix(what, "header") {
				continue // it is neither, which has its own text
			}
			spec := inline(data)
			spec.Format, spec.SampleRate = format, 24000
			if o.Check(spec) == nil {
				t.Errorf("%s is taken as %q", what, format)
				continue
			}
			e := wantError(t, o.Check(spec), errors.CodeInvalidJob, errors.PhaseJob, "audio.inline", strings.TrimSpace(strings.TrimSuffix(what, " with a tag")))
			if strings.HasPrefix(what, "server-sent") && strings.Contains(e.Message, "data: URL") {
				t.Error(e.Message)
			}
			if format == "" && strings.Contains(what, "MP3") && !strings.Contains(e.Message, "ffmpeg -i FILE -ac 1 -ar 24000 -c:a pcm_s16le") {
				t.Errorf("no line that says how to convert it: %s", e.Message)
			}
		}
	}
}

func TestAFileOfAnOddSizeSaysWhatItSeemsToBe(t *testing.T) {
	o := newOpener(t, Options{})
	tone := clip.WAV[44 : 44+9601]
	streamed := plainWAV(tone)
	streamed.dataSize, streamed.riffSize = 0, 0
	tagged := plainWAV(tone[:9600])
	tagged.dataSize, tagged.riffSize = 0, 0
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"English":         {[]byte("Internal Server Error"), "is text; send a WAV"},
		"a word":          {[]byte("error"), "is text"},
		"Russian":         {[]byte("Не найдено"), "is text"},
		"Russian, long":   {[]byte("Внутренняя ошибка сервера. Повторите запрос позже."), "is text"},
		"Latin-1":         {[]byte("Acc\xe8s refus\xe9!"), "is text (not UTF-8)"},
		"Japanese":        {[]byte("サーバーエラー"), "is text"},
		"Shift-JIS":       {[]byte("\x83\x54\x81\x5b\x83\x6f\x81\x5b!"), "is text (not UTF-8)"},
		"XML":             {[]byte("<e>a</e>\n"), "is an XML document"},
		"JSONP":           {[]byte("cb({\"a\":1});\n"), "is JSON in a call (JSONP)"},
		"JSON":            {[]byte("{\"a\":1}"), "is JSON"},
		"joined":          {slices.Concat(tone, clip.WAV[:4000]), "header of another WAV file in it, after 9601 bytes"},
		"joined, open":    {slices.Concat(streamed.bytes(), plainWAV(tone[:4000]).bytes()), "header of another WAV file in it, after 9601 bytes"},
		"a tag":           {append(tagged.bytes(), tagOf(101)...), "WAV has a tag behind 9600 bytes of samples"},
		"nothing else":    {tone, "PCM has an odd number of bytes (9601)"},
		"noise":           {noise(31, 1), "PCM has an odd number of bytes (31)"},
		"one byte":        {[]byte("a"), "PCM has an odd number of bytes (1)"},
		"open, no reason": {streamed.bytes(), "WAV has an odd number of bytes (9601)"},
	} {
		spec := inline(c.data)
		spec.SampleRate = 16000
		e := wantError(t, o.Check(spec), errors.CodeInvalidJob, errors.PhaseJob, c.want)
		if strings.Contains(e.Message, "odd") != strings.Contains(c.want, "odd") {
			t.Errorf("%s: %s", name, e.Message)
		}
	}
}

func FuzzWhatIs(f *testing.F) {
	for _, data := range filesOfOtherKinds(f) {
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		kind, found := sniff.Detect(data)
		if found == (kind.Name == "") {
			t.Errorf("%t %+v", found, kind)
		}
		kind.Hint(0)
		if kind, found := sniff.Short(data); found == (kind.Name == "") {
			t.Errorf("short: %t %+v", found, kind)
		}
		if kind, found := sniff.Text(data); found == (kind.Name == "") {
			t.Errorf("text: %t %+v", found, kind)
		}
		if at := sniff.Tag(data, true); at >= len(data) {
			t.Errorf("a tag at %d of %d", at, len(data))
		}
		sniff.Before(data)
		var c liveCheck
		for piece := range slices.Chunk(data, 700) {
			if c.pcm(LiveSpec{SampleRate: 16000}, piece, func(string, ...any) error { return errClosed }) != nil {
				break
			}
		}
		if len(c.head) > liveSniffed {
			t.Errorf("%d bytes are kept", len(c.head))
		}
	})
}
