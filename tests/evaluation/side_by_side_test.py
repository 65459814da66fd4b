"""Evaluations side by side: the pairs that are compared, and the error of a difference."""

import json
import os
import tracemalloc
import types

import browser
import numpy as np
import pytest
from random_evaluations import evaluation

from gemma_scope_jax.analysis import session
from gemma_scope_jax.cli import compare as compare_cli
from gemma_scope_jax.evaluation import metrics, side_by_side
from gemma_scope_jax.saes import evaluation_file


def by_row(seed, shift=0.0):
    """Forty rows of different difficulty, each equally hard for every SAE."""
    hard = np.random.default_rng(0).normal(size=40)
    rng = np.random.default_rng(seed)
    tokens = np.random.default_rng(1).integers(5, 30, size=40).astype(float)
    clean = tokens * (3 + hard)
    return {
        "activations": tokens, "tokens": tokens, "clean_loss": clean,
        "spliced_loss": clean + tokens * (1 + hard + shift + 0.1 * rng.normal(size=40)),
        "l0": tokens * rng.integers(3, 9, size=40), "error": tokens * rng.random(40), "variance": 2 * tokens,
    }  # fmt: skip


@pytest.mark.parametrize("number", list(metrics.paired()))
def test_the_error_of_a_difference_equals_a_bootstrap_over_rows(number):
    a, b = by_row(1), by_row(2, 0.2)

    def value(rows, chosen):
        over, less, per = metrics.paired()[number]
        total = rows[over][chosen].sum() - (rows[less][chosen].sum() if less else 0)
        return total / rows[per][chosen].sum()

    found, error = metrics.difference(number, a, b)
    everyone = np.arange(40)
    np.testing.assert_allclose(found, value(b, everyone) - value(a, everyone), atol=1e-9)
    rng = np.random.default_rng(3)
    drawn = [value(b, i) - value(a, i) for i in rng.integers(40, size=(4000, 40))]
    np.testing.assert_allclose(error, np.std(drawn), rtol=0.1, atol=1e-9)


def suite(*names):
    return side_by_side.Suite({}, {name: types.SimpleNamespace() for name in names})


def test_saes_are_paired_by_name_or_otherwise_in_order():
    a, b = suite("x", "y"), suite("y", "z")
    assert side_by_side.rows_of({"a": a, "b": b}) == [{"a": "x"}, {"a": "y", "b": "y"}, {"b": "z"}]
    assert side_by_side.rows_of({"a": a, "b": suite("p", "q")}) == [
        {"a": "x", "b": "p"},
        {"a": "y", "b": "q"},
    ]
    assert side_by_side.rows_of({"a": a, "b": suite("p")}) == [{"a": "x"}, {"a": "y"}, {"b": "p"}]


def test_a_difference_over_other_rows_has_no_error():
    a = types.SimpleNamespace(l0=4.0, by_row=by_row(1))
    b = types.SimpleNamespace(l0=6.0, by_row=by_row(2))
    fewer = types.SimpleNamespace(l0=6.0, by_row={**by_row(2), "tokens": np.ones(40)})
    assert np.isfinite(side_by_side.difference("l0", a, b, is_same_text=True)[1])
    for other, is_same_text in ((b, False), (fewer, True)):
        found, error = side_by_side.difference("l0", a, other, is_same_text)
        assert found == 2 and np.isnan(error)
    assert side_by_side.difference("kl", a, b, True) is None

    about = {
        "rows_of": "sotu-1",
        "split": "held_out",
        "turns": None,
        "context_length": 256,
        "dtype": "float32",
    }
    first = side_by_side.Suite(about, {})
    assert side_by_side._same_text(first, side_by_side.Suite(about | {"dtype": "bfloat16"}, {}))
    for name, value in {
        "rows_of": "other",
        "split": "train",
        "turns": "model",
        "context_length": 128,
    }.items():
        assert not side_by_side._same_text(first, side_by_side.Suite(about | {name: value}, {}))
    assert not side_by_side._same_text(side_by_side.Suite({}, {}), side_by_side.Suite({}, {}))


def test_folders_have_distinct_labels(tmp_path):
    folders = [tmp_path / "one" / "eval", tmp_path / "two" / "eval"]
    assert side_by_side.labels(folders) == ["one/eval", "two/eval"]
    with pytest.raises(ValueError, match="given twice"):
        side_by_side.labels([folders[0], folders[0]])
    with pytest.raises(ValueError, match="compare needs two folders or more, but only"):
        compare_cli.compare(folders[:1], tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file; give a folder"):
        compare_cli.compare(folders, tmp_path / "file")
    with pytest.raises(ValueError, match="has no evaluation"):
        compare_cli.compare(folders, tmp_path / "out")


@browser.needs_chromium
def test_the_page_does_not_scroll_sideways(tmp_path):
    columns = {
        f"{i}_{'long_name_' * 9}": side_by_side.Suite(
            {"text": 20 * "/long_folder"}, {f"{j}_{'long_name_' * 9}": evaluation(i + j) for j in range(2)}
        )
        for i in range(3)
    }
    page, _ = side_by_side.comparison(columns, True).save(tmp_path, 40 * "--option=")
    assert browser.beyond(page) == 0


ROWS = 40
NUMBERS = {key: 0.5 for key in evaluation_file.SCALARS} | {"rows": ROWS, "l0_quantiles": [1, 2, 3, 4, 5]}


def evaluated(folder, numbers=NUMBERS, arrays=None, **about):
    """Writes an evaluation to a new folder, as gemma-scope evaluate does."""
    folder.mkdir()
    written = {"model": "tiny", "text": "a", "cost": {"seconds": 1.0}, **about, "sae": {"x": numbers}}
    (folder / "evaluation.json").write_text(json.dumps(written))
    arrays = by_row(1) if arrays is None else arrays
    np.savez_compressed(
        folder / "evaluation.npz", **{f"x/by_row/{key}": value for key, value in arrays.items()}
    )
    return folder


def test_an_evaluation_is_read_as_it_was_written(tmp_path):
    found = side_by_side.read(evaluated(tmp_path / "a"))
    assert found.about == {"model": "tiny", "text": "a"}
    assert vars(found.results["x"]) == NUMBERS | {"by_row": found.results["x"].by_row}
    for key, value in by_row(1).items():
        np.testing.assert_array_equal(found.results["x"].by_row[key], value)
    # An older version writes fewer numbers, and a later version can write more.
    fewer = {"rows": ROWS, "l0": 3.0, "r_l0": None, "of_later": [1]}
    other = side_by_side.read(evaluated(tmp_path / "b", fewer, {"tokens": np.ones(ROWS)})).results["x"]
    assert (other.l0, other.r_l0, other.by_row) == (3.0, None, {}) and np.isnan(other.fvu)
    compare_cli.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"sae": []}', '{"sae": {}}', '{"sae": {"x": 3}}', '{"sae": {"x": {}}}',
        '{"sae": {"x": {"rows": 40, "l0": "many"}}}', '{"sae": {"x": {"rows": 40, "l0": [1]}}}',
        '{"sae": {"x": {"rows": 40, "l0": true}}}', '{"sae": {"x": {"rows": 40, "l0": NaN}}}',
        '{"sae": {"x": {"rows": 40, "l0": 1e400}}}', '{"sae": {"x": {"rows": 40, "l0": ' + "9" * 400 + "}}}",
        '{"sae": {"x": {"rows": 40, "l0": ' + "9" * 5000 + "}}}", '{"sae": {"x": {"rows": 40.0}}}',
        '{"sae": {"x": {"rows": -1}}}', '{"sae": {"x": {"rows": 1000000000000}}}',
        '{"sae": {"x": {"rows": 40, "l0_quantiles": [[1]]}}}', '{"sae": ' + '{"a":' * 100_000,
    ],
    ids=range(19),
)  # fmt: skip
def test_an_invalid_evaluation_is_refused_in_one_line(text, tmp_path):
    (evaluated(tmp_path / "a") / "evaluation.json").write_text(text)
    with pytest.raises(ValueError, match=r"a/evaluation\.json") as caught:
        compare_cli.compare([evaluated(tmp_path / "b"), tmp_path / "a"], tmp_path / "out")
    assert len(str(caught.value)) < 480 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"tokens": np.ones(ROWS + 1)}, r"an array has shape \(41,\), expected \(40,\)"),
        ({"tokens": np.array([[1]] * ROWS, object)}, "an array of dtype object is not supported"),
        ({"tokens": np.ones((ROWS, 1))}, r"an array has shape \(40, 1\), expected"),
        ({"tokens": np.full(ROWS, np.nan)}, "x/by_row/tokens holds non-finite values"),
        ({"tokens": np.full(ROWS, "a")}, "an array of dtype <U1 is not supported"),
        ({"tokens": np.zeros(2**23)}, r"an array has shape \(8388608,\), expected"),
    ],
    ids=["length", "object", "dimensions", "nan", "text", "bomb"],
)
def test_invalid_arrays_are_refused(arrays, message, tmp_path):
    folder = evaluated(tmp_path / "a", arrays={**by_row(1), **arrays})
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"evaluation\.npz is not a valid npz file: {message}"):
        side_by_side.read(folder)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_pipes_and_truncated_files_are_refused_by_every_reader(tmp_path):
    beside = evaluated(tmp_path / "a") / "evaluation.npz"
    content = beside.read_bytes()
    subject = types.SimpleNamespace(sae=types.SimpleNamespace(b_enc=np.zeros(8)))
    for write in (lambda: beside.write_bytes(content[:300]), lambda: os.mkfifo(beside)):
        beside.unlink()
        write()
        for read in (side_by_side.read, lambda folder: session._frequencies(folder, {"x": subject})):
            with pytest.raises(ValueError, match=r"evaluation\.npz"):
                read(tmp_path / "a")


def test_frequencies_must_have_one_value_per_latent(tmp_path):
    subject = types.SimpleNamespace(sae=types.SimpleNamespace(b_enc=np.zeros(8)))
    np.savez(tmp_path / "evaluation.npz", **{"x/frequency": np.arange(8) / 8, "y/frequency": np.ones(3)})
    found = session._frequencies(tmp_path, {"x": subject, "z": subject})
    assert list(found) == ["x"]
    np.testing.assert_array_equal(found["x"], np.arange(8) / 8)
    with pytest.raises(ValueError, match=r"an array has shape \(3,\), expected \(8,\)"):
        session._frequencies(tmp_path, {"y": subject})
