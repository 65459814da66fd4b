"""Names of SAEs and their folders; a `Member` has all that distinguishes an SAE from the others of a bank."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.models.sites import Site


def width_name(width: int) -> str:
    """A number of latents in Gemma Scope's notation: 16,384 is 16k, 1,048,576 is 1m."""
    if width < 1024 or width & (width - 1):
        return str(width)
    return f"{width >> 20}m" if width >= 2**20 else f"{width // 1000}k"


@dataclasses.dataclass(frozen=True)
class Member:
    """One SAE or transcoder of a bank."""

    site: Site  # The site it reads.
    target_site: Site  # The site it predicts; the same as `site` for an autoencoder.
    width: int
    sparsity_coefficient: float
    seed: int = 0
    objective: str = "linear"
    target_l0: float = 0.0  # 0: no target.
    skip: bool = False
    options: tuple[tuple[str, float], ...] = ()  # Options of the objective that differ from its defaults.

    @property
    def is_transcoder(self) -> bool:
        return self.target_site != self.site

    @property
    def place(self) -> str:
        """The site it reads and, for a transcoder, the kind of site it predicts."""
        return f"{self.site}_to_{self.target_site.kind}" if self.is_transcoder else str(self.site)

    @property
    def name(self) -> str:
        """The member's name, which differs from every other member's."""
        skip = "_skip" if self.skip else ""
        objective = "" if self.objective == "linear" else f"_{self.objective}"
        objective += f"_{str(self.target_l0).removesuffix('.0')}" if self.target_l0 else ""
        objective += "".join(f"_{name}_{value}" for name, value in self.options)
        seed = f"_seed_{self.seed}" if self.seed else ""
        width = width_name(self.width)
        return f"{self.place}{skip}_width_{width}_lambda_{self.sparsity_coefficient}{objective}{seed}"


def members(bank: config_lib.BankConfig) -> tuple[Member, ...]:
    """The members of a bank, ordered by layer, site, sparsity coefficient, target L0 and seed."""
    return tuple(
        Member(
            Site(site, layer),
            Site(bank.target_site or site, layer),
            bank.width,
            coefficient,
            seed,
            bank.objective,
            target_l0,
            bank.skip,
            tuple(sorted(bank.objective_options.items())),
        )
        for layer, site, coefficient, target_l0, seed in itertools.product(
            bank.layers,
            bank.sites,
            bank.sparsity_coefficients,
            bank.target_l0s or (0.0,),
            bank.seeds,
        )
    )


def place(name: str, member: Member, l0: float) -> str:
    """An SAE's folder within an export, in Gemma Scope's layout: `resid_post/layer_9/width_16k/average_l0_71`."""
    del name
    kind = "transcoder" if member.is_transcoder else member.site.kind
    affine = "_skip" if member.skip else ""
    seed = f"_seed_{member.seed}" if member.seed else ""
    return (
        f"{kind}{affine}/{layer_name(member)}/width_{width_name(member.width)}/average_l0_{round(l0)}{seed}"
    )


def layer_name(member: Member) -> str:
    """The layer as Google's repositories name it: `layer_9`, or `embedding` for an SAE of the embeddings."""
    return "embedding" if member.site.kind == "embed" else f"layer_{member.site.layer}"


def apart(places: Mapping[str, str], members: Mapping[str, Member]) -> dict[str, pathlib.Path]:
    """Makes the places of SAEs unique, by name.

    Where places are equal, the later ones get their λ appended and, if they are still equal, their name.
    """
    found: dict[str, pathlib.Path] = {}
    for name, place in places.items():
        wanted = (place, f"{place}_lambda_{members[name].sparsity_coefficient}")
        free = [one for one in map(pathlib.Path, wanted) if one not in found.values()]
        found[name] = free[0] if free else pathlib.Path(f"{wanted[-1]}_{name}")
    return found
