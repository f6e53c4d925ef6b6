#!/usr/bin/env bash
# From text files to a searchable model at every (exit, dimension), in about half an hour on two CPU cores:
# tokenizer, masked pretraining, contrastive fine-tuning, retrieval metrics.
#
# usage: examples/nano/run.sh DATA
#   DATA/pretrain/*        JSON lines with `text` and `lang`
#   DATA/finetune/*        JSON lines with `query`, `document`, `lang` and `source`
#   DATA/evaluate/*        packages-queries.jsonl.xz, packages-documents.jsonl.xz; everything here is kept out of training
# A run that was stopped goes on with RESUME=1; finished stages are not repeated.
set -euo pipefail
data=${1:?usage: examples/nano/run.sh DATA}
run() { python -m m3bert_hf "$@"; }
resume=()
[ -n "${RESUME:-}" ] && resume=(--resume_from_checkpoint true)

if [ ! -f runs/nano/tokenizer/tokenizer.json ]; then
  run train-tokenizer "$data"/pretrain/* "$data"/finetune/* --output runs/nano/tokenizer \
    --vocab-size 20480 --texts 24000 --max-characters 500 --temperature 0.4 --model-max-length 128
fi
if [ ! -f runs/nano/pretrained/trainer_state.json ]; then
  run pretrain examples/nano/pretrain.yaml --train_files "$data"/pretrain/* --resume_from_checkpoint auto
fi
if [ ! -f runs/nano/finetuned/modules.json ]; then
  run finetune examples/nano/finetune.yaml --train_files "$data"/finetune/* \
    --exclude_files "$data"/evaluate/packages-queries.jsonl.xz "$data"/evaluate/packages-documents.jsonl.xz \
    "$data"/evaluate/jaquad-dev.jsonl.xz "$data"/evaluate/tquad-dev.jsonl.xz "${resume[@]}"
fi
run evaluate runs/nano/finetuned --queries "$data"/evaluate/packages-queries.jsonl.xz \
  --documents "$data"/evaluate/packages-documents.jsonl.xz --max-seq-length 64 --output runs/nano/packages
