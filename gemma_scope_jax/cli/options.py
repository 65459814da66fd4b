"""Options that several commands have: the types of their values, with ranges, and groups of options."""

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
    """How the value of an option is read and shown; None is shown as `none`."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda arguments: read(arguments[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


def number(allowed: Range, kind: type = int) -> tyro.constructors.PrimitiveConstructorSpec:
    """How an option whose value is a number within a range is read."""

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
    """A path, with `~` expanded: a shell leaves the one in `--out=~/x` as it is."""
    return pathlib.Path(os.path.expanduser(text))


# The help text says what happens if such an option is not set. Its default, None or (), would say nothing.
_UNSET = tyro.conf.arg(help_behavior_hint="")

# What a command reads: a config, SAEs, the name of an SAE, a run directory.
ConfigName = Annotated[str, option(str, "CONFIG")]
SAEs = Annotated[str, option(str, "RUN")]
SAEName = Annotated[str, option(str, "NAME")]
Run = Annotated[pathlib.Path, option(place, "RUN")]
EditText = Annotated[str, option(str, "EDIT")]
Topology = Annotated[str, option(str, "TOPOLOGY")]
Place = Annotated[pathlib.Path, option(place, "PATH")]
MaybePlace = Annotated[pathlib.Path | None, option(place, "PATH"), _UNSET]
Text = Annotated[str, option(well_formed, "TEXT")]
MaybeText = Annotated[str | None, option(well_formed, "TEXT"), _UNSET]


def _prompt(text: str) -> str:
    """A prompt, which is refused if it is empty: before Gemma is loaded, which takes long."""
    if not text:
        raise ValueError("it is empty; give a text of at least one token")
    return well_formed(text)


Prompt = Annotated[str, option(_prompt, "PROMPT")]
# The command refuses an empty one itself: of a tuple's values tyro does not say what is wrong.
Prompts = Annotated[tuple[Annotated[str, option(well_formed, "PROMPT")], ...], _UNSET]
MaybePrompt = Annotated[str | None, option(_prompt, "PROMPT"), _UNSET]
Count = Annotated[int, number(ranges.COUNT)]
MaybeCount = Annotated[int | None, number(ranges.COUNT), _UNSET]
CountOrNone = Annotated[int, number(ranges.COUNT_OR_NONE)]
Few = Annotated[int, number(ranges.FEW)]
MaybeFew = Annotated[int | None, number(ranges.FEW), _UNSET]
MaybePrice = Annotated[float | None, number(ranges.POSITIVE_OR_ZERO, float), _UNSET]
NewTokens = Annotated[int, number(ranges.NEW_TOKENS)]
MaybeNewTokens = Annotated[int | None, number(ranges.NEW_TOKENS), _UNSET]
Whole = Annotated[int, number(ranges.WHOLE)]
Seed = Annotated[int, number(ranges.SEED)]
Share = Annotated[float, number(ranges.SHARE, float)]
PositiveOrZero = Annotated[float, number(ranges.POSITIVE_OR_ZERO, float)]


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    read = number(ranges.SIGNED, float).instance_from_str
    return tuple(read([one]) for one in text.split(","))


Numbers = Annotated[tuple[float, ...], option(_numbers, "N,N,..."), _UNSET]
Dtype = Literal["float32", "bfloat16"]
MaybeDtype = Annotated[Dtype | None, _UNSET]
# The option is given once for each value.
Repeated = tyro.conf.UseAppendAction[tuple[T, ...]]
Positional = tyro.conf.Positional
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclasses.dataclass(frozen=True)
class Overrides:
    """Settings that override those of the run or the SAE file.

    Args:
      model: name of the model to use, for example gemma2_2b-it; by default the run's or the SAE file's.
      weights: Gemma's weights: a folder, a file or hf://OWNER/NAME; by default as in the config.
      tokenizer: Gemma's tokenizer: a file, or a folder that contains one; by default as in the config.
      dtype: dtype of Gemma's weights and arithmetic.
        By default the one that the SAE's run or file names; float32 if a file names none.
      site: site that an SAE in a file reads, such as layer_20_resid_post; needed if the file names none.
      target_site: site that a transcoder in a file predicts, such as layer_20_mlp_out; needed if the file names none.
      trust: use the text, weights and tokenizer that are named by an SAE file outside a run directory.
    """

    model: MaybeText = None
    weights: MaybeText = None
    tokenizer: MaybeText = None
    dtype: MaybeDtype = None
    site: MaybeText = None
    target_site: MaybeText = None
    trust: Flag = False

    def given(self) -> dict[str, object]:
        """The settings as keyword arguments of `opening.open_path`."""
        return dataclasses.asdict(self) | {"trust": self.trust or None}


AS_SAID = Overrides()
# The empty name makes these options of the command itself: --model, not --others.model.
Others = Annotated[Overrides, tyro.conf.arg(name="")]
