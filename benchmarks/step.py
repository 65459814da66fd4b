"""The speed of the training step, as ratios that can be compared between machines.

    python -m benchmarks.step [--json=results/step.json]

Each time is the least of several repetitions, in one process, on an otherwise idle machine:

  update   one SAE update (weights, dead-latent counters, sums of the metrics) compared with the five dense matmuls
           that it needs, each in the faster of the equivalent layouts
  harvest  the FLOP rate of Gemma's forward pass up to the site, compared with a 4,096 × 4,096 matmul
  fused    the compiled step compared with harvest, ring and updates compiled and run separately

`make benchmark-peers` times the same update in SAELens and dictionary_learning.
"""

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from configs import quickstart
from gemma_scope_jax import config as config_lib
from gemma_scope_jax.data import prepare, token_rows
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.training import bank, loop, runs, shuffle_buffer, step
from gemma_scope_jax.training.normalizer import Normalizer

B, D, M, L0 = 1024, 640, 4096, 60


def least_time(fn: Callable, *args: object, repeat: int = 10) -> float:
    """Seconds of the fastest of `repeat` calls, after one warm-up call."""
    jax.block_until_ready(fn(*args))
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        best = min(best, time.perf_counter() - start)
    return best


def contract(a_axis: int, b_axis: int) -> Callable:
    """A jitted matmul that contracts the given axes."""
    return jax.jit(lambda a, b: jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ()))))


def five_matmuls(batch: int = B, d: int = D, m: int = M) -> float:
    """Seconds of the five dense matmuls of one update."""
    key = jax.random.key(0)
    x_BxD, f_BxM = jax.random.normal(key, (batch, d)), jax.random.normal(key, (batch, m))
    w_DxM, w_MxD = jax.random.normal(key, (d, m)), jax.random.normal(key, (m, d))
    to_latents = min(least_time(contract(1, 0), x_BxD, w_DxM), least_time(contract(1, 1), x_BxD, w_MxD))
    to_site = min(least_time(contract(1, 0), f_BxM, w_MxD), least_time(contract(1, 1), f_BxM, w_DxM))
    weights = min(least_time(contract(0, 0), f_BxM, x_BxD), least_time(contract(0, 0), x_BxD, f_BxM))
    return 2 * to_latents + to_site + 2 * weights


def quickstart_run(**changes: object) -> runs.Run:
    """The quickstart's run with changed fields."""
    c = quickstart.get_config()
    c.update_from_flattened_dict(changes)
    return runs.build(config_lib.from_dict(c.to_dict()))


def synthetic_state(run: runs.Run, x_BxD: jax.Array) -> step.State:
    """A state whose SAEs have an L0 of about 60 on x; a tiny learning rate keeps the L0 there."""
    d = x_BxD.shape[1]
    normalizer = Normalizer(jnp.zeros(d), jnp.ones(()), jnp.asarray(jnp.inf), jnp.zeros(d))
    state = step.init_state(run.plan, {str(site): normalizer for site in run.plan.sites}, jnp.float32)

    def sparse(bank_state: bank.State) -> bank.State:
        params = bank_state.params
        pre = x_BxD @ params.W_enc[0]
        threshold = jnp.quantile(pre[:, :512], 1 - L0 / params.W_enc.shape[-1])
        log_threshold = jnp.full_like(params.log_threshold, jnp.log(threshold))
        return bank_state.replace(params=params.replace(log_threshold=log_threshold))

    return state.replace(banks={name: sparse(bank_state) for name, bank_state in state.banks.items()})


def update_benchmark() -> dict:
    """Times one update, with the code of the step, at an L0 of about 60."""
    updates = 8
    run = quickstart_run(
        **{"train.batch": B, "train.sequences_per_step": 4 * updates, "ring.capacity": 16 * B * updates}
    )
    site = str(run.plan.sites[0])
    x_KxBxD = jax.random.normal(jax.random.key(1), (updates, B, D)) / D**0.5
    state = synthetic_state(run, x_KxBxD[0])
    batches = shuffle_buffer.Slots(
        {site: x_KxBxD}, {site: jnp.ones((updates, B))}, jnp.zeros((updates, B, 3), jnp.int32)
    )
    plan = dataclasses.replace(
        run.plan, optimizer=dataclasses.replace(run.plan.optimizer, learning_rate=1e-12)
    )
    jitted = jax.jit(
        lambda banks: step.train(plan, run.mesh, state.replace(banks=banks), batches), donate_argnums=0
    )
    banks = jax.tree.map(jnp.copy, dict(state.banks))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        banks, sums = jax.block_until_ready(jitted(banks))
        best = min(best, time.perf_counter() - start)
    floor = five_matmuls()
    return {
        "l0": float(sums["main"].l0.sum() / sums["main"].weight.sum()),
        "update_ms": 1e3 * best / updates,
        "five_matmuls_ms": 1e3 * floor,
        "update_over_five_matmuls": best / updates / floor,
    }


def harvest_flops(run: runs.Run, gemma: Gemma) -> float:
    """FLOPs of a harvest by formula: each weight of the blocks once per token, and the two products of attention."""
    model = run.module.config
    tokens, length = run.plan.activations, run.config.data.context_length
    layers = run.plan.sites[0].layer + 1
    block_weights = sum(
        leaf.size
        for name, block in gemma.params.items()
        if name.startswith("layer_")
        for leaf in jax.tree.leaves(block)
    )
    return 2 * tokens * (block_weights + layers * 2 * length * model.num_heads * model.head_dim)


def step_benchmark() -> dict:
    """Times the harvest and its FLOP rate, and the fused step compared with its parts."""
    run = quickstart_run()
    plan, sequences = run.plan, run.config.train.sequences_per_step
    rows = token_rows.open_rows(prepare.rows_of(run.config), token_rows.TRAIN)
    gemma = runs.load_gemma(run)
    normalizers = loop.calibrate(run, rows, gemma, run.plan.sites)
    state = runs.init_state(run, normalizers)
    compiled, batch = None, None
    for i in range(plan.ring_steps + 1):  # Until the ring is full and the bank has been trained.
        batch = runs.read_batch(run, rows, i * sequences, sequences)
        compiled = compiled or loop.lower_step(run, state, batch, gemma).compile()
        state, _ = jax.block_until_ready(compiled(state, batch, gemma))

    groups, count = plan.ring_groups, plan.activations // plan.ring_groups
    harvest = jax.jit(lambda gemma, batch: step.harvest(gemma, batch, normalizers, plan.sites, groups))
    harvest_s = least_time(harvest, gemma, batch, repeat=5)
    new = harvest(gemma, batch)

    @jax.jit
    def draw(slots: shuffle_buffer.Slots, key: jax.Array, number: jax.Array) -> tuple:
        index = shuffle_buffer.choose_slots(
            shuffle_buffer.Ring(slots, number), key, count, number, plan.ring_steps, jnp.bool_(False)
        )
        return index, jax.tree.map(
            lambda v: shuffle_buffer.deal(v, plan.updates_per_step), shuffle_buffer.gather(slots, index)
        )

    write = jax.jit(shuffle_buffer.scatter, donate_argnums=0)
    train = jax.jit(lambda state, batches: step.train(plan, run.mesh, state, batches)[0])
    small_state = jax.tree.map(jnp.copy, state.replace(ring=None))
    slots = jax.tree.map(jnp.copy, state.ring.slots)
    ring_s = train_s = fused_s = float("inf")
    for i in range(5):
        start = time.perf_counter()
        index, batches = jax.block_until_ready(draw(slots, jax.random.key(i), i))
        slots = jax.block_until_ready(write(slots, index, new))
        ring_s = min(ring_s, time.perf_counter() - start)
        train_s = min(train_s, least_time(train, small_state, batches, repeat=1))
        start = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch, gemma))
        fused_s = min(fused_s, time.perf_counter() - start)

    size = 4096
    a, b = jnp.ones((size, size)), jnp.ones((size, size))
    matmul_rate = 2 * size**3 / least_time(contract(1, 0), a, b, repeat=5)
    rate = harvest_flops(run, gemma) / harvest_s
    parts_s = harvest_s + ring_s + train_s
    return {
        "harvest_s": harvest_s,
        "ring_s": ring_s,
        "updates_s": train_s,
        "fused_step_s": fused_s,
        "fused_over_parts": fused_s / parts_s,
        "harvest_gflops_per_s": rate / 1e9,
        "matmul_gflops_per_s": matmul_rate / 1e9,
        "harvest_over_matmul_rate": rate / matmul_rate,
        "tokens_per_s": plan.activations / fused_s,
    }


def main() -> None:
    """Measures and prints; writes a file if --json is given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=pathlib.Path, help="file to write the numbers to")
    args = parser.parse_args()
    numbers = {**update_benchmark(), **step_benchmark()}
    for name, value in numbers.items():
        print(f"{name:28s} {value:12.3f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
