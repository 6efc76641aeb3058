package jobs_test

import (
	"testing"
	"time"

	"avatarworker/internal/jobs"
)

func TestPurgedRecordCanBeMadeAgain(t *testing.T) {
	h := newHouse(t)
	store, err := jobs.NewStore(h.js, h.handles.State, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Put(t.Context(), "j", jobs.Record{JobID: "j"}, 0); err != nil {
		t.Fatal(err)
	}
	if err := h.handles.State.Purge(t.Context(), "j"); err != nil {
		t.Fatal(err)
	}
	var got jobs.Record
	if revision, err := store.Get(t.Context(), "j", &got); err != nil || revision != 0 {
		t.Fatalf("a purged record has revision %d, %v", revision, err)
	}
	revision, err := store.Put(t.Context(), "j", jobs.Record{JobID: "j", Run: 2}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if read, err := store.Get(t.Context(), "j", &got); err != nil || read != revision || got.Run != 2 {
		t.Fatalf("read revision %d of %d, %+v, %v", read, revision, got, err)
	}
}
