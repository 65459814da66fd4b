"""Gemma equals transformers, whose results tests/peers/hugging_face.py stored: small models and the real 270M."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from gemma_scope_jax.models import forward as forward_lib
from gemma_scope_jax.models import masking, placement, predictions, tokenizer, weights
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.sites import SITES, Site

# Both layouts of the gating matrices: 2B's and the other models'.
MODELS = [(name, True) for name in small.NAMES] + [("small_gemma2_2b", False)]
from gemma_scope_jax.runtime import sharding


@functools.cache
def expected(name):
    return dict(np.load(small.FOLDER / name / "expected.npz"))


@functools.cache
def forward(name, transpose_gating):
    """A function that computes the losses, the logits and every site of one row of tokens."""
    model = small.model(name, transpose_gating)
    depth = model.config.num_layers
    params = weights.load_params(str(small.FOLDER / name), model, depth, jnp.float32, small.on_device)
    gemma = Gemma(name, model, sharding.one_device(), depth, params)
    sites = [Site("embed", 0)] + [
        Site(kind, layer) for kind in SITES if kind != "embed" for layer in range(depth)
    ]

    @jax.jit
    def run(tokens_1xL):
        x = forward_lib.embed(gemma, tokens_1xL)
        x, values = forward_lib.run_blocks(gemma, x, tokens_1xL, range(depth), read=sites)
        loss, _ = predictions.next_token_loss(gemma, x, tokens_1xL)
        named = {str(site): value[0] for site, value in values.items()}
        return {"loss": loss[0], "logits": predictions.logits(gemma, x)[0], **named}

    return lambda tokens: jax.device_get(run(jnp.asarray(tokens)[None]))


def check(actual, want, prefix, place=slice(None)):
    """Asserts that logits and every site are within 1e-4 of the reference's root mean square."""
    names = [key.removeprefix(prefix) for key in want if key.startswith(prefix)]
    assert len(names) > 10
    for name in names:
        reference = want[prefix + name].astype(np.float64)
        error = np.abs(actual[name][place] - reference).max()
        assert error <= 1e-4 * np.sqrt(np.square(reference).mean()), (name, error)


def losses(logits, tokens):
    logits = logits.astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log_p[np.arange(tokens.size - 1), tokens[1:]]


@pytest.mark.parametrize(("name", "transpose_gating"), MODELS)
def test_every_site_and_the_loss_equal_transformers(name, transpose_gating):
    want, run = expected(name), forward(name, transpose_gating)
    for i in range(3):
        tokens = want[f"tokens_{i}"]
        actual = run(tokens)
        check(actual, want, f"alone_{i}/")
        reference = losses(want[f"alone_{i}/logits"], tokens)
        np.testing.assert_allclose(actual["loss"][:-1], reference, atol=1e-4)


@pytest.mark.parametrize(("name", "transpose_gating"), MODELS)
def test_packed_and_padded_documents_equal_transformers_alone_and_padded(name, transpose_gating):
    want, run = expected(name), forward(name, transpose_gating)
    second, third = want["tokens_1"], want["tokens_2"]
    packed = run(np.concatenate([second, third]))
    check(packed, want, "alone_1/", slice(0, second.size))
    check(packed, want, "alone_2/", slice(second.size, None))
    padded = run(np.pad(second, (0, third.size)))
    check(padded, want, "padded/", slice(0, second.size))


@pytest.mark.peers
def test_the_real_model_equals_transformers_from_every_source(tmp_path):
    """Runs only in `make test-peers`, where transformers dequantises the same GGUF file into a folder."""
    folder = str(small.FOLDER / "gemma3_270m")
    want = expected("gemma3_270m")
    loaded = placement.load("gemma3_270m", folder, jnp.float32)
    from_gguf = placement.load("gemma3_270m", "", jnp.float32).params
    jax.tree.map(np.testing.assert_array_equal, loaded.params, from_gguf)
    weights.save_orbax(str(tmp_path / "orbax"), from_gguf)
    from_orbax = placement.load("gemma3_270m", str(tmp_path / "orbax"), jnp.float32).params
    jax.tree.map(np.testing.assert_array_equal, loaded.params, from_orbax)

    text = str(want["text"])
    for place in (folder, ""):
        assert [masking.BOS, *tokenizer.load("gemma3_270m", "", place).encode(text)] == want[
            "tokens"
        ].tolist()

    sites = [Site(kind, layer) for kind in SITES if kind != "embed" for layer in (5, 9, 12, 15)]
    tokens = jnp.asarray(want["tokens"])[None]

    @jax.jit
    def run(params):
        x = forward_lib.embed(loaded.replace(params=params), tokens)
        x, values = forward_lib.run_blocks(loaded.replace(params=params), x, tokens, range(18), read=sites)
        return predictions.next_token_loss(loaded.replace(params=params), x, tokens)[0][0, :-1], values

    loss, values = run(loaded.params)
    assert abs(loss.mean() - want["float32/loss"].mean()) < 1e-3
    for site, value in values.items():
        reference = want[f"float32/{site}"].astype(np.float64)
        error = np.linalg.norm(value[0] - reference, axis=-1) / np.linalg.norm(reference, axis=-1)
        assert np.median(error) < 1e-5 and error.max() < 1e-3, str(site)
