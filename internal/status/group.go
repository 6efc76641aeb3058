package status

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"avatarworker/internal/jobs/lifecycle"
)

// By is what jobs are counted by: queue, app, avatar, code or label:NAME. Empty: they
// are listed.
type By string

const (
	ByQueue  By = "queue"
	ByApp    By = "app"
	ByAvatar By = "avatar"
	ByCode   By = "code"

	byLabel = "label:"
)

// ParseBy reads what jobs are counted by; "" is nothing.
func ParseBy(text string) (By, error) {
	switch by := By(text); by {
	case "", ByQueue, ByApp, ByAvatar, ByCode:
		return by, nil
	}
	if name, ok := strings.CutPrefix(text, byLabel); ok && name != "" {
		return By(text), nil
	}
	return "", fmt.Errorf("jobs can't be counted by %q: want queue, app, avatar, code or label:NAME", text)
}

// Label is the name of the label that jobs are counted by; "": they are not counted by
// a label.
func (b By) Label() string {
	name, ok := strings.CutPrefix(string(b), byLabel)
	if !ok {
		return ""
	}
	return name
}

// Group is how many jobs have something in common.
type Group struct {
	Key    string                  `json:"key"` // "": they do not have what jobs are counted by
	Jobs   int                     `json:"jobs"`
	States map[lifecycle.State]int `json:"states"` // those of them in each state
}

// groups counts jobs.
type groups struct {
	by    By
	byKey map[string]*Group
}

func newGroups(by By) *groups { return &groups{by: by, byKey: make(map[string]*Group)} }

func (g *groups) add(key string, state lifecycle.State) {
	group := g.byKey[key]
	if group == nil {
		key = strings.Clone(key) // of a label: not all labels of its job
		group = &Group{Key: key, States: make(map[lifecycle.State]int)}
		g.byKey[key] = group
	}
	group.Jobs++
	group.States[state]++
}

func (g *groups) addRow(r *Row) {
	var key string
	switch g.by {
	case ByQueue:
		key = r.Queue
	case ByApp:
		key = r.AppID
	case ByAvatar:
		key = r.AvatarID
	case ByCode:
		key = string(r.Code)
	default:
		key = r.Labels[g.by.Label()]
	}
	g.add(key, r.State)
}

func (g *groups) addCompact(r *compactRow, defaultApp string) {
	var key string
	switch g.by {
	case ByQueue:
		key = r.queue.Value()
	case ByApp:
		if key = r.app.Value(); r.state == StateWaiting {
			key = cmp.Or(key, defaultApp)
		}
	case ByAvatar:
		key = r.avatar.Value()
	case ByCode:
		key = r.code.Value()
	default:
		key = labelValue(r.labels, g.by.Label())
	}
	g.add(key, r.state)
}

// end returns the largest groups first, at most limit (0: all).
func (g *groups) end(limit int) (list []Group, more bool) {
	list = make([]Group, 0, len(g.byKey))
	for _, group := range g.byKey {
		list = append(list, *group)
	}
	slices.SortFunc(list, func(a, b Group) int { return cmp.Or(cmp.Compare(b.Jobs, a.Jobs), cmp.Compare(a.Key, b.Key)) })
	if limit > 0 && len(list) > limit {
		return list[:limit], true
	}
	return list, false
}
