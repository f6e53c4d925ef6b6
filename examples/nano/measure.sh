#!/usr/bin/env bash
# The figures of m3bert-nano's card, from its weights.
#
# usage: examples/nano/measure.sh DATA [CHECKPOINT]
#   DATA/evaluate/*   packages-queries, packages-documents, jaquad-dev, tquad-dev (.jsonl.xz)
set -euo pipefail
data=${1:?usage: examples/nano/measure.sh DATA [CHECKPOINT]}
model=${2:-checkpoints/m3bert-nano}
out=runs/m3bert-nano/grids
run() { python -m m3bert_hf evaluate "$model" --max-seq-length 64 "$@"; }
run --queries "$data"/evaluate/packages-queries.jsonl.xz --documents "$data"/evaluate/packages-documents.jsonl.xz \
  --precisions float32 int8 binary --output $out/packages-queries
run --queries "$data"/evaluate/jaquad-dev.jsonl.xz --no-speed --output $out/jaquad-dev
run --queries "$data"/evaluate/tquad-dev.jsonl.xz --no-speed --output $out/tquad-dev
