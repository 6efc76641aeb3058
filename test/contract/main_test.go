package contract

import (
	"testing"

	"avatarworker/internal/natsserver/natstest"
)

func TestMain(m *testing.M) { natstest.Main(m) }
