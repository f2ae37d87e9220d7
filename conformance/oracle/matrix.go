package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"oracle/capture"
	"oracle/golden"
	"oracle/matrix"
)

const matrixUsage = `usage:
  oracle matrix make    --lab ISTIOD-LAB [--kind NAME,…]            make the fixed suites again: istiod's output and Envoy's answers
  oracle matrix compare [--proxy-cmd CMD] [--kind NAME,…] [--only CASE] [--sample N]
                                                                  hold a proxy (default: Envoy again) against the record
  oracle matrix fuzz    --lab ISTIOD-LAB --minutes N --proxy-cmd CMD [--seed S]
                                                                  new suites through istiod, Envoy and the proxy, until the time is over
  oracle matrix show    --kind NAME [--seed S --units N] CASE       the manifests, the request and the record of a case
`

// fixed are the suites of CI. A change of a seed or a number of units asks for "oracle matrix make".
var fixed = []struct {
	kind  string
	seed  uint64
	units int
}{
	{"traffic", 1, 40}, {"authorization", 1, 60}, {"tokens", 1, 24},
}

// matrixWorkers is how many cases are under way at once.
const matrixWorkers = 8

type matrixRun struct {
	places
	kinds, lab           string
	seed                 uint64
	units, sample        int
	minutes              float64
	differences, pending string
	alter                func(*capture.Set) error // spoils Envoy's configuration
}

func runMatrix(args []string) error {
	if len(args) == 0 {
		return errors.New(matrixUsage)
	}
	set, p := flags("matrix " + args[0])
	run := &matrixRun{}
	set.StringVar(&run.kinds, "kind", "", "which suites: traffic, authorization, tokens (default: all)")
	set.StringVar(&run.lab, "lab", "", "path of istiod-lab")
	set.StringVar(&p.runner.Command, "proxy-cmd", "", "shell command that runs the proxy under test")
	set.Uint64Var(&run.seed, "seed", 0, "another seed than that of CI; fuzz: the first one (default: by chance)")
	set.IntVar(&run.units, "units", 0, "how many services (default: as in CI; fuzz: 16)")
	set.IntVar(&run.sample, "sample", 1, "run only one of so many cases")
	alter := set.String("alter", "", "compare: spoil Envoy's configuration on purpose: headers, status or authz")
	set.Float64Var(&run.minutes, "minutes", 1, "fuzz: for how long")
	set.Parse(args[1:])
	run.places = *p
	if *alter != "" {
		if run.alter = alterations[*alter]; run.alter == nil {
			return fmt.Errorf("unknown alteration %q", *alter)
		}
	}
	if p.runner.Command != "" { // what is decided or pending concerns other proxies than Envoy
		run.differences = filepath.Join(filepath.Dir(filepath.Clean(p.root)), "DIFFERENCES.md")
		run.pending = filepath.Join(filepath.Dir(filepath.Clean(p.root)), "PENDING.md")
	}
	switch args[0] {
	case "make":
		return run.make()
	case "compare":
		return run.compare()
	case "fuzz":
		return run.fuzz()
	case "show":
		return run.show(set)
	}
	return errors.New(matrixUsage)
}

func (r *matrixRun) chosen(kind string) bool {
	return r.kinds == "" || slices.Contains(strings.Split(r.kinds, ","), kind)
}

func (r *matrixRun) folder(kind string) string {
	root, err := filepath.Abs(r.root) // the proxy runs in another directory
	if err != nil {
		root = r.root
	}
	return filepath.Join(root, "matrix", kind)
}

// fingerprint changes when a suite does.
func fingerprint(s *matrix.Suite) string {
	text, _ := json.Marshal(s.File.Cases)
	sum := sha256.Sum256([]byte(s.Manifests + string(text)))
	return hex.EncodeToString(sum[:8])
}

// capture lets istiod translate a suite.
func (r *matrixRun) capture(s *matrix.Suite, dir string) error {
	if r.lab == "" {
		return errors.New("which istiod? Name the program with --lab (conformance/istiod-lab)")
	}
	manifests, err := r.manifests(s)
	if err != nil {
		return err
	}
	out, err := exec.Command(r.lab, "capture", "-f", manifests, "--out", dir, "--json=false", "--gzip").CombinedOutput()
	if err != nil {
		return fmt.Errorf("istiod-lab capture of %s: %w\n%s", manifests, err, out)
	}
	return nil
}

// manifests leaves a suite's manifests in a file.
func (r *matrixRun) manifests(s *matrix.Suite) (string, error) {
	path := filepath.Join(r.runner.Work, fmt.Sprintf("%s-%d.yaml", s.Name, s.Seed))
	if err := os.MkdirAll(r.runner.Work, 0o755); err != nil {
		return "", err
	}
	return path, os.WriteFile(path, []byte(s.Manifests), 0o644)
}

// run sends a suite's requests through a proxy: Envoy when command is empty.
func (r *matrixRun) run(s *matrix.Suite, dir, command string) (*golden.Golden, error) {
	manifests, err := r.manifests(s)
	if err != nil {
		return nil, err
	}
	runner := r.runner
	runner.Command = command
	if command == "" {
		runner.Alter = func(set *capture.Set) error {
			err := set.ReadPeerAsClient(matrix.PeerPolicy)
			if err == nil && r.alter != nil {
				err = r.alter(set)
			}
			return err
		}
	}
	file := *s.File
	file.Cases = slices.Clone(file.Cases)
	if r.sample > 1 {
		n := 0
		file.Cases = slices.DeleteFunc(file.Cases, func(golden.Case) bool { n++; return n%r.sample != 0 })
	}
	return runner.RecordBatch(&file, manifests, dir, matrixWorkers)
}

func (r *matrixRun) make() error {
	for _, f := range fixed {
		if !r.chosen(f.kind) {
			continue
		}
		suite, err := matrix.Kinds[f.kind](f.seed, f.units)
		if err != nil {
			return err
		}
		dir := r.folder(f.kind)
		if err := r.capture(suite, dir); err != nil {
			return err
		}
		g, err := r.run(suite, dir, "")
		if err != nil {
			return err
		}
		g.Suite = fingerprint(suite)
		if len(g.Refused) > 0 {
			return fmt.Errorf("Envoy refuses what istiod made of %s: %s", f.kind, strings.Join(g.Refused, "; "))
		}
		fmt.Printf("%-14s %d services, %d cases\n", f.kind, len(suite.Units), len(g.Cases))
		if err := g.WriteLines(filepath.Join(dir, "golden.jsonl")); err != nil {
			return err
		}
	}
	return nil
}

func (r *matrixRun) lists() ([]*golden.Listed, error) {
	var lists []*golden.Listed
	for _, file := range []string{r.differences, r.pending} {
		l, err := golden.ReadListed(file)
		if err != nil {
			return nil, err
		}
		lists = append(lists, l)
	}
	return lists, nil
}

func (r *matrixRun) compare() error {
	lists, err := r.lists()
	if err != nil {
		return err
	}
	var total struct{ cases, different, listed, unexplained, complaints int }
	for _, f := range fixed {
		if !r.chosen(f.kind) {
			continue
		}
		suite, err := matrix.Kinds[f.kind](f.seed, f.units)
		if err != nil {
			return err
		}
		want, err := golden.ReadLines(filepath.Join(r.folder(f.kind), "golden.jsonl"))
		if err != nil {
			return err
		}
		if print := fingerprint(suite); print != want.Suite {
			return fmt.Errorf("%s: the generator makes %s, the record is of %s: make it again with oracle matrix make", f.kind, print, want.Suite)
		}
		began := time.Now()
		got, err := r.run(suite, r.folder(f.kind), r.runner.Command)
		if err != nil {
			return err
		}
		partial := len(got.Cases) < len(want.Cases)
		if partial {
			ran := map[string]bool{}
			for _, c := range got.Cases {
				ran[c.Name] = true
			}
			want.Cases = slices.DeleteFunc(want.Cases, func(c golden.Result) bool { return !ran[c.Name] })
		}
		found, names := golden.Compare(suite.File, want, got), []string{configuration}
		for _, refusal := range got.Refused {
			found = append(found, golden.Difference{Case: configuration, Where: "refused", Want: "accepted", Got: refusal})
		}
		different := map[string]bool{}
		for _, d := range found {
			if !d.Minor {
				different[d.Case] = true
			}
		}
		for _, c := range got.Cases {
			names = append(names, c.Name)
		}
		label := matrixLabel + f.kind
		unexplained, explained, complaints := golden.Judge(lists, label, names, found)
		for _, d := range unexplained {
			show(label, d)
		}
		for _, c := range complaints {
			fmt.Println(c)
		}
		fmt.Printf("%-24s %4d cases, %4d equal, %3d differences listed, %3d not listed, %d complaints, %.1f s\n",
			label, len(got.Cases), len(got.Cases)-len(different), explained, len(unexplained), len(complaints), time.Since(began).Seconds())
		total.cases += len(got.Cases)
		total.different += len(different)
		total.listed += explained
		total.unexplained += len(unexplained)
		total.complaints += len(complaints)
	}
	if r.kinds == "" && r.sample == 1 && r.runner.Only == "" { // only a full run can tell
		for _, l := range lists {
			for _, line := range l.Stale(matrixLabel) {
				fmt.Println(line)
				total.complaints++
			}
		}
	}
	fmt.Printf("%d cases, %d equal, %d differences listed, %d not listed, %d complaints\n",
		total.cases, total.cases-total.different, total.listed, total.unexplained, total.complaints)
	switch {
	case total.cases == 0:
		return errors.New("no case was run")
	case total.unexplained+total.complaints > 0:
		return errors.New("the proxies differ")
	}
	return nil
}

// matrixLabel is how the tables of exceptions call the suites of the matrix.
const matrixLabel = "matrix/"

// fuzz makes suites from new seeds. Rows of the tables cover what they name; that a listed case is equal is no complaint here.
func (r *matrixRun) fuzz() error {
	if r.runner.Command == "" {
		return errors.New("which proxy? Name it with --proxy-cmd")
	}
	lists, err := r.lists()
	if err != nil {
		return err
	}
	seed := r.seed
	if seed == 0 {
		seed = rand.Uint64N(1 << 32)
	}
	units := r.units
	if units == 0 {
		units = 16
	}
	deadline := time.Now().Add(time.Duration(r.minutes * float64(time.Minute)))
	cases, bad := 0, 0
	for ; time.Now().Before(deadline); seed++ {
		for _, f := range fixed {
			if !r.chosen(f.kind) || time.Now().After(deadline) {
				continue
			}
			suite, err := matrix.Kinds[f.kind](seed, units)
			if err != nil {
				return err
			}
			dir := filepath.Join(r.runner.Work, "capture")
			if err := r.capture(suite, dir); err != nil {
				return fmt.Errorf("seed %d: %w", seed, err)
			}
			want, err := r.run(suite, dir, "")
			if err != nil {
				return fmt.Errorf("seed %d: %w", seed, err)
			}
			got, err := r.run(suite, dir, r.runner.Command)
			if err != nil {
				return fmt.Errorf("seed %d: %w", seed, err)
			}
			found := golden.Compare(suite.File, want, got)
			if len(want.Refused) == 0 {
				for _, refusal := range got.Refused {
					found = append(found, golden.Difference{Case: configuration, Where: "refused", Want: "accepted", Got: refusal})
				}
			}
			unexplained, explained, _ := golden.Judge(lists, matrixLabel+f.kind, nil, found)
			for _, d := range unexplained {
				show(matrixLabel+f.kind, d)
				fmt.Printf("    look: oracle matrix show --kind %s --seed %d --units %d %s\n", f.kind, seed, units, d.Case)
			}
			fmt.Printf("%-14s seed %d: %d cases, %d differences listed, %d not listed\n", f.kind, seed, len(got.Cases), explained, len(unexplained))
			cases += len(got.Cases)
			bad += len(unexplained)
		}
	}
	fmt.Printf("%d cases, %d differences not listed\n", cases, bad)
	if bad > 0 {
		return errors.New("the proxies differ")
	}
	return nil
}

// show prints what a case is made of.
func (r *matrixRun) show(set *flag.FlagSet) error {
	for _, f := range fixed {
		if !r.chosen(f.kind) {
			continue
		}
		seed, units := f.seed, f.units
		if r.seed != 0 {
			seed = r.seed
		}
		if r.units != 0 {
			units = r.units
		}
		suite, err := matrix.Kinds[f.kind](seed, units)
		if err != nil {
			return err
		}
		unit, c := suite.Find(set.Arg(0))
		if unit == nil {
			continue
		}
		request, err := yaml.Marshal(c)
		if err != nil {
			return err
		}
		fmt.Printf("%s\n---\n# the request\n%s", strings.Join(unit.Objects, "\n---\n"), request)
		if g, err := golden.ReadLines(filepath.Join(r.folder(f.kind), "golden.jsonl")); err == nil && g.Suite == fingerprint(suite) {
			for _, result := range g.Cases {
				if result.Name == c.Name {
					text, _ := json.MarshalIndent(result, "", " ")
					fmt.Printf("---\n# what Envoy did\n%s\n", text)
				}
			}
		}
		return nil
	}
	return fmt.Errorf("no case is called %q", set.Arg(0))
}
