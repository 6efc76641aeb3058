package permissions_test

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

var cells = []string{"eu", "us"}

// startCells runs a server with deploy/nats/cells.conf that belongs to a cluster
// of this name.
func startCells(t *testing.T, cluster string) string {
	t.Helper()
	opts, err := server.ProcessConfigFile(filepath.Join(folder, "cells.conf"))
	if err != nil {
		t.Fatal(err)
	}
	opts.Cluster = server.ClusterOpts{Name: cluster, Host: "127.0.0.1", Port: server.RANDOM_PORT}
	return serve(t, opts)
}

func connectAs(t *testing.T, url, user string) *nats.Conn {
	t.Helper()
	return connect(t, url, user, nil).nc
}

// answerCells answers every request that reaches a cell with the subject under
// which it did.
func answerCells(t *testing.T, url string) {
	t.Helper()
	nc := connectAs(t, url, "operator")
	for _, cell := range cells {
		_, err := nc.Subscribe("avatar_"+cell+".>", func(m *nats.Msg) {
			if err := m.Respond([]byte(m.Subject)); err != nil {
				t.Error(err)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
}

// reached is the subject under which a message to subject reached a cell.
func reached(t *testing.T, nc *nats.Conn, subject string) string {
	t.Helper()
	reply, err := nc.Request(subject, nil, enough)
	if err != nil {
		t.Fatalf("%s: %v", subject, err)
	}
	return string(reply.Data)
}

func TestAPublisherReachesTheCellOfItsRegionUnderTheSubjectsItKnows(t *testing.T) {
	for _, cell := range cells {
		t.Run(cell, func(t *testing.T) {
			t.Parallel()
			url := startCells(t, cell)
			answerCells(t, url)
			nc := connectAs(t, url, "publisher")
			for _, subject := range []string{"jobs.default", "jobs.vip", "audio.job-1", "control.job-1"} {
				for range 20 { // a weight would show
					if got, want := reached(t, nc, "avatar."+subject), "avatar_"+cell+"."+subject; got != want {
						t.Fatalf("avatar.%s reached %q, want %s", subject, got, want)
					}
				}
			}
		})
	}
}

func TestJobsPublishedBesideTheRegionsAreDividedByWeight(t *testing.T) {
	url := startCells(t, "arbiter")
	answerCells(t, url)
	nc := connectAs(t, url, "publisher")
	const total = 400
	count := map[string]int{}
	for range total {
		count[reached(t, nc, "avatar.jobs.default")]++
	}
	for _, cell := range cells {
		// Half of them, give or take five standard deviations.
		if n := count["avatar_"+cell+".jobs.default"]; n < total/2-50 || n > total/2+50 {
			t.Errorf("of %d jobs, cells got %v", total, count)
		}
	}
	refused := newRefusals(nil)
	nc = connect(t, url, "publisher", refused).nc
	for _, subject := range []string{"avatar.audio.job-1", "avatar.control.job-1"} {
		if reply, err := nc.Request(subject, nil, 200*time.Millisecond); err == nil {
			t.Errorf("%s reached %s, where its job need not be", subject, reply.Data)
		}
	}
	if got := refused.all(); len(got) != 2 {
		t.Errorf("the server refused %v, want speech and control", got)
	}
}

func TestEverythingOfAJobIDReachesOneCell(t *testing.T) {
	url := startCells(t, "arbiter")
	answerCells(t, url)
	nc := connectAs(t, url, "publisher_by_id")
	const total = 400
	count := map[string]int{}
	for i := range total {
		id := fmt.Sprintf("job_%d-x", i)
		cell, rest, _ := strings.Cut(reached(t, nc, "avatar.jobs.vip."+id), ".")
		if rest != "jobs.vip" {
			t.Fatalf("job %s reached %s.%s, want the subject of its queue", id, cell, rest)
		}
		count[cell]++
		again := reached(t, nc, "avatar.jobs.default."+id)
		audio, control := reached(t, nc, "avatar.audio."+id), reached(t, nc, "avatar.control."+id)
		if again != cell+".jobs.default" || audio != cell+".audio."+id || control != cell+".control."+id {
			t.Errorf("job %s is in %s; to another queue it reaches %s, its speech %s, its control %s", id, cell, again, audio, control)
		}
	}
	for _, cell := range cells {
		if n := count["avatar_"+cell]; n < total/2-50 || n > total/2+50 {
			t.Errorf("of %d jobs, cells got %v", total, count)
		}
	}
}

func TestPublishersReachNothingElseOfACell(t *testing.T) {
	url := startCells(t, "eu")
	answerCells(t, url)
	for _, user := range []string{"publisher", "publisher_by_id"} {
		refused := newRefusals(nil)
		nc := connect(t, url, user, refused).nc
		for _, subject := range []string{"avatar_eu.events.completed.x", "avatar_us.frames.x", "avatar_eu.workers.w.drain", "$KV.AVATAR_EU_STATE.x", "$JS.API.INFO"} {
			if reply, err := nc.Request(subject, nil, 200*time.Millisecond); err == nil {
				t.Errorf("%s published %s, and %s answered", user, subject, reply.Data)
			}
		}
		if got := len(refused.all()); got < 5 {
			t.Errorf("%s: the server refused %v", user, refused.all())
		}
	}
}

func TestAListenerReceivesBothCellsUnderTheSubjectsItKnows(t *testing.T) {
	url := startCells(t, "eu")
	ctx, cancel := context.WithTimeout(t.Context(), enough)
	defer cancel()
	listener, fleet := connectAs(t, url, "listener"), connectAs(t, url, "operator")
	kinds := map[string]string{
		"avatar.events.>": "events.completed.j", "avatar.errors.>": "errors.server.upstreamError",
		"avatar.alerts.>": "alerts.recurring.x", "avatar.frames.*": "frames.j",
	}
	for filter, subject := range kinds {
		sub, err := listener.SubscribeSync(filter)
		if err != nil {
			t.Fatal(err)
		}
		if err := listener.Flush(); err != nil {
			t.Fatal(err)
		}
		for _, cell := range cells {
			if err := fleet.Publish("avatar_"+cell+"."+subject, []byte(cell)); err != nil {
				t.Fatal(err)
			}
		}
		var received []string
		for range cells {
			msg, err := sub.NextMsgWithContext(ctx)
			if err != nil {
				t.Fatalf("%s: %v, after %v", filter, err, received)
			}
			if msg.Subject != "avatar."+subject {
				t.Errorf("%s received %s, want avatar.%s", filter, msg.Subject, subject)
			}
			received = append(received, string(msg.Data))
		}
		if slices.Sort(received); !slices.Equal(received, cells) {
			t.Errorf("%s received %v, want one of each cell", filter, received)
		}
	}
}

func TestAWorkerOfACellHasThePermissionsOfAWorkerUnderItsPrefix(t *testing.T) {
	for _, cell := range cells {
		upper := strings.ToUpper(cell)
		want := strings.NewReplacer(
			"included by\n# permissions.conf and accounts.conf.", "included by\n# cells.conf. Made from worker.conf.",
			"avatar.", "avatar_"+cell+".", `"avatar"`, `"avatar_`+cell+`"`, "AVATAR_", "AVATAR_"+upper+"_", "_INBOX_worker", "_INBOX_worker_"+cell,
		).Replace(read(t, "worker.conf"))
		if got := read(t, "worker_"+cell+".conf"); got != want {
			t.Errorf("worker_%s.conf is not worker.conf under prefix avatar_%s", cell, cell)
		}
	}
}
