"""The compiled step equals an unfused reference, on one device and on eight."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from gemma_scope_jax.data import prepare, token_rows
from gemma_scope_jax.models import forward, masking, weights
from gemma_scope_jax.models.sites import blocks_needed
from gemma_scope_jax.runtime import devices as devices_lib
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.saes import jumprelu, objectives
from gemma_scope_jax.training import bank, loop, normalizer, runs, shuffle_buffer, step


def build(folder, data_axis=1, latent_axis=1, **changes):
    """A run on a mesh of the first devices, its rows, Gemma on that mesh, and the initial state."""
    config = tiny.run_config(folder, **changes)
    devices = jax.devices()[: data_axis * latent_axis]
    run = runs.build(config, sharding.make_mesh(data_axis, latent_axis, devices))
    rows = token_rows.open_rows(prepare.rows_of(config), token_rows.TRAIN)
    gemma = runs.load_gemma(run)
    return run, rows, gemma, runs.init_state(run, loop.calibrate(run, rows, gemma, run.plan.sites))


def member_params(state, place):
    return jax.tree.map(lambda leaf: leaf[place], state.banks["main"].params)


def run_steps(run, rows, gemma, state, count, compiled=None):
    """Runs `count` steps; returns the final state and the metrics of each step, on the host. Donates `state`."""
    sequences = run.config.train.sequences_per_step
    metrics = []
    for i in range(count):
        batch = runs.read_batch(run, rows, i * sequences, sequences)
        compiled = compiled or loop.lower_step(run, state, batch, gemma).compile()
        state, m = compiled(state, batch, gemma)
        metrics.append(jax.device_get(m))
    return jax.device_get(state), metrics


def reference(run, rows, gemma, state, count):
    """The parameters after the same steps in plain code: gemma's forward pass, optax's Adam and `jax.grad`."""
    plan, model = run.plan, run.module
    member = plan.members[0]
    site, scaling = str(member.site), state.normalizers[str(member.site)]
    params = member_params(state, 0)
    penalty_of = objectives.linear_penalty
    rate = run.config.optimizer
    adam = optax.scale_by_adam(b1=0.0, b2=rate.beta2, eps=rate.eps)
    adam_state = adam.init(params)
    slots = jax.tree.map(np.array, state.ring.slots)
    update, harvests, draws, last_full = 0, 0, 0, 0
    for i in range(count):
        draining = harvests >= plan.harvests
        index = np.asarray(
            shuffle_buffer.choose_slots(
                shuffle_buffer.Ring(slots, jnp.int32(last_full)),
                jax.random.wrap_key_data(state.key),
                plan.activations // plan.ring_groups,
                jnp.int32(i),
                jnp.int32(harvests - draws),
                jnp.bool_(draining),
            )
        )
        groups = np.arange(plan.ring_groups)[:, None]
        x, weight = slots.acts[site][groups, index], slots.weight[site][groups, index]
        drawing = draining or harvests - draws == plan.ring_steps
        if drawing:
            for k in range(plan.updates_per_step):
                share = plan.batch // plan.ring_groups
                part = slice(k * share, (k + 1) * share)
                x_k, w_k = x[:, part].reshape(-1, x.shape[-1]), weight[:, part].reshape(-1)
                coefficient = member.sparsity_coefficient * min(update / rate.sparsity_warmup_updates, 1)
                gradient = jax.grad(objectives.loss)(
                    params, x_k, w_k, penalty_of(coefficient), plan.banks[0].bandwidth
                )
                direction = params.W_dec / (jnp.linalg.norm(params.W_dec, axis=1, keepdims=True) + 1e-6)
                along = (gradient.W_dec * direction).sum(1, keepdims=True)
                gradient = gradient.replace(W_dec=gradient.W_dec - along * direction)
                scaled, adam_state = adam.update(gradient, adam_state)
                rise = 0.1 + 0.9 * (1 - np.cos(np.pi * min(update / rate.warmup_updates, 1))) / 2
                params = jax.tree.map(lambda p, u, r=rise: p - rate.learning_rate * r * u, params, scaled)
                norm = jnp.linalg.norm(params.W_dec, axis=1, keepdims=True)
                params = params.replace(W_dec=params.W_dec / norm)
                update += 1
        if not draining:
            batch = rows.read(
                token_rows.order(len(rows), run.config.seed, i * len(batch_rows(run)), len(batch_rows(run)))
            )
            tokens = jnp.asarray(batch.tokens)
            positions, mask = masking.packed_positions(tokens), masking.packed_mask(tokens)
            full = jax.tree.map(jnp.asarray, tiny.params())
            _, captured = model.apply(
                {"params": full}, tokens, positions=positions, attention_mask=mask,
                capture_intermediates=True, mutable=["intermediates"],
            )  # fmt: skip
            block = captured["intermediates"][f"layer_{member.site.layer}"]
            acts = np.asarray(block["__call__"][0][1]).reshape(plan.activations, -1)
            acts = (acts - scaling.mean_D) / scaling.scale
            kept = ~np.isin(batch.tokens.reshape(-1), [masking.PAD, masking.EOS, masking.BOS])
            slots.acts[site][groups, index] = acts.reshape(*index.shape, -1)
            slots.weight[site][groups, index] = kept.reshape(index.shape)
            harvests += 1
        draws += drawing
        if harvests - draws == plan.ring_steps:
            last_full = harvests
    return params


def batch_rows(run):
    return range(run.config.train.sequences_per_step)


@pytest.mark.parametrize("layer", [1, 3])
def test_fused_steps_equal_unfused_ones(inputs, layer):
    """The steps include filling, steady running and draining."""
    run, rows, gemma, state = build(inputs, banks__main__layers=(layer,), train__tokens=8 * 16 * 6)
    count = run.plan.harvests + run.plan.ring_steps
    expected = reference(run, rows, gemma, jax.device_get(state), count)
    final, _ = run_steps(run, rows, gemma, state, count)
    assert int(final.harvests) == int(final.draws) == 6
    ours = member_params(final, 0)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), ours, expected)
    # The parameters must have moved by more than the tolerance for the comparison to be meaningful.
    assert np.abs(ours.b_enc).max() > 1e-3


@pytest.mark.parametrize("mesh", [(1, 8), (8, 1), (2, 4)])
def test_eight_devices_train_the_same_as_one(inputs, mesh):
    """The bank has members at two layers and two sites, padded to a multiple of the data axis."""
    fields = dict(
        banks__main__layers=(0, 2), banks__main__sites=("resid_post", "mlp_out"),
        banks__main__sparsity_coefficients=(1e-2,),
    )  # fmt: skip
    finals = []
    for data_axis, latent_axis in [(1, 1), mesh]:
        built = build(inputs, data_axis, latent_axis, **fields)
        members = len(built[0].plan.members)
        final, metrics = run_steps(*built, 7)
        finals.append((jax.tree.map(lambda leaf, m=members: leaf[:m], final.banks), metrics[-1]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), finals[0][0], finals[1][0]
    )
    np.testing.assert_allclose(finals[0][1].banks["main"].l0_E, finals[1][1].banks["main"].l0_E, rtol=1e-3)
    np.testing.assert_array_equal(finals[0][1].source_Bx3, finals[1][1].source_Bx3)


# Banks with different layers, sites, λ, objectives and widths; two hold transcoders, one with a skip connection.
RECIPE = dict(bandwidth=0.1, initial_threshold=0.1, window_updates=3)
BANKS = {
    "residual": dict(layers=(0, 2), sites=("resid_post", "mlp_out"), width=64, sparsity_coefficients=(1e-2, 3e-3)),
    "heads": dict(
        layers=(1,), sites=("attn_out",), width=128, objective="controlled", target_l0s=(5.0, 9.0),
        sparsity_coefficients=(1e-2,),
    ),
    "mlp": dict(
        layers=(1, 3), sites=("mlp_in",), target_site="mlp_out", width=32, skip=True, scale_target_by="target",
        objective="quadratic", target_l0s=(4.0,), sparsity_coefficients=(1e-2,), seeds=(0, 5),
    ),
    "gain_free": dict(layers=(3,), sites=("mlp_in_gain_free",), target_site="mlp_out", width=32),
}  # fmt: skip


def build_banks(inputs, banks, *mesh, **changes):
    fields = {name: RECIPE | values for name, values in banks.items()}
    return build(inputs, *mesh, banks=fields, **changes)


def test_members_of_banks_equal_the_same_saes_alone(inputs):
    """Their parameters, optimizer and counters agree to 1e-6, whatever other banks the run has."""
    everything = build_banks(inputs, BANKS)
    together, _ = run_steps(*everything, 8)
    for plan in everything[0].plan.banks:
        member, place = plan.members[-1], len(plan.members) - 1
        alone = dict(
            BANKS[plan.name],
            layers=(member.site.layer,),
            sites=(member.site.kind,),
            sparsity_coefficients=(member.sparsity_coefficient,),
            seeds=(member.seed,),
        )
        if member.target_l0:
            alone["target_l0s"] = (member.target_l0,)
        final, _ = run_steps(*build_banks(inputs, {plan.name: alone}), 8)
        mine, its = final.banks[plan.name], together.banks[plan.name]
        jax.tree.map(
            lambda a, b, i=place: np.testing.assert_allclose(a[0], b[i], rtol=1e-6, atol=1e-6), mine, its
        )
        assert int(mine.updates_E[0]) == 16
        assert np.abs(mine.params.b_enc).max() > 1e-3


def test_the_order_of_members_does_not_matter(inputs):
    """So no member is trained with the site, λ, target or seed of another."""
    turned = {
        name: {field: v[::-1] if isinstance(v, tuple) else v for field, v in fields.items()}
        for name, fields in BANKS.items()
    }
    found = []
    for banks in (BANKS, turned):
        built = build_banks(inputs, banks)
        final, _ = run_steps(*built, 6)
        found.append(
            {
                member.name: jax.tree.map(lambda leaf, i=i: leaf[i], final.banks[plan.name])
                for plan in built[0].plan.banks
                for i, member in enumerate(plan.members)
            }
        )
    assert len(found[0]) == 8 + 2 + 4 + 1
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), *found)


def test_banks_on_eight_devices_train_the_same_as_on_one(inputs):
    finals = []
    for shape in [(1, 1), (2, 4)]:
        built = build_banks(inputs, BANKS, *shape)
        final, _ = run_steps(*built, 8)
        counts = {plan.name: len(plan.members) for plan in built[0].plan.banks}
        finals.append({n: jax.tree.map(lambda x, m=counts[n]: x[:m], b) for n, b in final.banks.items()})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), *finals)


def test_the_ring_holds_a_sites_activations_once_for_all_banks(inputs):
    banks = {
        "a": dict(layers=(1,), width=32, sparsity_coefficients=(1e-3, 1e-2)),
        "b": dict(layers=(1,), width=64),
    }
    run, _, _, state = build_banks(inputs, banks)
    assert set(state.ring.slots.acts) == {"layer_1_resid_post"} and len(run.plan.members) == 3


def test_a_transcoder_is_trained_on_both_sites_of_a_token_in_the_chosen_scales(inputs):
    """Compares the loss of the first update with one computed from Gemma's activations in float64."""
    for by in ("read", "target"):
        bank_config = dict(
            layers=(3,), sites=("mlp_in",), target_site="mlp_out", width=32, scale_target_by=by
        )
        run, rows, gemma, state = build_banks(
            inputs, {"t": bank_config}, train__batch=128, ring__capacity=128, train__tokens=256
        )
        first = jax.device_get(state)
        _, metrics = run_steps(run, rows, gemma, state, 2)
        batch = runs.read_batch(run, rows, 0, 8)
        read, target = run.plan.sites
        values = forward.read_sites(gemma, batch.tokens_SxL, [read, target])
        kept = np.asarray(masking.is_kept(batch.tokens_SxL, 0))
        x, y = (np.asarray(values[site], np.float64)[kept] for site in (read, target))
        n_x, n_y = (first.normalizers[str(site)] for site in (read, target))
        x, y = (x - n_x.mean_D) / n_x.scale, (y - n_y.mean_D) / (n_x if by == "read" else n_y).scale
        p = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), first.banks["t"].params)
        pre = x @ p.W_enc + p.b_enc
        f = pre * (pre > np.exp(p.log_threshold))
        error = np.square(f @ p.W_dec + p.b_dec - y).sum(1).mean()
        found = metrics[1].banks["t"]
        np.testing.assert_allclose(found.loss_E, [error], rtol=1e-4)  # λ is still warming up from zero.
        np.testing.assert_allclose(found.l0_E, [(f > 0).sum(1).mean()], rtol=1e-3)
        np.testing.assert_allclose(found.fvu_E, [error / np.square(y - y.mean(0)).sum(1).mean()], rtol=1e-3)


def test_dead_and_dense_latents_are_counted_over_whole_windows(inputs):
    """Compares with frequencies from the initial parameters, which a learning rate of zero keeps."""
    run, rows, gemma, state = build_banks(
        inputs,
        {"main": dict(layers=(1,), width=64, window_updates=7)},
        optimizer__learning_rate=0.0,
        train__tokens=128 * 10,
    )
    first = jax.device_get(state)
    p = member_params(first, 0)
    batches = []
    final, metrics = run_steps(run, rows, gemma, state, 9)
    for m in metrics:
        found = m.banks["main"]
        if not m.trained:
            continue
        batches.append(m)
        updates = 4 * len(batches)
        assert (found.dead_E[0] >= 0) == (updates >= 7)
    # 20 updates: two whole windows of seven, and six updates of the third.
    assert int(final.banks["main"].updates_E[0]) == 20
    firing = final.banks["main"].firing
    assert int(firing.windows_E[0]) == 2
    rows_of = lambda m: int(m.banks["main"].activations_E[0])  # noqa: E731
    assert rows_of(metrics[-1]) < int(firing.rows_E[0]) < rows_of(metrics[-1]) + rows_of(metrics[-2])
    threshold = np.exp(p.log_threshold)
    values = forward.read_sites(gemma, runs.read_batch(run, rows, 0, 40).tokens_SxL, run.plan.sites)
    site = run.plan.sites[0]
    tokens = runs.read_batch(run, rows, 0, 40).tokens_SxL
    x = np.asarray(values[site])[np.asarray(masking.is_kept(tokens, 0))]
    scaling = first.normalizers[str(site)]
    x = (x - scaling.mean_D) / scaling.scale
    frequency = ((x - p.b_dec) @ p.W_enc + p.b_enc > threshold).mean(0)
    # A window is a sample of the harvested activations, so frequencies agree within the sampling error.
    window = 7 * run.plan.batch
    deviation = np.sqrt(frequency * (1 - frequency) / window) + 1 / window
    assert (np.abs(firing.frequency_ExM[0] - frequency) < 5 * deviation).all()
    found = metrics[-1].banks["main"]
    assert int(found.dead_E[0]) == (firing.frequency_ExM[0] == 0).sum()
    assert int(found.dense_E[0]) == (firing.frequency_ExM[0] > 0.1).sum() > 0


def test_the_controller_raises_lambda_above_the_target_and_lowers_it_below(inputs):
    targets = dict(layers=(1,), width=64, objective="controlled", target_l0s=(1.0, 60.0))
    run, rows, gemma, state = build_banks(
        inputs, {"main": targets | {"sparsity_coefficients": (1e-2,)}}, optimizer__learning_rate=0.01
    )
    final, metrics = run_steps(run, rows, gemma, state, 8)
    coefficient_E = final.banks["main"].coefficient_E
    l0_E = metrics[-1].banks["main"].l0_E
    assert l0_E[0] > 3 and l0_E[1] < 20
    # Sixteen updates, of which eight are during λ's warmup. The controller's error is clipped to one e-fold.
    moved = np.exp(8 * 0.01 * objectives.CONTROLLER_SPEED)
    np.testing.assert_allclose(coefficient_E, [1e-2 * moved, 1e-2 / moved], rtol=2e-3)


def test_each_unmasked_activation_is_trained_on_exactly_once(inputs, monkeypatch):
    """With one update a step, the reported sources are all trained positions; a tenth of the tokens is masked."""
    run, rows, gemma, state = build(
        inputs, train__batch=128, train__tokens=8 * 16 * 9, normalizer__outlier_medians=1.4
    )
    tokens = np.array([rows.read(np.array([i])).tokens[0] for i in range(len(rows))])
    tokens[np.random.default_rng(0).random(tokens.shape) < 0.1] = masking.EOS
    with_eos = lambda _, i: token_rows.Batch(tokens[i], np.asarray(i, np.int32), np.zeros(len(i), np.int32))  # noqa: E731
    monkeypatch.setattr(token_rows.Rows, "read", with_eos)
    state, metrics = run_steps(run, rows, gemma, state, run.plan.harvests + run.plan.ring_steps)

    trained = [
        (tuple(source[:2].tolist()), float(weight))
        for m in metrics
        if m.trained
        for source, weight in zip(m.source_Bx3, m.weight_B, strict=True)
        if weight
    ]
    harvested = rows.read(token_rows.order(len(rows), 0, 0, 8 * 9))
    special = np.isin(harvested.tokens, [masking.PAD, masking.EOS, masking.BOS])
    assert 0.1 < special.mean() < 0.25
    expected = sorted((int(harvested.row[s]), int(p)) for s, p in zip(*np.nonzero(~special), strict=True))
    assert sorted(place for place, _ in trained) == expected

    site = run.plan.sites[0]
    scaling = state.normalizers[str(site)]
    values = forward.read_sites(gemma, jnp.asarray(harvested.tokens), [site])[site]
    squared = np.square(np.asarray(values) - scaling.mean_D).sum(-1)
    weight = np.minimum(1, scaling.max_squared_norm / squared)
    assert 0.02 < (weight < 1)[~special].mean() < 0.5
    places = {(int(harvested.row[s]), p): weight[s, p] for s in range(72) for p in range(16)}
    np.testing.assert_allclose([w for _, w in trained], [places[place] for place, _ in trained], rtol=1e-4)


def test_the_user_prefix_is_not_trained_on(inputs):
    run, rows, gemma, state = build(inputs, data__chat_template=True, data__context_length=32)
    batch = runs.read_batch(run, rows, 0, 8)
    tokens = np.asarray(batch.tokens_SxL)
    assert (tokens == 260).sum() >= 16  # <start_of_turn>, twice in each turn.
    new = step.harvest(
        gemma,
        batch,
        state.normalizers,
        run.plan.sites,
        1,
        run.plan.masked_prefix,
    )
    site = str(run.plan.sites[0])
    trained = {(int(r), int(p)) for (r, p, _), w in zip(new.source[0], new.weight[site][0], strict=True) if w}
    expected = set()
    for row, tokens_L in zip(np.asarray(batch.row_S), tokens, strict=True):
        since_start = 0
        for place, token in enumerate(tokens_L):
            since_start = 0 if token == masking.BOS else since_start + 1
            if token not in (masking.PAD, masking.EOS, masking.BOS) and since_start > 3:
                expected.add((int(row), place))
    assert trained == expected and len(expected) < 0.9 * tokens.size


def test_gemma_split_over_devices_trains_the_same_as_whole_copies(inputs):
    results = []
    for placement in ("whole", "split"):
        run, rows, gemma, state = build(inputs, 2, 4, mesh__gemma=placement)
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(gemma))
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(gemma))
        assert held == (whole // 8 if placement == "split" else whole)
        results.append(run_steps(run, rows, gemma, state, 6)[0].banks["main"].params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *results)


def test_gemma_is_split_if_it_would_fill_more_than_a_quarter_of_a_device(inputs, monkeypatch):
    run = runs.build(tiny.run_config(inputs, mesh__data=2, mesh__latent=4))
    shapes = weights.parameter_shapes(run.module, blocks_needed(run.plan.sites))
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))
    for memory, is_split in ((4 * whole, False), (4 * whole - 4, True)):
        monkeypatch.setattr(devices_lib, "memory_of", lambda device, memory=memory: memory)
        place = runs.gemma_placement(run)
        assert place("input_embedding", (256, 32)).is_fully_replicated != is_split


def test_the_state_is_donated_and_one_executable_runs_every_step(inputs):
    run, rows, gemma, state = build(inputs, 2, 4)
    compiled = loop.lower_step(run, state, runs.read_batch(run, rows, 0, 8), gemma).compile()
    per_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= 0.99 * per_device
    first = state
    # A precompiled executable raises an error if shapes or shardings change.
    run_steps(run, rows, gemma, state, run.plan.harvests + run.plan.ring_steps, compiled)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.banks))


def collective_shapes(run, scope=""):
    """The shapes of the outputs of the compiled step's collectives, or only of those in a named scope."""
    hlo = loop.lower_step(run, *runs.abstract_inputs(run)).compile().as_text()
    pattern = r"= (.+?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\((.*)"
    return [
        tuple(int(n) for n in shape.split(","))
        for result, rest in re.findall(pattern, hlo)
        if scope in rest
        for shape in re.findall(r"\w+\[([\d,]+)\]", result)
    ]


@pytest.mark.parametrize("mesh", [(1, 8), (2, 4), (8, 1)])
def test_a_chip_receives_only_its_members_activations(inputs, mesh):
    """No collective moves weights, which have 512 latents, the ring, or another member's batch."""
    c = tiny.run_config(
        inputs,
        banks__main__layers=(0, 1, 2, 3),
        banks__main__width=512,
        ring__capacity=128 * 16,
        train__tokens=128 * 20,
        mesh__data=mesh[0],
        mesh__latent=mesh[1],
    )
    run = runs.build(c)
    shapes = collective_shapes(run)
    assert shapes
    own = run.plan.banks[0].padded_members // mesh[0] * run.plan.batch * 32
    assert max(math.prod(shape) for shape in shapes) <= own
    assert not any({512, 512 // mesh[1]} & set(shape) for shape in shapes)


def test_no_collective_moves_weights_of_any_kind_of_bank(inputs):
    """Weights have a dimension of 2,048 latents, or 32 × 32 for a skip connection; other arrays do not."""
    c = tiny.run_config(
        inputs,
        banks={name: {**RECIPE, **fields, "width": 2048} for name, fields in BANKS.items()},
        train__sequences_per_step=24,
        train__batch=192,
        train__tokens=384 * 8,
        ring__capacity=384 * 4,
        mesh__data=2,
        mesh__latent=4,
    )
    shapes = collective_shapes(runs.build(c))
    assert shapes
    assert not any({2048, 2048 // 4} & set(shape) for shape in shapes)
    part = 32 // 4
    assert not any(len(s) > 2 and s[-2:] in {(32, 32), (part, 32), (32, part)} for s in shapes)


def test_split_gemma_moves_weights_and_the_rows_embeddings_but_no_other_activations(inputs):
    """Each of the 24 rows of 16 tokens stays on its chip, and no block moves activations."""
    c = tiny.run_config(
        inputs,
        banks__main__layers=(3,),
        train__sequences_per_step=24,
        train__batch=192,
        train__tokens=384 * 8,
        ring__capacity=384 * 4,
        mesh__data=1,
        mesh__latent=8,
        mesh__gemma="split",
    )
    run = runs.build(c)
    shapes = collective_shapes(run, "/gemma/")
    assert (64, 32) in shapes  # The gathered weights of the MLP.
    assert not any(shape[:2] == (24, 16) and math.prod(shape) > 24 * 16 for shape in shapes)
    # The embeddings are exchanged once: each chip has a part of all vectors, and needs those of its three rows whole.
    assert shapes.count((1, 3, 16, 32 // 8)) == 8


def test_the_compiled_step_computes_no_logits(inputs):
    run, rows, gemma, state = build(inputs)
    batch = runs.read_batch(run, rows, 0, 8)
    hlo = loop.lower_step(run, state, batch, gemma).compile().as_text()
    assert "f32[272,32]" in hlo  # the embedding table
    assert ",272]" not in hlo and "[272]" not in hlo  # logits
    assert set(gemma.params) == {"embedder", "final_norm", "layer_0", "layer_1"}


def test_calibration_equals_numpy():
    rng = np.random.default_rng(0)
    x = (3 + rng.normal(size=(500, 6))).astype(np.float32)
    x[7] += 100
    weight = (rng.random(500) > 0.2).astype(np.float32)
    weight[7] = 1
    kept = weight > 0
    plain = jax.jit(functools.partial(normalizer.calibrate, center=False, outlier_medians=0.0))(x, weight)
    np.testing.assert_allclose(plain.mean_D, 0)
    np.testing.assert_allclose(plain.scale, np.sqrt(np.square(x[kept]).sum(1).mean()), rtol=1e-5)
    np.testing.assert_allclose(plain.ablation_mean_D, x[kept].mean(0), rtol=1e-5)
    assert np.isinf(plain.max_squared_norm)

    robust = jax.jit(functools.partial(normalizer.calibrate, center=True, outlier_medians=16.0))(x, weight)
    squared = np.square(x - x[kept].mean(0)).sum(1)
    limit = 16 * np.median(squared[kept])
    w = weight * np.minimum(1, limit / squared)
    assert 0 < w[7] < 0.1 and (np.delete(w, 7) == np.delete(weight, 7)).all()
    mean = np.average(x, axis=0, weights=w)
    np.testing.assert_allclose(robust.max_squared_norm, limit, rtol=1e-5)
    np.testing.assert_allclose(robust.mean_D, mean, rtol=1e-5)
    np.testing.assert_allclose(
        robust.scale, np.sqrt(np.average(np.square(x - mean).sum(1), weights=w)), rtol=1e-5
    )
    np.testing.assert_allclose(robust.ablation_mean_D, x[kept].mean(0), rtol=1e-5)


def spoil(gemma, row, position, value=np.nan):
    """Gemma with the value in the embedding of the token at that position."""
    table = np.array(gemma.params["embedder"]["input_embedding"])
    table[row[position]] = value
    return gemma.replace(params=gemma.params | {"embedder": {"input_embedding": jnp.asarray(table)}})


def test_nonfinite_activations_are_left_out_and_reported(inputs):
    """A token's activations and those of BOS are not finite; BOS is not counted, and all others stay the same."""
    sites = dict(banks__main__layers=(0,), banks__main__sites=("embed",))
    run, rows, gemma, state = build(inputs, **sites)
    batch = runs.read_batch(run, rows, 0, 8)
    tokens = np.asarray(batch.tokens_SxL)
    kept = np.asarray(masking.is_kept(tokens, 0))

    def harvest(gemma):
        plan = run.plan
        new = step.harvest(gemma, batch, state.normalizers, plan.sites, 8)
        return jax.device_get(step.leave_out(new))

    clean, none = harvest(gemma)
    assert none["embed"].count == 0
    position = int(np.flatnonzero(kept[3])[4])
    token = tokens[3, position]
    for value in (np.nan, np.inf, 1e30):  # The square of 1e30 overflows.
        found, nonfinite = harvest(spoil(spoil(gemma, tokens[3], position, value), [masking.BOS], 0, value))
        is_bad = ((tokens == token) & kept).reshape(-1)
        assert nonfinite["embed"].count == is_bad.sum()
        assert nonfinite["embed"].first == np.flatnonzero(is_bad)[0]
        weight = found.weight["embed"].reshape(-1)
        np.testing.assert_array_equal(weight, np.where(is_bad, 0, clean.weight["embed"].reshape(-1)))
        zero = is_bad | (tokens == masking.BOS).reshape(-1)
        expected = np.where(zero[:, None], 0, clean.acts["embed"].reshape(zero.size, -1))
        np.testing.assert_array_equal(found.acts["embed"].reshape(zero.size, -1), expected)


def sums_of(batches, params):
    """The sums [K, E] of K batches, as in a bank with a single SAE."""
    made = [
        objectives.loss_gradient(params, x, weight, objectives.linear_penalty(0.0), 0.1)[1].replace(
            fired_M=None
        )
        for x, weight in batches
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[:, None], *made)


def test_fvu_is_accurate_for_a_large_mean_and_undefined_for_constants():
    """The squared activations are a hundred million times the variance, beyond float32's precision."""
    rng = np.random.default_rng(0)
    params = jumprelu.init(jax.random.key(0), 6, 16, 0.1)
    x = (1e4 + rng.normal(size=(3, 50, 6))).astype(np.float32)
    weight = rng.random((3, 50)).astype(np.float32)
    weight[1] = 0  # A batch without any weight.
    sums = sums_of(zip(x, weight, strict=True), params)
    kept, w = np.float64(x.reshape(-1, 6)), np.float64(weight.reshape(-1))
    mean = np.average(kept, axis=0, weights=w)
    variance = (w[:, None] * np.square(kept - mean)).sum()
    _, fvu = bank.l0_and_fvu(sums)
    np.testing.assert_allclose(fvu, sums.squared_error.sum() / variance, rtol=1e-3)

    _, fvu = bank.l0_and_fvu(sums_of([(np.full((50, 6), 1234.567, np.float32), weight[0])] * 3, params))
    assert np.isnan(fvu).all()
    l0, fvu = bank.l0_and_fvu(sums_of([(x[0], weight[1])], params))
    assert np.isnan(l0).all() and np.isnan(fvu).all()


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (np.zeros((40, 6)), np.ones(40), "activations of embed are zero at all 40 calibration positions"),
        (
            np.full((40, 6), 1234.567),
            np.ones(40),
            "activations of embed are the same at all 40 calibration positions",
        ),
        (
            np.arange(240.0).reshape(40, 6),
            np.zeros(40),
            "all positions of the calibration rows are masked: they are BOS",
        ),
        (
            np.full((40, 6), np.nan),
            np.ones(40),
            "no activation of embed is finite at any of the 40 calibration positions",
        ),
    ],
)
def test_activations_that_cannot_be_learned_are_refused(x, weight, message):
    sample = jax.jit(normalizer.inspect)(jnp.float32(x), jnp.float32(weight))
    with pytest.raises(ValueError, match=message):
        normalizer.check("embed", jax.device_get(sample))


def test_calibration_leaves_out_nonfinite_activations():
    rng = np.random.default_rng(0)
    x = (3 + rng.normal(size=(50, 6))).astype(np.float32)
    weight = np.ones(50, np.float32)
    bad = x.copy()
    bad[7, 2], bad[9] = np.nan, np.inf
    weight[7] = 0  # Masked positions are not reported.
    sample = jax.jit(normalizer.inspect)(bad, weight)
    assert np.flatnonzero(sample.nonfinite_N).tolist() == [9] and sample.kept == 49
    left = np.delete(x, [7, 9], axis=0)
    np.testing.assert_allclose(sample.variance, np.square(left - left.mean(0)).sum(1).mean(), rtol=1e-5)
    calibrate = functools.partial(normalizer.calibrate, center=True, outlier_medians=4.0)
    found, expected = (jax.jit(calibrate)(*v) for v in ((bad, weight), (left, np.ones(48, np.float32))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
