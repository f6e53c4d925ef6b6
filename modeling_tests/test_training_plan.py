from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3bert_hf.training_plan import first_fit, plan_evaluation, plan_training, temperature_shares


def corpus(counts=(4000, 400, 40), seed=0, held_out=0.0, longest=20):
    rng = np.random.default_rng(seed)
    languages = np.repeat(np.arange(len(counts)), counts).astype(np.int16)
    return SimpleNamespace(
        lengths=rng.integers(8, longest + 1, len(languages)).astype(np.int32),
        languages=languages,
        language_names=[str(i) for i in range(len(counts))],
        held_out=rng.random(len(languages)) < held_out,
    )


def tokens_by_language(data, pieces):
    return np.bincount(data.languages[pieces], data.lengths[pieces], minlength=len(data.language_names))


@given(
    sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=6),
    temperature=st.floats(0, 1),
    wanted=st.integers(0, 3000),
)
def test_shares_add_up_within_the_room(sizes, temperature, wanted):
    room = np.array(sizes, dtype=float)
    shares = temperature_shares(sizes, temperature, room, wanted)
    assert (shares <= room + 1e-6).all() and (shares >= 0).all()
    assert shares.sum() == pytest.approx(min(wanted, room.sum()), abs=1e-6)


def test_temperature_is_between_proportion_and_equality():
    sizes, room = [900.0, 90.0, 10.0], [np.inf] * 3
    assert temperature_shares(sizes, 1.0, room, 100) == pytest.approx([90, 9, 1])
    assert temperature_shares(sizes, 0.0, room, 90) == pytest.approx([30, 30, 30])


@given(lengths=st.lists(st.integers(1, 32), max_size=60), extra=st.integers(0, 20))
def test_first_fit_packs_every_item_once_as_a_naive_one_does(lengths, extra):
    budget = 32 + extra
    bins = first_fit(np.array(lengths, dtype=np.int32), budget)
    assert sorted(i for items in bins for i in items) == list(range(len(lengths)))
    naive: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = next((i for i, used in enumerate(naive) if used + length <= budget), None)
        if place is None:
            naive.append(length)
        else:
            naive[place] += length
    assert [sum(lengths[i] for i in items) for items in bins] == naive


@pytest.mark.parametrize("packing", [True, False])
def test_a_plan_depends_on_the_seed_alone(packing):
    data = corpus()
    one, two, other = (
        plan_training(data, 64, rows=700, packing=packing, group_size=16, seed=seed) for seed in (1, 1, 2)
    )
    assert len(one) == 700
    assert one.fingerprint() == two.fingerprint() != other.fingerprint()
    assert np.array_equal(one.pieces, two.pieces)


def test_an_epoch_holds_every_piece_once_and_none_that_is_held_out():
    data = corpus(held_out=0.1)
    plan = plan_training(data, 64, epochs=1.0)
    counts = np.bincount(plan.pieces, minlength=len(data.lengths))
    assert not counts[data.held_out].any()
    # Each language ends within one piece of its share.
    assert (counts[~data.held_out] == 1).mean() > 0.99 and counts.max() <= 2
    used = [data.lengths[plan[row]].sum() for row in range(len(plan))]
    assert max(used) <= 64 and np.mean(used) > 0.93 * 64
    evaluation = plan_evaluation(data, 64)
    assert sorted(evaluation.pieces) == np.flatnonzero(data.held_out).tolist()
    assert len(plan_evaluation(data, 64, 5)) == 5
    assert plan_evaluation(corpus(), 64) is None


def test_the_temperature_moves_over_the_run_and_repetition_is_bounded():
    data = corpus()
    plan = plan_training(data, 64, rows=2000, temperature=[1.0, 0.0])
    first, last = (
        tokens_by_language(data, np.concatenate([plan[r] for r in part])) for part in (range(200), range(1800, 2000))
    )
    assert first[0] / first.sum() > 0.8 and last[0] / last.sum() < 0.5
    assert last[2] > 5 * first[2]
    free = tokens_by_language(data, plan_training(data, 64, rows=800, temperature=0.0).pieces)
    bound = tokens_by_language(data, plan_training(data, 64, rows=800, temperature=0.0, max_repeats=2).pieces)
    own = tokens_by_language(data, np.arange(len(data.lengths)))
    assert free[2] > 10 * own[2] and bound[2] <= 2.2 * own[2]
    # A run longer than the bound allows repeats more, rather than ending early.
    assert len(plan_training(corpus((30,)), 64, rows=200, max_repeats=1)) == 200


def test_without_packing_batches_are_of_similar_length():
    data = corpus(longest=120)
    plan = plan_training(data, 128, rows=1600, packing=False, group_size=32)
    lengths = data.lengths[plan.pieces].reshape(-1, 32)
    padded = (lengths.max(axis=1) * 32).sum()
    assert lengths.sum() > 0.9 * padded
    # Batches still come in random order of length.
    assert abs(np.corrcoef(np.arange(len(lengths)), lengths.mean(axis=1))[0, 1]) < 0.4


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 400), seed=st.integers(0, 9), packing=st.booleans())
def test_any_number_of_rows_is_planned(rows, seed, packing):
    data = corpus((50, 3), seed)
    plan = plan_training(data, 40, rows=rows, packing=packing, group_size=7, temperature=0.3, seed=seed)
    assert len(plan) == rows and all(data.lengths[plan[r]].sum() <= 40 for r in range(rows))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`rows` must be at least 1, got 0"):
        plan_training(corpus(), 64, rows=0)
    with pytest.raises(ValueError, match="`temperature` must be"):
        plan_training(corpus(), 64, temperature=[-1.0])
    with pytest.raises(ValueError, match="every document is held out"):
        plan_training(corpus(held_out=2.0), 64)
