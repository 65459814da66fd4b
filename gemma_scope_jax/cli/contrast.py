"""`contrast`: which latents tell two sets of prompts apart, and what is left of a bias without them."""

import pathlib
from collections.abc import Sequence

from gemma_scope_jax.analysis.contrasts import find
from gemma_scope_jax.analysis.contrasts.correction import Correction, behaviour, correct
from gemma_scope_jax.analysis.contrasts.find import At, Contrast
from gemma_scope_jax.analysis.contrasts.halves import halves
from gemma_scope_jax.analysis.session import Scope, one_token, open_scope
from gemma_scope_jax.cli.common import refresh, say
from gemma_scope_jax.data import sources
from gemma_scope_jax.display import plotting
from gemma_scope_jax.runtime import files, ranges
from gemma_scope_jax.runtime.errors import InputError


def audit(
    path: str | pathlib.Path,
    first: pathlib.Path,
    second: pathlib.Path,
    at: At = "mean",
    rate: float = 0.05,
    is_paired: bool = False,
    answer: str | None = None,
    against: str | None = None,
    top: int | None = None,
    seed: int = 0,
    out: pathlib.Path | None = None,
    **overrides: str | None,
) -> tuple[Contrast, Correction | None]:
    """Contrasts two files of prompts; with an answer, on half of them, and measures on the others what latents do.

    Args:
      path: see `opening.open_path`.
      first: a file of prompts; see `sources.read_prompts`.
      second: the other.
      at: see `contrast`, as of the next two.
      rate: of false discoveries.
      is_paired: whether line by line the prompts are counterparts.
      answer: see `correct`, as of the next two; None: nothing is ablated.
      against: as much.
      top: only so many latents are ablated.
      seed: of shuffles, of the halves and of random sets.
      out: a new folder for contrast.json, contrast.png and correction.json; None: nothing is written.
      **overrides: see `opening.open_path`.

    Raises:
      ValueError: of answer and against one is missing, or the prompts cannot be contrasted.
    """
    if (answer is None) != (against is None):
        raise InputError(
            "--answer and --against go together: a behaviour is the logit of one less the other's"
        )
    if answer is None and top is not None:
        raise InputError("--top says how many latents are ablated, which takes --answer and --against")
    ranges.check("--seed", seed, ranges.SEED)
    if out is not None:
        files.check_new(out)
    sets = sources.read_prompts(first), sources.read_prompts(second)
    if is_paired and len(sets[0]) != len(sets[1]):
        raise InputError(f"--paired: {first} has {len(sets[0])} prompts, {second} has {len(sets[1])}")
    choosing, measured = (sets, None) if answer is None else halves(*sets, is_paired, seed)
    # Before Gemma is loaded.
    find.check(*choosing, at, rate, is_paired)
    if measured and not all(measured):
        raise InputError(
            f"{first} and {second} have {len(sets[0])} and {len(sets[1])} prompts, too few for two halves"
        )
    refresh(path)
    scope = open_scope(path, **overrides)
    for text in () if answer is None else (answer, against):
        one_token(scope, text)
    if measured:
        sizes = f"{len(choosing[0])} and {len(choosing[1])} prompts"
        say(f"Latents are found on {sizes} drawn at random, and measured on the others.")
    found, corrected = find.contrast(scope, *choosing, at, rate, is_paired, seed), None
    found.show()
    if out is not None:  # Now: what follows takes its time, and may be refused.
        found.write_json(out / "contrast.json")
        plotting.write_png(out / "contrast.png", found.figure())
    if measured:
        corrected = _correct(scope, found, answer, against, measured, top, seed)
    if corrected and out is not None:
        corrected.write_json(out / "correction.json")
    if out is not None:
        say(f"Wrote {out}")
    return found, corrected


def _correct(
    scope: Scope,
    found: Contrast,
    answer: str,
    against: str,
    measured: tuple[Sequence[str], Sequence[str]],
    top: int | None,
    seed: int,
) -> Correction | None:
    """Shows what the latents do; where none was found, the gap as it is."""
    if found.found():
        corrected = correct(scope, found, answer, against, *measured, top, seed=seed)
        corrected.show()
        return corrected
    first, second = (behaviour(scope, prompts, answer, against).mean() for prompts in measured)
    say(
        f"The logit of {answer!r} less that of {against!r} is {first:.3f} and {second:.3f} behind the others, a gap "
        f"of {first - second:.3f}. There is nothing to ablate."
    )
    return None
