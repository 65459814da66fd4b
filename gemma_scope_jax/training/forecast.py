"""Forecast of a run on a TPU slice, without a TPU: memory, collectives, FLOPs and time.

The step is the same as in training. It is lowered for the slice's chips and compiled by the TPU compiler, which needs
no TPU. Byte counts come from the compiler. FLOPs and times come from formulas at the chips' peak rates. A real run
reaches less than the peak, often half.
"""

import dataclasses
import math
import re
import statistics

import jax
from jax.experimental import topologies

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.runtime import devices as devices_lib
from gemma_scope_jax.runtime.errors import ConfigError
from gemma_scope_jax.runtime.reporting import say
from gemma_scope_jax.training import bank, loop, runs
from gemma_scope_jax.training import flops as flops_lib
from gemma_scope_jax.training import memory as memory_lib


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collective operations of one kind in one part of a step."""

    kind: str
    where: str  # The part of the step: "gemma", "banks" or "other".
    times: int  # Executions in a step.
    bytes: int  # Size of the results on each chip, summed over all executions.


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The forecast of one run on one slice. Bytes are for one device; times are seconds for one step."""

    topology: str
    devices: int
    data: int  # size of the mesh's data axis
    latent: int  # size of the mesh's latent axis
    saes: int
    padded: int  # SAEs that are computed: each bank is padded to a multiple of `data`
    tokens: int  # in the run
    tokens_per_step: int
    memory: float  # bytes that a device has
    needs: list[memory_lib.Need]
    peak_bytes: int
    gemma_flops: int  # in a step, summed over devices
    banks_flops: int
    collectives: list[Collective]
    gemma_s: float
    banks_s: float
    optimizer_s: float
    collectives_s: float
    one_pass_s: float  # the SAEs' matrix products if each took one pass

    @property
    def step_s(self) -> float:
        """The time of a step at peak rates, with its parts in sequence."""
        return self.gemma_s + self.banks_s + self.optimizer_s + self.collectives_s

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_s

    @property
    def hours(self) -> float:
        """The time of the run at peak rates."""
        return self.tokens / self.tokens_per_second / 3600

    def at(self, precision: str) -> "Forecast":
        """The forecast with all of the SAEs' matrix products at one precision."""
        return dataclasses.replace(self, banks_s=devices_lib.PASSES[precision] * self.one_pass_s)

    @property
    def chips(self) -> int:
        """The chips of the slice; a tpu7x chip is two devices."""
        return math.prod(map(int, self.topology.split(":")[1].split("x")))


# Chips in each direction of the slices that Google Cloud sells, by the number in their names: of chips for v5e and
# v6e, and of cores, two per chip, for v4 and v5p.
_BY_CHIPS = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_BY_CORES = {
    8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8",
    2048: "8x8x16", 4096: "8x16x16", 8192: "16x16x16",
}  # fmt: skip
_SLICES = {"v4": _BY_CORES, "v5p": _BY_CORES, "v5e": _BY_CHIPS, "v5litepod": _BY_CHIPS, "v6e": _BY_CHIPS}


def topology_of(name: str) -> str:
    """The topology of a slice by Google Cloud's name, such as v5p:2x2x2 for v5p-16. Other names stay as they are.

    Raises:
      ValueError: if Cloud has no slice of that size.
    """
    kind, dash, size = name.partition("-")
    if kind not in _SLICES or not dash:
        return name
    shapes = {str(count): shape for count, shape in _SLICES[kind].items()}
    if size not in shapes:
        raise ConfigError(f"there is no slice {name}; sizes of {kind} are {', '.join(shapes)}")
    return f"{kind.replace('v5litepod', 'v5e')}:{shapes[size]}"


def slice_devices(topology: str) -> list[jax.Device]:
    """The devices of a slice such as v5p:2x2x4, as the compiler describes them.

    Raises:
      ValueError: if there is no such slice, or no compiler for it.
    """
    kind = topology.split(":")[0]
    if kind not in devices_lib.CHIPS or not re.fullmatch(
        r"\d+(x\d+){1,2}", topology.removeprefix(f"{kind}:")
    ):
        raise ConfigError(
            f"topology {topology!r} is not KIND:AxB or KIND:AxBxC with KIND one of {', '.join(devices_lib.CHIPS)}; "
            "give for example v5e:2x4 or v5p:2x2x4, or Cloud's names for these, v5e-8 and v5p-32"
        )
    # In a slice of one chip, the host has only that chip.
    bounds = (1, 1, 1) if math.prod(map(int, re.findall(r"\d+", topology.split(":")[1]))) == 1 else (2, 2, 1)
    options = {} if kind == "tpu7x" else {"chips_per_host_bounds": bounds}
    if kind in ("v4", "v5p"):
        options["chip_config_name"] = "megacore"
    try:
        return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except Exception as error:  # Of many types: no libtpu, an unsupported shape, …
        reason = " ".join(str(error).split())[:300]
        hint = ". Run make .venv/libtpu or pip install libtpu" if "libtpu" in reason else ""
        raise ConfigError(f"cannot compile for {topology}: {reason}{hint}") from error


def parse_collectives(hlo: str, updates_per_step: int) -> list[Collective]:
    """The collectives in the text of a compiled step. Those of an update are counted once for each update."""
    sizes = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found: dict[tuple[str, str], list[int]] = {}
    for result, kind, start, rest in re.findall(rf"= (.+?) ({kinds})(-start)?\((.*)", hlo):
        name = (re.search(r'op_name="([^"]*)"', rest) or ["", ""])[1]
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
        if start and kind in ("all-gather", "collective-permute"):
            arrays = arrays[1:2]  # The tuple holds the operand, the result and sometimes contexts.
        count = sum(sizes.get(t, 4) * math.prod(int(n) for n in shape.split(",") if n) for t, shape in arrays)
        where = next((part for part in ("banks", "gemma") if f"/{part}/" in name), "other")
        times = updates_per_step if "/banks/while/body" in name else 1
        entry = found.setdefault((kind, where), [0, 0])
        entry[0] += times
        entry[1] += times * count
    return [Collective(*key, *value) for key, value in sorted(found.items())]


def _mean_passes(plan: bank.Plan) -> float:
    """The bfloat16 passes of a bank's five products, on average."""
    return statistics.mean(devices_lib.PASSES[precision] for precision in dataclasses.astuple(plan.precision))


def forecast(config: config_lib.Config, topology: str) -> Forecast:
    """Compiles the step of a config for a slice and returns the forecast.

    Args:
      config: the run.
      topology: the slice, as `topology_of` or `slice_devices` takes it.

    Raises:
      ValueError: if the config does not fit the slice. The message says what to change.
    """
    topology = topology_of(topology)
    devices = slice_devices(topology)
    chip = devices_lib.CHIPS[topology.split(":")[0]]
    run = runs.build(config, devices=devices)
    inputs = runs.abstract_inputs(run)
    state, _, gemma = inputs
    say(f"Compiling the training step for {topology}, which takes minutes for many SAEs …")
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
    gemma_passes = devices_lib.PASSES["highest"] if run.config.gemma_dtype == "float32" else 1
    rate = count * chip.flops
    banks_s = sum(_mean_passes(b) * flops / rate for b, flops in zip(plan.banks, per_bank, strict=True))
    # In each update, Adam without a first moment reads weights, gradient and second moment, and writes weights and
    # second moment. Before that, the gradient is written. So an update moves six times four bytes for each weight.
    weights_bytes = sum(memory_lib.bytes_per_device(b.params) for b in state.banks.values())
    # In an all-gather or all-to-all, a chip receives all of the result except its own part; in an all-reduce, twice
    # that; in a reduce-scatter, its result once from each other chip. This assumes one link and that all chips take
    # part.
    factors = {"all-reduce": 2, "reduce-scatter": count}
    moved = sum(c.bytes * factors.get(c.kind, 1) for c in collectives) * (count - 1) / count
    return Forecast(
        topology=topology,
        devices=count,
        data=run.mesh.shape["data"],
        latent=run.mesh.shape["latent"],
        saes=len(plan.members),
        padded=sum(b.padded_members for b in plan.banks),
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
        one_pass_s=sum(per_bank) / rate,
    )
