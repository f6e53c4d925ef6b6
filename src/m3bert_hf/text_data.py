"""Reading of texts: JSON lines, compressed or not, with a language per row."""

import bz2
import gzip
import json
import lzma
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


_OPENERS: dict[str, Callable] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}


def read_json_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON-lines file (.xz, .gz and .bz2 are unpacked).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not a JSON object or the file is corrupt, naming file and line.
    """
    path = Path(path)
    opener = _OPENERS.get(path.suffix) or open
    read = 0
    with opener(path, "rt", encoding="utf-8") as lines:
        try:
            for line in lines:
                read += 1
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {type(row).__name__}")
                yield row
        except (ValueError, EOFError, OSError, lzma.LZMAError) as error:
            raise ValueError(f"{path} cannot be read at line {max(read, 1)}: {error}.") from error


def sample_balanced(
    groups: Mapping[str, Sequence[Any]], size: int, temperature: float, seed: int = 0
) -> list[tuple[str, Any]]:
    """Draw rows without repetition from groups, in proportion to (group size) ** temperature.

    A small group gives all it has; what it cannot give is shared among the others.

    Args:
        groups: Rows of each group, such as a language.
        size: Rows to draw; all if there are fewer.
        temperature: 1 keeps the proportions, 0 makes the groups equal (exponential smoothing as in XLM-R, which
            uses 0.3).
        seed: Of the draw and of the order.

    Returns:
        Pairs of group and row, shuffled.
    """
    generator = random.Random(seed)
    open_groups = {name: len(rows) for name, rows in groups.items() if len(rows)}
    share: dict[str, int] = {}
    left = min(size, sum(open_groups.values()))
    while open_groups and left > 0:
        total = sum(count**temperature for count in open_groups.values())
        wanted = {name: left * count**temperature / total for name, count in open_groups.items()}
        full = [name for name, count in open_groups.items() if wanted[name] >= count]
        if not full:
            # Largest remainders, so that the shares add up to what is left.
            share.update({name: int(value) for name, value in wanted.items()})
            rest = left - sum(int(value) for value in wanted.values())
            for name in sorted(wanted, key=lambda n: (int(wanted[n]) - wanted[n], n))[:rest]:
                share[name] += 1
            break
        for name in full:
            share[name] = open_groups.pop(name)
            left -= share[name]
    drawn = [(name, row) for name in sorted(share) for row in generator.sample(list(groups[name]), share[name])]
    generator.shuffle(drawn)
    return drawn


def group_rows(files: Iterable[str | Path], by: Sequence[str] = ("lang",)) -> dict[str, list[dict[str, Any]]]:
    """Read files and group their rows by the values of some fields; rows that lack them form a group of their own."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for file in files:
        for row in read_json_lines(file):
            groups["/".join(str(row.get(field, "")) for field in by)].append(row)
    return dict(groups)


__all__ = ["group_rows", "read_json_lines", "sample_balanced"]
