"""The SAE equals DeepMind's published numbers, its readable definition, and NumPy."""

import dataclasses

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_scope_jax.saes import jumprelu, objectives


@pytest.fixture(scope="module")
def random_case():
    rng = np.random.default_rng(0)
    d, m, b = 12, 40, 64
    params = jumprelu.Params(
        W_enc=rng.normal(size=(d, m)),
        b_enc=0.1 * rng.normal(size=m),
        log_threshold=np.log(0.2 + rng.random(m)),
        W_dec=rng.normal(size=(m, d)),
        b_dec=rng.normal(size=d),
    )
    return params, rng.normal(size=(b, d)), np.where(rng.random(b) > 0.3, rng.random(b), 0)


def test_deepminds_published_loss_reconstruction_and_gradients():
    with jax.enable_x64(True):
        params, batches = golden.setup()
        x, weight = batches[0], jnp.ones(len(batches[0]))
        gradient, sums = jax.jit(objectives.loss_gradient, static_argnames=("penalty", "bandwidth"))(
            params, x, weight, golden.PENALTY, golden.BANDWIDTH
        )
        loss = sums.squared_error / sums.weight + sums.penalty
        np.testing.assert_allclose(loss, 81.98928, rtol=1e-5)
        np.testing.assert_allclose(
            objectives.loss(params, x, weight, golden.PENALTY, golden.BANDWIDTH), 81.98928, rtol=1e-5
        )
        for name, (stride, expected) in golden.GRADIENTS.items():
            np.testing.assert_allclose(
                getattr(gradient, name).ravel()[::stride], expected, rtol=1e-5, atol=1e-8, err_msg=name
            )
        # The published reconstruction is for raw inputs; folding without normalisation must not change it.
        folded = jumprelu.fold(params, jnp.zeros(16), jnp.ones(()))
        recon = jumprelu.decode(folded, jumprelu.encode(folded, x))
        np.testing.assert_allclose(
            recon.ravel()[::5001], [-0.34825447, -0.12089294, -0.20722952, 1.4071178], rtol=1e-5
        )


PENALTIES = {
    "linear": objectives.linear_penalty(0.7),
    "quadratic": objectives.quadratic_penalty(0.7, 9.0),
    "controlled": objectives.controlled_penalty(0.7, 9.0),
    # Depends on the frequency of each latent, not only on their sum.
    "frequency": lambda sparsity: 0.7 * sparsity.l0 + 3 * jnp.square(sparsity.frequency_M).sum(),
}


@pytest.fixture(scope="module")
def transcoder_case(random_case):
    """A case with a target whose width differs from the input's."""
    params, x, weight = random_case
    rng = np.random.default_rng(1)
    m, o = params.b_enc.size, 7
    changed = params.replace(W_dec=rng.normal(size=(m, o)), b_dec=rng.normal(size=o))
    return changed, x, weight, rng.normal(size=(len(x), o)), rng.normal(size=(x.shape[1], o))


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("bandwidth", [0.05, 1.0])
def test_hand_written_gradient_equals_the_custom_vjp_form(random_case, bandwidth, penalty):
    with jax.enable_x64(True):
        params, x, weight = jax.tree.map(jnp.asarray, random_case)
        expected = jax.grad(objectives.loss)(params, x, weight, PENALTIES[penalty], bandwidth)
        gradient, _ = objectives.loss_gradient(params, x, weight, PENALTIES[penalty], bandwidth)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), gradient, expected
        )


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoders_gradient_equals_the_custom_vjp_form(transcoder_case, skip):
    with jax.enable_x64(True):
        params, x, weight, target, W_skip = jax.tree.map(jnp.asarray, transcoder_case)
        params = params.replace(W_skip=W_skip if skip else None)
        arguments = (params, x, weight, PENALTIES["linear"], 0.5, target)
        expected = jax.grad(objectives.loss)(*arguments)
        gradient, _ = objectives.loss_gradient(*arguments)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), gradient, expected
        )


def test_only_the_threshold_has_a_pseudo_derivative(random_case):
    """If no pre-activation is near its threshold, all other gradients equal finite differences."""
    with jax.enable_x64(True):
        params, x, weight = jax.tree.map(jnp.asarray, random_case)
        none = objectives.linear_penalty(0.0)
        gradient, _ = objectives.loss_gradient(params, x, weight, none, 1e-9)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            leaf = getattr(params, name)
            index = tuple(1 for _ in leaf.shape)
            h = 1e-7
            low, high = (
                objectives.loss(params.replace(**{name: leaf.at[index].add(s * h)}), x, weight, none, 1e-9)
                for s in (-1, 1)
            )
            np.testing.assert_allclose(
                getattr(gradient, name)[index], (high - low) / (2 * h), rtol=1e-4, atol=1e-6
            )
        np.testing.assert_array_equal(gradient.log_threshold, 0)


def test_encoding_and_sums_equal_numpy(random_case):
    params, x, weight = random_case
    threshold = np.exp(params.log_threshold)
    pre = (x - params.b_dec) @ params.W_enc + params.b_enc
    f = pre * (pre > threshold)
    error = f @ params.W_dec + params.b_dec - x
    with jax.enable_x64(True):
        device = jax.tree.map(jnp.asarray, params)
        folded = jumprelu.fold(device, jnp.zeros(12), jnp.ones(()))
        np.testing.assert_allclose(jumprelu.encode(folded, jnp.asarray(x)), f, rtol=1e-9, atol=1e-12)
        _, sums = objectives.loss_gradient(
            device, jnp.asarray(x), jnp.asarray(weight), objectives.linear_penalty(0.1), 0.1
        )
    np.testing.assert_allclose(sums.squared_error, weight @ np.square(error).sum(1))
    np.testing.assert_allclose(sums.l0, weight @ (f > 0).sum(1))
    mean = np.average(x, axis=0, weights=weight)
    np.testing.assert_allclose(sums.target_variance, weight @ np.square(x - mean).sum(1))
    np.testing.assert_allclose(sums.target_O, weight @ x)
    np.testing.assert_array_equal(sums.fired_M, ((f > 0) & (weight > 0)[:, None]).sum(0))
    assert sums.rows == (weight > 0).sum()
    # The terms of θ's gradient, from their definition.
    w, kernel = weight / weight.sum(), np.abs(pre - threshold) < 0.05
    g_f = 2 * w[:, None] * error @ params.W_dec.T
    np.testing.assert_allclose(sums.penalty, 0.1 * (w @ (f > 0).sum(1)))
    np.testing.assert_allclose(
        sums.theta_from_error, np.abs(threshold**2 / 0.1 * (kernel * g_f).sum(0)).mean()
    )
    np.testing.assert_allclose(
        sums.theta_from_sparsity, (threshold * 0.1 / 0.1 * (w[:, None] * kernel).sum(0)).mean()
    )
    np.testing.assert_allclose(sums.theta_reached, ((w[:, None] * kernel).sum(0) > 0).mean())


def test_rows_of_weight_zero_change_nothing(random_case):
    params, x, weight = jax.tree.map(jnp.asarray, random_case)
    gradient, sums = objectives.loss_gradient(params, x, weight, objectives.linear_penalty(0.3), 0.2)
    spoilt = jnp.where(weight[:, None] > 0, x, 1e3)
    other_gradient, other_sums = objectives.loss_gradient(
        params, spoilt, weight, objectives.linear_penalty(0.3), 0.2
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), gradient, other_gradient
    )
    np.testing.assert_array_equal(sums.fired_M, other_sums.fired_M)


def test_a_batch_without_weight_has_no_gradient(random_case):
    params, x, weight = jax.tree.map(jnp.asarray, random_case)
    for penalty in PENALTIES.values():
        gradient, _ = objectives.loss_gradient(params, x, 0 * weight, penalty, 0.2)
        jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), gradient)


def test_the_frequencies_given_to_a_penalty_equal_numpy(random_case):
    params, x, weight = jax.tree.map(np.float32, random_case)
    pre = (x - params.b_dec) @ params.W_enc + params.b_enc
    fires = (pre > np.exp(params.log_threshold)) * (weight / weight.sum())[:, None]
    price_M = np.random.default_rng(5).normal(size=params.b_enc.size).astype(np.float32)

    def penalty(sparsity):
        return price_M @ sparsity.frequency_M

    def free(sparsity):
        return 0 * sparsity.l0

    cost = objectives.loss(params, x, weight, penalty, 0.2) - objectives.loss(params, x, weight, free, 0.2)
    np.testing.assert_allclose(cost, price_M @ fires.sum(0), rtol=1e-3)
    _, sums = objectives.loss_gradient(params, x, weight, penalty, 0.2)
    np.testing.assert_allclose(sums.penalty, price_M @ fires.sum(0), rtol=1e-5)


def test_a_differentiated_loss_equals_the_hand_written_gradient(random_case):
    def loss(params, examples, penalty, bandwidth):
        x_BxD, weight_B, target_BxO = examples
        return objectives.loss(params, x_BxD, weight_B, penalty, bandwidth, target_BxO)

    params, x, weight = jax.tree.map(jnp.asarray, random_case)
    linear = objectives.OBJECTIVES["linear"]
    penalty = linear.penalty(0.7, 0.0, {})
    found = [
        objectives.gradient_of(objective, params, objectives.Examples(x, weight, None), penalty, 0.2)
        for objective in (linear, dataclasses.replace(linear, loss=loss))
    ]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    nothing = objectives.Examples(x, 0 * weight, None)
    gradient, _ = objectives.gradient_of(
        dataclasses.replace(linear, loss=lambda *_: jnp.nan * params.b_dec.sum()),
        params,
        nothing,
        penalty,
        0.2,
    )
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), gradient)


def test_taken_and_unknown_names_of_objectives_are_refused():
    quadratic = objectives.OBJECTIVES["quadratic"]
    with pytest.raises(ValueError, match="another objective is called 'linear'"):
        objectives.register("linear", quadratic)
    objectives.register("quadratic", quadratic)  # Registering the same objective again is allowed.
    with pytest.raises(ValueError, match="cannot be called 'a b'"):
        objectives.register("a b", quadratic)
    with pytest.raises(ValueError, match="unknown objective 'cubic'"):
        objectives.objective_of("cubic")


def slope_of(penalty):
    """The derivative of a penalty with respect to L0."""
    return jax.grad(lambda l0: penalty(objectives.Sparsity(l0, jnp.zeros(1))))


def test_the_quadratic_penalty_has_the_linear_slope_at_twice_the_target():
    """As in Gemma Scope 2; its slope is zero at the target and negative below."""
    slope = slope_of(objectives.quadratic_penalty(0.3, 50.0))
    np.testing.assert_allclose([slope(100.0), slope(50.0), slope(25.0)], [0.3, 0.0, -0.15], rtol=1e-6)


def test_the_controllers_penalty_is_stronger_above_the_target_and_weaker_below():
    slope = slope_of(objectives.controlled_penalty(0.3, 50.0))
    np.testing.assert_allclose([slope(100.0), slope(50.0), slope(25.0)], [1.2, 0.3, 0.075], rtol=1e-5)
    np.testing.assert_allclose([slope(0.0), slope(1e6)], [0.3 * np.exp(-2), 0.3 * np.exp(2)], rtol=1e-5)


def test_folding_equals_normalising_encoding_and_denormalising():
    rng = np.random.default_rng(3)
    d, m, scale = 8, 24, 37.0
    mean, x = 5 * rng.normal(size=d), 40 * rng.normal(size=(50, d))
    W_dec = rng.normal(size=(m, d))
    arrays = dict(
        W_enc=rng.normal(size=(d, m)), b_enc=rng.normal(size=m), log_threshold=np.log(rng.random(m)), W_dec=W_dec,
        b_dec=rng.normal(size=d),
    )  # fmt: skip
    h = (x - mean) / scale
    pre = (h - arrays["b_dec"]) @ arrays["W_enc"] + arrays["b_enc"]
    f = pre * (pre > np.exp(arrays["log_threshold"]))
    expected = scale * (f @ W_dec + arrays["b_dec"]) + mean
    with jax.enable_x64(True):
        folded = jumprelu.fold(
            jumprelu.Params(**jax.tree.map(jnp.asarray, arrays)), jnp.asarray(mean), jnp.asarray(scale)
        )
        f_folded = jumprelu.encode(folded, jnp.asarray(x))
        np.testing.assert_allclose(f_folded, scale * np.maximum(f, 0), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(jumprelu.decode(folded, f_folded), expected, rtol=1e-9, atol=1e-9)


def test_initialisation_follows_gemma_scope():
    params = jumprelu.init(jax.random.key(0), 16, 256, 0.001)
    np.testing.assert_allclose(np.linalg.norm(params.W_dec, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(params.W_enc, params.W_dec.T)
    np.testing.assert_allclose(np.exp(params.log_threshold), 0.001, rtol=1e-6)
    assert not params.b_enc.any() and not params.b_dec.any()


@pytest.mark.parametrize("skip", [False, True])
def test_folding_a_transcoder_equals_normalising_predicting_and_denormalising(transcoder_case, skip):
    params, x, _, _, W_skip = transcoder_case
    rng = np.random.default_rng(4)
    mean, target_mean, scale, target_scale = 5 * rng.normal(size=12), rng.normal(size=7), 37.0, 3.0
    raw = mean + scale * x
    pre = x @ params.W_enc + params.b_enc
    f = pre * (pre > np.exp(params.log_threshold))
    out = f @ params.W_dec + params.b_dec + (x @ W_skip if skip else 0)
    with jax.enable_x64(True):
        device = jax.tree.map(jnp.asarray, params.replace(W_skip=W_skip if skip else None))
        folded = jumprelu.fold_transcoder(device, mean, scale, target_mean, target_scale)
        f_folded = jumprelu.encode(folded, jnp.asarray(raw))
        np.testing.assert_allclose(f_folded, target_scale * np.maximum(f, 0), rtol=1e-8, atol=1e-8)
        decoded = jumprelu.decode(folded, f_folded, jnp.asarray(raw))
        np.testing.assert_allclose(decoded, target_scale * out + target_mean, rtol=1e-8, atol=1e-8)
        # The same results from activations multiplied by a gain.
        gain = 1 + rng.random(12)
        scaled = jumprelu.read_scaled(folded, jnp.asarray(gain))
        np.testing.assert_allclose(
            jumprelu.encode(scaled, jnp.asarray(gain * raw)), f_folded, rtol=1e-8, atol=1e-8
        )
        again = jumprelu.decode(scaled, f_folded, jnp.asarray(gain * raw))
        np.testing.assert_allclose(again, decoded, rtol=1e-8, atol=1e-8)
        if skip:
            with pytest.raises(ValueError, match="has a skip connection"):
                jumprelu.decode(folded, f_folded)


def test_a_transcoders_encoder_and_decoder_are_independent():
    params = jumprelu.init(jax.random.key(0), 16, 256, 0.001, target_width=8, skip=True)
    assert params.W_enc.shape == (16, 256) and params.W_dec.shape == (256, 8)
    for rows in (params.W_enc.T, params.W_dec):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    square = jumprelu.init(jax.random.key(0), 16, 256, 0.001, target_width=16)
    assert np.abs((square.W_enc.T * square.W_dec).sum(1)).mean() < 0.3
    assert not params.W_skip.any() and square.W_skip is None
