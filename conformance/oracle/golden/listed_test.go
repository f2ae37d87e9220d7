package golden

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func listed(t *testing.T, table string) *Listed {
	t.Helper()
	file := filepath.Join(t.TempDir(), "LIST.md")
	if err := os.WriteFile(file, []byte(table), 0o644); err != nil {
		t.Fatal(err)
	}
	l, err := ReadListed(file)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

const table = "# Title\n\nText | with a bar.\n\n| scenario | case | what differs | why |\n|---|---|---|---|\n" +
	"| 01-http-basic | unknown-* | `client tunnel status = 503`, `client tunnel body` | at once |\n" +
	"| 08-* | canary | everything | issue 4 |\n"

func TestAListedDifferenceIsExplainedAndAnotherPlaceOfTheSameCaseIsNot(t *testing.T) {
	differences := []Difference{
		{Case: "unknown-vip", Where: "client tunnel status", Want: "200", Got: "503"},
		{Case: "unknown-vip", Where: "client tunnel body", Got: "no such address"},
		{Case: "unknown-vip", Where: "backend arrivals", Want: "0", Got: "1"},
		{Case: "unknown-port", Where: "client tunnel status", Want: "200", Got: "404"},
	}
	l := listed(t, table)
	unexplained, explained, complaints := Judge([]*Listed{l}, "01-http-basic", []string{"get", "unknown-vip"}, differences)
	if len(unexplained) != 2 || explained != 2 || len(complaints) != 0 {
		t.Errorf("unexplained %v, explained %d, complaints %v", unexplained, explained, complaints)
	}
}

func TestAListedCaseThatIsEqualIsComplainedAbout(t *testing.T) {
	l := listed(t, table)
	_, _, complaints := Judge([]*Listed{l}, "08-httproute-traffic", []string{"canary", "split"}, nil)
	if len(complaints) != 1 || !strings.Contains(complaints[0], "08-httproute-traffic | canary | listed but equal") {
		t.Error(complaints)
	}
}

func TestACaseThatDiffersByChanceMayBeEqual(t *testing.T) {
	l := listed(t, "| scenario | case | what differs | why |\n|---|---|---|---|\n| 14-lb | ring-* | by chance, `backend 1 pod` | issue 4 |\n")
	_, _, complaints := Judge([]*Listed{l}, "14-lb", []string{"ring-one"}, nil)
	if len(complaints) != 0 || len(l.Stale("")) != 0 {
		t.Error(complaints, l.Stale(""))
	}
	unexplained, _, _ := Judge([]*Listed{l}, "14-lb", []string{"ring-one"}, []Difference{{Case: "ring-one", Where: "client status", Got: "503"}})
	if len(unexplained) != 1 {
		t.Error("chance covers the named places only", unexplained)
	}
}

func TestRowsAndPlacesThatNothingMatchesAreStale(t *testing.T) {
	l := listed(t, table)
	differences := []Difference{{Case: "unknown-vip", Where: "client tunnel status", Got: "503"}}
	Judge([]*Listed{l}, "01-http-basic", []string{"unknown-vip"}, differences)
	stale := strings.Join(l.Stale(""), "\n")
	if !strings.Contains(stale, "client tunnel body") || !strings.Contains(stale, "no case is called 08-* | canary") {
		t.Error(stale)
	}
}

func TestMinorDifferencesNeedNoRow(t *testing.T) {
	unexplained, _, _ := Judge(nil, "x", []string{"a"}, []Difference{{Case: "a", Where: "log", Minor: true}})
	if len(unexplained) != 0 {
		t.Error(unexplained)
	}
}

func TestARowWithoutAReasonIsRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "LIST.md")
	_ = os.WriteFile(file, []byte("| scenario | case | what differs | why |\n|---|---|---|---|\n| a | b | `c` | |\n"), 0o644)
	if _, err := ReadListed(file); err == nil {
		t.Error("accepted")
	}
}

func TestAPatternMatchesAcrossSlashes(t *testing.T) {
	for _, c := range []struct {
		pattern, text string
		want          bool
	}{
		{"*", "a/b", true}, {"a*c", "abbc", true}, {"a*c", "ab", false}, {"a", "ab", false}, {"*-v1", "web-v1", true}, {"a*a", "a", false},
	} {
		if glob(c.pattern, c.text) != c.want {
			t.Errorf("%s %s", c.pattern, c.text)
		}
	}
}
