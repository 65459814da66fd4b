"""Latents that separate two sets of prompts: planted latents are found, with few false ones."""

import importlib
import json
import re

import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest
import scopes
import tiny
from scipy import stats
from toys import random_sae

from gemma_scope_jax import analysis
from gemma_scope_jax.models import forward, masking
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.saes import attached

# In the package, this name is a function.
module = importlib.import_module("gemma_scope_jax.analysis.contrasts.find")

SITES = {"first": Site("resid_post", 0), "second": Site("mlp_out", 2)}
PROMPTS = ["rivers", "bread and law", "a", "stars are older than any of us"]


def make_scope(tiny_gemma, mesh):
    subjects = {
        name: attached.Subject(random_sae(seed), site, None)
        for seed, (name, site) in enumerate(SITES.items())
    }
    return scopes.make(tiny_gemma, subjects, mesh, rows_per_batch=3)


@pytest.fixture(scope="module")
def scope(tiny_gemma):
    return make_scope(tiny_gemma, sharding.one_device())


@pytest.fixture(scope="module")
def slow(scope, tiny_gemma):
    """The activations [L, M] of each prompt on its own, by SAE, without BOS, in float64."""
    found = {name: [] for name in SITES}
    for prompt in PROMPTS:
        tokens = jnp.array([[masking.BOS, *tiny.encode(prompt)]])
        values = forward.read_sites(tiny_gemma, tokens, list(SITES.values()))
        for name, site in SITES.items():
            subject = scope.subjects[name].sae
            pre = np.float64(values[site][0, 1:]) @ np.float64(subject.W_enc) + subject.b_enc
            found[name].append(np.where(pre > subject.threshold, np.maximum(pre, 0), 0))
    return found


@pytest.mark.parametrize("at", module.AT)
def test_features_of_a_prompt_equal_slow_numpy(scope, slow, at):
    features, means = module.features_of(scope, PROMPTS, at)
    of = {"mean": lambda f: f.mean(0), "max": lambda f: f.max(0), "last": lambda f: f[-1]}
    for name in SITES:
        np.testing.assert_allclose(features[name], [of[at](f) for f in slow[name]], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(means[name], [f.mean(0) for f in slow[name]], rtol=1e-3, atol=1e-3)


def test_many_devices_return_the_same_features(scope, tiny_gemma):
    many = make_scope(tiny_gemma, sharding.make_mesh(2, 4))
    for got, expected in zip(
        module.features_of(many, PROMPTS, "max"), module.features_of(scope, PROMPTS, "max"), strict=True
    ):
        for name in SITES:
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-4)


def contrast_of(monkeypatch, scope, features, second, **options):
    """The contrast of features [N, M] by SAE; the last `second` prompts are the second set."""
    monkeypatch.setattr(module, "features_of", lambda *_: (features, features))
    prompts = [f"prompt {number}" for number in range(len(next(iter(features.values()))))]
    return analysis.contrast(scope, prompts[:-second], prompts[-second:], **options)


# The planted latents among 120.
PLANTED = np.arange(0, 120, 8)


def draw(kind, rng):
    """Features [N, 120] of random prompts, and the size of the second set."""
    if kind == "sparse":
        # Latents rarely fire, and most prompts are of one set.
        values = rng.exponential(size=(88, 120)) * (rng.random((88, 120)) < 0.06)
        values[:8, PLANTED] = 1 + rng.exponential(size=(8, len(PLANTED)))
        return values, 80
    values = rng.normal(size=(44, 120))
    if kind == "correlated":
        values = 0.5 * values + rng.normal(size=(44, 4)) @ rng.normal(size=(4, 120))
    if kind == "pairs":
        values = values + np.tile(rng.normal(size=(22, 1)), (2, 1))
    values[:22, PLANTED] += 4
    return np.maximum(values, 0), 22


@pytest.mark.parametrize("kind", ["independent", "correlated", "sparse", "pairs"])
def test_planted_latents_are_found_and_false_ones_stay_within_the_rate(monkeypatch, scope, kind):
    rng, rate, draws = np.random.default_rng(0), 0.1, 40
    shares, approximate, planted = [], [], []
    for _ in range(draws):
        values, second = draw(kind, rng)
        result = contrast_of(
            monkeypatch, scope, {"one": values}, second, rate=rate, is_paired=kind == "pairs"
        )
        found = np.array(result.latents("one"), int)
        planted.append(np.isin(PLANTED, found).mean())
        shares.append((~np.isin(found, PLANTED)).sum() / max(len(found), 1))
        p = stats.mannwhitneyu(values[:-second], values[-second:], method="asymptotic").pvalue
        found = np.flatnonzero(stats.false_discovery_control(np.nan_to_num(p, nan=1)) <= rate)
        approximate.append((~np.isin(found, PLANTED)).sum() / max(len(found), 1))
    assert np.mean(planted) > 0.9
    # The standard error is empirical, but at least the binomial one of independent discoveries.
    error = max(np.std(shares) / np.sqrt(draws), np.sqrt(rate / (draws * len(PLANTED))))
    assert np.mean(shares) <= rate + 2 * error
    if kind == "sparse":  # SciPy's approximation alone exceeds the rate here.
        assert np.mean(approximate) > rate + 2 * error


def test_without_planted_latents_false_discoveries_stay_within_the_rate(monkeypatch, scope):
    rng, rate, draws = np.random.default_rng(1), 0.1, 100
    found = 0
    for _ in range(draws):
        values = rng.exponential(size=(30, 60)) * (rng.random((30, 60)) < 0.3)
        found += bool(contrast_of(monkeypatch, scope, {"one": values}, 24, rate=rate).found())
    assert found / draws <= rate + 2 * np.sqrt(rate * (1 - rate) / draws)


def test_statistics_pool_all_saes_and_leave_out_silent_latents(monkeypatch, scope):
    rng = np.random.default_rng(0)
    features = {"a": rng.random((20, 30)), "<b>": rng.random((20, 10))}
    features["a"][:, :4] = 0
    features["a"][:10, 7] += 2
    features["<b>"][10:, 3] += 3
    features["<b>"][10:, 5] += 2
    features["<b>"][0, 5] = 2.5
    result = contrast_of(monkeypatch, scope, features, 10)
    assert (result.tested, result.silent) == (36, 4)
    assert result.found() == [("<b>", 3), ("a", 7), ("<b>", 5)]
    assert result.latents("<b>") == [3, 5] and result.latents("a") == [7]
    one = result.of["a"]
    assert np.isnan([one.p_M[:4], one.q_M[:4], one.auroc_M[:4]]).all() and (one.activation_M[:4] == 0).all()
    p = np.concatenate([one.p_M[4:], result.of["<b>"].p_M])
    q = np.concatenate([one.q_M[4:], result.of["<b>"].q_M])
    # Benjamini and Hochberg: q is the smallest p · n / rank from each rank on.
    order = np.argsort(p)
    slow = np.minimum.accumulate((p[order] * 36 / np.arange(1, 37))[::-1])[::-1]
    np.testing.assert_allclose(q[order], np.minimum(slow, 1))
    for M, of in ((one.first_M, features["a"][:10]), (one.second_M, features["a"][10:])):
        np.testing.assert_allclose(M, of.mean(0))
    np.testing.assert_allclose(one.fires_second_M, (features["a"][10:] > 0).mean(0))
    assert result.smallest_p == pytest.approx(2 / (10 * 36 / 0.05 + 1))


def test_it_shows_draws_and_writes_the_latents_found(monkeypatch, scope, tmp_path, capsys):
    rng = np.random.default_rng(0)
    features = {"a": rng.random((20, 30))}
    features["a"][:10, 7] += 2
    result = contrast_of(monkeypatch, scope, features, 10)
    result.show()
    shown = capsys.readouterr().out
    assert re.search(r" 7 +1\.000 ", shown) and "a: 1 latent found" in shown
    assert "1 of 30 latents separate the sets (10 and 10 prompts) at a false discovery rate of 0.05" in shown
    figure = result.figure()
    assert isinstance(figure, matplotlib.figure.Figure)
    (axis,) = figure.axes
    grey, blue = (collection.get_offsets() for collection in axis.collections)
    assert (len(grey), len(blue)) == (29, 1) and [text.get_text() for text in axis.texts] == ["7"]
    np.testing.assert_allclose(blue[0], [1.0, -np.log10(result.of["a"].q_M[7])])
    result.write_json(tmp_path / "a.json")
    stored = json.loads((tmp_path / "a.json").read_text())
    assert stored["tested"] == 30 and stored["sae"]["a"]["silent"] == 0
    (one,) = stored["sae"]["a"]["found"]
    assert one["latent"] == 7 and one["auroc"] == 1 and one["q"] == float(result.of["a"].q_M[7])


def test_few_prompts_report_the_smallest_possible_p(monkeypatch, scope):
    # Only the planted latents differ between the sets.
    features = {"a": np.tile(np.random.default_rng(0).random((4, 30)), (2, 1))}
    features["a"][:4, :3] += 2
    result = contrast_of(monkeypatch, scope, features, 4)
    # By hand: the smallest p is 2 / 70. Of 30 latents, 18 must reach it; a single latent would need 0.05 / 30.
    assert result.smallest_p == 2 / 70 and not result.found()
    assert "At least 18 latents must reach it for any to be found" in result.about()
    assert result.about().endswith(
        "A latent found alone needs p ≤ 0.0017, which takes 7 prompts in each set."
    )
    features["a"][:4, :17] += 2
    assert not contrast_of(monkeypatch, scope, features, 4).found()
    features["a"][:4, 17] += 2
    assert len(contrast_of(monkeypatch, scope, features, 4).found()) == 18


@pytest.mark.parametrize(
    ("first", "second", "options", "message"),
    [
        (
            list("abc"),
            list("def"),
            {},
            r"3 and 3 prompts the smallest possible p is 0\.1, .* least 4 prompts in each set",
        ),
        (list("abcd"), list("efgh"), {"is_paired": True}, r"4 pairs the .* 0\.12, .* at least 6 pairs"),
        (list("abcd"), list("abc"), {"is_paired": True}, "these have 4 and 3"),
        (list("abcda"), list("efgh"), {}, "the prompt 'a' appears twice"),
        (list("aabcde"), list("wwvxyz"), {"is_paired": True}, r"the pair \('a', 'w'\) appears twice"),
        (list("abcd"), ["", *"efg"], {}, "prompt 4 is empty"),
        (list("abcd"), list("efgh"), {"at": "first"}, "at is 'first'; choose one of mean, max, last"),
        (list("abcd"), list("efgh"), {"rate": 1.0}, "rate is 1.0; it must be between 0 and 1"),
        ([], list("efgh"), {}, "0 and 4 prompts"),
    ],
)
def test_invalid_arguments_are_refused(scope, first, second, options, message):
    with pytest.raises(ValueError, match=message):
        analysis.contrast(scope, first, second, **options)
