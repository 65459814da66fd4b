"""The cost of each additional SAE in a bank.

    python -m benchmarks.banks [--json=PATH]

Times the quickstart's step with banks of 1, 2, 4, 8 and 16 SAEs of 1,024 latents on the residual stream of layer 9,
in one process on an otherwise idle machine. Each is compared with the same number of separate runs of one SAE, and
the time of each additional SAE with five dense matmuls of its sizes. Each time is the least of several repetitions.
"""

import argparse
import json
import pathlib
import time

import jax

from benchmarks import step as step_benchmark
from configs import quickstart
from gemma_scope_jax import config as config_lib
from gemma_scope_jax.data import prepare, token_rows
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.training import loop, runs

M = 1024
SIZES = (1, 2, 4, 8, 16)


def build(size: int) -> runs.Run:
    """The quickstart with a bank of `size` SAEs that differ in λ."""
    c = quickstart.get_config()
    c.banks.main.width = M
    c.ring.capacity = 4096  # The activations of one step, so that the ring is full at once.
    c.banks.main.sparsity_coefficients = tuple(1e-4 * (i + 1) for i in range(size))
    return runs.build(config_lib.from_dict(c.to_dict()))


def step_seconds(
    run: runs.Run, rows: token_rows.Rows, gemma: Gemma, normalizers: dict, repeat: int = 4
) -> float:
    """Seconds of a step once the ring is full: the least of `repeat` steps."""
    state = runs.init_state(run, normalizers)
    sequences = run.config.train.sequences_per_step
    batch = runs.read_batch(run, rows, 0, sequences)
    compiled = loop.lower_step(run, state, batch, gemma).compile()
    best = float("inf")
    for i in range(run.plan.ring_steps + 1 + repeat):  # With a full ring every step trains.
        start = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch, gemma))
        if i > run.plan.ring_steps:
            best = min(best, time.perf_counter() - start)
    return best


def measure() -> dict:
    """Seconds of a step for each size of the bank."""
    one = build(1)
    rows = token_rows.open_rows(prepare.rows_of(one.config), token_rows.TRAIN)
    gemma = runs.load_gemma(one)
    normalizers = loop.calibrate(one, rows, gemma, one.plan.sites)
    seconds = {size: step_seconds(build(size), rows, gemma, normalizers) for size in SIZES}
    plan = one.plan
    matmuls = plan.updates_per_step * step_benchmark.five_matmuls(plan.batch, 640, M)
    return {
        "width": M,
        "batch": plan.batch,
        "updates_per_step": plan.updates_per_step,
        "activations_per_step": plan.activations,
        "sizes": [
            {
                "saes": size,
                "step_s": seconds[size],
                "separate_runs_s": size * seconds[1],
                "extra_sae_s": (seconds[size] - seconds[1]) / (size - 1) if size > 1 else None,
                "extra_sae_over_five_matmuls": (seconds[size] - seconds[1]) / (size - 1) / matmuls
                if size > 1
                else None,
            }
            for size in SIZES
        ],
        "five_matmuls_s": matmuls,
    }


def main() -> None:
    """Measures and prints; writes a file if --json is given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=pathlib.Path, help="file to write the numbers to")
    args = parser.parse_args()
    numbers = measure()
    for row in numbers["sizes"]:
        print(row, flush=True)
    print(f"five matmuls, each of {numbers['updates_per_step']} updates: {numbers['five_matmuls_s']:.3f} s")
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
