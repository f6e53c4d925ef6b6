"""Write a checkpoint that ships: half the bytes on disk, float32 once loaded, the head if there is one.

python examples/nano/ship.py runs/m3bert-nano/interpolated --output checkpoints/m3bert-nano
python examples/nano/ship.py runs/m3bert-nano/stage3 --output checkpoints/m3bert-nano-base
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

from m3bert_hf import build_sentence_transformer


TEXTS = ["convert images on the command line", "Bilder umwandeln", "画像を変換する", "convertir des images"]


def save_tokenizer(source: str, output: Path) -> None:
    """Save the tokenizer without the lengths of its last training batch, as compact JSON."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(output)
    file = output / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def main() -> None:
    """Save in float16, and check that the vectors are those of the source."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="directory of a pretrained or fine-tuned model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--least-cosine", type=float, default=0.9999)
    options = parser.parse_args()
    model = build_sentence_transformer(options.source)
    config = AutoConfig.from_pretrained(options.source)
    if (Path(options.source) / "modules.json").exists():
        model.save(str(options.output))
    save_tokenizer(options.source, options.output)
    head = "M3BertForMaskedLM" in (config.architectures or [])
    kind = AutoModelForMaskedLM if head else AutoModel
    kind.from_pretrained(options.source).half().save_pretrained(options.output)
    # The type that it is loaded in: half precision is for the disk, a CPU computes faster and closer in float32.
    file = options.output / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), "dtype": "float32"}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    shipped = build_sentence_transformer(str(options.output))
    for exit_layer in shipped.exit_layers:
        encode = {"exit_layer": exit_layer, "convert_to_tensor": True}
        least = torch.cosine_similarity(model.encode(TEXTS, **encode), shipped.encode(TEXTS, **encode)).min().item()
        if least < options.least_cosine:
            raise ValueError(f"Exit {exit_layer}: cosine {least:.5f} to the source is below {options.least_cosine}.")
    size = sum(path.stat().st_size for path in options.output.glob("*.safetensors")) / 2**20
    print(f"{options.output}: {size:.1f} MiB, exits {shipped.exit_layers}, widths {shipped.matryoshka_dimensions}")


if __name__ == "__main__":
    main()
