package suspect

import "testing"

func TestASuspectRunsOnlyBesideJobsWithoutCrashes(t *testing.T) {
	for _, c := range []struct {
		inHand []int
		job    int
		may    bool
	}{
		{nil, After, true},
		{[]int{0, 0}, After, true},
		{[]int{1}, After, false},
		{[]int{After}, After, false},
		{[]int{After}, 1, false},
		{[]int{After}, 0, true},
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
		if !j.Enter(After) {
			t.Errorf("after %v have left, something is still in hand", c.inHand)
		}
	}
}
