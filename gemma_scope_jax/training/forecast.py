"""What a run would be on a TPU slice, known before one is rented: memory, collectives, FLOPs and time.

The step is the very one that training compiles, lowered for the slice's chips and compiled by the TPU's compiler,
which needs no TPU. Bytes are the compiler's. FLOPs and times are formulas at the chips' peak rates: what a real run
reaches is less, often half.
"""

import dataclasses
import math
import re

import jax
from jax.experimental import topologies

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.display import tables
from gemma_scope_jax.runtime import devices as devices_lib
from gemma_scope_jax.runtime.errors import ConfigError
from gemma_scope_jax.training import flops as flops_lib
from gemma_scope_jax.training import loop, runs
from gemma_scope_jax.training import memory as memory_lib


@dataclasses.dataclass(frozen=True)
class Collective:
    """Arrays that chips give each other in a step."""

    kind: str
    where: str  # "gemma", "banks" or "else"
    times: int  # in a step
    bytes: int  # of the result on each chip, of all of those times together


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Of one run on one slice; bytes are of one device, times of one step and in seconds."""

    topology: str
    devices: int
    data: int  # of the mesh
    latent: int
    saes: int
    tokens: int  # of the run
    tokens_per_step: int
    memory: float  # of a device
    needs: list[memory_lib.Need]
    peak_bytes: int
    gemma_flops: int  # in a step, of all devices
    banks_flops: int
    collectives: list[Collective]
    gemma_s: float
    banks_s: float
    optimizer_s: float
    collectives_s: float
    passes: int  # that the SAEs' products are made in, at most

    @property
    def step_s(self) -> float:
        """At peak rates, one part after the other."""
        return self.gemma_s + self.banks_s + self.optimizer_s + self.collectives_s

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_s

    @property
    def hours(self) -> float:
        return self.tokens / self.tokens_per_second / 3600


def slice_devices(topology: str) -> list[jax.Device]:
    """The devices of a slice such as v5p:2x2x4, as the compiler knows them.

    Raises:
      ValueError: there is no such slice, or no compiler for it.
    """
    kind = topology.split(":")[0]
    if kind not in devices_lib.CHIPS or not re.fullmatch(
        r"\d+(x\d+){1,2}", topology.removeprefix(f"{kind}:")
    ):
        raise ConfigError(
            f"topology {topology!r} is not KIND:AxB or KIND:AxBxC with a KIND of {', '.join(devices_lib.CHIPS)}; for "
            "example v5e:2x4 (v5e-8) or v5p:2x2x4 (v5p-32)"
        )
    # A slice of one chip is a host's only one.
    bounds = (1, 1, 1) if math.prod(map(int, re.findall(r"\d+", topology.split(":")[1]))) == 1 else (2, 2, 1)
    options = {} if kind == "tpu7x" else {"chips_per_host_bounds": bounds}
    if kind in ("v4", "v5p"):
        options["chip_config_name"] = "megacore"
    try:
        return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except Exception as error:  # Of many kinds: no libtpu, a shape that the kind does not come in.
        reason = " ".join(str(error).split())[:300]
        hint = ". It needs libtpu: make .venv/libtpu, or pip install libtpu" if "libtpu" in reason else ""
        raise ConfigError(f"no compiler for {topology}: {reason}{hint}") from error


def parse_collectives(hlo: str, updates_per_step: int) -> list[Collective]:
    """The collectives of a compiled step, from its text; those of an update count as often as there are updates."""
    sizes = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found: dict[tuple[str, str], list[int]] = {}
    for result, kind, start, rest in re.findall(rf"= (.+?) ({kinds})(-start)?\((.*)", hlo):
        name = (re.search(r'op_name="([^"]*)"', rest) or ["", ""])[1]
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
        if start and kind in ("all-gather", "collective-permute"):
            arrays = arrays[1:2]  # Of operand, result and perhaps contexts.
        count = sum(sizes.get(t, 4) * math.prod(int(n) for n in shape.split(",") if n) for t, shape in arrays)
        where = next((part for part in ("banks", "gemma") if f"/{part}/" in name), "else")
        times = updates_per_step if "/banks/while/body" in name else 1
        entry = found.setdefault((kind, where), [0, 0])
        entry[0] += times
        entry[1] += times * count
    return [Collective(*key, *value) for key, value in sorted(found.items())]


def forecast(config: config_lib.Config, topology: str) -> Forecast:
    """Compiles the step of a config for a slice.

    Raises:
      ValueError: the config does not fit the slice; says what to change.
    """
    devices = slice_devices(topology)
    chip = devices_lib.CHIPS[topology.split(":")[0]]
    run = runs.build(config, devices=devices)
    inputs = runs.abstract_inputs(run)
    state, _, gemma = inputs
    try:
        compiled = loop.lower_step(run, *inputs).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory_lib.check(memory_lib.needs(state, gemma, 0), chip.memory)
        raise ConfigError(memory_lib.too_large(state, gemma, chip.memory)) from error
    memory = compiled.memory_analysis()
    plan, model, count = run.plan, run.module, len(devices)
    collectives = parse_collectives(compiled.as_text(), plan.updates_per_step)

    gemma_flops, per_bank = flops_lib.step_flops(plan, model, config.data.context_length)
    gemma_passes = devices_lib.PASSES["highest"] if config.gemma_dtype == "float32" else 1
    rate = count * chip.flops
    banks_s = sum(
        devices_lib.PASSES[b.precision] * flops / rate for b, flops in zip(plan.banks, per_bank, strict=True)
    )
    # Adam without a first moment reads weights, gradient and second moment, writes weights and second moment, and
    # the gradient was written before: six times four bytes for each weight, in every update.
    weights_bytes = sum(memory_lib.bytes_per_device(b.params) for b in state.banks.values())
    # A chip receives all but its own part of what is gathered, of what is reduced twice as much, and of what is
    # reduced and scattered as often its part as there are others; over one link, as if all chips took part.
    factors = {"all-reduce": 2, "reduce-scatter": count}
    moved = sum(c.bytes * factors.get(c.kind, 1) for c in collectives) * (count - 1) / count
    return Forecast(
        topology=topology,
        devices=count,
        data=run.mesh.shape["data"],
        latent=run.mesh.shape["latent"],
        saes=len(plan.members),
        tokens=config.train.tokens,
        tokens_per_step=plan.activations,
        memory=chip.memory,
        needs=memory_lib.needs(state, gemma, memory.temp_size_in_bytes),
        peak_bytes=memory.peak_memory_in_bytes,
        gemma_flops=gemma_flops,
        banks_flops=sum(per_bank),
        collectives=collectives,
        gemma_s=gemma_passes * gemma_flops / rate,
        banks_s=banks_s,
        optimizer_s=6 * weights_bytes * plan.updates_per_step / chip.memory_bandwidth,
        collectives_s=moved / chip.link_bandwidth,
        passes=max(devices_lib.PASSES[b.precision] for b in plan.banks),
    )


def show(found: Forecast) -> bool:
    """Prints a forecast as tables; returns whether the run fits."""
    title = (
        f"{found.topology}: {found.devices} devices, mesh {found.data} × {found.latent}, SAEs: {found.saes}"
    )
    table = tables.Table("on each device", "GB", title=title)
    for need in found.needs:
        table.add_row(need.what, f"{need.bytes / 1e9:.2f}")
    table.add_row("at most, says the compiler", f"{found.peak_bytes / 1e9:.2f}")
    table.add_row("there is", f"{found.memory / 1e9:.0f}")
    tables.show(table)
    table = tables.Table("collectives of a step", "in", "times", "GB on each device")
    for c in found.collectives:
        table.add_row(c.kind, c.where, str(c.times), f"{c.bytes / 1e9:.3f}")
    tables.show(table)
    table = tables.Table("a step, at peak rates", "TFLOP", "ms")
    rows = (
        ("Gemma", f"{found.gemma_flops / 1e12:.1f}", found.gemma_s),
        ("SAEs' matrix products", f"{found.banks_flops / 1e12:.1f}", found.banks_s),
        ("SAEs' optimizer, from memory and back", "", found.optimizer_s),
        ("collectives, over one link", "", found.collectives_s),
        ("all, one after the other", f"{(found.gemma_flops + found.banks_flops) / 1e12:.1f}", found.step_s),
    )
    for what, flops, seconds in rows:
        table.add_row(what, flops, f"{1000 * seconds:.1f}")
    tables.show(table)
    unit, factor = ("hours", 1) if found.hours >= 1 else ("minutes", 60)
    print(
        f"{found.tokens_per_step:,} tokens a step, {found.tokens_per_second:,.0f} a second: {found.tokens:,} take "
        f"{factor * found.hours:.1f} {unit}; at half of the peak rates {2 * factor * found.hours:.1f}."
    )
    if found.peak_bytes > found.memory:
        largest = max(found.needs, key=lambda need: need.bytes)
        print(f"It does not fit. Most is {largest.what}: {largest.remedy}.")
    elif found.passes > 1:
        print(
            f"The SAEs' products are made in up to {found.passes} passes; with banks.NAME.precision = default in one."
        )
    return found.peak_bytes <= found.memory
