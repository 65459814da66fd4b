"""Firings of latents (places, passages, counts, samples) and decoder directions, compared with slow NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from toys import Rows, random_sae

from gemma_scope_jax.analysis import decoder_directions
from gemma_scope_jax.analysis.dashboards import collect
from gemma_scope_jax.data import batching, token_rows
from gemma_scope_jax.models import forward, masking
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import resumable, sharding
from gemma_scope_jax.saes import attached, geometry, jumprelu

SITES = {"stream": Site("resid_post", 1), "embed": Site("embed", 0)}
OPTIONS = collect.Options(top=6, sample=10, before=3, after=2)
COUNT, LENGTH = 13, 24


@pytest.fixture(scope="module")
def rows():
    return Rows(tiny.tokens(16, LENGTH, special=0.05))


@pytest.fixture(scope="module")
def subjects():
    # The frequencies range from a third of all positions to none.
    rarer = np.geomspace(1, 100, 64, dtype=np.float32)
    made = [one.replace(threshold=one.threshold * rarer) for one in map(random_sae, range(2))]
    # Embeddings repeat, so activations do too: of equal activations, the first places must be kept.
    return {
        name: attached.Subject(one, site, None) for one, (name, site) in zip(made, SITES.items(), strict=True)
    }


@pytest.fixture(scope="module")
def gathered(tiny_gemma, subjects, rows):
    return collect.gather(tiny_gemma, subjects, rows, COUNT, 4, options=OPTIONS)


@pytest.fixture(scope="module")
def slow(tiny_gemma, subjects, rows):
    """The counted positions [S, L] and the activations [S, L, M] by SAE, in the order of `batching.batches`."""
    tokens = rows.tokens[token_rows.order(len(rows), batching.ORDER_SEED, 0, COUNT)]
    kept = ~np.isin(tokens, [masking.BOS, masking.EOS, masking.PAD])
    values = forward.read_sites(tiny_gemma, jnp.asarray(tokens), list(SITES.values()))
    f = {}
    for name, subject in subjects.items():
        pre = np.asarray(values[subject.site], np.float64) @ np.float64(subject.sae.W_enc) + subject.sae.b_enc
        f[name] = np.where((pre > subject.sae.threshold) & kept[..., None], np.maximum(pre, 0), 0)
    return kept, f


def same(a, b, exact=True):
    for name, value in vars(a).items():
        if isinstance(value, collect.Firings):
            same(value, getattr(b, name), exact)
        elif isinstance(value, np.ndarray) and (exact or value.dtype == np.int32):
            np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)
        elif isinstance(value, np.ndarray):
            np.testing.assert_allclose(value, getattr(b, name), rtol=1e-4, atol=1e-4, err_msg=name)
        else:
            assert value == getattr(b, name), name


@pytest.mark.parametrize("name", SITES)
def test_counts_means_and_histograms_equal_slow_numpy(slow, gathered, name):
    kept, f = slow[0], slow[1][name]
    found = gathered[name]
    assert (found.rows, found.activations) == (COUNT, kept.sum())
    count = (f > 0).sum((0, 1))
    np.testing.assert_array_equal(found.count_M, count)
    assert 0 < (count == 0).sum() < 64
    np.testing.assert_array_equal(found.is_dead_M, count == 0)
    np.testing.assert_array_equal(found.is_dense_M, count / kept.sum() > 0.1)
    np.testing.assert_allclose(found.frequency_M, count / kept.sum())
    np.testing.assert_allclose(found.mean_M, f.sum((0, 1)) / np.maximum(count, 1), rtol=1e-4)
    np.testing.assert_allclose(found.max_M, f.max((0, 1)), rtol=1e-4)
    for latent in range(64):
        fired = f[..., latent][f[..., latent] > 0]
        expected, _ = np.histogram(fired, collect.EDGES)
        np.testing.assert_array_equal(found.histogram_MxH[latent], expected)


def test_activations_beyond_the_bins_are_in_the_first_or_last_bin(tiny_gemma, subjects, rows):
    for factor, at in ((1e-9, 0), (1e9, collect.BINS - 1)):
        one = subjects["stream"].sae
        scaled = one.replace(
            W_enc=one.W_enc * factor, b_enc=one.b_enc * factor, threshold=one.threshold * factor
        )
        subject = {"a": dataclasses.replace(subjects["stream"], sae=scaled)}
        found = collect.gather(tiny_gemma, subject, rows, COUNT, 4, options=OPTIONS)["a"]
        np.testing.assert_array_equal(found.histogram_MxH[:, at], found.count_M)


@pytest.mark.parametrize("name", SITES)
def test_the_strongest_firings_equal_slow_numpy(slow, gathered, name):
    f = slow[1][name]
    found, radius = gathered[name].top, OPTIONS.before + OPTIONS.after
    # Equal embeddings have equal activations in float32, but not in float64 sums of another order.
    f32 = f.astype(np.float32)
    for latent in range(64):
        peaks = []
        for s in range(COUNT):
            for t in range(LENGTH):
                here = f32[s, t, latent]
                before = f32[s, max(t - radius, 0) : t, latent]
                behind = f32[s, t + 1 : t + radius + 1, latent]
                if here > 0 and (here > before).all() and (here >= behind).all():
                    peaks.append((-here, s, t))
        peaks = sorted(peaks)[: OPTIONS.top]
        places = list(zip(found.row_MxK[latent], found.position_MxK[latent], strict=True))
        assert places[: len(peaks)] == [(s, t) for _, s, t in peaks], latent
        assert (found.row_MxK[latent, len(peaks) :] == -1).all()
        for k, (_, s, t) in enumerate(peaks):
            padded = np.pad(f[s, :, latent], (OPTIONS.before, OPTIONS.after))
            np.testing.assert_allclose(
                found.window_MxKxT[latent, k], padded[t : t + OPTIONS.span], rtol=1e-3, atol=1e-4
            )
        for a in range(len(peaks)):
            for b in range(a):
                assert peaks[a][1] != peaks[b][1] or abs(peaks[a][2] - peaks[b][2]) > radius
    assert (found.row_MxK[:, -1] >= 0).any()  # Some latents fire often enough to fill the list.


def test_the_sample_holds_firings_of_the_highest_priority(slow, gathered):
    f = slow[1]["stream"]
    keys = [jax.random.fold_in(jax.random.key(OPTIONS.seed), place) for place in range(COUNT)]
    priority = np.array([jax.random.uniform(key, (LENGTH,)) for key in keys])
    found = gathered["stream"].sample
    for latent in range(64):
        fired = np.argwhere(f[..., latent] > 0)
        order = np.argsort(-priority[tuple(fired.T)])[: OPTIONS.sample]
        places = np.stack([found.row_MxK[latent], found.position_MxK[latent]], 1)
        np.testing.assert_array_equal(places[: len(order)], fired[order])
        assert (found.row_MxK[latent, len(order) :] == -1).all()


def test_firings_are_sampled_uniformly(slow, gathered):
    """A χ² test over seeds, on the places of the most frequent latent."""
    latent = int(gathered["stream"].count_M.argmax())
    fired = np.argwhere(slow[1]["stream"][..., latent] > 0)
    drawn, seeds = np.zeros((COUNT, LENGTH)), 60
    for seed in range(seeds):
        options = dataclasses.replace(OPTIONS, seed=seed)
        keys = [jax.random.fold_in(jax.random.key(options.seed), place) for place in range(COUNT)]
        priority = np.array([jax.random.uniform(key, (LENGTH,)) for key in keys])
        chosen = fired[np.argsort(-priority[tuple(fired.T)])[: options.sample]]
        drawn[tuple(chosen.T)] += 1
    expected = seeds * OPTIONS.sample / len(fired)
    chi = ((drawn[tuple(fired.T)] - expected) ** 2 / expected).sum() / (len(fired) - 1)
    assert 0.5 < chi < 1.5


@pytest.mark.parametrize("per_batch", [1, 13])
def test_the_batch_size_changes_nothing(tiny_gemma, subjects, rows, gathered, per_batch):
    again = collect.gather(tiny_gemma, subjects, rows, COUNT, per_batch, options=OPTIONS)
    for name in subjects:
        same(again[name], gathered[name], exact=False)


def test_eight_devices_agree_with_one(tiny_gemma, subjects, rows, gathered):
    mesh = sharding.make_mesh(4, 2)
    everywhere = jax.device_put(tiny_gemma.params, jax.NamedSharding(mesh, sharding.REPLICATED))
    loaded = tiny_gemma.replace(mesh=mesh, params=everywhere)
    again = collect.gather(loaded, subjects, rows, COUNT, 8, options=OPTIONS)
    for name in subjects:
        same(again[name], gathered[name], exact=False)


class Stopped(Exception):
    """Interrupts a pass."""


def test_an_interrupted_pass_resumes(tiny_gemma, subjects, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "SAVE_EVERY", 2)
    whole = collect.gather(tiny_gemma, subjects, rows, COUNT, 2, options=OPTIONS)
    read = []

    class Cut(Rows):
        def read(self, indices):
            read.append(len(indices))
            if len(read) == 6:
                raise Stopped
            return super().read(indices)

    def parts():
        return resumable.Parts(tmp_path / "partial", {"a": 1})

    with pytest.raises(Stopped):
        collect.gather(tiny_gemma, subjects, Cut(rows.tokens), COUNT, 2, options=OPTIONS, parts=parts())
    read.clear()
    again = collect.gather(tiny_gemma, subjects, Cut(rows.tokens), COUNT, 2, options=OPTIONS, parts=parts())
    assert sum(read) == COUNT - 8  # Four batches were kept.
    for name in subjects:
        same(again[name], whole[name])


def test_a_top_k_sae_fires_only_its_k_strongest_latents(tiny_gemma, subjects, rows, slow):
    subject = {"a": dataclasses.replace(subjects["stream"], top_k=2)}
    found = collect.gather(tiny_gemma, subject, rows, COUNT, 4, options=OPTIONS)["a"]
    fired = (slow[1]["stream"] > 0).sum(2)
    assert found.count_M.sum() == np.minimum(fired, 2).sum() < fired.sum()


def test_passages_stay_within_a_document():
    tokens = np.array(
        [[2, 11, 12, 13, 2, 21, 22, 23, 24, 0, 0], [31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41]]
    )
    row = np.array([[0, 0, 1, 1]])
    position = np.array([[2, 8, 0, 5]])
    window = np.arange(24, dtype=np.float32).reshape(1, 4, 6)
    firings = collect.Firings(row, position, window)
    cut = collect.Passages(tokens)
    expected = [
        (0, [11, 12, 13], [2, 3, 4], 1),
        (0, [21, 22, 23, 24], [6, 7, 8, 9], 3),
        (1, [31, 32, 33], [15, 16, 17], 0),
        (1, [33, 34, 35, 36, 37, 38], [18, 19, 20, 21, 22, 23], 3),
    ]
    for index, (row, words, values, peak) in enumerate(expected):
        found = cut(OPTIONS, firings, 0, index)
        assert (found.row, found.peak) == (row, peak)
        np.testing.assert_array_equal(found.tokens, words)
        np.testing.assert_array_equal(found.values, values)


def test_bands_have_equal_size_and_begin_with_the_first_sampled_firing():
    value = np.array([5, 1, 9, 2, 7, 3, 8, 4, 6, 10, 0], np.float32)
    row = np.array([[0] * 10 + [-1]])
    window = np.pad(value[None, :, None], ((0, 0), (0, 0), (OPTIONS.before, OPTIONS.after)))
    firings = collect.Firings(row, row, window)
    found = collect.Gathered(OPTIONS, 1, 10, np.array([10]), value[:1], np.zeros((1, 2)), firings, firings)
    assert [value[band].tolist() for band in collect.bands(found, 0)] == [
        [9, 10], [7, 8], [5, 6], [3, 4], [1, 2]
    ]  # fmt: skip
    assert [band[0] for band in collect.bands(found, 0)] == [2, 4, 0, 5, 1]
    few = dataclasses.replace(
        found, sample=collect.Firings(np.where(np.arange(11)[None] < 2, 0, -1), row, window)
    )
    assert [value[band].tolist() for band in collect.bands(few, 0)] == [[5], [1]]


def test_a_planted_latent_is_found(tiny_gemma):
    """A latent that reads one token's embedding fires at that token, and raises the token it is made to raise."""
    table = np.asarray(tiny_gemma.params["embedder"]["input_embedding"], np.float32)
    one = random_sae()
    W_enc, W_dec = np.zeros_like(one.W_enc), np.array(one.W_dec)
    W_enc[:, 5] = table[77] / np.linalg.norm(table[77]) ** 2 / np.sqrt(32)
    gain = 1 + np.asarray(tiny_gemma.params["final_norm"]["scale"], np.float32)
    W_dec[5] = table[200] / gain
    planted = jumprelu.SAE(W_enc, np.zeros(64, np.float32), np.full(64, 0.99, np.float32), W_dec, one.b_dec)
    tokens = np.full((4, 30), 50, np.int32)
    tokens[:, 0] = masking.BOS
    tokens[1, 7] = tokens[3, 20] = tokens[3, 23] = tokens[2, 0] = 77
    subjects = {"a": attached.Subject(planted, SITES["embed"], None)}
    found = collect.gather(
        tiny_gemma, subjects, Rows(tokens), 4, 4, lambda tokens: tokens != masking.PAD, options=OPTIONS
    )["a"]
    order = token_rows.order(4, batching.ORDER_SEED, 0, 4)
    assert found.count_M[5] == 4 and found.count_M.sum() == 4
    top = {
        (int(order[r]), int(p))
        for r, p in zip(found.top.row_MxK[5], found.top.position_MxK[5], strict=True)
        if r >= 0
    }
    assert top == {(1, 7), (2, 0), (3, 20)}  # (3, 23) overlaps the passage of (3, 20), so it is left out.
    drawn = (found.sample.row_MxK[5] >= 0).sum()
    assert drawn == 4
    said = decoder_directions.logits(tiny_gemma, W_dec, 1)
    logits = W_dec[5] / np.sqrt(np.square(W_dec[5]).mean()) * gain @ table.T
    assert said.highest_token_MxT[5, 0] == logits.argmax()


@pytest.mark.parametrize("devices", [1, 8])
def test_logits_of_directions_equal_slow_numpy(tiny_gemma, monkeypatch, devices):
    monkeypatch.setattr(decoder_directions, "_LOGITS", 272 * 24)  # Three chunks; the last is not full.
    mesh = sharding.make_mesh(1, devices, jax.devices()[:devices])
    everywhere = jax.device_put(tiny_gemma.params, jax.NamedSharding(mesh, sharding.REPLICATED))
    W_dec = np.asarray(random_sae().W_dec)
    found = decoder_directions.logits(tiny_gemma.replace(mesh=mesh, params=everywhere), W_dec, 4)
    x = W_dec.astype(np.float64)
    x = x / np.sqrt(np.square(x).mean(1, keepdims=True) + 1e-6)
    x = x * (1 + np.asarray(tiny_gemma.params["final_norm"]["scale"], np.float64))
    logits = np.tanh(x @ np.asarray(tiny_gemma.params["embedder"]["input_embedding"], np.float64).T / 3) * 3
    order = np.argsort(logits, axis=1)
    np.testing.assert_array_equal(found.highest_token_MxT, order[:, ::-1][:, :4])
    np.testing.assert_array_equal(found.lowest_token_MxT, order[:, :4])
    np.testing.assert_allclose(found.highest_MxT, np.sort(logits, 1)[:, ::-1][:, :4], rtol=1e-5)
    np.testing.assert_allclose(found.lowest_MxT, np.sort(logits, 1)[:, :4], rtol=1e-5)


def test_directions_of_heads_go_through_the_output_projection(tiny_gemma):
    """The model itself adds the same direction: its norm after the projection only scales the output."""
    site = Site("attn_out", 2)
    W_dec = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    found = decoder_directions.in_stream(tiny_gemma.params, site, W_dec)
    tokens = jnp.asarray([[masking.BOS, 50, 60]])
    x = forward.embed(tiny_gemma, tokens)
    for latent in range(5):

        def write(z, latent=latent):
            return jnp.broadcast_to(jnp.asarray(W_dec[latent]), z.shape)

        silent = {site: write, Site("mlp_out", 2): jnp.zeros_like}
        after, _ = forward.run_blocks(tiny_gemma, x, tokens, range(2, 3), write=silent)
        added = np.asarray(after - x)[0, -1]
        cosine = added @ found[latent] / np.linalg.norm(added) / np.linalg.norm(found[latent])
        np.testing.assert_allclose(cosine, 1, atol=1e-5)
    assert decoder_directions.in_stream(tiny_gemma.params, Site("mlp_in", 2), W_dec) is None
    assert decoder_directions.in_stream(tiny_gemma.params, Site("mlp_out", 2), W_dec) is W_dec


def test_nearest_decoders_equal_slow_numpy():
    W_dec = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    latent, cosine = geometry.nearest(W_dec, 3, block=16)
    unit = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    cosines = unit @ unit.T - 3 * np.eye(50)
    np.testing.assert_array_equal(latent, np.argsort(-cosines, 1)[:, :3])
    np.testing.assert_allclose(cosine, -np.sort(-cosines, 1)[:, :3], atol=1e-6)


@pytest.mark.parametrize(("name", "value"), [("top", 0), ("sample", 0), ("before", 0), ("after", -1)])
def test_options_that_keep_nothing_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least"):
        collect.Options(**{name: value})
