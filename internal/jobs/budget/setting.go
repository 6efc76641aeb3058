package budget

import (
	"encoding/json"

	"avatarworker/internal/topology"
)

// SettingKey is the key in the fleet's bucket under which the credits of a rule can
// be set at run time; its value is a Setting.
func SettingKey(key, per string) string {
	return Prefix + topology.Token(key) + "." + topology.Token(per)
}

// Setting replaces the credits of a rule at run time.
type Setting struct {
	Credits int64 `json:"credits"`
}

func parseSetting(data []byte) (credits int64, ok bool) {
	var s Setting
	if json.Unmarshal(data, &s) != nil || s.Credits <= 0 {
		return 0, false
	}
	return s.Credits, true
}

// ParseSettings reads the settings of a bucket's entries, by key; others are left
// out.
func ParseSettings(entries map[string][]byte) map[string]int64 {
	settings := make(map[string]int64, len(entries))
	for key, data := range entries {
		if credits, ok := parseSetting(data); ok {
			settings[key] = credits
		}
	}
	return settings
}
