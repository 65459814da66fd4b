"""The walk over Gemma's blocks against gemma's own forward pass, and packing against running alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemma_scope_jax import gemma

SITES = [gemma.Site(kind, layer) for kind in gemma.HOOKS for layer in (0, 2, 3)]


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(tiny.tokens(6, 24))


def full_model(tiny_gemma, tokens, **kwargs):
    positions, mask = gemma.packed_positions_and_mask(tokens)
    return tiny_gemma.model.apply(
        {"params": tiny_gemma.params}, tokens, positions=positions, attention_mask=mask, **kwargs
    )


def test_sites_equal_the_same_values_inside_the_full_model(tiny_gemma, tokens):
    """Flax captures every module's output in gemma's own forward pass; `attn_out` is checked through W_O."""
    _, captured = full_model(tiny_gemma, tokens, capture_intermediates=True, mutable=["intermediates"])
    captured = captured["intermediates"]
    values = gemma.read_sites(tiny_gemma.model, tiny_gemma.params, tokens, SITES)
    for site, value in values.items():
        block = captured[f"layer_{site.layer}"]
        match site.kind:
            case "resid_post":
                expected = block["__call__"][0][1]
            case "mlp_out":
                expected = block["post_ffw_norm"]["__call__"][0]
            case "attn_out":
                expected = block["attn"]["attn_vec_einsum"]["__call__"][0]
                w_out = tiny_gemma.params[f"layer_{site.layer}"]["attn"]["attn_vec_einsum"]["w"]
                value = value @ w_out.reshape(-1, w_out.shape[-1])
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5, err_msg=str(site))


def test_loss_equals_gemmas_logits_in_float64(tiny_gemma, tokens):
    logits = np.asarray(full_model(tiny_gemma, tokens).logits, np.float64)
    expected = (
        np.log(np.exp(logits).sum(-1))
        - np.take_along_axis(logits, np.roll(np.asarray(tokens), -1, axis=1)[..., None], axis=2)[..., 0]
    )
    x = run_all(tiny_gemma, tokens)
    for chunk in (7, 512):
        loss, scored = gemma.next_token_loss(tiny_gemma.model, tiny_gemma.params, x, tokens, chunk=chunk)
        scored = np.asarray(scored) > 0
        np.testing.assert_allclose(np.asarray(loss)[scored], expected[scored], rtol=1e-5, atol=1e-5)


def test_no_loss_is_scored_at_special_tokens_or_across_a_boundary(tiny_gemma):
    b, e, p = gemma.BOS, gemma.EOS, gemma.PAD
    tokens = jnp.array([[b, 9, 8, b, 7, e, 6, 5, p, p]])
    _, scored = gemma.next_token_loss(
        tiny_gemma.model, tiny_gemma.params, run_all(tiny_gemma, tokens), tokens
    )
    np.testing.assert_array_equal(scored[0], [0, 1, 0, 0, 1, 0, 1, 0, 0, 0])


def run_all(tiny_gemma, tokens, tap=None):
    x = gemma.embed(tiny_gemma.model, tiny_gemma.params, tokens)
    return gemma.run_blocks(tiny_gemma.model, tiny_gemma.params, x, tokens, range(4), tap)


def test_packed_documents_equal_the_same_documents_alone(tiny_gemma):
    rng = np.random.default_rng(0)
    pieces = [[gemma.BOS, *rng.integers(3, 259, size=n)] for n in (5, 9, 7)]
    packed = jnp.array([[*pieces[0], *pieces[1], *pieces[2], *[gemma.PAD] * 3]])
    values = gemma.read_sites(tiny_gemma.model, tiny_gemma.params, packed, SITES)
    start = 0
    for piece in pieces:
        alone = gemma.read_sites(tiny_gemma.model, tiny_gemma.params, jnp.array([piece]), SITES)
        for site in SITES:
            np.testing.assert_allclose(
                values[site][:, start : start + len(piece)], alone[site], rtol=1e-4, atol=1e-5
            )
        start += len(piece)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_splicing_in_the_unchanged_activation_changes_nothing_and_another_does(tiny_gemma, tokens, site):
    value = gemma.read_sites(tiny_gemma.model, tiny_gemma.params, tokens, [site])[site]
    clean = run_all(tiny_gemma, tokens)
    spliced = run_all(tiny_gemma, tokens, lambda passed, x: value if passed == site else x)
    np.testing.assert_array_equal(spliced, clean)
    zeroed = run_all(tiny_gemma, tokens, lambda passed, x: 0 * x if passed == site else x)
    assert np.abs(zeroed - clean).max() > 1e-2


@pytest.mark.parametrize("layer", [0, 2])
def test_harvest_computes_no_later_layer_and_no_logits(tiny_gemma, tokens, layer):
    """A block has seven matmuls; reading a residual must cost those of its layers and no other."""
    params = {
        k: v for k, v in tiny_gemma.params.items() if k not in {f"layer_{i}" for i in range(layer + 1, 4)}
    }
    jaxpr = jax.make_jaxpr(
        functools.partial(gemma.read_sites, tiny_gemma.model, sites=[gemma.Site("resid_post", layer)])
    )(params, tokens)
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


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown model 'gemma9'"):
        gemma.build_model("gemma9")
    with pytest.raises(ValueError, match="unknown site 'resid_mid'"):
        gemma.check_site(tiny.TinyGemma(), gemma.Site("resid_mid", 0))
    with pytest.raises(ValueError, match="layer 4 is out of range: TinyGemma has layers 0 to 3"):
        gemma.check_site(tiny.TinyGemma(), gemma.Site("resid_post", 4))


@pytest.mark.parametrize("site", SITES, ids=str)
def test_hook_names_are_read_back(site):
    assert gemma.site_from_hook(gemma.hook_name(site)) == site
