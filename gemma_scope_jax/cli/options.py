"""Options that several commands have: their types with the ranges of their numbers, and groups of them."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

import tyro

from gemma_scope_jax.runtime import ranges
from gemma_scope_jax.runtime.printing import printable, well_formed
from gemma_scope_jax.runtime.ranges import Range, shown

T = TypeVar("T")


def option(read: Callable[[str], object], metavar: str) -> tyro.constructors.PrimitiveConstructorSpec:
    """How an option of one value is read, and shown; also of one that may be left out."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda arguments: read(arguments[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


def number(allowed: Range, kind: type = int) -> tyro.constructors.PrimitiveConstructorSpec:
    """How an option that is a number of a range is read."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError as error:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"{printable(text, 40)} is not {what}") from error
        if value not in allowed:
            raise ValueError(f"it is {shown(value)}; it must be {allowed}")
        return value

    return option(read, "INT" if kind is int else "FLOAT")


def place(text: str) -> pathlib.Path:
    """A path; a shell leaves the `~` of `--out=~/x` to be expanded."""
    return pathlib.Path(os.path.expanduser(text))


Place = Annotated[pathlib.Path, option(place, "PATH")]
MaybePlace = Annotated[pathlib.Path | None, option(place, "PATH")]
Text = Annotated[str, option(well_formed, "TEXT")]
MaybeText = Annotated[str | None, option(well_formed, "TEXT")]
Count = Annotated[int, number(ranges.COUNT)]
MaybeCount = Annotated[int | None, number(ranges.COUNT)]
CountOrNone = Annotated[int, number(ranges.COUNT_OR_NONE)]
Few = Annotated[int, number(ranges.FEW)]
MaybeFew = Annotated[int | None, number(ranges.FEW)]
NewTokens = Annotated[int, number(ranges.NEW_TOKENS)]
MaybeNewTokens = Annotated[int | None, number(ranges.NEW_TOKENS)]
Whole = Annotated[int, number(ranges.WHOLE)]
Seed = Annotated[int, number(ranges.SEED)]
Share = Annotated[float, number(ranges.SHARE, float)]
PositiveOrZero = Annotated[float, number(ranges.POSITIVE_OR_ZERO, float)]


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers apart by commas."""
    read = number(ranges.SIGNED, float).instance_from_str
    return tuple(read([one]) for one in text.split(","))


Numbers = Annotated[tuple[float, ...], option(_numbers, "N,N,...")]
Dtype = Literal["float32", "bfloat16"]
# Given once for each value.
Repeated = tyro.conf.UseAppendAction[tuple[T, ...]]
Positional = tyro.conf.Positional
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclasses.dataclass(frozen=True)
class Overrides:
    """Where it shall be another than the run or the file says.

    Args:
      model: for example gemma2_2b-it.
      weights: Gemma's; a folder, a file or `hf://OWNER/NAME`.
      tokenizer: Gemma's; a file, or a folder that has one.
      dtype: Gemma's.
      site: of SAEs in files: what is read, if the file does not say it, as in layer_20_resid_post.
      target_site: likewise what a transcoder predicts, as in layer_20_mlp_out.
      trust: use the text, weights and tokenizer that a file outside a run directory names, wherever they lie.
    """

    model: MaybeText = None
    weights: MaybeText = None
    tokenizer: MaybeText = None
    dtype: Dtype | None = None
    site: MaybeText = None
    target_site: MaybeText = None
    trust: Flag = False

    def given(self) -> dict[str, object]:
        """As `opening.open_path` takes them."""
        return dataclasses.asdict(self) | {"trust": self.trust or None}


AS_SAID = Overrides()
# Options of a group stand beside the others, and have no name of the group before them.
Others = Annotated[Overrides, tyro.conf.arg(name="")]
