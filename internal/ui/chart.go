package ui

import (
	"fmt"
	"strings"
	"time"

	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/event"
)

// chart is failures by code over time as bars: an SVG of chartWidth × chartHeight.
type chart struct {
	Span    string // "1h"
	Spans   []string
	Since   time.Time
	Every   time.Duration // of one bar
	Width   int
	Height  int
	Bars    []bar
	Ticks   []tick
	Lines   []gridLine
	Legend  []legend
	Total   int
	Most    int // of one bar
	Whole   bool
	Summary string // in words
}

type bar struct {
	X, Y, W, H float64
	Series     int
	Title      string
}

type tick struct {
	X      float64
	Text   string
	Anchor string
}

type gridLine struct {
	Y    float64
	Text string
}

type legend struct {
	Series int
	Code   errors.Code
	Total  int
	Other  bool
}

const (
	chartWidth, chartHeight = 720, 120
	chartBars               = 60
	// chartSeries is how many codes have their own bars.
	chartSeries = 5
)

// chartSpans are the times that a chart can show.
func chartSpans() []string { return []string{"1h", "6h", "24h"} }

func newChart(r Reader, span string, now time.Time) chart {
	length, err := time.ParseDuration(span)
	if err != nil || length != time.Hour && length != 6*time.Hour && length != 24*time.Hour {
		span, length = "1h", time.Hour
	}
	c := chart{Span: span, Spans: chartSpans(), Since: now.Add(-length), Every: length / chartBars, Width: chartWidth, Height: chartHeight}
	f := r.Failures(c.Since, now, chartBars)
	c.Whole = f.Complete
	series := f.Codes
	if len(series) > chartSeries+1 {
		other := CodeCount{Code: otherCodes, Counts: make([]int, chartBars)}
		for _, s := range series[chartSeries:] {
			other.Total += s.Total
			for i, n := range s.Counts {
				other.Counts[i] += n
			}
		}
		series = append(series[:chartSeries:chartSeries], other)
	}
	sums := make([]int, chartBars)
	var words []string
	for i, s := range series {
		c.Total += s.Total
		c.Legend = append(c.Legend, legend{Series: i, Code: s.Code, Total: s.Total, Other: s.Code == otherCodes})
		words = append(words, fmt.Sprintf("%s %d", s.Code, s.Total))
		for k, n := range s.Counts {
			sums[k] += n
			c.Most = max(c.Most, sums[k])
		}
	}
	c.Summary = strings.Join(words, ", ")
	c.draw(series, now)
	return c
}

// draw places bars and lines. They are stretched to the available width; texts are next
// to them.
func (c *chart) draw(series []CodeCount, now time.Time) {
	if c.Total == 0 {
		return
	}
	top := niceTop(c.Most)
	slot := float64(chartWidth) / chartBars
	heights := make([]float64, chartBars)
	for i, s := range series {
		for k, n := range s.Counts {
			if n == 0 {
				continue
			}
			h := chartHeight * float64(n) / float64(top)
			heights[k] += h
			c.Bars = append(c.Bars, bar{
				X: round(slot*float64(k) + 1), Y: round(chartHeight - heights[k]), W: round(slot - 2), H: round(h), Series: i,
				Title: fmt.Sprintf("%s: %d from %s to %s", s.Code, n, c.Since.Add(time.Duration(k)*c.Every).Format("15:04"), c.Since.Add(time.Duration(k+1)*c.Every).Format("15:04")),
			})
		}
	}
	for _, n := range []int{top, top / 2, 0} {
		c.Lines = append(c.Lines, gridLine{Y: round(chartHeight - chartHeight*float64(n)/float64(top)), Text: grouped(fmt.Sprint(n))})
	}
	for i := range 5 {
		c.Ticks = append(c.Ticks, tick{Text: c.Since.Add(now.Sub(c.Since) * time.Duration(i) / 4).UTC().Format("15:04")})
	}
}

func round(f float64) float64 { return float64(int(f*10+0.5)) / 10 }

// niceTop is a round number that is at least n.
func niceTop(n int) int {
	for unit := 1; ; unit *= 10 {
		for _, k := range []int{2, 4, 6, 8, 10} {
			if k*unit >= n {
				return k * unit
			}
		}
	}
}

// timeline is a job's life drawn as bars on a line: an SVG of lineWidth × its height.
type timeline struct {
	Width, Height int
	Runs          []lane
	Ticks         []tick
	Words         string // the same in words
}

type lane struct {
	Y     float64
	Run   int
	Spans []stretch
	Marks []mark
}

// stretch is a time in which the job was in one state.
type stretch struct {
	X, W  float64
	Kind  string // waiting, running, retrying, held
	Title string
}

// mark is the end of a run.
type mark struct {
	X     float64
	Kind  string // an outcome
	Title string
}

const (
	lineWidth  = 900
	laneHeight = 46
	lineLeft   = 64
	lineRight  = 16
)

// moment is a change of a job's state.
type moment struct {
	at    time.Time
	run   int
	kind  string
	final bool
}

// moments reads the changes of a job's state from its events, oldest first.
func moments(steps []step, published, now time.Time) []moment {
	var list []moment
	if !published.IsZero() {
		list = append(list, moment{at: published, run: 1, kind: "waiting"})
	}
	for _, s := range steps {
		m := moment{at: s.Time, run: max(s.Run, 1)}
		switch s.Kind {
		case event.TypeStarted:
			m.kind = "running"
		case event.TypeRetrying:
			m.kind = "retrying"
		case event.TypeHeld:
			m.kind = "held"
		case event.TypeReleased:
			m.kind = "waiting"
		case event.TypeCompleted, event.TypeDeadLettered, event.TypeExpired, event.TypeCancelled:
			m.kind, m.final = s.Kind, true
		default:
			continue
		}
		if n := len(list); n > 0 && m.at.Before(list[n-1].at) {
			m.at = list[n-1].at // two clocks
		}
		list = append(list, m)
	}
	if n := len(list); n > 0 && !list[n-1].final && now.After(list[n-1].at) {
		list = append(list, moment{at: now, run: list[n-1].run, kind: "now"})
	}
	return list
}

func newTimeline(steps []step, published, now time.Time) *timeline {
	list := moments(steps, published, now)
	if len(list) < 2 {
		return nil
	}
	begin, end := list[0].at, list[len(list)-1].at
	whole := max(end.Sub(begin), time.Millisecond)
	clock := "15:04:05"
	switch {
	case whole < 10*time.Second:
		clock = "15:04:05.0"
	case whole > 48*time.Hour:
		clock = "2 Jan 15:04"
	}
	x := func(t time.Time) float64 {
		return round(lineLeft + float64(lineWidth-lineLeft-lineRight)*float64(t.Sub(begin))/float64(whole))
	}
	line := &timeline{Width: lineWidth}
	var words []string
	for i, m := range list {
		if len(line.Runs) == 0 || line.Runs[len(line.Runs)-1].Run != m.run {
			line.Runs = append(line.Runs, lane{Run: m.run, Y: float64(len(line.Runs)*laneHeight + 8)})
		}
		run := &line.Runs[len(line.Runs)-1]
		switch {
		case m.final:
			text := fmt.Sprintf("%s at %s", strings.ReplaceAll(m.kind, "_", " "), m.at.UTC().Format("15:04:05"))
			run.Marks = append(run.Marks, mark{X: x(m.at), Kind: m.kind, Title: text})
			words = append(words, text)
		case m.kind != "now" && i+1 < len(list):
			next := list[i+1].at
			text := fmt.Sprintf("%s for %s", m.kind, precise(next.Sub(m.at)))
			run.Spans = append(run.Spans, stretch{X: x(m.at), W: max(x(next)-x(m.at), 2), Kind: m.kind, Title: text})
			words = append(words, text)
		}
	}
	line.Height = len(line.Runs)*laneHeight + 30
	for i := range 5 {
		at := begin.Add(whole * time.Duration(i) / 4)
		anchor := "middle"
		switch i {
		case 0:
			anchor = "start"
		case 4:
			anchor = "end"
		}
		line.Ticks = append(line.Ticks, tick{X: x(at), Text: at.UTC().Format(clock), Anchor: anchor})
	}
	if len(words) > 30 {
		words = append(words[:30], "…")
	}
	line.Words = strings.Join(words, ", ")
	return line
}
