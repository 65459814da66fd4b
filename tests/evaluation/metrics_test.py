"""Every metric compared with slow float64 NumPy, one token at a time, and with cases known by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from toys import Rows, random_sae

from gemma_scope_jax.data import batching, token_rows
from gemma_scope_jax.evaluation import evaluate, measuring, metrics
from gemma_scope_jax.models import forward, masking, passes, predictions
from gemma_scope_jax.models import placement as placement_lib
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.saes import attached, evaluation_file, geometry

SITE = Site("resid_post", 1)
COUNT = 10


def logits_in_float64(tiny_gemma, tokens_L, write):
    """The logits of one row, with the site's activations changed by `write`."""
    row = jnp.asarray(tokens_L)[None]
    x = forward.embed(tiny_gemma, row)
    x = forward.run_blocks(tiny_gemma, x, row, range(4), write={SITE: write})[0]
    x = np.asarray(x[0], np.float64)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    x = x * (1 + np.asarray(tiny_gemma.params["final_norm"]["scale"], np.float64))
    return np.tanh(x @ np.asarray(tiny_gemma.params["embedder"]["input_embedding"], np.float64).T / 3.0) * 3.0


def log_softmax(values):
    return values - np.log(np.exp(values).sum())


@pytest.fixture(scope="module")
def measured(tiny_gemma):
    subject = random_sae()
    rows = Rows(tiny.tokens(12, 24, special=0.1))
    mean = np.full(32, 0.5, np.float32)
    subjects = {"a": attached.Subject(subject, SITE, mean)}
    result = evaluate.evaluate(tiny_gemma, subjects, rows, rows, COUNT, 4)[0]["a"]
    return subject, rows.tokens[token_rows.order(12, batching.ORDER_SEED, 0, COUNT)], mean, result


@pytest.fixture(scope="module")
def slow(measured, tiny_gemma):
    """The same in slow NumPy: for each row, a dict of arrays with one value per counted token."""
    subject, tokens, _, _ = measured
    p = {name: np.asarray(v, np.float64) for name, v in vars(subject).items() if v is not None}
    special = (masking.BOS, masking.EOS, masking.PAD)
    found = []
    for row in tokens:
        values = forward.read_sites(tiny_gemma, jnp.asarray(row)[None], [SITE])[SITE][0]
        y = np.asarray(values, np.float64)
        pre = y @ p["W_enc"] + p["b_enc"]
        f = np.where(pre > p["threshold"], np.maximum(pre, 0), 0)
        recon = f @ p["W_dec"] + p["b_dec"]
        kept = ~np.isin(row, special)
        spliced = jnp.asarray(np.where(kept[:, None], recon, y), jnp.float32)[None]
        clean_logits, logits = (
            logits_in_float64(tiny_gemma, row, w) for w in (lambda x: x, lambda x, s=spliced: s)
        )

        def centred(value, row=row, kept=kept):
            """The sum of the centred logits in float32, for plain differentiation of all logits at once."""
            out = forward.embed(tiny_gemma, row[None])
            write = {SITE: lambda _: value}
            out = forward.run_blocks(tiny_gemma, out, row[None], range(4), write=write)[0]
            all_logits = predictions.logits(tiny_gemma, out)[0]
            total = 0.0
            for t in range(len(row) - 1):
                if kept[t] and row[t + 1] not in (masking.BOS, masking.PAD):
                    total += all_logits[t, row[t + 1]] - all_logits[t].mean()
            return total

        gradient = np.asarray(jax.grad(centred)(values[None])[0], np.float64)
        of_row = {name: [] for name in ("y", "recon", "f", "position", "r_l0", "loss", "clean", "kl", "at")}
        start = 0
        for t, token in enumerate(row):
            start = t if token == masking.BOS else start
            if not kept[t]:
                continue
            of_row["y"].append(y[t])
            of_row["recon"].append(recon[t])
            of_row["f"].append(f[t])
            of_row["position"].append(t - start)
            importance = [abs(f[t, i] * float(gradient[t] @ p["W_dec"][i])) for i in range(64) if f[t, i] > 0]
            if sum(importance) > 0:  # After the last prediction, no latent matters.
                share = np.array(importance) / sum(importance)
                of_row["r_l0"].append(np.exp(-sum(s * np.log(s) for s in share)) / len(share))
            if t + 1 < len(row) and row[t + 1] not in (masking.BOS, masking.PAD):
                clean_log_p, log_p = log_softmax(clean_logits[t]), log_softmax(logits[t])
                of_row["loss"].append(-log_p[row[t + 1]])
                of_row["clean"].append(-clean_log_p[row[t + 1]])
                of_row["kl"].append(sum(np.exp(a) * (a - b) for a, b in zip(clean_log_p, log_p, strict=True)))
                of_row["at"].append(t - start)
        found.append({name: np.array(values) for name, values in of_row.items()})
    return found


def over(slow, value):
    """The mean over all tokens."""
    return np.concatenate([value(row) for row in slow]).mean()


def test_reconstruction(measured, slow):
    _, _, mean, result = measured
    y, recon = (np.concatenate([row[name] for row in slow]) for name in ("y", "recon"))
    error = np.square(recon - y)
    near = dict(rtol=1e-4)
    np.testing.assert_allclose(result.fvu, error.sum() / np.square(y - y.mean(0)).sum(), **near)
    np.testing.assert_allclose(result.fvu_per_dimension, (error.mean(0) / y.var(0)).mean(), **near)
    np.testing.assert_allclose(result.explained_variance_elements, 1 - error.mean() / y.var(), **near)
    of_tokens = [1 - e.sum() / np.square(v - mean).sum() for e, v in zip(error, y, strict=True)]
    np.testing.assert_allclose(result.explained_variance_tokens, np.mean(of_tokens), **near)
    lengths = [(np.linalg.norm(a), np.linalg.norm(b), a @ b) for a, b in zip(y, recon, strict=True)]
    np.testing.assert_allclose(result.cosine, np.mean([d / (a * b) for a, b, d in lengths]), **near)
    np.testing.assert_allclose(result.norm_ratio, np.mean([b / a for a, b, _ in lengths]), **near)
    assert result.activations == len(y)


def test_sparsity(measured, slow):
    subject, _, _, result = measured
    f = np.concatenate([row["f"] for row in slow])
    l0 = (f > 0).sum(1)
    np.testing.assert_allclose(result.l0, l0.mean(), rtol=1e-6)
    np.testing.assert_array_equal(result.l0_counts, np.bincount(l0))
    for quantile, value in zip(evaluation_file.QUANTILES, result.l0_quantiles, strict=True):
        assert (l0 <= value).mean() >= quantile / 100 > (l0 < value).mean() - 1e-9
    np.testing.assert_allclose(result.frequency, (f > 0).mean(0), atol=1e-6)
    assert result.dead_fraction == ((f > 0).sum(0) == 0).mean()
    assert result.dense_fraction == ((f > 0).mean(0) > 0.1).mean()
    W_dec = np.float64(subject.W_dec)
    unit = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    nearest = [max(unit[i] @ unit[j] for j in range(64) if j != i) for i in range(64)]
    np.testing.assert_allclose(result.nearest_cosine, nearest, rtol=1e-5)
    np.testing.assert_allclose(geometry.nearest_cosine(subject.W_dec, block=10), nearest, rtol=1e-5)
    np.testing.assert_allclose(result.decoder_cosine, np.median(nearest), rtol=1e-5)


def test_predictions(measured, slow):
    _, _, _, result = measured
    np.testing.assert_allclose(result.clean_loss, over(slow, lambda row: row["clean"]), rtol=1e-5)
    np.testing.assert_allclose(result.spliced_loss, over(slow, lambda row: row["loss"]), rtol=1e-5)
    np.testing.assert_allclose(
        result.delta_loss, over(slow, lambda row: row["loss"] - row["clean"]), rtol=1e-3
    )
    np.testing.assert_allclose(result.kl, over(slow, lambda row: row["kl"]), rtol=1e-3)
    assert result.kl > 0.01  # Otherwise nothing was compared.
    np.testing.assert_allclose(result.r_l0, over(slow, lambda row: row["r_l0"]), rtol=1e-3)
    assert 0.1 < result.r_l0 < 0.99


def test_by_position(measured, slow):
    _, _, _, result = measured
    at = np.concatenate([row["position"] for row in slow])
    scored_at = np.concatenate([row["at"] for row in slow])
    y, recon, f = (np.concatenate([row[name] for row in slow]) for name in ("y", "recon", "f"))
    delta = np.concatenate([row["loss"] - row["clean"] for row in slow])
    variance = np.square(y - y.mean(0)).sum(1).mean()
    for position in range(24):
        here, scored = at == position, scored_at == position
        assert result.by_position["activations"][position] == here.sum()
        assert result.by_position["tokens"][position] == scored.sum()
        if here.any():
            np.testing.assert_allclose(
                result.by_position["l0"][position], (f[here] > 0).sum(1).mean(), rtol=1e-5
            )
            error = np.square(recon - y)[here].sum(1).mean() / variance
            np.testing.assert_allclose(result.by_position["error"][position], error, rtol=1e-4)
        if scored.any():
            want = delta[scored].mean()
            np.testing.assert_allclose(result.by_position["delta_loss"][position], want, rtol=1e-3, atol=1e-5)
    assert at.max() > 10 and (at == 1).sum() > 3


def test_every_standard_error_equals_a_bootstrap_over_rows(measured, slow):
    """Compared with a bootstrap of the slow numbers."""
    _, _, mean, result = measured
    rng = np.random.default_rng(0)

    def statistics(rows):
        y, recon = (np.concatenate([row[name] for row in rows]) for name in ("y", "recon"))
        error = np.square(recon - y)
        every = {
            name: np.concatenate([row[name] for row in rows]) for name in ("loss", "clean", "kl", "r_l0", "f")
        }
        return {
            "l0": (every["f"] > 0).sum(1).mean(),
            "fvu": error.sum() / np.square(y - y.mean(0)).sum(),
            "fvu_per_dimension": (error.mean(0) / y.var(0)).mean(),
            "explained_variance_elements": 1 - error.mean() / y.var(),
            "explained_variance_tokens": (1 - error.sum(1) / np.square(y - mean).sum(1)).mean(),
            "cosine": ((y * recon).sum(1) / np.linalg.norm(y, axis=1) / np.linalg.norm(recon, axis=1)).mean(),
            "norm_ratio": (np.linalg.norm(recon, axis=1) / np.linalg.norm(y, axis=1)).mean(),
            "delta_loss": every["loss"].mean() - every["clean"].mean(),
            "clean_loss": every["clean"].mean(),
            "kl": every["kl"].mean(),
            "r_l0": every["r_l0"].mean(),
        }

    drawn = [statistics([slow[i] for i in rng.integers(COUNT, size=COUNT)]) for _ in range(2000)]
    for name in drawn[0]:
        spread = np.std([one[name] for one in drawn]) * np.sqrt(COUNT / (COUNT - 1))
        # Ten rows are few for the variance of a variance, and both values are estimates.
        np.testing.assert_allclose(getattr(result, f"{name}_se"), spread, rtol=0.3, err_msg=name)


def test_the_standard_error_of_loss_recovered_equals_a_bootstrap_over_rows():
    """The losses are made up; ablation costs much, as in a real model."""
    rng = np.random.default_rng(0)
    s, length = 60, 5
    scored = rng.integers(0, 2, size=(s, length)).astype(float)
    hard = rng.gamma(2, size=(s, 1))  # Some rows have higher losses throughout.
    losses = {name: scored * hard * mean * rng.gamma(4, 0.25, size=(s, length)) for name, mean in
              (("clean", 2), ("loss", 2.4), ("zero", 9), ("mean", 5))}  # fmt: skip
    of_sae, references = measuring.Totals(), metrics.Totals()
    position = np.tile(np.arange(length), (s, 1))
    rest = {
        f"{n}_SxL": np.ones((s, length))
        for n in ("count", "l0", "explained", "cosine", "norm_ratio", "error")
    }
    of_sae.add(
        rest | {"error_SxO": np.ones((s, 2)), "loss_SxL": losses["loss"], "fired_M": np.ones(64)}, position
    )
    y = {"y_SxO": rng.normal(size=(s, 2)), "y_within_SxO": 9 + rng.random((s, 2))}
    references.add(
        y | {f"{n}_SxL": losses[n] for n in ("clean", "zero", "mean")} | {"scored_SxL": scored}, position
    )
    result = metrics.summarize(random_sae(), of_sae, references)
    for name in ("zero", "mean"):
        rows = {key: value.sum(1) for key, value in losses.items()}

        def recovered(i, rows=rows, name=name):
            clean = rows["clean"][i].sum()
            return 1 - (rows["loss"][i].sum() - clean) / (rows[name][i].sum() - clean)

        np.testing.assert_allclose(getattr(result, f"loss_recovered_{name}"), recovered(np.arange(s)))
        drawn = [recovered(i) for i in rng.integers(s, size=(4000, s))]
        found = getattr(result, f"loss_recovered_{name}_se")
        np.testing.assert_allclose(found, np.std(drawn) * np.sqrt(s / (s - 1)), rtol=0.1)


def test_uniformity_by_hand():
    """Four equal latents: 1. One of four that dominates: ¼. Two with importances 3 to 1: exp(H) / 2."""
    importance = jnp.array([[2.0, 2, 2, 2], [1, 1e-12, 1e-12, 1e-12], [3, 1, 0, 0], [0, 0, 0, 0]])
    found, is_active = measuring.uniformity(importance)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    np.testing.assert_allclose(found, [1, 0.25, np.exp(entropy) / 2, 0], rtol=1e-5)
    assert is_active.tolist() == [True, True, True, False]


def test_divergence_by_hand(tiny_gemma, monkeypatch):
    """The KL of (½, ½) from (¼, ¾) is ½ ln 2 + ½ ln ⅔ = ½ ln 4⁄3; that of a distribution from itself is 0."""
    table = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
    monkeypatch.setattr(predictions, "logits", lambda gemma, x: table[x[..., 0].astype(int)])
    clean, other = jnp.zeros((2, 5, 1)), jnp.array([[0.0], [1], [1], [0], [1]])[None].repeat(2, 0)
    tokens = jnp.ones((2, 5), int)
    loss, kl = predictions.next_token_divergence(None, other, clean, tokens, chunk=4)
    want = 0.5 * np.log(4 / 3)
    np.testing.assert_allclose(kl, [[0, want, want, 0, want]] * 2, atol=1e-6)
    np.testing.assert_allclose(loss[0, :2], -np.log([0.5, 0.75]), rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_logits_in_chunks_equal_all_logits_at_once(tiny_gemma, chunk):
    tokens = jnp.asarray(tiny.tokens(3, 11))
    x = jax.random.normal(jax.random.key(0), (3, 11, 32))
    logits = predictions.logits(tiny_gemma, x)
    target = masking.next_tokens(tokens)
    want = jnp.take_along_axis(logits, target[..., None], -1)[..., 0] - logits.mean(-1)
    got = predictions.centred_logits(tiny_gemma, x, tokens, chunk)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_fast_leaves_out_the_slowest_metrics_and_changes_no_other(measured, tiny_gemma):
    subject, _, mean, result = measured
    rows = Rows(tiny.tokens(12, 24, special=0.1))
    subjects = {"a": attached.Subject(subject, SITE, mean)}
    fast = evaluate.evaluate(tiny_gemma, subjects, rows, rows, COUNT, 4, is_fast=True)[0]["a"]
    assert (fast.kl, fast.r_l0, fast.r_l0_se) == (None, None, None)
    full = evaluation_file.numbers(result)
    for name, value in evaluation_file.numbers(fast).items():
        if not name.startswith(("kl", "r_l0")):
            np.testing.assert_allclose(value, full[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_eight_devices_agree_with_one(measured, tiny_gemma):
    subject, _, mean, result = measured
    mesh = sharding.make_mesh(2, 4)
    placement = placement_lib.gemma_placement(mesh, True)
    split = jax.tree.map_with_path(
        lambda path, leaf: jax.device_put(leaf, placement(path[-1].key, leaf.shape)), tiny_gemma.params
    )
    several = tiny_gemma.replace(mesh=mesh, params=split)
    rows = Rows(tiny.tokens(12, 24, special=0.1))
    subjects = {"a": attached.Subject(subject, SITE, mean)}
    many = evaluate.evaluate(several, subjects, rows, rows, COUNT, 4)[0]["a"]
    for name, value in evaluation_file.numbers(many).items():
        np.testing.assert_allclose(
            value, evaluation_file.numbers(result)[name], rtol=1e-4, atol=1e-5, err_msg=name
        )


def test_a_silent_sae_has_no_uniformity():
    silent = jax.tree.map(np.zeros_like, random_sae())
    x = jnp.ones((1, 3, 32))
    _, found = measuring.measure(silent, x, x, jnp.zeros(32), jnp.ones((1, 3), bool), x)
    assert found["active_SxL"].sum() == 0 and found["l0_SxL"].sum() == 0


def test_the_fvu_of_constant_activations_is_undefined_and_reported(tiny_gemma, monkeypatch):
    """The site has the same vector at every token; replacing it by its mean changes no prediction."""
    constant = jnp.asarray(100 + np.random.default_rng(0).normal(size=32), jnp.float32)
    clean = passes.clean

    def constant_site(gemma, tokens, sites):
        streams, values, _ = clean(gemma, tokens, sites)
        values = {SITE: jnp.broadcast_to(constant, values[SITE].shape)}
        is_kept = masking.is_kept(tokens, 0)
        final = passes.spliced(gemma, streams[SITE.layer], tokens, is_kept, SITE, values[SITE])
        return streams, values, final

    monkeypatch.setattr(passes, "clean", constant_site)
    rows = Rows(tiny.tokens(4, 24, special=0.1))
    subjects = {"a": attached.Subject(random_sae(), SITE, np.asarray(constant))}
    results, _ = evaluate.evaluate(tiny_gemma, subjects, rows, rows, 4, 2)
    result = results["a"]
    for name in ("fvu", "fvu_se", "fvu_per_dimension", "explained_variance_tokens", "loss_recovered_mean"):
        assert np.isnan(getattr(result, name)), name
    assert np.isfinite([result.l0, result.cosine, result.delta_loss]).all()
    fvu, recovered = metrics.undefined(results)
    assert fvu.startswith(
        "FVU and explained variance of a are undefined: the activations to reconstruct are the same at"
    )
    assert "recovered of a against mean ablation is undefined" in recovered
    assert np.isnan(metrics.difference("fvu", result.by_row, result.by_row)).all()


def test_non_finite_values_are_reported_with_row_and_position(tiny_gemma):
    rows = Rows(tiny.tokens(12, 24, special=0.1))
    table = np.array(tiny_gemma.params["embedder"]["input_embedding"])
    table[rows.tokens[5, 2]] = np.nan
    broken = dataclasses.replace(
        tiny_gemma, params=tiny_gemma.params | {"embedder": {"input_embedding": jnp.asarray(table)}}
    )
    mean = np.full(32, 0.5, np.float32)
    with pytest.raises(
        FloatingPointError, match=r"Gemma's own loss is not finite at row \d+, position \d+; check"
    ):
        evaluate.evaluate(broken, {"a": attached.Subject(random_sae(), SITE, mean)}, rows, rows, COUNT, 4)
    with pytest.raises(
        FloatingPointError, match="activations of layer_1_resid_post on the first 12 training rows"
    ):
        evaluate.evaluate(broken, {"a": attached.Subject(random_sae(), SITE, None)}, rows, rows, COUNT, 4)
    subject = random_sae().replace(b_dec=np.full(32, np.nan, np.float32))
    first = rows.tokens[token_rows.order(12, batching.ORDER_SEED, 0, 1)[0]]
    with pytest.raises(
        FloatingPointError,
        match=rf"by a is not finite at row \d+, position {np.flatnonzero(first > masking.BOS)[0]}; check",
    ):
        evaluate.evaluate(tiny_gemma, {"a": attached.Subject(subject, SITE, mean)}, rows, rows, COUNT, 4)
