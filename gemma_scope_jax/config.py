"""The configuration of a run, its checks, and what they make of it.

The defaults are Gemma Scope's recipe (section 3). Config files build a `ConfigDict` from `defaults()` and
change fields; `from_dict` turns it into the frozen dataclass that the library takes.
"""

import dataclasses
import itertools
import typing
from collections.abc import Mapping

import jax.numpy as jnp
import ml_collections
from gemma import gm

from gemma_scope_jax import gemma, optim, step
from gemma_scope_jax.data import DataConfig


@dataclasses.dataclass(frozen=True)
class BankConfig:
    """The SAEs: one for each combination of layer, site, sparsity coefficient and seed, of equal shape."""

    layers: tuple[int, ...] = (12,)
    sites: tuple[str, ...] = ("resid_post",)
    sparsity_coefficients: tuple[float, ...] = (6e-4,)
    seeds: tuple[int, ...] = (0,)
    width: int = 16_384
    bandwidth: float = 0.001
    initial_threshold: float = 0.001
    precision: str = (
        "highest"  # Of matmuls: default, high or highest. On TPU, default multiplies in bfloat16.
    )
    dead_after_updates: int = 2_500  # A latent that has not fired for so many updates counts as dead.


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


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are laid out: bank members over `data`, latents over `latent` (0: all that are left)."""

    data: int = 1
    latent: int = 0
    shard_gemma: bool = (
        False  # Each chip holds a part of every weight, and gathers a block when it is its turn.
    )


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Cadences, in steps."""

    checkpoint_every: int = 500
    keep_checkpoints: int = 2


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How a run is evaluated when the command line does not say otherwise."""

    rows: int = 512
    rows_per_batch: int = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    model: str = "gemma3_270m"
    # An Orbax checkpoint, a Hugging Face folder, `hf://OWNER/NAME` or a GGUF file; empty: those that come with the
    # requirements (gemma3_270m), Google's own in gs://gemma-data for all others.
    weights: str = ""
    # A SentencePiece file, a tokenizer.json or a GGUF file; empty: what lies beside the weights, else Google's own.
    tokenizer: str = ""
    gemma_dtype: str = "bfloat16"
    seed: int = 0
    data: DataConfig = DataConfig()
    bank: BankConfig = BankConfig()
    train: TrainConfig = TrainConfig()
    ring: RingConfig = RingConfig()
    normalizer: NormalizerConfig = NormalizerConfig()
    optimizer: optim.OptimizerConfig = optim.OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    log: LogConfig = LogConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


# What a run may be continued with another value of. All else decides what the numbers mean.
FREE_FIELDS = ("mesh.", "log.", "evaluation.", "train.tokens", "data.folder")


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
        raise ValueError(f"{model} has no suite {suite!r}; choose one of {', '.join(suites)}")
    site, width = suite.rsplit("_", 1)
    c = defaults()
    c.model = model
    c.data.text = "tfds:c4/en:3.1.0/train"  # Open, and not what Google trained on, which is not.
    c.bank.sites, c.bank.layers = (site,), suites[suite]
    c.bank.width, c.train.tokens = _WIDTHS[width]
    # Of the published SAEs' coefficients 1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3 and 4e-3 one in the middle.
    c.bank.sparsity_coefficients = (5e-4,)
    return c


def to_dict(config: Config) -> dict:
    """The config as plain nested dicts, as it is stored in a run."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping, cls: type = Config, prefix: str = "") -> Config:
    """The config of nested dicts.

    Raises:
      ValueError: a key that no field has, or a value of the wrong type.
    """
    fields = typing.get_type_hints(cls)
    unknown = values.keys() - fields.keys()
    if unknown:
        raise ValueError(
            f"unknown config field {prefix}{sorted(unknown)[0]}; known are {', '.join(prefix + f for f in fields)}"
        )
    made = {}
    for name, value in values.items():
        kind = fields[name]
        if dataclasses.is_dataclass(kind):
            made[name] = from_dict(value, kind, f"{prefix}{name}.")
        elif typing.get_origin(kind) is tuple:
            elements = value if isinstance(value, (tuple, list)) else (value,)
            made[name] = tuple(_typed(v, typing.get_args(kind)[0], prefix + name) for v in elements)
        else:
            made[name] = _typed(value, kind, prefix + name)
    return cls(**made)


def _typed(value: object, kind: type, name: str) -> object:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"config field {name} is {value!r}, expected a value of type {kind.__name__}")
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
    for name, value in now.items():
        if before[name] != value and not name.startswith(FREE_FIELDS):
            raise ValueError(
                f"this run was started with config.{name} = {before[name]!r}, now it is {value!r}; give it the old "
                "value, or start another run with another --workdir"
            )


def dtype(config: Config) -> jnp.dtype:
    """Gemma's dtype."""
    kinds = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    if config.gemma_dtype not in kinds:
        raise ValueError(f"gemma_dtype is {config.gemma_dtype!r}; choose one of {', '.join(kinds)}")
    return kinds[config.gemma_dtype]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def members(bank: BankConfig) -> tuple[step.Member, ...]:
    """The SAEs that a bank's config names, in the order of layers, sites, coefficients, seeds."""
    return tuple(
        step.Member(gemma.Site(site, layer), coefficient, seed)
        for layer, site, coefficient, seed in itertools.product(
            bank.layers, bank.sites, bank.sparsity_coefficients, bank.seeds
        )
    )


def _check_bank(bank: BankConfig, model: gm.nn.Transformer, latent_axis: int) -> None:
    named = members(bank)
    _require(bool(named), "the bank has no member: each of bank.layers, .sites, … needs a value")
    _require(len(set(named)) == len(named), "the bank names a member twice; values must differ")
    for member in named:
        gemma.check_site(model, member.site)
    widths = {str(member.site): gemma.site_width(model, member.site) for member in named}
    _require(len(set(widths.values())) == 1, f"the sites of a bank must have one width, these have {widths}")
    _require(
        bank.width > 0 and bank.width % latent_axis == 0,
        f"bank.width {bank.width} is not divisible by the mesh's latent axis ({latent_axis}); "
        f"choose a multiple of {latent_axis}",
    )
    _require(
        bank.precision in ("default", "high", "highest"),
        f"bank.precision is {bank.precision!r}; choose default, high or highest",
    )
    for name in ("bandwidth", "initial_threshold"):
        _require(getattr(bank, name) > 0, f"bank.{name} is {getattr(bank, name)}; it must be positive")
    _require(
        min(bank.sparsity_coefficients) >= 0,
        f"bank.sparsity_coefficients are {bank.sparsity_coefficients}; none may be negative",
    )


def _check_ranges(config: Config) -> None:
    at_least_one = {
        "log.checkpoint_every": config.log.checkpoint_every,
        "log.keep_checkpoints": config.log.keep_checkpoints,
        "evaluation.rows": config.evaluation.rows,
        "evaluation.rows_per_batch": config.evaluation.rows_per_batch,
        "normalizer.rows": config.normalizer.rows,
        "mesh.data": config.mesh.data,
    }
    for name, value in at_least_one.items():
        _require(value >= 1, f"{name} is {value}; it must be at least 1")
    optimizer = config.optimizer
    for name in ("warmup_updates", "sparsity_warmup_updates", "learning_rate", "eps"):
        value = getattr(optimizer, name)
        _require(value >= 0, f"optimizer.{name} is {value}; it may not be negative")
    _require(
        0 <= optimizer.decay_fraction <= 1,
        f"optimizer.decay_fraction is {optimizer.decay_fraction}; choose 0 to 1",
    )
    _require(0 <= optimizer.beta2 < 1, f"optimizer.beta2 is {optimizer.beta2}; it must be in [0, 1)")


def _check_sizes(config: Config, devices: int) -> None:
    train, ring, length = config.train, config.ring, config.data.context_length
    activations = train.sequences_per_step * length
    _require(length >= 2, f"data.context_length is {length}; at least 2 is needed")
    _require(
        train.sequences_per_step > 0 and train.sequences_per_step % devices == 0,
        f"train.sequences_per_step {train.sequences_per_step} is not a multiple of the {devices} devices",
    )
    _require(
        train.batch > 0 and activations % train.batch == 0,
        f"train.sequences_per_step × data.context_length = {activations} is not a multiple of train.batch "
        f"{train.batch}",
    )
    _require(
        ring.groups > 0 and ring.groups % devices == 0,
        f"ring.groups {ring.groups} is not a multiple of the {devices} devices",
    )
    _require(
        train.batch % ring.groups == 0,
        f"train.batch {train.batch} is not a multiple of ring.groups {ring.groups}",
    )
    _require(
        ring.capacity >= activations,
        f"ring.capacity {ring.capacity} is smaller than the {activations} activations of one step "
        "(train.sequences_per_step × data.context_length); ten times that shuffles well",
    )
    _require(
        ring.capacity % activations == 0,
        f"ring.capacity {ring.capacity} is not a multiple of the {activations} activations of one step; "
        f"choose for example {ring.capacity // activations * activations}",
    )
    _require(
        train.tokens >= ring.capacity,
        f"train.tokens {train.tokens} do not fill the ring once; give more tokens or a ring.capacity "
        f"of at most {train.tokens // activations * activations}",
    )


def padded(count: int, data_axis: int) -> int:
    """A number of members, rounded up to a multiple of the mesh's data axis."""
    return -(-count // data_axis) * data_axis


def make_plan(config: Config, model: gm.nn.Transformer, data_axis: int, latent_axis: int) -> step.Plan:
    """What the step is compiled for, on a mesh of `data_axis` × `latent_axis` devices.

    Raises:
      ValueError: fields that do not fit each other, the model or the mesh; names and values in the message.
    """
    bank, train = config.bank, config.train
    _check_ranges(config)
    _check_bank(bank, model, latent_axis)
    _check_sizes(config, data_axis * latent_axis)
    activations = train.sequences_per_step * config.data.context_length
    named = members(bank)
    return step.Plan(
        members=named,
        padded_members=padded(len(named), data_axis),
        latents=bank.width,
        batch=train.batch,
        updates_per_step=activations // train.batch,
        harvests=train.tokens // activations,
        ring_groups=config.ring.groups,
        ring_capacity=config.ring.capacity,
        bandwidth=bank.bandwidth,
        initial_threshold=bank.initial_threshold,
        dead_after_updates=bank.dead_after_updates,
        optimizer=config.optimizer,
        precision=bank.precision,
        seed=config.seed,
        masked_prefix=config.data.masked_prefix,
    )
