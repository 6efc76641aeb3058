// Package session runs one avatar session on the wire: it mints the session
// token, dials the WebSocket, configures and confirms the session, sends speech
// and hands out the backend's envelopes as they were received. What it knows of
// the backend is in docs/protocol.md.
//
// A Client is shared by all sessions of a process. A Session speaks one
// utterance at a time; from its upgrade to its close exactly one goroutine
// reads from it, and that goroutine calls Utterance.OnFrame.
package session
