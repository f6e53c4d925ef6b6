"""Interpolate between a fine-tuned checkpoint and the one that it began from: much of either's skill at no cost.

python examples/nano/interpolate.py runs/m3bert-nano/finetuned runs/m3bert-nano/joint --share 0.85 --output OUT

Weights lie on a line between the two models (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903), which one training run
connects; what only the second has, such as a masked-language head, is taken as it is.
"""

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


PREFIX = "model."


def main() -> None:
    """Write the second checkpoint with weights between the first's and its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="directory of the checkpoint that the second began from")
    parser.add_argument("second", type=Path, help="directory of the checkpoint whose files are written")
    parser.add_argument("--share", type=float, required=True, help="of the second: 0 gives the first, 1 the second")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if not 0 <= options.share <= 1:
        raise ValueError(f"--share {options.share} must be within 0 and 1.")
    before, after = (load_file(path / "model.safetensors") for path in (options.first, options.second))
    before = {name.removeprefix(PREFIX): weight.float() for name, weight in before.items()}
    encoder = {name.removeprefix(PREFIX) for name in after if name.startswith(PREFIX)} or set(after)
    if not encoder <= set(before):
        raise ValueError(f"{options.first} lacks {sorted(encoder - set(before))[:3]} of {options.second}'s encoder.")
    mixed = {
        name: before[short].lerp(weight.float(), options.share).to(weight.dtype) if short in encoder else weight
        for name, weight in after.items()
        for short in (name.removeprefix(PREFIX),)
    }
    shutil.copytree(options.second, options.output, ignore=shutil.ignore_patterns("checkpoint-*"), dirs_exist_ok=True)
    save_file(mixed, options.output / "model.safetensors", metadata={"format": "pt"})
    print(f"{options.output}: {len(encoder)} tensors between the two, {len(after) - len(encoder)} of the second")


if __name__ == "__main__":
    main()
