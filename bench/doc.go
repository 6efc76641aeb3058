// Command bench compares the worker with the simplest programs for the same work: a
// bare nats.go loop, another queue over JetStream, a bare WebSocket reader.
// docs/performance.md has its table and says how to read it.
//
// Every measurement has its own processes: the one that is measured,
// NATS and the simulated backend. The harness starts itself for each of them
// (see child.go), takes the measurements in turn, round by round, and prints
// medians.
package main
