#!/usr/bin/env bash
# about: Cairn's own tests: every crate, doc tests too
# budget: 1500
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
code=0
(cd "$repo" && cargo test --workspace --locked --no-fail-fast) 2>&1 | tee "$work/out" || code=$?
# test result: ok. 12 passed; 0 failed; 1 ignored; …
read -r good bad ignored < <(awk '/^test result:/ { p += $4; f += $6; i += $8 } END { print p + 0, f + 0, i + 0 }' "$work/out")
if ((ignored)); then
	note "$ignored tests are ignored:"
	sed -n 's/^test \(.*\) \.\.\. ignored.*/note:   \1/p' "$work/out" | sort -u
fi
if ((bad)); then sed -n 's/^test \(.*\) \.\.\. FAILED$/note: failed: \1/p' "$work/out" | sort -u; fi
((good)) || { echo "no test ran"; exit 1; }
((code == 0 || bad > 0)) || bad=1 # something does not compile
counts "$good" "$bad" "$ignored"
exit "$code"
