import gzip
import json
import lzma
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3bert_hf.text_data import group_rows, read_json_lines, sample_balanced


ROWS = [{"lang": "en", "text": "a"}, {"lang": "ja", "text": "写"}, {"text": "no language"}]


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".xz", lzma.open), (".gz", gzip.open)])
def test_reads_plain_and_compressed_files(suffix, opener, tmp_path):
    path = tmp_path / f"rows.jsonl{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("\n\n".join(json.dumps(row) for row in ROWS))
    assert list(read_json_lines(path)) == ROWS
    assert set(group_rows([path])) == {"en", "ja", ""}


def test_damage_is_named_with_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match=r"rows\.jsonl cannot be read at line 2"):
        list(read_json_lines(path))
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="expected an object, got list"):
        list(read_json_lines(path))
    packed = tmp_path / "rows.jsonl.xz"
    packed.write_bytes(lzma.compress(b'{"text": "a"}\n' * 9999)[:-20])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.xz cannot be read"):
        list(read_json_lines(packed))


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    size=st.integers(0, 120),
    temperature=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_draws_exactly_what_is_asked_for_without_repetition(sizes, size, temperature, seed):
    groups = {str(i): [(i, j) for j in range(n)] for i, n in enumerate(sizes)}
    drawn = sample_balanced(groups, size, temperature, seed)
    assert len(drawn) == min(size, sum(sizes))
    assert len(set(drawn)) == len(drawn)
    assert all(row in groups[name] for name, row in drawn)
    assert drawn == sample_balanced(groups, size, temperature, seed)


def test_temperature_moves_from_proportional_to_equal():
    groups = {"big": list(range(900)), "small": list(range(100))}
    counts = {t: Counter(name for name, _ in sample_balanced(groups, 100, t))["small"] for t in (1.0, 0.5, 0.0)}
    assert counts == {1.0: 10, 0.5: 25, 0.0: 50}
