"""What the numbers of an SAE say of it, in one line, and what to do about it; docs/metrics.md has it for readers."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

from gemma_scope_jax.saes import jumprelu

# A difference of losses is named when it is over so many standard errors.
SURE = 2
# A useful SAE gives back nine tenths of what mean ablation costs; the README's poorest, of a short run, gives 0.65.
LEAST_RECOVERED = 0.5
# The controller's SAEs in the README are within 22% of their targets.
OFF_TARGET = 0.25
# Where thresholds have not moved, half of the latents fire; sparse SAEs have a hundredth of them.
HARDLY_SPARSE = 0.25
# A quarter of the width is paid for and not used.
MANY_DEAD = 0.25
# Only with so many firings for each latent on average is a silent one called dead: on 512 rows of 256 the quickstart
# has 1,800 and 18% are silent, on 64 rows 230 and 30%. With fewer, half must be silent to be named.
TELLING_FIRINGS = 1000
MANY_SILENT = 0.5
# Dense latents, which fire on over a tenth (`jumprelu.DENSE`), make up a quarter of all firings or more.
MUCH_OF_ALL_FIRINGS = 0.25
# In a narrow SAE latents are dense by arithmetic: where the mean one, L0 / M, fires on over a fortieth, that is no
# fault.
NARROW = jumprelu.DENSE / 4

_SHORT_RUN = (
    "if it was trained here, train on more tokens, in a short run with normalizer.center and "
    "normalizer.outlier_medians as in configs/quickstart.py; if not, check --model and --site"
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is wrong with an SAE, the worst first, and what to do about that; or, of none, what is right."""

    faults: tuple[str, ...]
    step: str

    @property
    def line(self) -> str:
        """All of it in one line."""
        return f"{'; '.join(self.faults)}. Next: {self.step}" if self.faults else self.step


def verdict(numbers: Mapping[str, object], width: int, target_l0: float = 0.0) -> Verdict:
    """Judges an SAE by its delta loss, then by its sparsity; FVU alone says nothing good of it.

    Args:
      numbers: as `evaluation_file.numbers` has them; what is not among them was not measured.
      width: its latents.
      target_l0: that it was trained for; 0: none.
    """

    number = functools.partial(_number, numbers)
    l0, fvu = number("l0"), number("fvu")
    if l0 == 0:
        step = (
            "if it was trained here, lower sparsity_coefficients or initial_threshold of its bank; if not, check "
            "--model and --site"
        )
        return Verdict(("nothing fires: it gives its bias alone",), step)
    found = _of_losses(number) if "delta_loss" in numbers else []
    if math.isnan(l0) or not fvu >= 0:
        found.append(
            (f"FVU {fvu:.3g} means nothing: the activations do not vary", "check the text and the site")
        )
    if fvu > 1:
        found.append((f"FVU {fvu:.3g}: further from the activations than their mean is", _SHORT_RUN))
    found += _of_sparsity(number, l0, width, target_l0)
    if found:
        return Verdict(tuple(fault for fault, _ in found), found[0][1])
    if "delta_loss" not in numbers:
        return Verdict(
            (),
            f"nothing amiss at L0 {l0:.1f} and FVU {fvu:.3f}; delta loss, by gemma-scope evaluate, decides",
        )
    cost = number("mean_ablation_loss") - number("clean_loss")
    said = (
        f"it costs {number('delta_loss'):.3f} of the {cost:.2f} nats that mean ablation costs, at L0 {l0:.1f}"
    )
    return Verdict((), f"nothing amiss: {said}")


def _number(numbers: Mapping[str, object], name: str) -> float:
    """nan for what was not measured, or is none."""
    value = numbers.get(name)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _of_losses(number: Callable[[str], float]) -> list[tuple[str, str]]:
    delta = number("delta_loss")
    if math.isnan(delta):
        return [("delta loss is not a number", "check the weights, --dtype and the SAE's arrays")]
    error = number("delta_loss_se")
    least = delta - (0 if math.isnan(error) else SURE * error)
    costs = {name: number(f"{name}_ablation_loss") - number("clean_loss") for name in ("mean", "zero")}
    # An ablation that costs nothing, as of attn_out at some layers, leaves nothing to be worse than.
    if worse := [f"{name} ablation ({cost:.3f})" for name, cost in costs.items() if least > max(cost, 0)]:
        return [(f"worse than {' and '.join(worse)}: it costs {delta:.3f} nats", _SHORT_RUN)]
    if costs["mean"] <= 0:
        fault = f"delta loss ({delta:.3f}) cannot judge it: mean ablation costs nothing ({costs['mean']:.3f} nats)"
        return [(fault, "look at KL and FVU")]
    if least > (1 - LEAST_RECOVERED) * costs["mean"]:
        fault = f"recovers under half: it costs {delta:.3f} of the {costs['mean']:.2f} nats that mean ablation costs"
        return [(fault, "train on more tokens or more latents, or lower sparsity_coefficients")]
    return []


def _of_sparsity(
    number: Callable[[str], float], l0: float, width: int, target_l0: float
) -> list[tuple[str, str]]:
    found = []
    mean_frequency = l0 / width
    if mean_frequency > HARDLY_SPARSE:
        step = "raise sparsity_coefficients; raise bandwidth too if the log says that thresholds stand still"
        found.append((f"hardly sparse: {mean_frequency:.0%} of latents fire on an activation", step))
    if target_l0 and abs(l0 / target_l0 - 1) > OFF_TARGET:
        step = (
            f"{'raise' if l0 > target_l0 else 'lower'} sparsity_coefficients or train on more tokens; objective "
            "'controlled' holds a target better than 'quadratic'"
        )
        off = f"{abs(l0 / target_l0 - 1):.0%} {'above' if l0 > target_l0 else 'below'}"
        found.append((f"L0 {l0:.1f} is {off} its target of {target_l0:g}", step))
    dead, activations = number("dead_fraction"), number("activations")
    is_telling = activations * mean_frequency >= TELLING_FIRINGS
    if dead > (MANY_DEAD if is_telling else MANY_SILENT):
        fault = f"{dead:.0%} of latents never fired on {activations:,.0f} activations"
        fault = f"{'dead' if is_telling else 'silent'}: {fault}"
        step = (
            "train fewer latents, or with normalizer.center and normalizer.outlier_medians"
            if is_telling
            else "give more --rows, to tell rare latents from dead ones"
        )
        found.append((fault, step))
    dense = number("dense_fraction")
    if mean_frequency <= NARROW and dense * jumprelu.DENSE > MUCH_OF_ALL_FIRINGS * mean_frequency:
        fault = f"dense: {dense:.1%} of latents fire on over {jumprelu.DENSE:.0%} of activations"
        found.append((fault, "raise sparsity_coefficients, or train more latents"))
    return found


def beside_own(numbers: Mapping[str, object], own: Mapping[str, object]) -> str:
    """What a text does to an SAE that its own did not; empty where its delta loss is no worse.

    Args:
      numbers: on another text than it was trained on.
      own: on held-out rows of that one.
    """
    names = ("delta_loss", "delta_loss_se", "fvu")
    delta, error, fvu = (_number(numbers, name) for name in names)
    own_delta, own_error, own_fvu = (_number(own, name) for name in names)
    if not delta - own_delta > SURE * math.hypot(*(0 if math.isnan(e) else e for e in (error, own_error))):
        return ""
    said = f"delta loss {delta:.3f} against {own_delta:.3f} on the text it was trained on"
    return said + (f", although FVU is lower ({fvu:.3f} against {own_fvu:.3f})" if fvu < own_fvu else "")


def lines(verdicts: Mapping[str, Verdict], most: int = 5) -> list[str]:
    """The verdicts of some SAEs for a terminal: of one its line, of many only those that are amiss."""
    if not verdicts:
        return []
    if len(verdicts) == 1:
        return [f"Verdict: {next(iter(verdicts.values())).line}."]
    amiss = {name: one for name, one in verdicts.items() if one.faults}
    said = [f"Verdict: {len(verdicts) - len(amiss)} of {len(verdicts)} SAEs with nothing amiss."]
    said += [f"{name}: {one.line}." for name, one in list(amiss.items())[:most]]
    return said + ([f"And {len(amiss) - most} more."] if len(amiss) > most else [])
