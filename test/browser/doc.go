// Package browser drives the page for operators in a real browser. It is a module of
// its own: what it needs (Chromium, axe-core from npm) is for CI, and nothing of it
// is part of the program.
package browser
