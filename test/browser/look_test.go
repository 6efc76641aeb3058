package browser_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"
)

// look is one way to look at a page.
type look struct {
	name   string
	width  int64
	height int64
	dark   bool
}

var looks = []look{{"light", 1200, 800, false}, {"dark", 1200, 800, true}, {"tablet", 768, 900, false}, {"phone", 390, 800, false}, {"phone-dark", 390, 800, true}}

func (p *tab) look(l look) {
	p.t.Helper()
	scheme := "light"
	if l.dark {
		scheme = "dark"
	}
	p.run(chromedp.EmulateViewport(l.width, l.height), emulation.SetEmulatedMedia().WithFeatures([]*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}))
}

var letterLink = regexp.MustCompile(`letters/(\d+)`)

// everyPage are the pages by the names of their screenshots.
func everyPage(t *testing.T) map[string]string {
	t.Helper()
	p := newTab(t, true)
	p.visit("/jobs/demo-unknown-avatar")
	var href string
	p.run(chromedp.AttributeValue(`a.button[href^="/letters/"]`, "href", &href, nil, chromedp.ByQuery))
	m := letterLink.FindString(href)
	if m == "" {
		t.Fatalf("no letter of demo-unknown-avatar: %q", href)
	}
	return map[string]string{
		"overview": "/", "jobs": "/jobs?newer=24h", "job": "/jobs/demo-flaky", "job-given-up": "/jobs/demo-unknown-avatar", "letters": "/letters", "letter": "/" + m,
		"alerts": "/alerts", "codes": "/codes", "code": "/codes/avatarNotFound", "recordings": "/recordings", "missing": "/nope",
	}
}

// axe are the findings of axe-core.
type axe struct {
	Violations []struct {
		ID    string `json:"id"`
		Help  string `json:"help"`
		Nodes []struct {
			HTML    string `json:"html"`
			Summary string `json:"failureSummary"`
		} `json:"nodes"`
	} `json:"violations"`
}

func TestEveryPageIsAccessibleAndFitsEveryScreen(t *testing.T) {
	script, err := os.ReadFile(filepath.Join("node_modules", "axe-core", "axe.min.js"))
	if err != nil {
		t.Fatalf("axe-core is not here: run npm ci in test/browser: %v", err)
	}
	pages := everyPage(t)
	pages["jobs by code"], pages["jobs that run"] = "/jobs?by=code", "/jobs?sort=running"
	p := newTab(t, true)
	p.expected = []string{"404 (Not Found)"}
	for name, path := range pages {
		p.visit(path)
		for _, l := range looks { // a page takes another look without being loaded again
			p.look(l)
			var wide []string
			p.run(chromedp.Evaluate(fmt.Sprintf(`document.documentElement.scrollWidth <= %[1]d ? [] : [document.documentElement.scrollWidth + " px", ...[...document.querySelectorAll("main *")].filter((el) => el.getBoundingClientRect().right > %[1]d + 1 && !el.closest(".scroll")).map((el) => el.outerHTML.slice(0, 120))]`, l.width), &wide))
			if len(wide) > 0 {
				t.Errorf("%s, %s: it is wider than the screen: %q", name, l.name, wide[:min(len(wide), 5)])
			}
			// What can be changed has to be in sight: as cards, no table is wider than the screen.
			if cards := ".cards, .cards-s"; l.name == "tablet" || l.name == "phone" {
				p.run(chromedp.Evaluate(fmt.Sprintf(`[...document.querySelectorAll(".scroll")].filter((el) => el.querySelector(%q) && el.scrollWidth > el.clientWidth + 1).map((el) => el.getAttribute("aria-label"))`, cards), &wide))
				if len(wide) > 0 {
					t.Errorf("%s, %s: one has to scroll sideways: %q", name, l.name, wide)
				}
			}
			rules := "{}"
			switch l.name {
			case "light":
			case "dark": // only its colours are others
				rules = `{runOnly: ["color-contrast"]}`
			default:
				continue
			}
			var found string
			p.run(chromedp.Evaluate(string(script)+`; axe.run(`+rules+`).then((r) => JSON.stringify({violations: r.violations}))`, &found, awaiting))
			var result axe
			if err := json.Unmarshal([]byte(found), &result); err != nil {
				t.Fatal(err)
			}
			for _, v := range result.Violations {
				for _, node := range v.Nodes {
					t.Errorf("%s, %s: %s: %s\n%s\n%s", name, l.name, v.ID, v.Help, node.HTML, node.Summary)
				}
			}
		}
	}
}

func TestEveryPageHasItsPicture(t *testing.T) {
	for i := range 5 {
		submit(t, fmt.Sprintf("picture-%d", i), []string{"ok", "fail-avatarNotFound", "fail-serverError", "ok", "flaky-connectionClosed-1"}[i], "--label", "customer=acme")
	}
	submit(t, "picture-waits", "ok", "--queue", "unserved")
	pages := everyPage(t)
	delete(pages, "missing")
	p := newTab(t, true)
	for name, path := range pages {
		for _, l := range looks {
			// Each page in the light; those that are most looked at in the dark and
			// on a phone too.
			if l.name != "light" && (l.name != "dark" && l.name != "phone" || !strings.Contains(" overview jobs job-given-up letter ", " "+name+" ")) {
				continue
			}
			if !*update && name != "overview" {
				continue // one is enough to see that they can be made
			}
			p.look(l)
			p.visit(path)
			var picture []byte
			p.run(page.BringToFront(), chromedp.FullScreenshot(&picture, 100))
			img, err := png.Decode(bytes.NewReader(picture))
			if err != nil || img.Bounds().Dx() < int(l.width) || plain(img) {
				t.Errorf("%s, %s: %v, or there is nothing on it", name, l.name, err)
				continue
			}
			if !*update {
				continue
			}
			file := filepath.Join("..", "..", "docs", "page", name+"-"+l.name+".png")
			if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, small(t, img), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// plain reports whether a picture has one colour only.
func plain(img image.Image) bool {
	b := img.Bounds()
	first := img.At(b.Min.X, b.Min.Y)
	for y := b.Min.Y; y < b.Max.Y; y += 7 {
		for x := b.Min.X; x < b.Max.X; x += 7 {
			if img.At(x, y) != first {
				return false
			}
		}
	}
	return true
}

// small is a picture as PNG with its most frequent colours: a page has few.
func small(t *testing.T, img image.Image) []byte {
	t.Helper()
	const colours, most = 240, 1800 // of the height
	b := img.Bounds()
	b.Max.Y = min(b.Max.Y, b.Min.Y+most)
	counts := make(map[color.RGBA]int)
	at := func(x, y int) color.RGBA { return color.RGBAModel.Convert(img.At(x, y)).(color.RGBA) }
	for y := b.Min.Y; y < b.Max.Y; y++ {
		for x := b.Min.X; x < b.Max.X; x++ {
			counts[at(x, y)]++
		}
	}
	var frequent []color.RGBA
	for c := range counts {
		frequent = append(frequent, c)
	}
	sort.Slice(frequent, func(i, j int) bool { return counts[frequent[i]] > counts[frequent[j]] })
	palette := color.Palette{}
	for _, c := range frequent[:min(len(frequent), colours)] {
		palette = append(palette, c)
	}
	out := image.NewPaletted(b, palette)
	nearest := make(map[color.RGBA]uint8)
	for y := b.Min.Y; y < b.Max.Y; y++ {
		for x := b.Min.X; x < b.Max.X; x++ {
			c := at(x, y)
			i, known := nearest[c]
			if !known {
				i = uint8(palette.Index(c))
				nearest[c] = i
			}
			out.SetColorIndex(x, y, i)
		}
	}
	var file bytes.Buffer
	encoder := png.Encoder{CompressionLevel: png.BestCompression}
	if err := encoder.Encode(&file, out); err != nil {
		t.Fatal(err)
	}
	return file.Bytes()
}
