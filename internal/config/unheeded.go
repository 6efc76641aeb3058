package config

// unheeded warns of policies about codes that say, mostly, that a job is over.
// They count where an attempt fails with such a code, as for a WAV at a URL that
// is broken; nothing is left to choose where the worker finds it without one.
func (c *Config) unheeded() []Warning {
	const message = "it counts for failed attempts only; a message that is no valid job, a deadline that has passed and workers lost one after the other end the job whatever it says"
	var list []Warning
	for _, code := range []string{"deadlineExceeded", "invalidJob", "workerLost"} {
		if p := c.Policy[code]; p != nil && (p.Action != "" || p.Attempts != 0) {
			list = append(list, Warning{"policy." + code, message})
		}
	}
	return list
}
