#!/usr/bin/env bash
# Trains, merges with the command line under every recipe, verifies each output, evaluates all.
# usage: examples/demo/run.sh [FOLDER]      FOLDER defaults to demo_out; python and mergekernels come from PATH
set -euo pipefail
export LC_ALL=C
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-demo_out}
rm -rf "$folder/checkpoints" "$folder/merged" "$folder/merges.tsv"
mkdir -p "$folder/merged"
python "$here/train.py" "$folder/checkpoints"
cd "$folder"
for recipe in "$here"/recipes/*.yml; do
    name=$(basename "$recipe" .yml)
    begin=$EPOCHREALTIME
    mergekernels run "$recipe" "merged/$name" --quiet
    end=$EPOCHREALTIME
    mergekernels verify "merged/$name" --recompute 4 --quiet
    method=$(sed -n 's/^merge_method: *//p' "$recipe")
    printf '%s\t%s\t%s\n' "$name" "$method" "$(echo "$begin $end" | awk '{printf "%.3f", $2 - $1}')" >>merges.tsv
    echo "merged and verified $name"
done
python "$here/evaluate.py" .
