// Package streams reads the messages of streams without consuming them: all that there
// are (Scan), those to come (Follow), those of a work queue (Reader), or what is new, now
// and then (Tail). It owns the consumers that it creates for that, and removes them. It
// must not know what the messages mean.
package streams
