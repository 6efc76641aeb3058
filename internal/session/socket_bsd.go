//go:build unix && !linux

package session

import "time"

// peerClosed says nothing here: this system does not tell.
func (s *socket) peerClosed() (ago time.Duration, closed bool) { return 0, false }

// quietFor implements waiter. This system does not tell.
func (s *socket) quietFor() time.Duration { return 0 }
