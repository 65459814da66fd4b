"""Descriptions of latents and their scores, compared with slow NumPy, counted pairs and planted latents."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import tiny
from sklearn.metrics import roc_auc_score
from toys import random_sae

from gemma_scope_jax.cli import main
from gemma_scope_jax.data import token_rows
from gemma_scope_jax.evaluation import detection, token_descriptions
from gemma_scope_jax.models import masking
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.saes import attached
from gemma_scope_jax.training import loop

BOS, EOS, PAD = masking.BOS, masking.EOS, masking.PAD
EMBED = Site("embed", 0)


def rows_of(count, length=32, seed=0, vocabulary=40):
    """Rows of random words; a document begins in each row, and some rows end in padding."""
    tokens = (
        np.random.default_rng(seed).integers(100, 100 + vocabulary, size=(count, length)).astype(np.int32)
    )
    tokens[:, 0] = BOS
    tokens[1::2, length // 2] = BOS
    tokens[::5, -3:] = PAD
    # The document of an even row continues in the next row, whose second segment is another document.
    documents = np.repeat(np.arange(0, count, 2), 2)[:count]
    return token_rows.Batch(tokens, np.arange(count), documents)


def test_whole_documents_are_divided_into_halves_of_similar_size():
    rows = rows_of(40)
    text = token_descriptions.divide(rows.tokens, rows.first_document, 1)
    half_of = {}
    for row in range(40):
        segment, position = -1, 0
        for column in range(32):
            token = rows.tokens[row, column]
            segment, position = (segment + 1, 0) if token == BOS else (segment, position + 1)
            assert text.position_RxL[row, column] == position
            half = text.half_RxL[row, column]
            if token in (BOS, PAD) or position == 1:  # The prefix leaves out one position after BOS.
                assert half == -1
            else:
                assert half_of.setdefault(rows.first_document[row] + segment, half) == half in (0, 1)
    assert np.array_equal(text.vocabulary_V[text.tokens_RxL], rows.tokens)
    sizes = [(text.half_RxL == half).sum() for half in (0, 1)]
    assert abs(sizes[0] - sizes[1]) <= 48  # The length of the longest document.


def test_one_document_cannot_be_divided():
    rows = rows_of(1)
    with pytest.raises(ValueError, match="1 rows are of 1 document, but two are needed; give more --rows"):
        token_descriptions.divide(rows.tokens, rows.first_document, 0)


def test_passages_end_at_the_given_positions_and_stay_in_their_segment():
    tokens = np.array([[BOS, *range(10, 20), BOS, 20, 21, PAD], [BOS, *range(30, 44)]], np.int32)
    text = token_descriptions.divide(tokens, np.array([0, 2]), 0)
    found = token_descriptions.passages(text, np.array([1, 10, 13, 15 + 14]))
    found = np.where(found >= 0, text.vocabulary_V[found], -1)
    assert found.tolist() == [
        [*[-1] * 7, BOS, 10],
        list(range(11, 20)),
        [*[-1] * 6, BOS, 20, 21],
        list(range(35, 44)),
    ]


def lift_slowly(examples, elsewhere, token, is_last):
    """The log lift of one token from its definition."""

    def occurrences(passages):
        return sum(token == p[-1] if is_last else token in p[:-1] for p in passages)

    expected = occurrences(elsewhere) / len(elsewhere) * len(examples)
    return np.log((occurrences(examples) + 1) / (expected + 1))


def evidence_slowly(examples, elsewhere, weight, passage):
    before = sum(lift_slowly(examples, elsewhere, token, False) for token in set(passage[:-1]) - {-1})
    return lift_slowly(examples, elsewhere, passage[-1], True) + weight * before


def auroc_slowly(positive, negative):
    return np.mean([(a > b) + (a == b) / 2 for a in positive for b in negative])


def random_passages(rng, count, favoured=None):
    """Random passages; a quarter are short, and most have the favoured token, if any, before the last token."""
    made = rng.integers(12, size=(count, 9))
    if favoured is not None:
        made[np.arange(count), rng.integers(8, size=count)] = np.where(rng.random(count) < 0.7, favoured, 3)
    made[::4, :5] = -1
    return made


@pytest.mark.parametrize("favoured", [None, 7])
def test_descriptions_equal_slow_numpy(favoured):
    rng = np.random.default_rng(0)
    examples = random_passages(rng, 20, favoured)
    elsewhere, silent, tested = (random_passages(rng, n) for n in (60, 40, 15))
    size = 13  # One of the tokens never occurs.
    found = token_descriptions.describe(examples, token_descriptions.count(elsewhere, size), silent)
    examples, elsewhere, silent, tested = (part.tolist() for part in (examples, elsewhere, silent, tested))
    for token in range(size):
        for name, is_last in (("last_V", True), ("before_V", False)):
            expected = lift_slowly(examples, elsewhere, token, is_last)
            np.testing.assert_allclose(getattr(found, name)[token], expected, rtol=1e-12)
    evidence = found.evidence(np.array(tested))
    expected = [evidence_slowly(examples, elsewhere, found.weight, passage) for passage in tested]
    np.testing.assert_allclose(evidence, expected, rtol=1e-10, atol=1e-12)
    by_weight = {}
    for weight in token_descriptions.WEIGHTS:
        own = [
            evidence_slowly(examples[:i] + examples[i + 1 :], elsewhere, weight, passage)
            for i, passage in enumerate(examples)
        ]
        others = [evidence_slowly(examples, elsewhere, weight, passage) for passage in silent]
        by_weight[weight] = auroc_slowly(np.round(own, 9), np.round(others, 9))
    np.testing.assert_allclose(by_weight[found.weight], max(by_weight.values()), atol=1e-3)
    assert favoured is None or found.weight > 0


def test_the_score_is_the_share_of_ordered_pairs_and_equals_scikit_learn():
    rng = np.random.default_rng(0)
    description = token_descriptions.Description(rng.integers(-2, 3, size=6).astype(float), np.zeros(6), 1.0)
    firing, silent = rng.integers(6, size=(20, 9)), rng.integers(6, size=(70, 9))
    expected = auroc_slowly(description.evidence(firing), description.evidence(silent))
    found = token_descriptions.score(description, firing, silent)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    both = description.evidence(np.concatenate([firing, silent]))
    np.testing.assert_allclose(found, roc_auc_score([1] * 20 + [0] * 70, both), rtol=1e-12)


def random_latents(text, count, share, seed=1):
    """Latents that fire at random, with random strengths."""
    rng = np.random.default_rng(seed)
    f = rng.random((*text.tokens_RxL.shape, count)).astype(np.float32)
    return np.where((rng.random(f.shape) < share) & (text.half_RxL >= 0)[..., None], f, 0)


def collected(text, pool, f, per_batch):
    found = detection.Firings(text, pool, f.shape[-1], seed=0)
    for first in range(0, len(f), per_batch):
        found.add(first, f[first : first + per_batch])
    return found


def test_kept_firings_equal_a_slow_search_of_all_firings(monkeypatch):
    rows = rows_of(60, length=40)
    text = token_descriptions.divide(rows.tokens, rows.first_document, 0)
    half = text.half_RxL.reshape(-1)
    pool = np.sort(np.random.default_rng(2).permutation(half.size)[:100])
    f = random_latents(text, 5, 0.3)
    f[..., 4] = 0
    found = collected(text, pool, f, per_batch=7)
    flat = f.reshape(-1, 5)
    assert found.count_C.tolist() == (flat > 0).sum(0).tolist() and found.count_C[4] == 0
    assert np.array_equal(found.is_firing_NxC, flat[pool] > 0)
    for latent in range(5):
        best = {}
        for position in np.flatnonzero((half == 0) & (flat[:, latent] > 0)).tolist():
            passage = (position // 40, position % 40 // detection.APART)
            best[passage] = max(best.get(passage, (0, 0)), (flat[position, latent], position))
        expected = sorted(best.values(), reverse=True)[: detection.EXAMPLES]
        assert found.examples.position[found.examples.latent == latent].tolist() == [p for _, p in expected]
        tested = found.tested.where(found.tested.latent == latent)
        firing = np.flatnonzero((half == 1) & (flat[:, latent] > 0))
        assert len(tested.position) == len(set(tested.position)) == min(len(firing), detection.FIRINGS)
        assert set(tested.position) <= set(firing)
        assert np.array_equal(tested.value, flat[tested.position, latent])
    # The kept firings do not depend on the batch size.
    for name in ("examples", "tested"):
        for one, other in zip(getattr(found, name), getattr(collected(text, pool, f, 60), name), strict=True):
            assert np.array_equal(one, other)


def test_the_sample_of_firings_is_uniform_over_rows_and_strengths():
    rows = rows_of(400)
    text = token_descriptions.divide(rows.tokens, rows.first_document, 0)
    f = random_latents(text, 200, 0.3)
    found = collected(text, np.flatnonzero(text.half_RxL.reshape(-1) == 1)[:10], f, 50)
    firing = np.flatnonzero(text.half_RxL.reshape(-1) == 1)
    n = len(found.tested.position)
    assert n == 200 * detection.FIRINGS
    # The means of n uniform samples are within four standard errors.
    for drawn, everyone in ((found.tested.position, firing), (found.tested.value, np.linspace(0, 1, 1000))):
        assert abs(drawn.mean() - everyone.mean()) < 4 * everyone.std() / np.sqrt(n)


def summarized(text, f, wanted=100):
    half = text.half_RxL.reshape(-1)
    pool = np.sort(np.random.default_rng(0).permutation(np.flatnonzero(half >= 0))[:4000])
    first = token_descriptions.passages(text, pool[half[pool] == 0])
    elsewhere = token_descriptions.count(first, len(text.vocabulary_V))
    return detection.summarize(
        collected(text, pool, f, 50), np.arange(f.shape[-1]) + 1000, wanted, elsewhere, str
    )


def test_random_firing_scores_a_half_and_earlier_tokens_are_described():
    """Latents of a token, of tokens after another token, of the token five places earlier, and noise."""
    rows = rows_of(400)
    text = token_descriptions.divide(rows.tokens, rows.first_document, 0)
    tokens, kept = rows.tokens, text.half_RxL >= 0

    def ago(n):
        earlier = np.roll(tokens, n, axis=1)
        return np.where(text.position_RxL > n, earlier, -1)

    planted = np.stack([tokens == 105, (tokens < 120) & (ago(1) == 106), ago(5) == 107], -1) & kept[..., None]
    noise = random_latents(text, 40, 0.05)
    strength = np.random.default_rng(3).random(planted.shape).astype(np.float32)
    f = np.concatenate([np.where(planted, 1 + strength, 0), noise], -1)
    result = summarized(text, f)
    assert [latent.latent for latent in result.latents] == list(range(1000, 1043)) and result.scorable == 1
    on, behind, ago5, *rest = result.latents
    assert on.auroc == on.auroc_strongest == 1 and on.words["on"][0] == "[105]"
    # The token explains half, and the tokens in the eight places before it nearly all of the rest.
    assert behind.auroc > 0.9 and behind.words["before"][0] == "[106]"
    assert ago5.auroc > 0.85 and ago5.words["before"][0] == "[107]"
    for latent in result.latents:
        np.testing.assert_allclose(latent.frequency, (f[..., latent.latent - 1000] > 0).sum() / kept.sum())
    noisy = np.array([latent.auroc for latent in rest])
    assert abs(noisy.mean() - 0.5) < 3 * noisy.std() / np.sqrt(40) and noisy.std() < 0.06
    assert 0.4 < result.control < 0.6
    everyone = np.array([latent.auroc for latent in result.latents])
    np.testing.assert_allclose(result.auroc, everyone.mean())
    np.testing.assert_allclose(result.auroc_se, everyone.std(ddof=1) / np.sqrt(43))
    few = summarized(text, f, wanted=5)
    assert [latent.latent for latent in few.latents] == list(range(1000, 1005))


def test_latents_that_fire_too_rarely_or_everywhere_are_not_scored():
    rows = rows_of(100)
    text = token_descriptions.divide(rows.tokens, rows.first_document, 0)
    f = random_latents(text, 4, 0.3)
    f[..., 0] = 0
    f.reshape(-1, 4)[np.flatnonzero(f[..., 1].reshape(-1))[5:], 1] = 0
    f[..., 2] = text.half_RxL >= 0
    result = summarized(text, f)
    assert [latent.latent for latent in result.latents] == [1003] and result.scorable == 0.25
    assert np.isnan(result.control) and np.isnan(result.auroc_se)
    assert detection.numbers(result)["control"] is None
    nothing = summarized(text, 0 * f)
    assert nothing.latents == () and detection.numbers(nothing)["auroc"] is None


def on_tokens(chosen, d=32):
    """A random SAE of the token embeddings, whose first latents fire on one token each."""
    embedding_VxD = np.asarray(tiny.params()["embedder"]["input_embedding"], np.float64) * np.sqrt(d)
    made = random_sae()
    arrays = {name: np.array(getattr(made, name)) for name in ("W_enc", "b_enc", "threshold")}
    for latent, token in enumerate(chosen):
        direction_D = embedding_VxD[token] / np.square(embedding_VxD[token]).sum()
        assert np.delete(embedding_VxD @ direction_D, token).max() < 0.9
        arrays["W_enc"][:, latent], arrays["b_enc"][latent], arrays["threshold"][latent] = (
            direction_D,
            0,
            0.95,
        )
    return made.replace(**arrays)


def test_latents_of_single_tokens_are_described_by_their_token(tiny_gemma):
    rows = rows_of(120, vocabulary=20)
    subjects = {"planted": attached.Subject(on_tokens(range(100, 110)), EMBED, None)}
    arguments = (tiny_gemma, subjects, rows, 64, 0)
    result = detection.detect(*arguments, per_batch=50, decode=str)["planted"]
    planted = [latent for latent in result.latents if latent.latent < 10]
    assert len(planted) == 10
    for latent in planted:
        assert latent.auroc == 1 and latent.words["on"] == [f"[{100 + latent.latent}]"]
        np.testing.assert_allclose(
            latent.frequency,
            (rows.tokens == 100 + latent.latent).sum() / (~np.isin(rows.tokens, (BOS, PAD))).sum(),
        )
    assert result.control < 0.75
    again = detection.detect(*arguments, per_batch=7, decode=str)["planted"]
    assert dataclasses.asdict(again) == dataclasses.asdict(result)
    mesh = sharding.make_mesh(2, 4)
    again = detection.detect(tiny_gemma.replace(mesh=mesh), *arguments[1:], per_batch=16, decode=str)[
        "planted"
    ]
    assert [latent.latent for latent in again.latents] == [latent.latent for latent in result.latents]
    np.testing.assert_allclose(again.auroc, result.auroc, atol=1e-3)
    other = detection.detect(*arguments[:-1], 1, per_batch=50, decode=str)["planted"]
    assert [latent.latent for latent in other.latents] != [latent.latent for latent in result.latents]


def test_the_command_scores_a_run(inputs, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    loop.train(tiny.run_config(inputs, banks__main__sparsity_coefficients=(1e-3, 1e-1)), run)
    asked = ["detect", str(run), "--rows=100000", "--latents=6", f"--out={tmp_path / 'out'}"]
    monkeypatch.setattr("sys.argv", ["gemma_scope_jax", *asked])
    main.run(sys.argv[1:])
    stored = json.loads((tmp_path / "out" / "detection.json").read_text())
    assert stored["rows"] > 10 and len(stored["sae"]) == 2
    shown = capsys.readouterr().out
    for name, result in stored["sae"].items():
        scores = [latent["auroc"] for latent in result["latents"]]
        assert len(scores) == 6
        np.testing.assert_allclose(result["auroc"], np.mean(scores))
        assert f"{result['auroc']:.3f} ± {result['auroc_se']:.3f}" in shown and name in shown
    for option in ("--rows", "--latents", "--rows_per_batch"):
        monkeypatch.setattr("sys.argv", ["gemma_scope_jax", *asked, f"{option}=0"])
        with pytest.raises(SystemExit):
            main.run(sys.argv[1:])
        said = capsys.readouterr().err
        assert f"{option.replace('_', '-')}: it is 0; it must be at least 1 and" in said
