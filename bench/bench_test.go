package main

import (
	"testing"

	"avatarworker/internal/simulator"
)

// The figures are worth something for frames of the real size only: 49,868
// bytes (docs/protocol.md, section 4).
func TestFramesHaveTheRealSize(t *testing.T) {
	if n := len(envelope(keyFrames, false)); n < 49_868-8 || n > 49_868+8 {
		t.Errorf("an envelope has %d bytes", n)
	}
}

func TestBackendAnswersWithAsManyFramesAsAskedFor(t *testing.T) {
	for _, n := range []int{1, 2, 500} {
		x := exchange(n)
		if len(x.Envelopes) != n {
			t.Errorf("%d envelopes, not %d", len(x.Envelopes), n)
		}
		s := simulator.New(simulator.Options{Addr: "127.0.0.1:0", Replay: x})
		if err := s.Start(t.Context()); err != nil {
			t.Errorf("%d envelopes: %v", n, err)
		}
		s.Stop()
	}
}

func TestTargetsCompareMedians(t *testing.T) {
	of := func(values ...float64) []sample {
		var list []sample
		for _, v := range values {
			list = append(list, sample{jobsPerSecond: v})
		}
		return list
	}
	for _, c := range []struct {
		ours []sample
		got  float64
		met  bool
	}{
		{of(10, 950, 1000), 0.95, true},
		{of(100, 700, 5000), 0.7, false},
		{of(920, 940), 0.93, true},
	} {
		all := results{"queue/our worker, 16 jobs in hand": c.ours, "queue/bare nats.go loop": of(1000, 1, 1e6)}
		got := targets(nil, all)
		if len(got) != 1 || got[0].Got != c.got || got[0].Met != c.met {
			t.Errorf("%v: %+v, want %v (%t)", c.ours, got, c.got, c.met)
		}
	}
}

func TestAnIdleSessionIsJudgedByItsWorstRound(t *testing.T) {
	all := results{"idle/our worker": {{memoryPerIdle: 30}, {memoryPerIdle: 41}, {memoryPerIdle: 31}}}
	if got := targets(nil, all); len(got) != 1 || got[0].Got != 41 || got[0].Met {
		t.Errorf("%+v", got)
	}
}

func TestAMissedTargetFailsTheRunAndIsNamed(t *testing.T) {
	r := report{Targets: []target{
		{What: "one", Got: 1, Limit: 2, Met: true},
		{What: "two", Got: 3, Limit: 2},
		{What: "three", Got: 0.5, Limit: 0.92, Least: true},
	}}
	err := r.missed()
	if err == nil {
		t.Fatal("a run that misses its targets goes well")
	}
	const want = "missed: two: 3.00, want ≤ 2.00\nmissed: three: 0.500, want ≥ 0.920"
	if err.Error() != want {
		t.Errorf("%q, want %q", err, want)
	}
	r.Targets = r.Targets[:1]
	if err := r.missed(); err != nil {
		t.Error(err)
	}
}

// Each target needs the rows that it compares: a name that no row has would never
// be checked.
func TestEveryTargetFindsItsRows(t *testing.T) {
	all := make(results)
	list := suite(fullSizes)
	for _, m := range list {
		all[m.key()] = []sample{{}}
	}
	for _, m := range list {
		for _, metric := range []string{
			jobsPerSecond, cpuPerJob, cpuPerFrame, memoryPerIdle, startMedian, startP99, coldStart, warmStart, firstFrameMedian, firstFrameP99, cpuPerSession,
		} {
			all[m.key()][0][metric] = 1
		}
	}
	if got := targets(list, all); len(got) != 23 {
		t.Errorf("%d targets", len(got))
	}
}

func TestUnequalWorkIsNotCompared(t *testing.T) {
	all := results{
		"queue/our worker":        {{storedPerJob: 5}},
		"queue/bare nats.go loop": {{storedPerJob: 4}},
	}
	if sameWork(all) == nil {
		t.Error("a loop that leaves fewer messages was compared")
	}
	all["queue/bare nats.go loop"][0][storedPerJob] = 5
	if err := sameWork(all); err != nil {
		t.Error(err)
	}
}

func TestNumbersHaveThreeDigits(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.12345: "0.123", 1.2345: "1.23", 12.345: "12.3", 1234.5: "1234", 99.96: "100.0"} {
		if got := short(v); got != want {
			t.Errorf("%v is written %s, want %s", v, got, want)
		}
	}
}
