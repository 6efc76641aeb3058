package config

// ineffectivePolicies warns of policies for codes with which a job mostly ends
// before it has an attempt. A policy counts where an attempt fails with such a
// code, as for a broken WAV at a URL. Where the worker finds the fault before any
// attempt, there is nothing to choose.
func (c *Config) ineffectivePolicies() []Warning {
	const message = "it counts for failed attempts only: an invalid message, a deadline that has passed and a job that has lost several workers end the job whatever the policy says"
	var list []Warning
	for _, code := range []string{"deadlineExceeded", "invalidJob", "workerLost"} {
		if p := c.Policy[code]; p != nil && (p.Action != "" || p.Attempts != 0) {
			list = append(list, Warning{"policy." + code, message})
		}
	}
	return list
}
