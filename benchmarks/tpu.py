"""The memory of harvests, training steps and evaluations on TPU slices, compiled ahead of time without a TPU.

    python -m benchmarks.tpu [--harvest=gemma2_2b] [--step=all_16k] [--evaluation=gemma2_27b] [--json=PATH]

Bytes are reported by the compiler, for one chip. Needs libtpu (`make .venv/libtpu`, or a path in $TPU_LIBRARY_PATH).
"""

import argparse
import dataclasses
import importlib
import json
import pathlib
import time

from gemma_scope_jax.cli import common
from gemma_scope_jax.evaluation import measuring
from gemma_scope_jax.models import passes
from gemma_scope_jax.models.gemma import Gemma

common.find_tpu_compiler()

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.models import placement, registry, weights
from gemma_scope_jax.models.sites import Site, site_width
from gemma_scope_jax.runtime import devices as devices_lib
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.saes import attached, jumprelu
from gemma_scope_jax.training import flops, forecast, step
from gemma_scope_jax.training import memory as memory_lib
from gemma_scope_jax.training.normalizer import Normalizer


@dataclasses.dataclass(frozen=True)
class Harvest:
    """A harvest of one residual stream."""

    model: str
    layer: int
    topology: str
    split: bool
    sequences_per_chip: int = 4
    length: int = 1024


HARVESTS = (
    Harvest("gemma2_2b", 12, "v5e:2x4", split=False),
    Harvest("gemma2_9b", 20, "v5e:2x4", split=True),
    Harvest("gemma2_27b", 22, "v5e:4x4", split=True),
)


@dataclasses.dataclass(frozen=True)
class Step:
    """The training step of a config on a slice."""

    config: str
    suite: str
    topology: str
    layers: tuple[int, ...] = ()  # Empty: the layers of the suite.


STEPS = (
    Step("gemma2_2b", "resid_post_16k", "v5e:2x4", (12,)),
    Step("gemma2_2b", "resid_post_16k", "v5p:2x2x4"),
    Step("gemma2_2b", "all_16k", "v5p:2x2x4"),
    Step("gemma2_2b", "resid_post_1m", "v5p:2x2x4", (12,)),
    Step("gemma2_9b", "resid_post_131k", "v5p:2x2x2", (20,)),
    Step("gemma2_9b", "resid_post_131k", "v6e:4x4", (20,)),
    Step("gemma2_27b", "resid_post_131k", "v5p:2x4x4", (22,)),
    Step("gemma3", "270m/resid_post_16k", "v5e:2x4", (9,)),
)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation of one SAE of a residual stream with all metrics, on 2,048 rows as in Gemma Scope."""

    model: str
    layer: int
    width: int
    topology: str
    rows: int = 2048
    sequences_per_chip: int = 1
    length: int = 1024


EVALUATIONS = (
    Evaluation("gemma2_2b", 12, 2**14, "v5e:2x4"),
    Evaluation("gemma2_9b", 20, 2**17, "v5p:2x2x2"),
    Evaluation("gemma2_27b", 22, 2**17, "v5p:2x2x4"),
)


def report(lowered: jax.stages.Lowered) -> dict:
    """Compiles, and returns the bytes of HBM on each chip by kind."""
    started = time.monotonic()
    memory = lowered.compile().memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "compile_s": round(time.monotonic() - started, 1),
    }


def placed(mesh: jax.sharding.Mesh, shape: tuple, dtype: jnp.dtype, spec: P) -> jax.ShapeDtypeStruct:
    """The shape of an array placed on the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))


def batch_shapes(mesh: jax.sharding.Mesh, sequences: int, length: int) -> step.Batch:
    """The shapes of the rows of one step."""
    rows = placed(mesh, (sequences,), jnp.int32, sharding.TOKENS)
    return step.Batch(placed(mesh, (sequences, length), jnp.int32, sharding.TOKENS), rows, rows)


def measure_harvest(case: Harvest) -> dict:
    """The memory of a harvest."""
    devices = forecast.slice_devices(case.topology)
    mesh = sharding.make_mesh(1, 0, devices)
    model, site = registry.build_model(case.model), Site("resid_post", case.layer)
    params = weights.placed_shapes(
        model, case.layer + 1, jnp.bfloat16, placement.gemma_placement(mesh, case.split)
    )
    vector = placed(mesh, (site_width(model, site),), jnp.float32, sharding.REPLICATED)
    scalar = placed(mesh, (), jnp.float32, sharding.REPLICATED)
    normalizers = {str(site): Normalizer(vector, scalar, scalar, vector)}

    gemma = Gemma(case.model, model, mesh, case.layer + 1, params)

    def harvest(gemma: Gemma, batch: step.Batch, normalizers: dict) -> object:
        return step.harvest(gemma, batch, normalizers, [site], len(devices))

    out = jax.NamedSharding(mesh, sharding.TOKENS)
    batch = batch_shapes(mesh, case.sequences_per_chip * len(devices), case.length)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    lowered = jax.jit(harvest, out_shardings=out).lower(gemma, batch, normalizers)
    return {**dataclasses.asdict(case), "chips": len(devices), "parameters": count, **report(lowered)}


def measure_step(case: Step) -> dict:
    """The memory and time of the training step of a config, as in `gemma-scope plan`."""
    c = importlib.import_module(f"configs.{case.config}").get_config(case.suite)
    for bank in c.banks.values():
        bank.layers = case.layers or bank.layers
    try:
        found = forecast.forecast(config_lib.from_dict(c.to_dict()), case.topology)
    except ValueError as error:
        return {**dataclasses.asdict(case), "refused": str(error)}
    return {
        **dataclasses.asdict(case),
        **dataclasses.asdict(found),
        "step_s": found.step_s,
        "tokens_per_second": found.tokens_per_second,
        "hours": found.hours,
    }


def measure_evaluation(case: Evaluation) -> dict:
    """The memory of all passes of an evaluation, and its time at peak rates.

    The peak is that of the largest pass, together with all arrays that are in memory during that pass.
    """
    devices = forecast.slice_devices(case.topology)
    chip = devices_lib.CHIPS[case.topology.split(":")[0]]
    mesh = sharding.make_mesh(1, 0, devices)
    model, site = registry.build_model(case.model), Site("resid_post", case.layer)
    layers = model.config.num_layers
    c = config_lib.from_dict({"model": case.model})
    params = weights.placed_shapes(
        model, layers, jnp.bfloat16, placement.placement_of(c, mesh, model, layers)
    )
    gemma = Gemma(case.model, model, mesh, layers, params)
    d, v, m = model.config.embed_dim, model.config.num_embed, case.width
    shape = (case.sequences_per_chip * len(devices), case.length)
    tokens, kept = (placed(mesh, shape, dtype, sharding.TOKENS) for dtype in (jnp.int32, jnp.bool))
    x, importance = (
        placed(mesh, (*shape, d), dtype, sharding.TOKENS) for dtype in (jnp.bfloat16, jnp.bfloat16)
    )
    mean = placed(mesh, (d,), jnp.float32, sharding.REPLICATED)
    arrays = {"W_enc": (d, m), "b_enc": (m,), "threshold": (m,), "W_dec": (m, d), "b_dec": (d,)}
    specs = attached.latent_specs(mesh, m)
    subject = jumprelu.SAE(
        **{name: placed(mesh, of, jnp.float32, specs.get(name, P())) for name, of in arrays.items()}
    )
    lowered = {
        "clean": passes.clean.lower(gemma, tokens, (site,)),
        "loss": passes.loss.lower(gemma, x, tokens, kept),
        "spliced": jax.jit(passes.spliced, static_argnames="site").lower(gemma, x, tokens, kept, site, x),
        "importance": passes.importance.lower(gemma, x, x, tokens, kept, site),
        "reconstruct": measuring.reconstruct.lower(mesh, subject, x, x, mean, kept, importance, None),
        "divergence": passes.divergence.lower(gemma, x, x, tokens, kept),
    }
    of_passes = {name: report(one) for name, one in lowered.items()}
    # In memory throughout: the input of the site's block, the site, the last activations, the splice, the gradient.
    resident = memory_lib.bytes_per_device((params, subject, tokens, kept, x, x, x, x, importance))
    peak = max(resident + of["temporary_bytes"] + of["output_bytes"] for of in of_passes.values())
    count = case.rows * case.length
    blocks = flops.harvest_flops(model, case.rows, case.length, layers)
    upper = blocks * (1 - case.layer / layers)
    logits = 2 * count * d * v
    # The clean pass; two ablations; a gradient of the activations, as a forward, a repeated forward and a backward
    # pass; and the splice, whose KL computes logits twice.
    gemma_flops = blocks + 2 * upper + 3 * upper + upper + logits * (1 + 2 + 3 + 2)
    # Encoding, decoding and one further product for r_L0, each in float32.
    sae_flops = devices_lib.PASSES["highest"] * 2 * count * 3 * d * m
    return {
        **dataclasses.asdict(case),
        "chips": len(devices),
        "memory": chip.memory,
        "passes": of_passes,
        "resident_bytes": resident,
        "peak_bytes": peak,
        "gemma_flops": gemma_flops,
        "sae_flops": sae_flops,
        "minutes": (gemma_flops + sae_flops) / (len(devices) * chip.flops) / 60,
    }


def main() -> None:
    """Prints a line for each case; writes all cases as JSON if --json is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--harvest", help="model whose harvest is measured, or all; other cases are left out")
    parser.add_argument("--step", help="suite whose steps are measured, or all; other cases are left out")
    parser.add_argument(
        "--evaluation", help="model whose evaluation is measured, or all; other cases are left out"
    )
    parser.add_argument("--json", type=pathlib.Path, help="file to write the numbers to")
    args = parser.parse_args()
    is_all = not (args.harvest or args.step or args.evaluation)
    measured = {"harvests": [], "steps": [], "evaluations": []}
    for case in HARVESTS:
        if is_all or args.harvest in (case.model, "all"):
            measured["harvests"].append(result := measure_harvest(case))
            print(
                f"harvest of {case.model} to layer {case.layer} on {case.topology}: "
                f"{result['parameters'] / 1e9:.3f} billion parameters; on each chip "
                f"{result['argument_bytes'] / 1e9:.2f} GB of weights, {result['peak_bytes'] / 1e9:.2f} GB at peak; "
                f"compiled in {result['compile_s']:.0f} s",
                flush=True,
            )
    for case in STEPS:
        if not (is_all or args.step in (case.suite, "all")):
            continue
        measured["steps"].append(result := measure_step(case))
        told = result.get("refused") or (
            f"{result['peak_bytes'] / 1e9:.2f} GB at peak, {result['hours']:.1f} hours at peak rates"
        )
        print(f"step of {case.config}:{case.suite} on {case.topology}: {told}", flush=True)
    for case in EVALUATIONS:
        if not (is_all or args.evaluation in (case.model, "all")):
            continue
        measured["evaluations"].append(result := measure_evaluation(case))
        print(
            f"evaluation on {case.rows} rows of {case.model}, layer {case.layer}, {case.width} latents, on "
            f"{case.topology}: {result['peak_bytes'] / 1e9:.2f} GB at peak of {result['memory'] / 1e9:.0f}, "
            f"{result['minutes']:.1f} minutes at peak rates",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
