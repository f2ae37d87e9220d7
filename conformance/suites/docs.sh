#!/usr/bin/env bash
# about: the pages tell the truth: links lead somewhere, every suite is described, the tables of exceptions can be read
# budget: 60
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
need_tool python3 python3
python3 "$conformance/suites/docs.py" "$repo" | tee "$work/out"
read -r good bad < <(tail -1 "$work/out" | sed 's/[^0-9 ]//g')
counts "$good" "$bad"
((bad == 0))
