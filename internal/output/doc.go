// Package output writes the backend's envelopes to a job's output: the frames
// stream, a recording, or nowhere. It never changes the bytes. It owns the layout
// of frames and recordings, and knows how much space a stream has for them.
//
// It gets the session's number, to distinguish a session's frames from those of another
// (SessionID), and tries a publish again while its acknowledgement is missing. It
// must not know how a session is run, which job comes next, or when a job is tried
// again.
package output
