package app

// ID is the worker's id.
func (a *App) ID() string { return a.id }
