package suspect

import "testing"

func TestASuspectRunsOnlyBesideJobsWithoutCrashes(t *testing.T) {
	for _, c := range []struct {
		inHand []int
		job    int
		may    bool
	}{
		{nil, after, true},
		{[]int{0, 0}, after, true},
		{[]int{1}, after, false},
		{[]int{after}, after, false},
		{[]int{after}, 1, false},
		{[]int{after}, 0, true},
		{[]int{1, 2, 2}, 1, true},
	} {
		var j Jobs
		for _, crashes := range c.inHand {
			if !j.Enter(crashes) {
				t.Fatalf("%v can't be in hand together", c.inHand)
			}
		}
		if got := j.Enter(c.job); got != c.may {
			t.Errorf("%d beside %v: %t", c.job, c.inHand, got)
		}
		if c.may {
			j.Leave(c.job)
		}
		for _, crashes := range c.inHand {
			j.Leave(crashes)
		}
		if !j.Enter(after) {
			t.Errorf("after %v have left, something is still in hand", c.inHand)
		}
	}
}
