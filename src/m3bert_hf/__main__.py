"""The command line: `python -m m3bert_hf COMMAND ...`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _convert(options: argparse.Namespace) -> None:
    from .conversion import convert_released_checkpoint

    model = convert_released_checkpoint(options.source, options.output)
    config = model.config
    print(f"Saved in {options.output}: {config.num_hidden_layers} layers, exits {config.exit_layers}, dimensions")
    print(f"{config.matryoshka_dimensions}, {model.num_parameters():,} parameters, exit_norm='{config.exit_norm}'.")
    print("This default normalises every exit, as the release does in evaluation and fine-tuning; load with")
    print("exit_norm='last' for the states that its pretraining loss reads at the exits below the last.")


def _train_tokenizer(options: argparse.Namespace) -> None:
    from .corpus import load_documents
    from .text_data import sample_balanced
    from .tokenizer_training import train_tokenizer

    documents = load_documents(options.files, options.text_columns, options.language_column)
    groups: dict[str, list[int]] = {}
    for row, language in enumerate(documents["language"]):
        groups.setdefault(language, []).append(row)
    rows = [row for _, row in sample_balanced(groups, options.texts, options.temperature, options.seed)]
    texts = [text[: options.max_characters] for text in documents.select(rows)["text"]]
    tokenizer = train_tokenizer(
        texts,
        options.vocab_size,
        nfkc=not options.no_nfkc,
        model_max_length=options.model_max_length,
        model=options.model,
        lowercase=options.lowercase,
    )
    tokenizer.save_pretrained(options.output)
    print(
        f"Saved in {options.output}: {len(tokenizer):,} tokens from {len(texts):,} texts in {len(groups)} languages."
    )


def _parse_recipe(classes: Any, arguments: Sequence[str], prog: str) -> tuple:
    """Read `[recipe.yaml] [--key value ...]` into dataclasses; the command line goes over the recipe."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(classes, prog=prog, usage="%(prog)s [recipe.yaml] [--key value ...]")
    arguments = list(arguments)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        import yaml

        recipe = yaml.safe_load(Path(arguments.pop(0)).read_text(encoding="utf-8")) or {}
        known = {action.dest: action for action in parser._actions}
        unknown = sorted(set(recipe) - set(known))
        if unknown:
            parser.error(f"the recipe has keys that do not exist: {', '.join(unknown)}")
        structured = {key: value for key, value in recipe.items() if isinstance(value, dict)}
        # A list of one value may be written as the value.
        lists = {key for key, action in known.items() if action.nargs in ("+", "*")}
        recipe = {k: [v] if k in lists and v is not None and not isinstance(v, list) else v for k, v in recipe.items()}
        parser.set_defaults(**recipe)
        for key in recipe:
            known[key].required = False
        parsed = parser.parse_args_into_dataclasses(arguments)
        for part in parsed:
            for key, value in structured.items():
                if hasattr(part, key) and getattr(part, key) is None:
                    setattr(part, key, value)
        return parsed
    return parser.parse_args_into_dataclasses(arguments)


def _pretrain(arguments: Sequence[str]) -> None:
    from .pretraining import PretrainArguments, pretrain
    from .trainer import M3BertTrainingArguments

    own, training = _parse_recipe((PretrainArguments, M3BertTrainingArguments), arguments, "m3bert_hf pretrain")
    pretrain(own, training)


def _finetune(arguments: Sequence[str]) -> None:
    import torch
    from sentence_transformers import SentenceTransformerTrainingArguments

    from .finetuning import FinetuneArguments, finetune

    classes = (FinetuneArguments, SentenceTransformerTrainingArguments)
    if not torch.accelerator.is_available():
        # Otherwise `bf16: true` is refused, although CPUs have it.
        arguments = [*arguments, "--use_cpu", "true"]
    own, training = _parse_recipe(classes, arguments, "m3bert_hf finetune")
    finetune(own, training)


def _curves(options: argparse.Namespace) -> None:
    from .training_curves import draw_curves, first_and_last

    print(first_and_last(options.runs, options.values))
    draw_curves(options.runs, options.output)


def _evaluate(options: argparse.Namespace) -> None:
    from .granularity_evaluator import GranularityEvaluator
    from .retrieval_task import load_question_task, load_retrieval_task
    from .sentence_transformer import build_sentence_transformer

    model = build_sentence_transformer(options.model, max_seq_length=options.max_seq_length)
    if options.documents:
        task = load_retrieval_task(options.queries, options.documents)
    else:
        task = load_question_task(options.queries)
    evaluator = GranularityEvaluator.from_task(
        task,
        exit_layers=options.exit_layers,
        truncate_dims=options.dims,
        precisions=options.precisions,
        cutoffs=options.cutoffs,
        batch_size=options.batch_size,
        measure_speed=not options.no_speed,
        show_progress_bar=True,
    )
    report = evaluator.evaluate(model)
    report.description["model"] = Path(options.model).name
    if options.output:
        report.save(options.output)
    for metric in report.metrics:
        print(f"\n{report.table(metric)}")
    print(f"\n{report.cost_table()}")
    cell = report.recommend(options.min_quality)
    print(
        f"\nRecommended: exit {cell['exit_layer']}, {cell['truncate_dim']} dimensions, {cell['precision']}: the "
        f"shallowest with {options.min_quality:.0%} of the best {report.metric}."
    )
    if options.output:
        print(f"Tables and pictures: {options.output}")


def _texts(files: Sequence[str], columns: str, languages: Sequence[str] | None = None) -> list[str]:
    from .corpus import load_documents

    documents = load_documents(files, columns, "lang")
    if languages:
        documents = documents.filter(lambda language: language in languages, input_columns="language")
        if not len(documents):
            sys.exit(f"m3bert_hf export: {', '.join(files)} hold no text in {', '.join(languages)}.")
    return documents["text"][:]


def _export(options: argparse.Namespace) -> None:
    import torch

    from .export import export_submodel

    report = export_submodel(
        options.model,
        options.output,
        options.exit_layer,
        options.truncate_dim,
        corpus=_texts(options.corpus, options.text_columns, options.corpus_languages) if options.corpus else None,
        languages=options.languages,
        min_count=options.min_count,
        other_texts=_texts(options.sample, options.text_columns)[: options.sample_size] if options.sample else None,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        normalize=not options.no_normalize,
        keep_mlm_head=False if options.no_head else None,
    )
    before = f" (before: {report['parent']['bytes'] / 2**20:.1f} MiB)" if report["parent"] else ""
    print(f"Saved in {options.output}: exit {report['exit_layer']}, {report['truncate_dim']} dimensions,")
    print(f"{report['parameters']:,} parameters in {report['dtype']}, {report['bytes'] / 2**20:.1f} MiB{before}.")
    if "vocabulary" in report:
        figures = report["vocabulary"]
        print(f"vocabulary: {figures['new_size']:,} of {figures['old_size']:,} tokens", end="")
        if "other_texts" in figures:
            changed = 1 - figures["other_unchanged"]
            print(f"; {changed:.2%} of {figures['other_texts']:,} other texts are split differently", end="")
        print(".")
    print(
        f"Against the parent on {report['compared_texts']} texts: difference {report['max_difference']:.1e}, least "
        f"cosine {report['min_cosine']:.6f}."
    )
    if options.onnx or options.int8:
        from .onnx_export import export_onnx

        for int8 in (False, True) if options.int8 else (False,):
            file = export_onnx(options.output, int8=int8, target=options.target)
            print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB.")


def _deepen(options: argparse.Namespace) -> None:
    from .deepening import deepen

    config = deepen(options.model, options.output, options.exit_layers, options.seed).transformers_model.config
    print(f"Saved in {options.output}: {config.num_hidden_layers} layers, exits {config.exit_layers}.")


def _card(options: argparse.Namespace) -> None:
    from .model_card import write_model_card

    written = write_model_card(options.model, options.facts, options.grids, options.output)
    print(f"Wrote {written}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="m3bert_hf", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    convert = commands.add_parser("convert", help="turn a checkpoint of the authors' release into Hub format")
    convert.add_argument("source", help="directory with config.json and the weights")
    convert.add_argument("output", help="directory to write")
    convert.set_defaults(run=_convert)

    tokenizer = commands.add_parser(
        "train-tokenizer", help="train a multilingual tokenizer without unknown characters"
    )
    tokenizer.add_argument("files", nargs="+", help="files, patterns, directories or Hub datasets")
    tokenizer.add_argument("--output", required=True, help="directory to write")
    tokenizer.add_argument("--model", choices=["unigram", "bpe"], default="unigram")
    tokenizer.add_argument("--text-columns", default="text|query,document", help="default: %(default)s")
    tokenizer.add_argument("--language-column", default="lang", help="default: %(default)s")
    tokenizer.add_argument("--vocab-size", type=int, default=32_000)
    tokenizer.add_argument("--texts", type=int, default=20_000, help="texts to draw (default: %(default)s)")
    tokenizer.add_argument("--max-characters", type=int, default=1_500, help="of each text (default: %(default)s)")
    tokenizer.add_argument("--temperature", type=float, default=0.3, help="language balance, 1 as is, 0 equal")
    tokenizer.add_argument("--model-max-length", type=int, default=512)
    tokenizer.add_argument("--no-nfkc", action="store_true", help="leave Unicode as it is")
    tokenizer.add_argument("--lowercase", action="store_true", help="an uncased vocabulary: for small models")
    tokenizer.add_argument("--seed", type=int, default=0)
    tokenizer.set_defaults(run=_train_tokenizer)

    for name, run, text in (
        ("pretrain", _pretrain, "masked pretraining at every (exit, dimension)"),
        ("finetune", _finetune, "contrastive fine-tuning at every (exit, dimension)"),
    ):
        command = commands.add_parser(name, help=text, add_help=False, description="[recipe.yaml] [--key value ...]")
        command.set_defaults(run=run, takes_rest=True)

    curves = commands.add_parser("curves", help="table and picture of every granularity's loss in pretraining runs")
    curves.add_argument("runs", nargs="+", help="output directories, stages in order")
    curves.add_argument("--output", default="curves.png", help="PNG file (default: %(default)s)")
    curves.add_argument("--values", default="eval_loss", help="of the table (default: %(default)s)")
    curves.set_defaults(run=_curves)

    evaluate = commands.add_parser("evaluate", help="retrieval quality at every (exit, dimension)")
    evaluate.add_argument("model", help="checkpoint directory or Hub name")
    evaluate.add_argument("--queries", required=True, help="JSON lines with `query`, `id` and perhaps `lang`")
    evaluate.add_argument(
        "--documents", help="JSON lines with `id` and `document`; without it, rows of --queries hold a `document` each"
    )
    evaluate.add_argument("--exit-layers", type=int, nargs="+")
    evaluate.add_argument("--dims", type=int, nargs="+")
    evaluate.add_argument("--max-seq-length", type=int)
    evaluate.add_argument("--batch-size", type=int, default=256)
    evaluate.add_argument("--precisions", nargs="+", choices=["float32", "int8", "binary"], default=["float32"])
    evaluate.add_argument("--cutoffs", type=int, nargs="+", default=[10, 100], help="k of MRR@k and Recall@k")
    evaluate.add_argument("--no-speed", action="store_true", help="leave out latency and throughput")
    evaluate.add_argument("--min-quality", type=float, default=0.97, help="share of the best that is good enough")
    evaluate.add_argument("--output", help="directory for grid.json, grid.csv and pictures")
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser("export", help="one (exit, dimension) and a smaller vocabulary as a model of its own")
    export.add_argument("model", help="checkpoint directory or Hub name")
    export.add_argument("output", help="directory to write")
    export.add_argument("--exit-layer", type=int, help="layer to end at; the deepest by default")
    export.add_argument("--truncate-dim", type=int, help="width of the vectors; the full one by default")
    export.add_argument("--corpus", nargs="+", help="files whose tokens stay: JSON lines, text, parquet")
    export.add_argument("--corpus-languages", nargs="+", help="use the rows of the corpus in these languages (`lang`)")
    export.add_argument("--text-columns", default="text|query,document", help="default: %(default)s")
    export.add_argument("--languages", nargs="+", help="languages whose scripts stay, without any text of them")
    export.add_argument("--min-count", type=int, default=1, help="least count of a token in the corpus")
    export.add_argument("--sample", nargs="+", help="files of other texts, to measure how the smaller tokenizer fares")
    export.add_argument("--sample-size", type=int, default=10_000)
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; as they are")
    export.add_argument("--no-normalize", action="store_true", help="leave the vectors' length as it is")
    export.add_argument("--no-head", action="store_true", help="leave out the masked-language-model head")
    export.add_argument("--onnx", action="store_true", help="also onnx/model.onnx, for onnxruntime")
    export.add_argument("--int8", action="store_true", help="also onnx/model.onnx and onnx/model_int8.onnx")
    export.add_argument("--target", choices=["avx512_vnni", "avx2", "arm64"], default="avx512_vnni", help="of --int8")
    export.set_defaults(run=_export)

    deeper = commands.add_parser("deepen", help="add layers that begin as copies of the deepest exit")
    deeper.add_argument("model", help="checkpoint directory or Hub name")
    deeper.add_argument("output", help="directory to write")
    deeper.add_argument(
        "--exit-layers", type=int, nargs="+", required=True, help="exits to add; the last is the depth"
    )
    deeper.add_argument("--seed", type=int, default=0)
    deeper.set_defaults(run=_deepen)

    card = commands.add_parser("card", help="fill a model card from measured grids")
    card.add_argument("model", help="checkpoint directory")
    card.add_argument(
        "--facts", required=True, help="YAML or JSON: name, license, languages, training data, limits, ..."
    )
    card.add_argument("--grids", nargs="*", default=[], help="directories or grid.json files of `evaluate --output`")
    card.add_argument("--output", help="file to write (default: README.md of the checkpoint)")
    card.set_defaults(run=_card)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command of the package; without `arguments`, those of the process."""
    options, rest = _parser().parse_known_args(arguments)
    takes_rest = getattr(options, "takes_rest", False)
    if rest and not takes_rest:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        options.run(rest if takes_rest else options)
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"m3bert_hf {options.command}: {error}")


if __name__ == "__main__":
    main()
