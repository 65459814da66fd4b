"""Evaluations side by side: what is compared with what, and how sure a difference is."""

import types

import numpy as np
import pytest

from gemma_scope_jax import metrics, suites


def by_row(seed, shift=0.0):
    """Forty rows that are hard or easy for every SAE alike."""
    hard = np.random.default_rng(0).normal(size=40)
    rng = np.random.default_rng(seed)
    tokens = np.random.default_rng(1).integers(5, 30, size=40).astype(float)
    clean = tokens * (3 + hard)
    return {
        "activations": tokens, "tokens": tokens, "clean_loss": clean,
        "spliced_loss": clean + tokens * (1 + hard + shift + 0.1 * rng.normal(size=40)),
        "l0": tokens * rng.integers(3, 9, size=40), "error": tokens * rng.random(40), "variance": 2 * tokens,
    }  # fmt: skip


@pytest.mark.parametrize("number", list(metrics.PAIRED))
def test_a_difference_has_the_error_of_rows_drawn_again(number):
    a, b = by_row(1), by_row(2, 0.2)

    def value(rows, chosen):
        over, less, per = metrics.PAIRED[number]
        total = rows[over][chosen].sum() - (rows[less][chosen].sum() if less else 0)
        return total / rows[per][chosen].sum()

    found, error = metrics.difference(number, a, b)
    everyone = np.arange(40)
    np.testing.assert_allclose(found, value(b, everyone) - value(a, everyone), atol=1e-9)
    rng = np.random.default_rng(3)
    drawn = [value(b, i) - value(a, i) for i in rng.integers(40, size=(4000, 40))]
    np.testing.assert_allclose(error, np.std(drawn), rtol=0.1, atol=1e-9)


def suite(*names):
    return suites.Suite({}, {name: types.SimpleNamespace() for name in names})


def test_saes_stand_side_by_side_by_name_or_else_in_order():
    a, b = suite("x", "y"), suite("y", "z")
    assert suites.rows_of({"a": a, "b": b}) == [{"a": "x"}, {"a": "y", "b": "y"}, {"b": "z"}]
    assert suites.rows_of({"a": a, "b": suite("p", "q")}) == [{"a": "x", "b": "p"}, {"a": "y", "b": "q"}]
    assert suites.rows_of({"a": a, "b": suite("p")}) == [{"a": "x"}, {"a": "y"}, {"b": "p"}]


def test_other_rows_leave_a_difference_without_an_error():
    a = types.SimpleNamespace(l0=4.0, by_row=by_row(1))
    b = types.SimpleNamespace(l0=6.0, by_row=by_row(2))
    fewer = types.SimpleNamespace(l0=6.0, by_row={**by_row(2), "tokens": np.ones(40)})
    assert np.isfinite(suites.difference("l0", a, b, is_same_text=True)[1])
    for other, is_same_text in ((b, False), (fewer, True)):
        found, error = suites.difference("l0", a, other, is_same_text)
        assert found == 2 and np.isnan(error)
    assert suites.difference("kl", a, b, True) is None

    about = {
        "rows_of": "sotu-1",
        "split": "held_out",
        "turns": None,
        "context_length": 256,
        "dtype": "float32",
    }
    first = suites.Suite(about, {})
    assert suites._same_text(first, suites.Suite(about | {"dtype": "bfloat16"}, {}))
    for name, value in {
        "rows_of": "other",
        "split": "train",
        "turns": "model",
        "context_length": 128,
    }.items():
        assert not suites._same_text(first, suites.Suite(about | {name: value}, {}))
    assert not suites._same_text(suites.Suite({}, {}), suites.Suite({}, {}))


def test_folders_are_told_apart(tmp_path):
    folders = [tmp_path / "one" / "eval", tmp_path / "two" / "eval"]
    assert suites._labels(folders) == ["one/eval", "two/eval"]
    with pytest.raises(ValueError, match="given twice"):
        suites._labels([folders[0], folders[0]])
    with pytest.raises(ValueError, match="alone cannot be compared"):
        suites.compare(folders[:1], tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file; give a folder"):
        suites.compare(folders, tmp_path / "file")
    with pytest.raises(ValueError, match="has no evaluation"):
        suites.compare(folders, tmp_path / "out")
