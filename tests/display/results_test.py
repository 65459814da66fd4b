"""Results as tables and files: rows hold the fields, and unknown file endings are refused."""

import csv

import numpy as np
import pandas
import pytest

from gemma_scope_jax.analysis import one_latent, prompt_activations
from gemma_scope_jax.analysis.attribution import ablation, gradients
from gemma_scope_jax.analysis.contrasts import correction, find
from gemma_scope_jax.analysis.layers import flow, links, logit_lens
from gemma_scope_jax.analysis.steering import steer, sweep
from gemma_scope_jax.display import results

TOKENS = ("a", " b")
F_LxM = np.array([[0.0, 2.0, 0.0], [1.0, 0.0, 0.5]])
READING = prompt_activations.Reading(
    "m", TOKENS, {"s": F_LxM}, {"s": np.ones(2)}, {"s": np.array([0.5, 0.1, 0])}
)
PARTS = gradients.Parts(
    np.array([1, 0]), np.array([2, 1]), np.array([0.5, 2.0]), np.array([3.0, -1.0]), 3,
    np.array([0.1, 0.2]), np.array([0.3, 0.4]), np.array([0.0, 0.5]), np.array([-0.6, 4.1]),
)  # fmt: skip
ATTRIBUTION = gradients.Attribution("m", TOKENS, (2, 5, 6), (1, "x"), None, 0.5, {"s": PARTS})
NAN = np.array([np.nan, 0.01, 0.5])
LATENTS = find.Latents(NAN, NAN, NAN, *np.arange(15.0).reshape(5, 3))
LENS = logit_lens.Lens(
    TOKENS, ("0", "1"), np.array([7, 8]), True,
    *(logit_lens.Predictions(np.full((r, 2), 7), *np.full((2, r, 2), p), np.ones((r, 2), int))
      for r, p in ((2, 0.25), (2, 0.5), (1, 0.75))),
    {7: "x", 8: "y"},
)  # fmt: skip
OUTCOME = correction.Outcome(np.array([1.0, 3.0]), np.array([1.0, 2.0]), 0.5)


def test_each_firing_of_a_prompt_has_a_row():
    assert READING.to_dataframe().to_dict("records") == [
        {"sae": "s", "position": 1, "token": "a", "latent": 1, "activation": 2.0, "is_dense": False},
        {"sae": "s", "position": 2, "token": " b", "latent": 0, "activation": 1.0, "is_dense": True},
        {"sae": "s", "position": 2, "token": " b", "latent": 2, "activation": 0.5, "is_dense": False},
    ]


def test_the_parts_of_an_attribution_sum_to_all_of_it():
    frame = ATTRIBUTION.to_dataframe()
    np.testing.assert_allclose(frame.groupby("position").part.sum(), PARTS.total_L)
    latents = frame[frame.kind == "latent"]
    assert latents[["position", "token", "latent", "activation", "part"]].values.tolist() == [
        [2, " b", 2, 0.5, 3.0],
        [1, "a", 1, 2.0, -1.0],
    ]
    assert frame[frame.kind != "latent"].latent.isna().all()


def test_ablations_contrasts_and_corrections():
    numbers = [np.array([n]) for n in (4, 1, 0, True, 0.5, 0.25)]
    (row,) = ablation.Ablations(("s",), *numbers).records()
    assert row == {
        "sae": "s", "latent": 4, "layer": 1, "prompt": 0, "is_strongest": True, "attributed": 0.5, "effect": 0.25
    }  # fmt: skip
    frame = find.Contrast("m", ("p",), ("q",), "mean", 0.05, False, 0.001, {"s": LATENTS}).to_dataframe()
    assert frame.is_found.tolist() == [False, True, False] and np.isnan(frame.q[0])
    assert frame.loc[1, ["latent", "first", "second", "activation"]].tolist() == [1, 1.0, 4.0, 13.0]
    made = correction.Correction(
        "x", "y", False, (("s", 1),), OUTCOME, OUTCOME, (OUTCOME,) * 2
    ).to_dataframe()
    assert made.kind.tolist() == ["clean", "ablated", "random", "random"] and set(made.gap) == {0.5}


def test_sweeps_and_replies():
    strengths = np.array([-1.0, 2.0])
    frame = sweep.Sweep(
        "s", 1, "add", 1.0, TOKENS, strengths, *np.arange(8.0).reshape(4, 2), 3.0, 2, 9
    ).to_dataframe()
    assert frame.loc[1].to_dict() == {
        "strength": 2.0,
        "effect": 1,
        "effect_se": 3,
        "damage": 5,
        "damage_se": 7,
    }
    steered = steer.Steered("m", (), ("p", "q"), (("a", "b"), ("c", "d")), (("A", "B"), ("C", "D")))
    assert [tuple(row.values()) for row in steered.records()] == [
        ("p", "a", "A"), ("p", "b", "B"), ("q", "c", "C"), ("q", "d", "D")
    ]  # fmt: skip


def test_layers():
    frame = LENS.to_dataframe()
    assert len(frame) == 5 * 2 and frame.groupby("of").probability.first().to_dict() == {
        "stream": 0.25, "reconstruction": 0.5, "output": 0.75
    }  # fmt: skip
    assert frame.loc[1, ["position", "token", "likeliest", "answer"]].tolist() == [2, " b", "x", "y"]
    values = np.arange(16.0).reshape(4, 2, 2)
    frame = flow.Flow("m", TOKENS, ("s", "t"), ("resid_post",) * 2, (3, 5), *values, LENS).to_dataframe()
    assert frame.iloc[3].tolist() == ["t", "resid_post", 5, 2, " b", 3.0, 7.0, 11.0, 15.0]
    effect, frequency = {"t": np.array([0.0, 0.25])}, {"t": np.array([0.5, 0.125])}
    found = links.Links(
        "s", 1, 9, 9, 0.5, {"t": None}, {"t": None}, effect, effect, frequency, {"t": 1.0}, {"t": 5}
    )
    (row,) = found.records()
    assert row == {
        "sae": "t", "layer": 5, "latent": 1, "weight": None, "cosine": None, "attribution": 0.25, "effect": 0.25,
        "frequency": 0.125,
    }  # fmt: skip


def test_one_latent():
    excerpt = one_latent.Excerpt(TOKENS, np.array([0.0, 2.0]), 1)
    look = one_latent.Look("m", "s", 1, 9, 0.1, 0.5, 1.0, np.ones(3), (excerpt,), (excerpt,) * 2, None, None)
    frame = look.to_dataframe()
    assert frame.groupby("kind").excerpt.nunique().to_dict() == {"strongest": 1, "sampled": 2}
    assert frame[frame.is_peak].token.unique().tolist() == [" b"]


def test_the_ending_chooses_the_file_format(tmp_path, capsys):
    path = READING.save(tmp_path / "a.csv")
    assert [row["latent"] for row in csv.DictReader(path.read_text().splitlines())] == ["1", "0", "2"]
    pandas.testing.assert_frame_equal(pandas.read_csv(path), READING.to_dataframe())
    assert READING.save(str(tmp_path / "a.png")).read_bytes().startswith(b"\x89PNG")
    assert READING.save(tmp_path / "a.html").read_text().startswith("<!doctype html>")
    with pytest.raises(
        ValueError, match=r"a\.xlsx has an unknown ending; Reading can be saved as \.csv, \.png, \.html"
    ):
        READING.save(tmp_path / "a.xlsx")
    with pytest.raises(ValueError, match="unknown ending"):
        READING.save(tmp_path / "a.json")
    assert capsys.readouterr().out == "" and len(list(tmp_path.iterdir())) == 3


def test_no_rows_make_no_records():
    assert list(results.records_of({"a": 1, "b": np.zeros(0)})) == []
