// Package session runs one avatar session on the wire: it mints the session
// token, dials the WebSocket, configures the session, waits for its confirmation,
// sends speech and passes on the backend's envelopes as they were received.
// docs/protocol.md says what is known of the backend.
//
// A Client is shared by all sessions of a process. A Session has one utterance in
// flight at a time. Exactly one goroutine reads from it between upgrade and
// close, and calls Utterance.OnFrame. The package owns tokens, connections and
// their timeouts; it must not know about jobs, queues or outputs.
package session
