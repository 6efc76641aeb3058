package errors

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"
)

// Rule is what the worker does about a code where nothing else decides.
type Rule struct {
	Class    Class
	Action   Action
	Attempts int  // failures with this code in all; 0: the job's own limit
	Alert    bool // counts towards the recurring alert
	// Exception says in words where class or action differ; "" where they never do.
	Exception string
}

// Override changes what the table does about a code. A zero field changes
// nothing.
type Override struct {
	Action   Action // one of PolicyActions
	Attempts int    // failures with this code in all
	Alert    *bool
}

// Policy is the user's `policy:`.
type Policy map[Code]Override

// Table decides what becomes of a failure. It never changes, and may be used by
// several goroutines at once.
type Table struct {
	rules  map[Code]Rule
	policy Policy
}

// Decision is what the worker does about one failure.
type Decision struct {
	Code     Code
	Class    Class
	Action   Action
	Attempts int  // failures with this code in all; 0: the job's own limit
	Alert    bool // counts towards the recurring alert
	// Raises: Attempts is the policy's, and counts also where it lies above the
	// limit of all jobs.
	Raises bool
	// NotBefore is how long the backend asked not to be called, at most 1 h; 0
	// where it did not, or where the job is not tried again.
	NotBefore time.Duration
	// AppWide: the failure concerns the whole app and counts for its circuit.
	AppWide bool
	// OpensCircuit: the app's circuit opens at once.
	OpensCircuit bool
	// Proxy: a proxy on the way to the backend let nothing through, which is the
	// fault of neither job nor backend: a retry counts no attempt.
	Proxy bool
}

// maxNotBefore is how much of a Retry-After counts.
const maxNotBefore = time.Hour

// NewTable is the default table under a policy, which may be nil. The error
// names every code, action and limit of it that can't be.
func NewTable(policy Policy) (*Table, error) {
	var faults []error
	for _, code := range sortedCodes(policy) {
		faults = append(faults, policy[code].validate(code))
	}
	if err := Join(faults...); err != nil {
		return nil, err
	}
	own := make(Policy, len(policy))
	for code, o := range policy {
		if o.Alert != nil {
			alert := *o.Alert
			o.Alert = &alert
		}
		own[code] = o
	}
	return &Table{rules: defaultRules(), policy: own}, nil
}

func sortedCodes(policy Policy) []Code {
	var out []Code
	for code := range policy {
		out = append(out, code)
	}
	slices.Sort(out)
	return out
}

func (o Override) validate(code Code) error {
	if !code.Known() {
		return fmt.Errorf("policy.%s: not a code; want one of %v", code, codes())
	}
	var faults []error
	if o.Action != "" && !slices.Contains(PolicyActions(), o.Action) {
		faults = append(faults, fmt.Errorf("policy.%s.action: %q is not an action of a policy; want %s", code, o.Action, policyActions()))
	}
	if o.Attempts < 0 {
		faults = append(faults, fmt.Errorf("policy.%s.attempts: %d is below 0; want how many failures with this code end a job, or 0 for the job's own limit", code, o.Attempts))
	}
	return Join(faults...)
}

// policyActions names PolicyActions for people.
func policyActions() string {
	var names []string
	for _, action := range PolicyActions() {
		names = append(names, string(action))
	}
	last := len(names) - 1
	return strings.Join(names[:last], ", ") + " or " + names[last]
}

// defaultRules is the table of the codes, before HTTP status, text and policy.
func defaultRules() map[Code]Rule {
	rules := make(map[Code]Rule, len(codes()))
	for _, code := range codes() {
		rules[code] = defaultRule(code)
	}
	return rules
}

func defaultRule(code Code) Rule {
	r := Rule{Class: code.Class(), Action: ActionDeadLetter}
	switch r.Class {
	case ClassTransient:
		r.Action = ActionRetry
	case ClassServer:
		r.Action, r.Alert = ActionRetry, true
	case ClassProtocol, ClassUnknown, ClassInternal:
		r.Action, r.Attempts, r.Alert = ActionRetry, 2, true
	case ClassBilling:
		r.Action = ActionHold
	}
	switch code {
	case CodeEgressUnavailable:
		r.Exception = `class config and dead_letter where the text says "not configured"`
	case CodeInvalidEgressConfig, CodeInvalidRequest:
		r.Exception = "before the handshake: class auth for HTTP 401 or 403, class transient and retry for HTTP 5xx"
	case CodeSessionDurationExceeded:
		r.Action = ActionDeadLetter
		r.Exception = "retry where an utterance was finished since the last attempt"
	case CodeAudioUnavailable:
		r.Exception = "class transient and retry for a network fault, HTTP 5xx, 408, 425 or 429"
	case CodeDeadlineExceeded:
		r.Action = ActionExpire
	}
	return r
}

// Decide says what becomes of a failure. progressed: an utterance was finished
// since the last attempt. First match wins: policy, billing codes, HTTP status
// 408, 425, 429 and 503, the text, the code; the policy changes the action, the
// attempts and the alert, never the class. Of a token call the status also
// decides where it is 401 or 403 (auth) or 5xx (transient). A nil e, or a code that is not
// known, is a fault of the worker: internal.
func (t *Table) Decide(e *Error, progressed bool) Decision {
	if e == nil {
		e = &Error{Code: CodeInternal, Phase: PhaseJob}
	}
	code := e.Code
	rule, ok := t.rules[code]
	if !ok {
		code, rule = CodeInternal, t.rules[CodeInternal]
	}
	rule = rule.refine(code, e, progressed)
	d := Decision{
		Code: code, Class: rule.Class, Action: rule.Action, Attempts: rule.Attempts, Alert: rule.Alert,
		AppWide: appWide(code, rule.Class, e), Proxy: e.Proxy,
	}
	t.policy[code].apply(&d)
	d.OpensCircuit = d.Action == ActionHold && (code == CodeBillingRequired || code == CodeCreditsExhausted)
	if d.Action == ActionRetry || d.Action == ActionHold {
		d.NotBefore = min(max(e.RetryAfter, 0), maxNotBefore)
	}
	return d
}

// refine is the precedence below the policy: billing, status, text, code.
func (r Rule) refine(code Code, e *Error, progressed bool) Rule {
	switch {
	case code.Class() == ClassBilling:
		if code == CodeSessionDurationExceeded && progressed {
			r.Action = ActionRetry
		}
	case ownVerdict(code):
	case passingStatus(e.HTTPStatus), code == CodeAudioUnavailable && passingAudioFault(e):
		r.Class, r.Action, r.Attempts = ClassTransient, ActionRetry, 0
	case refusesKey(e):
		r.Class, r.Action, r.Attempts, r.Alert = ClassAuth, ActionDeadLetter, 0, false
	case failsItself(e) && r.Class != ClassServer:
		r.Class, r.Action, r.Attempts, r.Alert = ClassTransient, ActionRetry, 0, false
	case code == CodeEgressUnavailable && e.mentions("not configured"):
		r.Class, r.Action = ClassConfig, ActionDeadLetter
	}
	return r
}

// ownVerdict: the worker itself judged the job, so that an HTTP status which it
// carries along from an earlier failure changes nothing.
func ownVerdict(code Code) bool {
	return code == CodeInvalidJob || code == CodeDeadlineExceeded || code == CodeWorkerLost
}

// passingStatus: the server itself says that a later try may succeed.
func passingStatus(status int) bool {
	switch status {
	case http.StatusRequestTimeout, http.StatusTooEarly,
		http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return true
	}
	return false
}

// refusesKey: the status says that the credentials are refused, whatever the
// text made the code: 401 or 403. The session's own settings have not been sent
// by then. At the upgrade a text may still name what the request named, as the
// avatar; it counts only where it names nothing of the kind.
func refusesKey(e *Error) bool {
	refused := e.HTTPStatus == http.StatusUnauthorized || e.HTTPStatus == http.StatusForbidden
	return refused && e.Code.Class() != ClassBilling && statusDecides(e)
}

// failsItself: the status says that the server failed, whatever the text made
// the code. A refused job would have another status.
func failsItself(e *Error) bool {
	return e.HTTPStatus >= http.StatusInternalServerError && statusDecides(e)
}

func statusDecides(e *Error) bool {
	switch e.Phase {
	case PhaseToken:
		return true
	case PhaseConnect:
		return e.Code == CodeInvalidEgressConfig || e.Code == CodeInvalidRequest
	}
	return false
}

func passingAudioFault(e *Error) bool {
	return e.Network || e.HTTPStatus >= http.StatusInternalServerError
}

// mentions looks at every text of the failure. The server's code is one: it is
// where a flat body's "error" ends up.
func (e *Error) mentions(phrase string) bool {
	text := strings.Join([]string{e.ServerCode, e.ServerTitle, e.ServerDetail, e.Message}, " | ")
	return strings.Contains(lower(text), phrase)
}

// appWide: auth codes, appIDUnrecognized, and transient or server failures
// before a session was confirmed. A 401 or 403 to the token request is the app's
// API key whatever its code: with the text "unauthorized" it is classified as
// invalidEgressConfig (docs/protocol.md, section 9).
func appWide(code Code, class Class, e *Error) bool {
	if code.Class() == ClassAuth || code == CodeAppIDUnrecognized {
		return true
	}
	if e.Phase == PhaseToken && refusesKey(e) {
		return true
	}
	if class != ClassTransient && class != ClassServer {
		return false
	}
	return e.Phase == PhaseToken || e.Phase == PhaseConnect || e.Phase == PhaseHandshake
}

func (o Override) apply(d *Decision) {
	if o.Action != "" {
		d.Action = o.Action
	}
	if o.Attempts > 0 {
		d.Attempts, d.Raises = o.Attempts, true
	}
	if o.Alert != nil {
		d.Alert = *o.Alert
	}
}

// Row is one code of the table as it is under the policy.
type Row struct {
	Code       Code   `json:"code"`
	Class      Class  `json:"class"`
	Action     Action `json:"action"`
	Attempts   int    `json:"attempts"` // 0: the job's own limit
	Alert      bool   `json:"alert"`
	Exception  string `json:"unless,omitempty"` // where class or action differ
	Overridden bool   `json:"overridden"`       // the policy changed something
	Explanation
}

// Rows is the whole table in the order of Codes.
func (t *Table) Rows() []Row {
	rows := make([]Row, 0, len(t.rules))
	for _, code := range codes() {
		rule := t.rules[code]
		o, overridden := t.policy[code]
		d := Decision{Class: rule.Class, Action: rule.Action, Attempts: rule.Attempts, Alert: rule.Alert}
		o.apply(&d)
		row := Row{
			Code: code, Class: d.Class, Action: d.Action, Attempts: d.Attempts, Alert: d.Alert,
			Exception: rule.Exception, Overridden: overridden && o != Override{}, Explanation: Explain(code),
		}
		if o.Action != "" {
			row.Exception = "" // the policy's action holds in every case
		}
		rows = append(rows, row)
	}
	return rows
}
