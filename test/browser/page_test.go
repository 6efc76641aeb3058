package browser_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/chromedp"
)

// withAndWithout runs a test with the page's script and without it.
func withAndWithout(t *testing.T, test func(t *testing.T, p *tab, scripts bool)) {
	for _, scripts := range []bool{true, false} {
		name := map[bool]string{true: "with script", false: "without script"}[scripts]
		t.Run(name, func(t *testing.T) { test(t, newTab(t, scripts), scripts) })
	}
}

func TestADeadLetterIsFoundReadCorrectedAndReplayed(t *testing.T) {
	withAndWithout(t, func(t *testing.T, p *tab, scripts bool) {
		id := fmt.Sprintf("wrong-avatar-%t", scripts)
		end(t, id, "fail-avatarNotFound")
		p.visit("/")
		p.sees("dead letters to decide on", scripts)
		p.click("nav//a", "Dead letters")
		p.sees(id, scripts)
		p.click("tr[contains(., '"+id+"')]//th/a", "")
		p.sees("There is no avatar with the job's avatar_id", scripts)
		p.sees("Correct avatar_id in what publishes the jobs", scripts)
		p.run(chromedp.SendKeys(`//form[@action="/letters/replay"]//input[@name="value"]`, "ok", chromedp.BySearch))
		p.click("button", "Preview the replay")
		p.sees("Nothing was changed yet", scripts)
		p.sees(`"fail-avatarNotFound" → "ok"`, scripts)
		p.click("button", "Replay 1 dead letter")
		p.sees("Replayed 1 dead letter", scripts)
		if want := "jobs/" + id; !strings.Contains(p.where(), want) {
			t.Fatalf("at %s, not at %s", p.where(), want)
		}
		p.sees("It completed after", scripts)
		p.sees("run 2", scripts)
	})
}

func TestThreeJobsAreCancelledByFilter(t *testing.T) {
	withAndWithout(t, func(t *testing.T, p *tab, scripts bool) {
		batch := fmt.Sprintf("batch=%t", scripts)
		for i := range 3 {
			submit(t, fmt.Sprintf("stop-%t-%d", scripts, i), "ok", "--queue", "unserved", "--label", batch)
		}
		submit(t, fmt.Sprintf("stay-%t", scripts), "ok", "--queue", "unserved", "--label", "batch=other")
		p.visit("/jobs")
		p.run(chromedp.Click("details.filter > summary", chromedp.ByQuery), chromedp.SendKeys(`input[name="label"]`, batch, chromedp.ByQuery))
		p.click("button", "Show")
		p.sees(fmt.Sprintf("stop-%t-2", scripts), scripts)
		if strings.Contains(p.text(), "stay-") {
			t.Fatal("the filter shows others")
		}
		p.click("button", "Cancel all that match")
		p.sees("Cancel 3 jobs?", scripts)
		p.click("button", "Cancel 3 jobs")
		p.sees("Cancelled 3 jobs", scripts)
		if out := command(t, "jobs", "ls", "--label", "batch=other", "--json"); strings.Contains(out, `"cancelled"`) {
			t.Errorf("another job was cancelled: %s", out)
		}
	})
}

func TestAQueueIsPausedAndResumed(t *testing.T) {
	withAndWithout(t, func(t *testing.T, p *tab, scripts bool) {
		p.visit("/")
		row := "tr[contains(., 'default')]//button"
		p.click(row, "Pause")
		p.sees("Queue default: paused.", scripts)
		id := fmt.Sprintf("paused-%t", scripts)
		submit(t, id, "ok")
		p.visit("/jobs/" + id)
		p.sees("The queue is paused", scripts)
		p.visit("/")
		p.sees("Queue default is paused until it is resumed", scripts)
		p.click(row, "Resume")
		p.sees("Queue default: resumed.", scripts)
		p.visit("/jobs/" + id)
		p.sees("It completed after", scripts)
	})
}

func TestAPageChangesByItself(t *testing.T) {
	p := newTab(t, true)
	p.visit("/letters?code=invalidRequest")
	p.sees("No dead letter matches", true)
	var marked string
	p.run(chromedp.Evaluate(`window.marked = "still here"`, &marked))
	submit(t, "by-itself", "fail-invalidRequest")
	p.sees("by-itself", true)
	p.sees("Kept current", true)
	p.run(chromedp.Evaluate(`window.marked`, &marked))
	if marked != "still here" {
		t.Error("the page was loaded again")
	}
	// What a person does stays when the page changes.
	p.run(chromedp.Click(`input[name="seq"]`, chromedp.ByQuery), chromedp.Evaluate(`document.querySelector('input[name="seq"]').focus(); "x"`, &marked))
	submit(t, "by-itself-too", "fail-invalidRequest")
	p.sees("by-itself-too", true)
	var ticked []string
	p.run(chromedp.Evaluate(`[...document.querySelectorAll('input[name="seq"]:checked')].map((el) => el.closest("tr").innerText)`, &ticked))
	if len(ticked) != 1 || !strings.Contains(ticked[0], "by-itself") || strings.Contains(ticked[0], "by-itself-too") {
		t.Errorf("ticked: %q", ticked)
	}
	p.run(chromedp.Evaluate(`document.activeElement.name || document.activeElement.tagName`, &marked))
	if marked != "seq" {
		t.Errorf("the focus went to %s", marked)
	}
}

func TestThePageIsUsedByKeyboard(t *testing.T) {
	p := newTab(t, true)
	p.visit("/")
	var focused string
	p.run(chromedp.KeyEvent("\t"), chromedp.Evaluate(`document.activeElement.textContent`, &focused))
	if focused != "Skip to the content" {
		t.Errorf("the first tab leads to %q", focused)
	}
	p.run(chromedp.KeyEvent("\r"), chromedp.Evaluate(`document.activeElement.id`, &focused))
	if focused != "content" {
		t.Errorf("the skip link leads to %q", focused)
	}
	var outline string
	p.run(chromedp.KeyEvent("\t"), chromedp.Evaluate(`getComputedStyle(document.activeElement).outlineStyle`, &outline))
	if outline == "none" {
		t.Error("the focus can't be seen")
	}
	// A form is filled in and sent without a mouse.
	p.visit("/")
	p.run(chromedp.Focus("#find", chromedp.ByQuery), chromedp.KeyEvent("demo-flaky"), chromedp.KeyEvent("\r"), chromedp.WaitVisible(`//h1[text()="demo-flaky"]`, chromedp.BySearch))
}

func TestARefusedActionSaysSo(t *testing.T) {
	p := newTab(t, true)
	p.expected = []string{"403 (Forbidden)"}
	p.visit("/")
	var nodes []*cdp.Node
	p.run(
		chromedp.Nodes(`form[action="/queues/pause"] input[name="token"]`, &nodes, chromedp.ByQueryAll),
		chromedp.Evaluate(`document.querySelectorAll('input[name="token"]').forEach((el) => { el.value = "x"; }); document.querySelectorAll("[data-live]").forEach((el) => el.removeAttribute("data-live"))`, nil),
	)
	p.click("button", "Pause")
	p.sees("This form is too old", true)
}
