#!/usr/bin/env bash
# m3bert-nano from text files to a measured checkpoint, in about three and a half hours on two CPU cores.
#
# usage: examples/nano/run.sh DATA
#   DATA/pretrain/stage1-* stage2-* stage3-*   JSON lines with `text` and `lang`; stage2-multilingual-a* and stage3-*
#                                              are read again while the fine-tuned model learns to fill in words
#   DATA/finetune/*                            JSON lines with `query`, `document`, `lang` and `source`
#   DATA/evaluate/*                            packages-queries, packages-documents, jaquad-dev, tquad-dev (.jsonl.xz);
#                                              the queries and documents here are kept out of the pairs
# A run that was stopped goes on where it was; finished stages are not repeated.
set -euo pipefail
data=${1:?usage: examples/nano/run.sh DATA}
out=runs/m3bert-nano
recipes=examples/pretraining/nano
evaluation=("$data"/evaluate/{packages-queries,packages-documents,jaquad-dev,tquad-dev}.jsonl.xz)
run() { python -m m3bert_hf "$@"; }

if [ ! -f $out/tokenizer/tokenizer.json ]; then
  run train-tokenizer "$data"/pretrain/* "$data"/finetune/* --output $out/tokenizer --lowercase \
    --vocab-size 32768 --texts 48000 --max-characters 400 --temperature 0.5 --model-max-length 128
fi

# stage, file of the recipe, steps, stage before
pretrain() {
  if [ ! -f "$out/$1/eval_results.json" ]; then
    run pretrain "$recipes/$2.yaml" --train_files "$data/pretrain/$1"-* --tokenizer $out/tokenizer \
      --output_dir "$out/$1" --max_steps "$3" --resume_from_checkpoint auto ${4:+--init_from "$out/$4"}
  fi
}
pretrain stage1 stage1_monolingual 400
pretrain stage2 stage2_multilingual 800 stage1
pretrain stage3 stage3_web 800 stage2
run curves $out/stage1 $out/stage2 $out/stage3 --output $out/curves.png

if [ ! -f $out/pairs/validation-queries.jsonl.gz ]; then
  python examples/nano/prepare_pairs.py "$data"/finetune/* --output $out/pairs
fi
# recipe, where it ends up
finetune() {
  if [ ! -f "$out/$2/trainer_state.json" ]; then
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m m3bert_hf finetune "examples/nano/$1.yaml" \
      --exclude_files "${evaluation[@]}" --resume_from_checkpoint auto
  fi
}
finetune finetune exit2
if [ ! -d $out/deep ]; then
  run deepen $out/exit2 $out/deep.new --exit-layers 4 6
  mv $out/deep.new $out/deep
fi
finetune finetune_all finetuned
if [ ! -f $out/joint/trainer_state.json ]; then
  # One process: the masked-language head belongs to a loss, which is not synchronised between several.
  run finetune examples/nano/finetune_joint.yaml --exclude_files "${evaluation[@]}" --resume_from_checkpoint auto \
    --masked_language_files "$data"/pretrain/stage2-multilingual-a* "$data"/pretrain/stage3*
fi

python examples/nano/interpolate.py $out/finetuned $out/joint --share 0.85 --output $out/interpolated

python examples/nano/ship.py $out/interpolated --output $out/shipped
examples/nano/measure.sh "$data" $out/shipped
