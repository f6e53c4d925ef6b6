#!/usr/bin/env bash
# The three stages of pretraining, one after another, and a picture of every granularity's loss.
#
# usage: examples/pretraining/run.sh SIZE DATA [--key value ...]
#   SIZE   nano or base
#   DATA   directory with stage1-*, stage2-* and stage3-* (JSON lines with `text` and `lang`, perhaps compressed)
# Further keys go to every stage. A run that was ended goes on where it stopped; finished stages are not repeated.
set -euo pipefail
size=${1:?usage: examples/pretraining/run.sh SIZE DATA [--key value ...]}
data=${2:?usage: examples/pretraining/run.sh SIZE DATA [--key value ...]}
shift 2
for stage in stage1_monolingual stage2_multilingual stage3_web; do
  short=${stage%%_*}
  if [ ! -f "runs/$size/$short/eval_results.json" ]; then
    python -m m3bert_hf pretrain "examples/pretraining/$size/$stage.yaml" --train_files "$data/$short"-* \
      --resume_from_checkpoint auto "$@"
  fi
done
python -m m3bert_hf curves "runs/$size/stage1" "runs/$size/stage2" "runs/$size/stage3" --output "runs/$size/curves.png"
