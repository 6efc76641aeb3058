package app_test

import (
	"encoding/base64"
	"net/url"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"avatarworker/internal/config"
	"avatarworker/internal/errors"
	"avatarworker/internal/jobs/lifecycle"
	"avatarworker/internal/natsserver"
	"avatarworker/internal/natsserver/natstest"
)

// restart stops NATS, and starts it again on the same port with the same files.
func (f *fleet) restart(o natsserver.Options) {
	f.t.Helper()
	u, err := url.Parse(f.server.ClientURL())
	if err != nil {
		f.t.Fatal(err)
	}
	if err := f.server.Shutdown(); err != nil {
		f.t.Fatal(err)
	}
	if o.Port, err = strconv.Atoi(u.Port()); err != nil {
		f.t.Fatal(err)
	}
	f.server = natstest.StartWith(f.t, o)
	f.nc = natstest.Connect(f.t, f.server, nats.MaxReconnects(-1))
	if f.js, err = jetstream.New(f.nc); err != nil {
		f.t.Fatal(err)
	}
}

func TestSessionsOutliveARestartOfNATS(t *testing.T) {
	t.Parallel()
	o := natsserver.Options{StoreDir: t.TempDir(), Port: natstest.Port(t)}
	f := newFleetWith(t, o, nil)
	f.worker(worker{config: func(c *config.Config) {
		c.NATS.Storage, c.Lease.AckWait = "file", 20*time.Second
	}})
	// 30 s at 8 kHz: 8 frames in 2.4 s.
	audio := fields{"inline": base64.StdEncoding.EncodeToString(silence(15 * time.Second)), "sample_rate": 8000}
	f.publish("frames", "slow-300", fields{"audio": audio})
	f.publish("live", "ok", live("20s"))
	f.say("live", silence(3*time.Second), going)
	f.watch(f.names.FramesStream(), f.names.Frames("live"), func(jetstream.Msg) bool { return true })
	f.watch(f.names.FramesStream(), f.names.Frames("frames"), func(msg jetstream.Msg) bool { return number(t, msg, "Avatar-Seq") == 2 })
	f.restart(o)
	f.say("live", silence(3*time.Second), end)
	f.say("live", silence(time.Second), closing)
	if done := f.completed("live"); done.UtterancesTotal != 2 || done.Session != 1 || done.Utterances[0].AudioMS != 6000 {
		t.Errorf("%+v", done)
	}
	if done := f.completed("frames"); done.Session != 1 || done.Attempts != 1 {
		t.Errorf("%+v after %+v", done, f.errorEvents("frames"))
	}
	var seqs []int
	for _, msg := range f.frames("frames") {
		seqs = append(seqs, number(t, msg, "Avatar-Seq"))
	}
	if !slices.Equal(seqs, []int{1, 2, 3, 4, 5, 6, 7, 8}) {
		t.Errorf("frames stored: %v", seqs)
	}
}

func TestASessionThatLastsTooLongIsClosedAndGoesOnWhereItGotFurther(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{config: func(c *config.Config) { c.Backend.MaxSession = 3 * time.Second }})
	f.publish("further", "slow-500", fields{"utterances": five()}) // 1 s each
	if done := f.completed("further"); done.UtterancesTotal != 5 || done.Attempts < 2 {
		t.Errorf("%+v", done)
	}
	if ends := f.ends("further"); len(ends) != 5 {
		t.Errorf("delivered: %v", ends)
	}
	f.publish("stuck", "hang", nil)
	r := f.outcome("stuck")
	if r.State != lifecycle.StateDeadLettered || r.LastError.Code != errors.CodeSessionDurationExceeded || r.Attempt != 1 {
		t.Errorf("%s after %d: %+v", r.State, r.Attempt, r.LastError)
	}
	for _, s := range f.backend.SessionLog() {
		if s.Closed.Sub(s.Confirmed) > 6*time.Second || s.CloseCode != 1000 {
			t.Errorf("%+v", s)
		}
	}
}

func TestEveryEventNamesTheRegionThatServed(t *testing.T) {
	t.Parallel()
	f := newFleet(t, nil)
	f.worker(worker{config: func(c *config.Config) { c.Backend.FallbackRegions = []string{"cn-beijing"} }})
	f.publish("own", "flaky-upstreamError-1", fields{"region": "ap-northeast"})
	f.publish("default", "ok", nil)
	for id, region := range map[string]string{"own": "ap-northeast", "default": "us-west"} {
		if done := f.completed(id); done.Region != region {
			t.Errorf("%s completed in %q, want %q", id, done.Region, region)
		}
	}
	if e := f.errorEvents("own"); len(e) != 1 || e[0].Region != "ap-northeast" {
		t.Errorf("%+v", e)
	}
}
