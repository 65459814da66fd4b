"""Our forward pass equals gemma's own, and packed documents equal the same documents alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from gemma_scope_jax.models import forward, masking, predictions, registry, weights
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.sites import SITES, Site, check_site
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.training import flops as flops_lib

KINDS = [kind for kind in SITES if kind != "embed"]
ALL_SITES = [Site("embed", 0), *(Site(kind, layer) for kind in KINDS for layer in (0, 2, 3))]


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(tiny.tokens(6, 24))


def full_model(tiny_gemma, tokens, **kwargs):
    positions, mask = masking.packed_positions(tokens), masking.packed_mask(tokens)
    return tiny_gemma.module.apply(
        {"params": tiny_gemma.params}, tokens, positions=positions, attention_mask=mask, **kwargs
    )


def test_sites_equal_the_values_inside_gemmas_forward_pass(tiny_gemma, tokens):
    """Flax captures the output of every module of gemma; `attn_out` is compared after W_O."""
    _, captured = full_model(tiny_gemma, tokens, capture_intermediates=True, mutable=["intermediates"])
    captured = captured["intermediates"]
    values = forward.read_sites(tiny_gemma, tokens, ALL_SITES)
    for site, value in values.items():
        block = captured[f"layer_{site.layer}"]
        match site.kind:
            case "embed":
                expected = np.sqrt(32) * tiny_gemma.params["embedder"]["input_embedding"][tokens]
            case "resid_post":
                expected = block["__call__"][0][1]
            case "mlp_in":
                expected = block["pre_ffw_norm"]["__call__"][0]
            case "mlp_in_gain_free":
                scale = tiny_gemma.params[f"layer_{site.layer}"]["pre_ffw_norm"]["scale"]
                expected = block["pre_ffw_norm"]["__call__"][0] / (1 + scale[None, None])
            case "mlp_out":
                expected = block["post_ffw_norm"]["__call__"][0]
            case "attn_out":
                expected = block["attn"]["attn_vec_einsum"]["__call__"][0]
                w_out = tiny_gemma.params[f"layer_{site.layer}"]["attn"]["attn_vec_einsum"]["w"]
                value = value @ w_out.reshape(-1, w_out.shape[-1])
        rms = np.sqrt(np.square(expected).mean())
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5 * rms, err_msg=str(site))


def test_loss_equals_gemmas_logits_in_float64(tiny_gemma, tokens):
    logits = np.asarray(full_model(tiny_gemma, tokens).logits, np.float64)
    expected = (
        np.log(np.exp(logits).sum(-1))
        - np.take_along_axis(logits, np.roll(np.asarray(tokens), -1, axis=1)[..., None], axis=2)[..., 0]
    )
    x = run_all(tiny_gemma, tokens)
    for chunk in (7, 512):
        loss, scored = predictions.next_token_loss(tiny_gemma, x, tokens, chunk=chunk)
        scored = np.asarray(scored) > 0
        np.testing.assert_allclose(np.asarray(loss)[scored], expected[scored], rtol=1e-5, atol=1e-5)


def test_no_loss_counts_at_special_tokens_or_across_a_boundary(tiny_gemma):
    b, e, p = masking.BOS, masking.EOS, masking.PAD
    tokens = jnp.array([[b, 9, 8, b, 7, e, 6, 5, p, p]])
    _, scored = predictions.next_token_loss(tiny_gemma, run_all(tiny_gemma, tokens), tokens)
    np.testing.assert_array_equal(scored[0], [0, 1, 0, 0, 1, 0, 1, 0, 0, 0])


def run_all(tiny_gemma, tokens, write=None):
    x = forward.embed(tiny_gemma, tokens)
    return forward.run_blocks(tiny_gemma, x, tokens, range(4), write=write)[0]


def test_packed_documents_equal_the_same_documents_alone(tiny_gemma):
    rng = np.random.default_rng(0)
    pieces = [[masking.BOS, *rng.integers(3, 259, size=n)] for n in (5, 9, 7)]
    packed = jnp.array([[*pieces[0], *pieces[1], *pieces[2], *[masking.PAD] * 3]])
    values = forward.read_sites(tiny_gemma, packed, ALL_SITES)
    start = 0
    for piece in pieces:
        alone = forward.read_sites(tiny_gemma, jnp.array([piece]), ALL_SITES)
        for site in ALL_SITES:
            np.testing.assert_allclose(
                values[site][:, start : start + len(piece)], alone[site], rtol=1e-4, atol=1e-5
            )
        start += len(piece)


@pytest.mark.parametrize("site", ALL_SITES, ids=str)
def test_splicing_in_the_same_activation_changes_nothing_and_zero_does(tiny_gemma, tokens, site):
    value = forward.read_sites(tiny_gemma, tokens, [site])[site]
    clean = run_all(tiny_gemma, tokens)
    spliced = run_all(tiny_gemma, tokens, {site: lambda x: value})
    np.testing.assert_array_equal(spliced, clean)
    zeroed = run_all(tiny_gemma, tokens, {site: lambda x: 0 * x})
    assert np.abs(zeroed - clean).max() > 1e-2


@pytest.mark.parametrize("layer", [0, 2])
def test_a_harvest_computes_no_later_layer_and_no_logits(tiny_gemma, tokens, layer):
    """A block has seven matmuls; reading a residual must run only those of the blocks up to it."""
    params = {
        k: v for k, v in tiny_gemma.params.items() if k not in {f"layer_{i}" for i in range(layer + 1, 4)}
    }
    jaxpr = jax.make_jaxpr(functools.partial(forward.read_sites, sites=[Site("resid_post", layer)]))(
        tiny_gemma.replace(params=params), tokens
    )
    assert count_equations(jaxpr.jaxpr, "dot_general") == 7 * (layer + 1)


def count_equations(jaxpr, name):
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == name
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += count_equations(inner, name)
    return total


@pytest.mark.parametrize("name", ["gemma2_2b", "gemma2_27b", "gemma3_4b"])
@pytest.mark.parametrize("layer", [0, 3])
def test_the_flops_formula_of_a_harvest_matches_the_compiler(name, layer):
    """Compiles with the real shapes, without allocating arrays; the formula omits less than five per cent."""
    model = registry.build_model(name)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16),
        weights.parameter_shapes(model, layer + 1),
    )
    gemma = Gemma(name, model, sharding.one_device(), layer + 1, params)
    read = functools.partial(forward.read_sites, sites=[Site("resid_post", layer)])
    compiled = jax.jit(read).lower(gemma, jax.ShapeDtypeStruct((1, 1024), jnp.int32)).compile()
    flops = compiled.cost_analysis()["flops"]
    assert abs(flops / flops_lib.harvest_flops(model, 1, 1024, layer + 1) - 1) < 0.05


def test_reading_a_site_outside_the_blocks_is_refused(tiny_gemma, tokens):
    x = forward.embed(tiny_gemma, tokens)
    with pytest.raises(ValueError, match="blocks 1 to 2 do not contain layer_3_mlp_out"):
        forward.run_blocks(tiny_gemma, x, tokens, range(1, 3), read=[Site("mlp_out", 3)])


def test_many_sites_are_read_and_written_in_one_pass(tiny_gemma, tokens):
    """Reading a site returns its value before the write there and after all earlier writes; it changes nothing."""
    first, second = Site("attn_out", 0), Site("mlp_in_gain_free", 2)
    x = forward.embed(tiny_gemma, tokens)
    clean, values = forward.run_blocks(tiny_gemma, x, tokens, range(4), read=ALL_SITES)
    np.testing.assert_array_equal(clean, run_all(tiny_gemma, tokens))
    steered, both = forward.run_blocks(
        tiny_gemma,
        x,
        tokens,
        range(4),
        read=[first, second],
        write={first: lambda z: z + 1, second: lambda y: jnp.zeros_like(y)},
    )
    np.testing.assert_array_equal(both[first], values[first])
    alone = run_all(tiny_gemma, tokens, {first: lambda z: values[first] + 1})
    assert np.abs(both[second] - values[second]).max() > 1e-2
    assert np.abs(steered - alone).max() > 1e-2


def test_written_activations_keep_gemmas_dtype(tiny_gemma, tokens):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_gemma.params)
    x = forward.embed(tiny_gemma.replace(params=params), tokens)
    write = {site: lambda value: value.astype(jnp.float32) for site in ALL_SITES}
    x, values = forward.run_blocks(
        tiny_gemma.replace(params=params), x, tokens, range(4), read=ALL_SITES, write=write
    )
    assert {x.dtype, *(value.dtype for value in values.values())} == {jnp.dtype("bfloat16")}


def test_norms_are_computed_in_float32(tiny_gemma, tokens):
    """The result is rounded to bfloat16 once; gemma's own norm squares in bfloat16 and has larger errors."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_gemma.params)
    x = 3 * jax.random.normal(jax.random.key(0), (2, 8, 32), jnp.bfloat16)
    site = Site("mlp_in", 0)
    inputs = {}

    def keep(call, args, kwargs, context):
        if context.module.name == "pre_ffw_norm":
            inputs["x"] = args[0]
        return call(*args, **kwargs)

    with nn.intercept_methods(keep):
        _, values = forward.run_blocks(
            tiny_gemma.replace(params=params), x, tokens[:2, :8], range(1), read=[site]
        )
    exact = np.asarray(inputs["x"], np.float64)
    exact /= np.sqrt(np.square(exact).mean(-1, keepdims=True) + 1e-6)
    exact *= 1 + np.asarray(params["layer_0"]["pre_ffw_norm"]["scale"], np.float64)
    error = np.abs(np.asarray(values[site], np.float64) - exact)
    # Half a unit in the last place from the one rounding, and a little for errors of float32.
    assert (error <= 1.001 * 2.0**-9 * 2.0 ** np.ceil(np.log2(np.abs(exact) + 1e-30))).all()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown model 'gemma9'"):
        registry.build_model("gemma9")
    with pytest.raises(ValueError, match="the site embed is in layer 0, not in layer 2"):
        check_site(tiny.TinyGemma(), Site("embed", 2))
    with pytest.raises(ValueError, match="unknown site 'resid_mid'"):
        check_site(tiny.TinyGemma(), Site("resid_mid", 0))
    with pytest.raises(ValueError, match="layer 4 is out of range: TinyGemma has layers 0 to 3"):
        check_site(tiny.TinyGemma(), Site("resid_post", 4))
