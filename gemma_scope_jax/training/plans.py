"""Checks a config and turns it into the plan for which the step is compiled."""

import math

from gemma_scope_jax.config import BankConfig, Config, check_ranges
from gemma_scope_jax.models import masking
from gemma_scope_jax.models.gemma_package import gm
from gemma_scope_jax.models.sites import check_site, site_width
from gemma_scope_jax.runtime import ranges
from gemma_scope_jax.runtime.errors import ConfigError
from gemma_scope_jax.runtime.ranges import Range
from gemma_scope_jax.saes import naming, objectives, products
from gemma_scope_jax.training import bank, step


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


# The allowed values of `scale_target_by` and `precision`.
_CHOICES = {
    "scale_target_by": ("read", "target"),
    "precision": ("default", "high", "highest"),
}


def _check_bank(
    name: str, config: BankConfig, batch: int, model: gm.nn.Transformer, latent_axis: int
) -> None:
    at, named = f"banks.{name}", naming.members(config)
    _require(
        bool(named),
        f"{at} has no SAE; give layers, sites, sparsity_coefficients and seeds at least one value each",
    )
    for member in named:
        check_site(model, member.site)
        check_site(model, member.target_site)
    for member in named:
        _require(
            member.is_transcoder or not config.target_site,
            f"{at}: a transcoder from {member.site} to itself is an autoencoder; leave target_site empty",
        )
    for kind in ("site", "target_site"):
        widths = {str(getattr(m, kind)): site_width(model, getattr(m, kind)) for m in named}
        _require(
            len(set(widths.values())) == 1,
            f"the sites of {at} have different widths, {widths}; put the sites of each width into their own bank",
        )
    _require(
        config.width % latent_axis == 0,
        f"{at}.width {config.width} is not divisible by the mesh's latent axis ({latent_axis}); "
        f"choose a multiple of {latent_axis}",
    )
    for field, choices in _CHOICES.items():
        value = getattr(config, field)
        _require(value in choices, f"{at}.{field} is {value!r}; choose one of {', '.join(choices)}")
    _require(
        not config.skip or bool(config.target_site), f"{at}.skip is only for transcoders; set target_site"
    )
    o = site_width(model, named[0].target_site)
    _require(
        not config.skip or o % latent_axis == 0,
        f"{at}.skip: the width {o} of {named[0].target_site} is not divisible by the mesh's latent axis "
        f"({latent_axis}); set a larger mesh.data",
    )
    # A window's activations are counted in int32.
    ranges.check(f"{at}.window_updates", config.window_updates, Range(1, ranges.LARGEST // batch))
    try:
        objective = objectives.objective_of(config.objective)
    except ValueError as error:
        raise ConfigError(f"{at}.objective: {error}") from error
    for option, value in config.objective_options.items():
        _require(
            option in objective.options,
            f"{at}.objective_options has the unknown option {option!r}; the objective {config.objective} has "
            f"{', '.join(objective.options) or 'no options'}",
        )
        ranges.check(f"{at}.objective_options.{option}", value, ranges.SIGNED)
    if not objective.needs_target:
        with_targets = [name for name, one in objectives.OBJECTIVES.items() if one.needs_target]
        _require(
            not config.target_l0s,
            f"{at}.target_l0s is set, but the objective {config.objective} has no target; choose the objective "
            f"{' or '.join(with_targets)}",
        )
        return
    _require(
        bool(config.target_l0s),
        f"{at}.objective is {config.objective}, which needs a target; set {at}.target_l0s",
    )
    for target in config.target_l0s:
        _require(
            0 < target < config.width,
            f"{at}.target_l0s has {target}; choose values above 0 and below the width",
        )
    _require(
        min(config.sparsity_coefficients) > 0,
        f"{at}.sparsity_coefficients is {config.sparsity_coefficients}; the objective {config.objective} needs "
        "values above 0",
    )


def _check_banks(config: Config, model: gm.nn.Transformer, latent_axis: int) -> None:
    _require(bool(config.banks), "config.banks is empty; add at least one bank")
    banks_of = {}
    for name, bank_config in config.banks.items():
        _require(
            name.isidentifier(), f"config.banks has the invalid name {name!r}; use letters, digits and _"
        )
        _check_bank(name, bank_config, config.train.batch, model, latent_axis)
        for member in naming.members(bank_config):
            _require(
                member.name not in banks_of,
                f"two SAEs have the name {member.name}, in banks.{banks_of.get(member.name)} and banks.{name}; "
                "change a field that is part of the name, for example the seed",
            )
            banks_of[member.name] = name


GEMMA_PLACEMENTS = ("auto", "whole", "split")


def _up(value: int, step: int) -> int:
    """The next multiple of a step."""
    return -(-value // step) * step


def _check_sizes(config: Config, devices: int) -> None:
    train, ring, length = config.train, config.ring, config.data.context_length
    activations = train.sequences_per_step * length
    # The fewest sequences that are whole batches and are divisible by the number of devices.
    whole = math.lcm(train.batch // math.gcd(train.batch, length), devices)
    ranges.check("train.sequences_per_step × data.context_length", activations, Range(1, ranges.LARGEST))
    _require(
        train.sequences_per_step % devices == 0,
        f"train.sequences_per_step {train.sequences_per_step} is not a multiple of the {devices} devices; "
        f"choose for example {_up(train.sequences_per_step, devices)}",
    )
    _require(
        activations % train.batch == 0,
        f"train.sequences_per_step × data.context_length = {activations} is not a multiple of train.batch "
        f"{train.batch}; choose for example train.sequences_per_step = {_up(train.sequences_per_step, whole)}",
    )
    _require(
        ring.groups % devices == 0,
        f"ring.groups {ring.groups} is not a multiple of the {devices} devices; choose for example "
        f"{_up(ring.groups, devices)}",
    )
    _require(
        train.batch % ring.groups == 0,
        f"train.batch {train.batch} is not a multiple of ring.groups {ring.groups}; choose for example "
        f"train.batch = {_up(train.batch, ring.groups)}",
    )
    _require(
        ring.capacity >= activations,
        f"ring.capacity {ring.capacity} is smaller than the {activations} activations of one step "
        "(train.sequences_per_step × data.context_length); choose for example ten times that",
    )
    _require(
        ring.capacity % activations == 0,
        f"ring.capacity {ring.capacity} is not a multiple of the {activations} activations of one step; "
        f"choose for example {ring.capacity // activations * activations}",
    )
    _require(
        train.tokens >= ring.capacity,
        f"train.tokens {train.tokens} is less than ring.capacity {ring.capacity}; give more tokens or a "
        f"ring.capacity of at most {train.tokens // activations * activations}",
    )
    # Steps and updates, including those that fill and drain the ring, are counted in int32.
    ranges.check("train.tokens", train.tokens, Range(1, ranges.LARGEST * train.batch - 2 * ring.capacity))


def padded(count: int, data_axis: int) -> int:
    """A number of members, rounded up to a multiple of the mesh's data axis."""
    return -(-count // data_axis) * data_axis


def choose_data_axis(config: Config, devices: int) -> int:
    """Chooses the size of the mesh's `data` axis, for a config that leaves it open (0).

    With a larger `data` axis, fewer sums go over chips. So this is the largest divisor of the number of devices that
    pads no bank by more than an eighth and leaves a `latent` axis that divides every width.
    """

    sizes = [(len(naming.members(b)), b.width) for b in config.banks.values()]

    def suits(data: int) -> bool:
        return all(
            8 * padded(count, data) <= 9 * count and width % (devices // data) == 0 for count, width in sizes
        )

    if config.mesh.latent:
        return max(devices // config.mesh.latent, 1)
    return max((d for d in range(1, devices + 1) if devices % d == 0 and suits(d)), default=1)


def make_plan(
    config: Config, model: gm.nn.Transformer, data_axis: int, latent_axis: int, started: Config | None = None
) -> step.Plan:
    """Checks a config and returns its plan for a mesh of `data_axis` × `latent_axis` devices.

    Args:
      config: the run's config.
      model: the Gemma model that the run reads.
      data_axis: the size of the mesh's data axis.
      latent_axis: the size of the mesh's latent axis.
      started: the config with which the run was started, if it continues; see `config.check_ranges`.

    Raises:
      ValueError: if a field is out of range, or fields do not fit each other, the model or the mesh. The message has
        the names and values.
    """
    check_ranges(config, started)
    _require(
        config.mesh.gemma in GEMMA_PLACEMENTS,
        f"mesh.gemma is {config.mesh.gemma!r}; choose one of {', '.join(GEMMA_PLACEMENTS)}",
    )
    _check_sizes(config, data_axis * latent_axis)
    _check_banks(config, model, latent_axis)
    return plan_of(config, data_axis)


def plan_of(config: Config, data_axis: int) -> step.Plan:
    """The plan of a config, unchecked, so that a finished run still opens if checks have become stricter."""
    train = config.train
    activations = train.sequences_per_step * config.data.context_length
    return step.Plan(
        banks=tuple(_bank_plan(name, b, data_axis) for name, b in config.banks.items()),
        batch=train.batch,
        updates_per_step=activations // train.batch,
        harvests=train.tokens // activations,
        ring_groups=config.ring.groups,
        ring_capacity=config.ring.capacity,
        optimizer=config.optimizer,
        seed=config.seed,
        masked_prefix=masking.masked_prefix(config.data),
    )


def _bank_plan(name: str, config: BankConfig, data_axis: int) -> bank.Plan:
    named = naming.members(config)
    return bank.Plan(
        name=name,
        members=named,
        padded_members=padded(len(named), data_axis),
        scale_target_by=config.scale_target_by,
        bandwidth=config.bandwidth,
        initial_threshold=config.initial_threshold,
        window_updates=config.window_updates,
        precision=products.Precision.of(config.precision),
    )
