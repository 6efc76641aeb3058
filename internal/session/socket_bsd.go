//go:build unix && !linux

package session

import "time"

// closedFor implements waiter. This system does not say.
func (s *socket) closedFor() time.Duration { return 0 }
