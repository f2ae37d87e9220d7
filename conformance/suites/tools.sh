#!/usr/bin/env bash
# about: the programs of this folder: formatted, vetted, their own tests, and the descriptor set is what protoset makes
# budget: 1800
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
need_go
cd "$conformance"
unformatted=$(gofmt -l .)
[[ -z $unformatted ]] || { echo "not formatted: $unformatted"; exit 1; }
good=1
check() { # check DIR COMMAND: once for a content of DIR; a check that passed needs no repetition
	go_program "checked-$(basename "$1")" "$conformance/$1" "$2" && good=$((good + 1))
}
check protoset 'go vet ./... && go build -o "$OUT/protoset" .'
"$built/protoset" "$work/descriptors.binpb"
cmp "$work/descriptors.binpb" "$repo/proto/descriptors.binpb" || { echo "proto/descriptors.binpb is not what protoset makes: see protoset/README.md"; exit 1; }
check oracle 'go vet ./... && go test ./...'
check istiod-lab 'go vet . && go test .'
counts $((good + 1)) 0
