"""The syntax of edits on the command line: NAME:LATENT, the change and, optionally, the tokens.

Examples: `NAME:12=ablate`, `NAME:12*0.5`, `NAME:12+3t@reply`, `NAME:12=2t@3:7`. t is the latent's typical activation.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

from gemma_scope_jax.analysis import latent_statistics
from gemma_scope_jax.analysis.session import Scope
from gemma_scope_jax.analysis.steering import edits
from gemma_scope_jax.analysis.steering.edits import Edit
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import printable

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_ABLATED = re.compile(r"=ablate")
_CLAMPED = re.compile(rf"=(?P<add>-?(?:{_NUMBER})?)(?P<typical>t?)")
_MOVED = re.compile(rf"(?:\*(?P<scale>-?{_NUMBER}))?(?:(?P<add>[+-](?:{_NUMBER})?)(?P<typical>t?))?")


class Spec(NamedTuple):
    """A parsed edit, before its SAE and units are resolved."""

    edit: Edit  # The name of its SAE is empty if the text has none.
    is_typical: bool  # Whether `add` is in units of the typical activation.


def parse(text: str) -> Spec:
    """Parses an edit.

    Raises:
      ValueError: if the text is not a valid edit, or a number is out of range.
    """
    head, at, where = text.partition("@")
    name, colon, change = head.rpartition(":")
    latent = re.match(r"\d+", change)
    if latent is None or (colon and not name):
        raise _error(text, f"{change!r} does not start with the number of a latent")
    scale, add, is_typical = _change(text, change[latent.end() :])
    edit = Edit(name, int(latent[0]), scale, add, _tokens(text, where) if at else "all")
    try:
        edits.check_change(edit)
    except ValueError as error:
        raise _error(text, str(error)) from error
    return Spec(edit, is_typical)


def _change(text: str, change: str) -> tuple[float, float, bool]:
    """The scale, the added value, and whether the added value is in units of the typical activation."""
    if not change:
        raise _error(text, "it names a latent but no change")
    if _ABLATED.fullmatch(change):
        return 0.0, 0.0, False
    clamped, moved = _CLAMPED.fullmatch(change), _MOVED.fullmatch(change)
    found = clamped or moved
    # A number can be omitted only before t, where it is 1.
    if not found or (found["add"] in ("", "+", "-") and not found["typical"]):
        raise _error(text, f"{change!r} is not a change such as =ablate, *0.5, +3, +3t or =2t")
    amount = found["add"] or ("1" if found["typical"] else "0")
    add = float(amount + "1" if amount in ("+", "-") else amount)
    scale = 0.0 if clamped else float(moved["scale"] or 1)
    return scale, add, bool(found["typical"])


def _tokens(text: str, where: str) -> edits.Tokens:
    if where in ("all", "prompt", "reply"):
        return where
    if ends := re.fullmatch(r"(\d+):(\d+)", where):
        return range(int(ends[1]), int(ends[2]))
    raise _error(text, f"{'@' + where!r} does not name tokens; use @prompt, @reply or a range such as @3:7")


def _error(text: str, what: str) -> InputError:
    return InputError(f"the edit {printable(text, 80)!r}: {what}; write it like NAME:12+3t@reply")


def written(edit: Edit) -> str:
    """Formats an edit so that `parse` reads it."""
    add = f"{edit.add:+.6g}" if edit.add else ""
    if edit.scale == 0:
        change = f"={edit.add:.6g}" if edit.add else "=ablate"
    else:
        change = f"*{edit.scale:.6g}{add}" if edit.scale != 1 else add or "+0"
    where = f"{edit.tokens.start}:{edit.tokens.stop}" if isinstance(edit.tokens, range) else edit.tokens
    name = f"{edit.sae}:" if edit.sae else ""
    return f"{name}{edit.latent}{change}" + ("" if where == "all" else f"@{where}")


def named(scope: Scope, edit: Edit) -> Edit:
    """Returns the edit with the name of its SAE, which can be omitted if the scope has only one SAE.

    Raises:
      ValueError: if the name is omitted and the scope has several SAEs, or the SAE or latent does not exist.
    """
    if not edit.sae:
        if len(scope.subjects) > 1:
            raise InputError(
                f"the edit {written(edit)!r} has no SAE name; write NAME: before it, where NAME is one of "
                f"{', '.join(scope.subjects)}"
            )
        edit = dataclasses.replace(edit, sae=next(iter(scope.subjects)))
    scope.check_latent(edit.sae, edit.latent)
    return edit


def resolve(scope: Scope, specs: Sequence[Spec]) -> list[Edit]:
    """Converts parsed edits to edits in units of activation, measuring typical activations where needed.

    Raises:
      ValueError: if an SAE or latent does not exist, or a latent without activations on the held-out text has an edit
        in typical activations.
    """
    made = []
    for spec in specs:
        edit = named(scope, spec.edit)
        if spec.is_typical:
            unit = latent_statistics.typical(scope, edit.sae, edit.latent)
            edit = dataclasses.replace(edit, add=edit.add * unit)
        made.append(edit)
    return made
