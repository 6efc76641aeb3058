// Package storage checks, before a session is opened, whether the streams and
// buckets that a job reads and writes can serve it, and keeps space in them for
// the jobs that were admitted. It implements jobs.Storage, and so it learns when a
// session has failed for a store.
//
// It owns what this worker knows of these stores, and nothing that is stored. It
// must not know about records, retries or sessions.
package storage
