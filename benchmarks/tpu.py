"""What harvests and whole steps need of a TPU, compiled ahead of time on this host for slices of real chips.

    python -m benchmarks.tpu [--harvest=gemma2_2b | --step=all_16k] [--json=PATH]

Bytes are the compiler's, for one chip. Needs libtpu (`make .venv/libtpu`), or another as $TPU_LIBRARY_PATH.
"""

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence

_LIBRARY = pathlib.Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"
# It is there to compile and not to run, and two processes may do so at once.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "none")
if _LIBRARY.exists():
    os.environ.setdefault("TPU_LIBRARY_PATH", str(_LIBRARY))

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from gemma_scope_jax import config as config_lib
from gemma_scope_jax import gemma, planning, runs, sharding, step, training, weights
from gemma_scope_jax.normalizer import Normalizer


@dataclasses.dataclass(frozen=True)
class Harvest:
    """A harvest of one residual stream."""

    model: str
    layer: int
    topology: str
    shard_gemma: bool
    sequences_per_chip: int = 4
    length: int = 1024


HARVESTS = (
    Harvest("gemma2_2b", 12, "v5e:2x4", shard_gemma=False),
    Harvest("gemma2_9b", 20, "v5e:2x4", shard_gemma=True),
    Harvest("gemma2_27b", 22, "v5e:4x4", shard_gemma=True),
)


@dataclasses.dataclass(frozen=True)
class Step:
    """The step of a config, as its docstring names the hardware."""

    config: str
    suite: str
    topology: str
    layers: tuple[int, ...] = ()  # Empty: those of the suite.
    sequences: int = 64  # In a step.
    data: int = 1  # Of the mesh.


STEPS = (
    Step("gemma2_2b", "resid_post_16k", "v5e:2x4", (12,)),
    Step("gemma2_2b", "resid_post_16k", "v5p:2x2x4", data=2),
    Step("gemma2_2b", "all_16k", "v5p:2x2x4", data=2),
    Step("gemma2_9b", "resid_post_131k", "v5e:4x4", (20,)),
    Step("gemma2_27b", "resid_post_131k", "v5p:2x2x4"),
    Step("gemma2_9b_it", "resid_post_16k", "v5e:4x4"),
    Step("gemma3", "270m/resid_post_16k", "v5e:2x4", (9,)),
)


def chips(topology: str) -> Sequence[jax.Device]:
    """The chips of a slice, as the compiler knows them."""
    megacore = {"chip_config_name": "megacore"} if topology.startswith(("v4", "v5p")) else {}
    return topologies.get_topology_desc(topology, "tpu", chips_per_host_bounds=(2, 2, 1), **megacore).devices


def report(lowered: jax.stages.Lowered) -> dict:
    """Compiles; bytes of HBM on each chip, by what holds them."""
    started = time.monotonic()
    memory = lowered.compile().memory_analysis()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "compile_s": round(time.monotonic() - started, 1),
    }


def placed(mesh: jax.sharding.Mesh, shape: tuple, dtype: jnp.dtype, spec: sharding.P) -> jax.ShapeDtypeStruct:
    """A shape on the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))


def batch_shapes(mesh: jax.sharding.Mesh, sequences: int, length: int) -> step.Batch:
    """The rows that a step takes."""
    rows = placed(mesh, (sequences,), jnp.int32, sharding.TOKENS)
    return step.Batch(placed(mesh, (sequences, length), jnp.int32, sharding.TOKENS), rows, rows)


def measure_harvest(case: Harvest) -> dict:
    """A harvest alone."""
    devices = chips(case.topology)
    mesh = sharding.make_mesh(1, 0, devices)
    model, site = gemma.build_model(case.model), gemma.Site("resid_post", case.layer)
    params = weights.placed_shapes(
        model, case.layer + 1, jnp.bfloat16, sharding.gemma_placement(mesh, case.shard_gemma)
    )
    vector = placed(mesh, (gemma.site_width(model, site),), jnp.float32, sharding.REPLICATED)
    scalar = placed(mesh, (), jnp.float32, sharding.REPLICATED)
    normalizers = {str(site): Normalizer(vector, scalar, scalar, vector)}

    def harvest(params: weights.Params, batch: step.Batch, normalizers: dict) -> object:
        whole = step.gather_gemma(mesh, params)
        return step.harvest(model, whole, batch, normalizers, [site], len(devices), jnp.bfloat16)

    out = jax.NamedSharding(mesh, sharding.TOKENS)
    batch = batch_shapes(mesh, case.sequences_per_chip * len(devices), case.length)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    lowered = jax.jit(harvest, out_shardings=out).lower(params, batch, normalizers)
    return {**dataclasses.asdict(case), "chips": len(devices), "parameters": count, **report(lowered)}


def measure_step(case: Step) -> dict:
    """The whole step of a config; the ring and the SAEs are among the arguments."""
    devices = chips(case.topology)
    c = importlib.import_module(f"configs.{case.config}").get_config(case.suite)
    for bank in c.banks.values():
        bank.layers = case.layers or bank.layers
    c.mesh.data = case.data
    c.train.sequences_per_step = case.sequences
    config = config_lib.from_dict(c.to_dict())
    run = runs.build(config, sharding.make_mesh(config.mesh.data, 0, devices))
    state, batch, params = runs.abstract_inputs(run)
    lowered = training.lower_step(run, state, batch, params)
    parts = {need.what: need.bytes for need in planning.needs(state, params, 0)[:-1]}
    saes = len(run.plan.members)
    return {
        **dataclasses.asdict(case),
        "chips": len(devices),
        "saes": saes,
        "parts_bytes": parts,
        **report(lowered),
    }


def main() -> None:
    """Prints a line for each case, and writes all of them as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--harvest", help="only the harvest of this model")
    parser.add_argument("--step", help="only the steps of this suite")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the numbers")
    args = parser.parse_args()
    measured = {"harvests": [], "steps": []}
    for case in HARVESTS:
        if args.step is None and args.harvest in (None, case.model):
            measured["harvests"].append(result := measure_harvest(case))
            print(
                f"harvest of {case.model} to layer {case.layer} on {case.topology}: "
                f"{result['parameters'] / 1e9:.3f} billion parameters; on each chip "
                f"{result['argument_bytes'] / 1e9:.2f} GB of weights, {result['peak_bytes'] / 1e9:.2f} GB at most; "
                f"compiled in {result['compile_s']:.0f} s",
                flush=True,
            )
    for case in STEPS if args.harvest is None else ():
        if args.step not in (None, case.suite):
            continue
        measured["steps"].append(result := measure_step(case))
        print(
            f"step of {case.config}:{case.suite} on {case.topology}, {result['saes']} SAEs: on each chip "
            f"{result['argument_bytes'] / 1e9:.2f} GB of weights and state, {result['peak_bytes'] / 1e9:.2f} GB at "
            f"most; compiled in {result['compile_s']:.0f} s",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
