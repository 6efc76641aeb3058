// Package reliability shows, by breaking things, that the worker keeps its
// promises: real worker processes against real NATS and the simulated backend.
// docs/reliability.md says which test shows which promise.
//
// AVATAR_CHAOS=10m runs the long forms; AVATAR_CHAOS_SEED replays a schedule.
package reliability
