package golden

import (
	"bufio"
	"fmt"
	"os"
	"path"
	"regexp"
	"strings"
)

// Listed is the rows of a markdown table that name cases which do not equal the record:
// decided differences (DIFFERENCES.md) or work that is not done yet (PENDING.md).
type Listed struct {
	File string
	Rows []*Row
}

// Row is one line of such a table: | scenario | case | what differs | why |.
// Scenario and case may hold *. What differs is one or more `where` or `where = got`
// in backticks, with * allowed too; without any, the row covers every difference of its cases.
type Row struct {
	Line           int
	Scenario, Case string
	Wheres         []Where
	Why            string
	// ByChance rows may also be equal: what they wait for decides what is chance until then.
	ByChance bool

	matched bool // some case that ran is named by this row
}

// Where is one place of a case that differs, and what is observed there instead.
type Where struct {
	Place, Got string // Got is "" when any observation will do
	used       bool
}

var quoted = regexp.MustCompile("`([^`]+)`")

// ReadListed reads the table rows of a markdown file. A file that is absent lists nothing.
func ReadListed(file string) (*Listed, error) {
	l := &Listed{File: file}
	if file == "" {
		return l, nil
	}
	f, err := os.Open(file)
	if os.IsNotExist(err) {
		return l, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	inTable := false
	for n := 1; lines.Scan(); n++ {
		text := strings.TrimSpace(lines.Text())
		if !strings.HasPrefix(text, "|") {
			inTable = false
			continue
		}
		cells := splitCells(text)
		switch {
		case len(cells) > 1 && strings.EqualFold(cells[0], "scenario") && strings.EqualFold(cells[1], "case"):
			inTable = true
			continue
		case !inTable || strings.Trim(cells[0], "-: ") == "":
			continue
		case len(cells) != 4:
			return nil, fmt.Errorf("%s:%d: a row has four cells: scenario, case, what differs, why; this one has %d", file, n, len(cells))
		}
		row := &Row{Line: n, Scenario: unquote(cells[0]), Case: unquote(cells[1]), Why: cells[3], ByChance: strings.Contains(cells[2], "by chance")}
		if row.Scenario == "" || row.Case == "" || row.Why == "" {
			return nil, fmt.Errorf("%s:%d: scenario, case and reason must not be empty", file, n)
		}
		for _, pattern := range []string{row.Scenario, row.Case} {
			if _, err := path.Match(pattern, ""); err != nil {
				return nil, fmt.Errorf("%s:%d: bad pattern %q", file, n, pattern)
			}
		}
		for _, match := range quoted.FindAllStringSubmatch(cells[2], -1) {
			place, got, _ := strings.Cut(match[1], " = ")
			row.Wheres = append(row.Wheres, Where{Place: strings.TrimSpace(place), Got: strings.TrimSpace(got)})
		}
		l.Rows = append(l.Rows, row)
	}
	return l, lines.Err()
}

// splitCells splits a table line at the bars that are not escaped.
func splitCells(line string) []string {
	const bar = "\x00"
	line = strings.ReplaceAll(strings.Trim(line, " "), `\|`, bar)
	cells := strings.Split(strings.TrimSuffix(strings.TrimPrefix(line, "|"), "|"), "|")
	for i := range cells {
		cells[i] = strings.TrimSpace(strings.ReplaceAll(cells[i], bar, "|"))
	}
	return cells
}

func unquote(cell string) string { return strings.Trim(cell, "` ") }

// glob matches with * for any run of characters, also across slashes.
func glob(pattern, text string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == text
	}
	if !strings.HasPrefix(text, parts[0]) {
		return false
	}
	text = text[len(parts[0]):]
	for _, part := range parts[1 : len(parts)-1] {
		i := strings.Index(text, part)
		if i < 0 {
			return false
		}
		text = text[i+len(part):]
	}
	return strings.HasSuffix(text, parts[len(parts)-1])
}

func (r *Row) names(scenario, name string) bool {
	return glob(r.Scenario, scenario) && glob(r.Case, name)
}

// covers tells whether the row explains a difference of one of its cases.
func (r *Row) covers(d Difference) bool {
	if len(r.Wheres) == 0 {
		return true
	}
	for i := range r.Wheres {
		w := &r.Wheres[i]
		if glob(w.Place, d.Where) && (w.Got == "" || glob(w.Got, oneLine(d.Got))) {
			w.used = true
			return true
		}
	}
	return false
}

func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

// Judge sorts the differences of a scenario that ran: unexplained ones, how many the rows
// explain, and complaints about rows that name a case which equals the record.
func Judge(lists []*Listed, scenario string, cases []string, differences []Difference) (unexplained []Difference, explained int, complaints []string) {
	covered := map[string]map[*Row]bool{}
	for _, d := range differences {
		if d.Minor {
			continue
		}
		found := false
		for _, l := range lists {
			for _, r := range l.Rows {
				if r.names(scenario, d.Case) && r.covers(d) {
					found = true
					if covered[d.Case] == nil {
						covered[d.Case] = map[*Row]bool{}
					}
					covered[d.Case][r] = true
				}
			}
		}
		if found {
			explained++
		} else {
			unexplained = append(unexplained, d)
		}
	}
	for _, name := range cases {
		for _, l := range lists {
			for _, r := range l.Rows {
				if !r.names(scenario, name) {
					continue
				}
				r.matched = true
				if !covered[name][r] && !r.ByChance {
					complaints = append(complaints, fmt.Sprintf("%s | %s | listed but equal: remove it (%s:%d)", scenario, name, l.File, r.Line))
				}
			}
		}
	}
	return unexplained, explained, complaints
}

// Stale lists what is left over once every case has run: rows that name no case, and
// places that no case of their row differs in. Scenarios with a prefix (another version's captures,
// the matrix) are run apart from those without: family is the prefix of those that ran, or "".
func (l *Listed) Stale(family string) []string {
	var out []string
	for _, r := range l.Rows {
		if prefix, _, found := strings.Cut(r.Scenario, "/"); family == "" && found || family != "" && prefix+"/" != family {
			continue
		}
		if !r.matched {
			out = append(out, fmt.Sprintf("%s:%d: no case is called %s | %s", l.File, r.Line, r.Scenario, r.Case))
			continue
		}
		for _, w := range r.Wheres {
			if !w.used && !r.ByChance {
				out = append(out, fmt.Sprintf("%s:%d: no case differs in `%s`: remove it", l.File, r.Line, w))
			}
		}
	}
	return out
}

func (w Where) String() string {
	if w.Got == "" {
		return w.Place
	}
	return w.Place + " = " + w.Got
}
