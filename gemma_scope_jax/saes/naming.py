"""What SAEs and their folders are called: `Member` says all that tells an SAE of a bank from the others."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping

from gemma_scope_jax.models.sites import Site


def width_name(width: int) -> str:
    """A number of latents as Gemma Scope writes it: 16,384 is 16k, 1,048,576 is 1m."""
    if width < 1024 or width & (width - 1):
        return str(width)
    return f"{width >> 20}m" if width >= 2**20 else f"{width // 1000}k"


@dataclasses.dataclass(frozen=True)
class Member:
    """One SAE of a bank, or one transcoder."""

    site: Site  # What it reads.
    target_site: Site  # What it predicts; an autoencoder's is the site that it reads.
    width: int
    sparsity_coefficient: float
    seed: int = 0
    objective: str = "linear"
    target_l0: float = 0.0  # 0: none.
    skip: bool = False
    options: tuple[tuple[str, float], ...] = ()  # Of the objective, those that are not its defaults.

    @property
    def is_transcoder(self) -> bool:
        return self.target_site != self.site

    @property
    def place(self) -> str:
        """What it reads and predicts."""
        return f"{self.site}_to_{self.target_site.kind}" if self.is_transcoder else str(self.site)

    @property
    def name(self) -> str:
        """Differs from every other member's."""
        skip = "_skip" if self.skip else ""
        objective = "" if self.objective == "linear" else f"_{self.objective}"
        objective += f"_{str(self.target_l0).removesuffix('.0')}" if self.target_l0 else ""
        objective += "".join(f"_{name}_{value}" for name, value in self.options)
        seed = f"_seed_{self.seed}" if self.seed else ""
        width = width_name(self.width)
        return f"{self.place}{skip}_width_{width}_lambda_{self.sparsity_coefficient}{objective}{seed}"


def layout(
    members: Mapping[str, Member], l0: Mapping[str, float], file_format: str
) -> dict[str, pathlib.Path]:
    """Where each member goes below an export's folder, as in Google's repositories, by name.

    `resid_post/layer_9/width_16k/average_l0_71`, or in Gemma Scope 2's way `resid_post/layer_9_width_16k_l0_71`. Of
    members that would share a place, the later have their λ in it too, and if need be their whole name.
    circuit-tracer has a folder for all layers that are otherwise the same.
    """
    places: dict[str, pathlib.Path] = {}
    for name, member in members.items():
        if file_format == "circuit_tracer":
            places[name] = pathlib.Path(re.sub(r"layer_\d+_", "", name, count=1))
            continue
        kind = "transcoder" if member.is_transcoder else member.site.kind
        seed = f"_seed_{member.seed}" if member.seed else ""
        width, rounded = width_name(member.width), round(l0[name])
        # Gemma Scope has its embedding SAEs beside its layers.
        layer = "embedding" if member.site.kind == "embed" else f"layer_{member.site.layer}"
        if file_format == "gemma_scope_2":
            affine = "_affine" if member.skip else ""
            place = f"{kind}/{layer}_width_{width}_l0_{rounded}{affine}{seed}"
        else:
            affine = "_skip" if member.skip else ""
            place = f"{kind}{affine}/{layer}/width_{width}/average_l0_{rounded}{seed}"
        if pathlib.Path(place) in places.values():
            place = f"{place}_lambda_{member.sparsity_coefficient}"
        if pathlib.Path(place) in places.values():
            place = f"{place}_{name}"
        places[name] = pathlib.Path(place)
    return places
