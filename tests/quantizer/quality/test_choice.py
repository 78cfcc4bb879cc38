"""Types chosen by measured errors and sizes, beside all choices that there are."""

import itertools
import random

import pytest
from auraflow_gguf.quantizer.quality.choice import Candidate, choose, squared_errors

SIZES = {"Q2": 2, "Q3": 3, "Q4": 4, "Q6": 6}


def curves(seed, groups=6):
    """Groups of random sizes whose error falls by about 4 a bit, as a quantization's does."""
    rng = random.Random(seed)
    made = {}
    for group in range(groups):
        weights, error = rng.choice((100, 200, 400)), rng.uniform(1, 100)
        made[str(group)] = [
            Candidate(name, bits * weights, error * 4.0 ** (2 - bits) * rng.uniform(0.8, 1.2))
            for name, bits in SIZES.items()
        ]
    return made


def total(chosen, attribute):
    return sum(getattr(entry, attribute) for entry in chosen.values())


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_of_the_size_is_much_better(seed):
    candidates = curves(seed)
    limit = 3.6 * sum(entries[0].nbytes for entries in candidates.values()) / SIZES["Q2"]
    chosen = choose(candidates, limit)
    assert total(chosen, "nbytes") <= limit
    every = (dict(zip(candidates, choice, strict=True)) for choice in itertools.product(*candidates.values()))
    best = min(total(choice, "error") for choice in every if total(choice, "nbytes") <= limit)
    assert best <= total(chosen, "error") <= 1.15 * best


def test_what_remains_is_filled_up():
    candidates = {
        "a": [Candidate("small", 10, 9.0), Candidate("large", 30, 1.0)],
        "b": [Candidate("small", 10, 5.0), Candidate("large", 22, 4.0)],
    }
    names = {group: entry.type_name for group, entry in choose(candidates, 35).items()}
    assert names == {"a": "small", "b": "large"}  # a's step is steeper, and does not fit
    names = {group: entry.type_name for group, entry in choose(candidates, 40).items()}
    assert names == {"a": "large", "b": "small"}


def test_no_choice_is_so_small():
    candidates = {"a": [Candidate("small", 10, 9.0)]}
    assert choose(candidates, 9) is None
    assert choose(candidates, 10) == {"a": candidates["a"][0]}


def test_a_type_that_is_larger_and_worse_is_not_chosen():
    entries = [Candidate("small", 10, 2.0), Candidate("bad", 20, 3.0), Candidate("worse", 10, 4.0)]
    assert choose({"a": entries}, 100)["a"].type_name == "small"


def test_types_between_the_measured_ones_lie_on_the_curve():
    rulers = {"Q2": 0.08, "Q3": 0.02, "X": 0.01, "Q4": 0.005, "Q8": 0.00005, "Q1": 0.3, "Y": 0.085, "BF16": 0.0}
    told = squared_errors({"Q2": 1.0, "Q4": 0.01}, rulers)
    assert told["Q2"] == 1.0
    assert told["Q4"] == 0.01
    assert told["Q3"] == pytest.approx(0.1)  # half of the way in the logarithm
    assert told["Q4"] < told["X"] < told["Q3"]
    assert told["Q8"] == pytest.approx(0.0001)  # a hundredth of Q4's ruler, a hundredth of its error
    assert told["Y"] == pytest.approx(1.0 * 0.085 / 0.08)
    assert told["BF16"] == 0
    assert "Q1" not in told  # far coarser than all that was measured
