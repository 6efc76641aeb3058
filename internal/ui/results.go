package ui

import (
	"crypto/rand"
	"slices"
	"sync"
)

// result is what an action did, as the page after it shows it.
type result struct {
	Title string
	Rows  []resultRow
	OK    int
	Not   int

	id      string
	session string // only its user sees it
}

type resultRow struct {
	Name    string // of the job, letter, queue, …
	Href    string // "": there is no page of it
	Status  string
	Message string
	OK      bool
}

func (r *result) add(row resultRow) {
	if r.Rows = append(r.Rows, row); row.OK {
		r.OK++
	} else {
		r.Not++
	}
}

// maxResults is how many results are kept until they are shown.
const maxResults = 100

// results keeps the results of the last actions, so that a page that is loaded
// again does nothing again.
type results struct {
	mu   sync.Mutex
	list []*result
}

// keep returns the id by which the session finds the result.
func (s *results) keep(r *result, session string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.id, r.session = rand.Text(), session
	s.list = append(s.list, r)
	if len(s.list) > maxResults {
		s.list = slices.Delete(s.list, 0, len(s.list)-maxResults)
	}
	return r.id
}

func (s *results) get(id, session string) *result {
	if id == "" {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.list {
		if r.id == id && r.session == session {
			return r
		}
	}
	return nil
}
