package main

import (
	"path/filepath"
	"testing"

	"oracle/golden"
	"oracle/matrix"
)

func TestARecordIsOfTheSuiteThatTheGeneratorMakes(t *testing.T) {
	cases := map[string]int{}
	for _, f := range fixed {
		suite, err := matrix.Kinds[f.kind](f.seed, f.units)
		if err != nil {
			t.Fatal(err)
		}
		record, err := golden.ReadLines(filepath.Join("..", "fixtures", "matrix", f.kind, "golden.jsonl"))
		if err != nil {
			t.Fatal(err)
		}
		if made := fingerprint(suite); made != record.Suite {
			t.Errorf("%s: the generator makes %s, the record is of %s: oracle matrix make", f.kind, made, record.Suite)
		}
		if len(record.Cases) != len(suite.File.Cases) {
			t.Errorf("%s: %d cases made, %d recorded", f.kind, len(suite.File.Cases), len(record.Cases))
		}
		cases[f.kind] = len(record.Cases)
	}
	if cases["traffic"] < 300 || cases["authorization"] < 2000 {
		t.Errorf("too few cases: %v", cases)
	}
}

func TestASeedAlwaysMakesTheSameAndAnotherSeedSomethingElse(t *testing.T) {
	for kind, make := range matrix.Kinds {
		prints := map[string]uint64{}
		for _, seed := range []uint64{1, 2, 3, 1} {
			suite, err := make(seed, 8)
			if err != nil {
				t.Fatal(err)
			}
			print := fingerprint(suite)
			if other, known := prints[print]; known != (len(prints) == 3) || known && other != seed {
				t.Errorf("%s: seed %d makes what seed %d makes", kind, seed, other)
			}
			prints[print] = seed
		}
	}
}

func TestARecordHasVerdictsOfEveryKind(t *testing.T) {
	seen := map[string]int{}
	for _, kind := range []string{"authorization", "tokens"} {
		record, err := golden.ReadLines(filepath.Join("..", "fixtures", "matrix", kind, "golden.jsonl"))
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range record.Cases {
			for _, r := range c.Client.Responses {
				switch {
				case r.Status == 200, r.Body == "echoed":
					seen[kind+" in"]++
				default:
					seen[kind+" out"]++
				}
				if r.Body == "echoed" {
					seen["tcp in"]++
				}
			}
		}
	}
	for _, kind := range []string{"authorization in", "authorization out", "tokens in", "tokens out", "tcp in"} {
		if seen[kind] < 10 {
			t.Errorf("%s: %d", kind, seen[kind])
		}
	}
}
