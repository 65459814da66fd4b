"""`contrast`: the latents that distinguish two sets of prompts, and how much of a bias is left without them."""

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
    """Finds the latents that distinguish two files of prompts, and measures a behaviour without them.

    With an answer, latents are found on one half of the prompts and the behaviour is measured on the other half.

    Args:
      path: of a run or of SAEs; see `opening.open_path`.
      first: the file with the first set of prompts; see `sources.read_prompts`.
      second: the file with the second set of prompts.
      at: how a latent's activations on a prompt become one value; see `find.contrast`.
      rate: the false discovery rate.
      is_paired: whether prompt N of one file is the counterpart of prompt N of the other.
      answer: the token whose logit is the behaviour; see `correct`. None: no latent is ablated.
      against: the token whose logit is subtracted; see `correct`.
      top: the number of latents to ablate, the strongest first; None: all latents found.
      seed: of the shuffles, the halves and the random sets of latents.
      out: a new folder for contrast.json, contrast.png and correction.json; None: no file is written.
      **overrides: settings that override the run's; see `opening.open_path`.

    Returns:
      The contrast, and what ablation of the latents changes; None without an answer or without latents found.

    Raises:
      ValueError: if only one of answer and against is given, or the prompts cannot be contrasted.
    """
    if (answer is None) != (against is None):
        raise InputError(
            "--answer and --against must be given together: the behaviour is the difference of their logits"
        )
    if answer is None and top is not None:
        raise InputError("--top, the number of latents to ablate, needs --answer and --against")
    ranges.check("--seed", seed, ranges.SEED)
    if out is not None:
        files.check_new(out)
    sets = sources.read_prompts(first), sources.read_prompts(second)
    if is_paired and len(sets[0]) != len(sets[1]):
        raise InputError(
            f"--paired needs as many prompts in both files; {first} has {len(sets[0])}, {second} has {len(sets[1])}"
        )
    choosing, measured = (sets, None) if answer is None else halves(*sets, is_paired, seed)
    # Checked before Gemma is loaded, which takes long.
    find.check(*choosing, at, rate, is_paired)
    if measured and not all(measured):
        raise InputError(
            f"{first} and {second} have {len(sets[0])} and {len(sets[1])} prompts, too few to be split into halves"
        )
    refresh(path)
    scope = open_scope(path, **overrides)
    for text in () if answer is None else (answer, against):
        one_token(scope, text)
    if measured:
        sizes = f"{len(choosing[0])} and {len(choosing[1])} prompts"
        say(
            f"Latents are found on {sizes} chosen at random, and their effect is measured on the other prompts."
        )
    found, corrected = find.contrast(scope, *choosing, at, rate, is_paired, seed), None
    found.show()
    if out is not None:  # Written now, because the next part takes long and can fail.
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
    """Shows what ablation of the latents changes; if no latent was found, only the gap."""
    if found.found():
        corrected = correct(scope, found, answer, against, *measured, top, seed=seed)
        corrected.show()
        return corrected
    first, second = (behaviour(scope, prompts, answer, against).mean() for prompts in measured)
    say(
        f"On the other prompts, the logit of {answer!r} minus that of {against!r} has the means {first:.3f} and "
        f"{second:.3f}, a gap of {first - second:.3f}. There are no latents to ablate."
    )
    return None
