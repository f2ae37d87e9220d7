package main

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"oracle/golden"
)

// compare runs every chosen scenario and holds what happened against the record. With
// another proxy than Envoy, DIFFERENCES.md and PENDING.md say which cases may differ;
// a difference that they do not list fails, and so does a listed case that is equal.
func compare(args []string) error {
	set, p := flags("compare")
	set.StringVar(&p.runner.Command, "proxy-cmd", "", "shell command that runs the proxy under test (default: Envoy again)")
	alter := set.String("alter", "", "spoil Envoy's configuration on purpose: headers, status, authz or ejection")
	minor := set.Bool("minor", false, "also show minor differences (header order, the proxy's own log)")
	differencesFile := set.String("differences", "", "table of decided differences (default: DIFFERENCES.md beside the fixtures, with --proxy-cmd)")
	pendingFile := set.String("pending", "", "table of cases that wait for another issue (default: PENDING.md beside the fixtures, with --proxy-cmd)")
	writePending := set.Bool("write-pending", false, "print rows for PENDING.md for everything that differs and is not in DIFFERENCES.md")
	quiet := set.Bool("summary", false, "print the totals of each scenario only")
	set.Parse(args)
	if *alter != "" {
		p.runner.Alter = alterations[*alter]
		if p.runner.Alter == nil {
			return fmt.Errorf("unknown alteration %q", *alter)
		}
	}
	if p.runner.Command != "" {
		beside := filepath.Dir(filepath.Clean(p.root))
		if *differencesFile == "" {
			*differencesFile = filepath.Join(beside, "DIFFERENCES.md")
		}
		if *pendingFile == "" && !*writePending {
			*pendingFile = filepath.Join(beside, "PENDING.md")
		}
	}
	var lists []*golden.Listed
	for _, file := range []string{*differencesFile, *pendingFile} {
		l, err := golden.ReadListed(file)
		if err != nil {
			return err
		}
		lists = append(lists, l)
	}
	var total struct{ cases, equal, listed, unexplained, minor, complaints int }
	var rows []string
	err := p.each(func(file *golden.File, manifests, captureDir, goldenPath string) error {
		want, err := golden.ReadGolden(goldenPath)
		if os.IsNotExist(err) && p.istio != recordedIstio {
			return nil // only some scenarios are recorded for other versions
		}
		if err != nil {
			return err
		}
		label := p.label(file.Scenario)
		got, err := p.runner.Record(file, manifests, captureDir)
		if err != nil {
			return err
		}
		var all []golden.Difference
		different := map[string]bool{}
		minors := 0
		for _, d := range golden.Compare(file, want, got) {
			if p.runner.Only != "" && !strings.Contains(d.Case, p.runner.Only) {
				continue
			}
			all = append(all, d)
			if d.Minor {
				minors++
			} else {
				different[d.Case] = true
			}
			if d.Minor && *minor {
				show(label, d)
			}
		}
		names := []string{configuration}
		if len(want.Refused) == 0 { // what Envoy accepted, the other proxy accepts too
			for _, refusal := range got.Refused {
				all = append(all, golden.Difference{Case: configuration, Where: "refused", Want: "accepted", Got: refusal})
			}
		}
		for _, c := range got.Cases {
			names = append(names, c.Name)
		}
		unexplained, explained, complaints := golden.Judge(lists, label, names, all)
		if *writePending {
			rows = append(rows, pendingRows(label, unexplained)...)
		}
		if !*quiet && !*writePending {
			for _, d := range unexplained {
				show(label, d)
			}
		}
		for _, c := range complaints {
			fmt.Println(c)
		}
		equal := len(got.Cases) - len(different)
		fmt.Fprintf(output(*writePending), "%-32s %3d cases, %3d equal, %3d differences listed, %3d not listed, %d minor, %d complaints\n",
			label, len(got.Cases), equal, explained, len(unexplained), minors, len(complaints))
		total.cases, total.equal, total.listed = total.cases+len(got.Cases), total.equal+equal, total.listed+explained
		total.unexplained, total.minor, total.complaints = total.unexplained+len(unexplained), total.minor+minors, total.complaints+len(complaints)
		return nil
	})
	if p.scenarios == "" && p.runner.Only == "" && p.istio == recordedIstio && err == nil { // only a full run can tell
		for _, l := range lists {
			for _, line := range l.Stale("") {
				fmt.Println(line)
				total.complaints++
			}
		}
	}
	for _, row := range rows {
		fmt.Println(row)
	}
	fmt.Fprintf(output(*writePending), "%d cases, %d equal, %d differences listed, %d not listed, %d minor, %d complaints\n",
		total.cases, total.equal, total.listed, total.unexplained, total.minor, total.complaints)
	if err == nil && total.cases == 0 {
		err = fmt.Errorf("no case was found in %s (requests, golden) for %s", p.root, p.istio)
	}
	if err == nil && total.unexplained+total.complaints > 0 && !*writePending {
		err = errors.New("the proxies differ")
	}
	return err
}

// configuration is what the tables call a scenario's configuration itself, beside its cases.
const configuration = "configuration"

// output keeps standard output clean when it carries table rows.
func output(rows bool) *os.File {
	if rows {
		return os.Stderr
	}
	return os.Stdout
}

func show(scenario string, d golden.Difference) {
	fmt.Printf("%s | %s | %s\n    want %s\n    got  %s\n", scenario, d.Case, d.Where, d.Want, d.Got)
}

// pendingRows makes one table row for each case.
func pendingRows(scenario string, differences []golden.Difference) []string {
	var order []string
	places := map[string][]string{}
	for _, d := range differences {
		if places[d.Case] == nil {
			order = append(order, d.Case)
		}
		if slices.Contains(places[d.Case], "`"+d.Where+"`") {
			continue
		}
		places[d.Case] = append(places[d.Case], "`"+d.Where+"`")
	}
	var rows []string
	for _, name := range order {
		rows = append(rows, fmt.Sprintf("| %s | %s | %s | issue %s |", scenario, name, strings.Join(places[name], ", "), issueOf(scenario)))
	}
	return rows
}

// issueOf is the first guess at who brings a scenario's behaviour: traffic rules (4),
// policies (5), telemetry and extensions (6).
func issueOf(scenario string) string {
	switch number, _, _ := strings.Cut(path.Base(scenario), "-"); number {
	case "20", "21", "22":
		return "5"
	case "23", "24", "25", "30":
		return "6"
	}
	return "4"
}
