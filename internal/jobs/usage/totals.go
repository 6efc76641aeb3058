package usage

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/big"
	"strconv"
)

// Totals are sums over sessions.
type Totals struct {
	Sessions         int64 `json:"sessions"`
	ConnectedMS      int64 `json:"connected_ms"`
	Credits          int64 `json:"credits"`
	EstimatedCredits int64 `json:"estimated_credits"` // of those, from sessions whose end is not known
	FailedCredits    int64 `json:"failed_credits"`    // of those, from sessions that failed or were lost
}

// Plus adds other.
func (t Totals) Plus(other Totals) Totals {
	return Totals{
		Sessions: t.Sessions + other.Sessions, ConnectedMS: t.ConnectedMS + other.ConnectedMS, Credits: t.Credits + other.Credits,
		EstimatedCredits: t.EstimatedCredits + other.EstimatedCredits, FailedCredits: t.FailedCredits + other.FailedCredits,
	}
}

// Minus takes other away.
func (t Totals) Minus(other Totals) Totals {
	return t.Plus(Totals{
		Sessions: -other.Sessions, ConnectedMS: -other.ConnectedMS, Credits: -other.Credits,
		EstimatedCredits: -other.EstimatedCredits, FailedCredits: -other.FailedCredits,
	})
}

func (t Totals) fields() [5]int64 {
	return [5]int64{t.Sessions, t.ConnectedMS, t.Credits, t.EstimatedCredits, t.FailedCredits}
}

// digits is how many decimal digits each of the sums has in a counter. The server
// adds whole numbers of any length, so the five are one number and are added
// together or not at all.
const digits = 18

func base() *big.Int { return new(big.Int).Exp(big.NewInt(10), big.NewInt(digits), nil) }

// Number packs the sums into the number that a counter adds: failed credits in the
// last 18 digits, then estimated ones, credits, milliseconds and sessions.
func (t Totals) Number() *big.Int {
	n, b := new(big.Int), base()
	for _, f := range t.fields() {
		n.Mul(n, b).Add(n, big.NewInt(f))
	}
	return n
}

// Unpack takes the sums out of a counter's number. Each is between -10^18/2 and
// 10^18/2.
func Unpack(n *big.Int) Totals {
	b, half := base(), new(big.Int).Div(base(), big.NewInt(2))
	rest, field := new(big.Int).Set(n), new(big.Int)
	var fields [5]int64
	for i := len(fields) - 1; i >= 0; i-- {
		rest.DivMod(rest, b, field)
		if field.Cmp(half) >= 0 { // a negative one: it borrowed from the next
			field.Sub(field, b)
			rest.Add(rest, big.NewInt(1))
		}
		fields[i] = field.Int64()
	}
	return Totals{Sessions: fields[0], ConnectedMS: fields[1], Credits: fields[2], EstimatedCredits: fields[3], FailedCredits: fields[4]}
}

// parseDigits is Unpack of a number that is not negative and not too long, which is
// what nearly every counter is: a year's sum reads many.
func parseDigits(text string) (Totals, bool) {
	const half = 1_000_000_000_000_000_000 / 2
	var fields [5]int64
	for i := len(fields) - 1; i >= 0 && text != ""; i-- {
		from := max(len(text)-digits, 0)
		n, err := strconv.ParseUint(text[from:], 10, 63)
		if err != nil || n >= half {
			return Totals{}, false // one that is negative borrowed from the next
		}
		fields[i], text = int64(n), text[:from]
	}
	return Totals{Sessions: fields[0], ConnectedMS: fields[1], Credits: fields[2], EstimatedCredits: fields[3], FailedCredits: fields[4]}, text == ""
}

// ParseCounter reads the body of a counter's message, {"val":"…"}.
func ParseCounter(data []byte) (Totals, error) {
	if digits, ok := bytes.CutPrefix(data, []byte(`{"val":"`)); ok {
		if digits, ok = bytes.CutSuffix(digits, []byte(`"}`)); ok {
			if t, ok := parseDigits(string(digits)); ok {
				return t, nil
			}
		}
	}
	var body struct {
		Value string `json:"val"`
	}
	if err := json.Unmarshal(data, &body); err != nil {
		return Totals{}, fmt.Errorf("counter: %w", err)
	}
	n, ok := new(big.Int).SetString(body.Value, 10)
	if !ok {
		return Totals{}, fmt.Errorf("counter: %q is not a whole number", body.Value)
	}
	return Unpack(n), nil
}
