"""Verdicts: a line on what is wrong with an SAE, judged by its metrics, and what to do next. See docs/metrics.md."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

from gemma_scope_jax.saes import jumprelu

# A difference of losses counts if it is over this many standard errors.
SURE = 2
# A useful SAE recovers 0.9 of the cost of mean ablation; the poorest in docs/results.md recovers 0.65.
LEAST_RECOVERED = 0.5
# The controller's SAEs in docs/results.md are within 22% of their targets.
OFF_TARGET = 0.25
# If thresholds have not moved, half of the latents fire; in sparse SAEs a hundredth of them do.
HARDLY_SPARSE = 0.25
# A quarter of the width costs compute and memory, and is not used.
MANY_DEAD = 0.25
# A silent latent is called dead only if latents fired this many times on average. On 512 rows of 256 tokens the
# quickstart has 1,800 firings and 18% silent latents; on 64 rows, 230 and 30%. With fewer, half must be silent.
TELLING_FIRINGS = 1000
MANY_SILENT = 0.5
# Dense latents, which fire on over a tenth (`jumprelu.DENSE`), make up a quarter of all firings or more.
MUCH_OF_ALL_FIRINGS = 0.25
# In a narrow SAE latents are dense by arithmetic: if the mean firing frequency, L0 / M, is over a fortieth, dense
# latents are no fault.
NARROW = jumprelu.DENSE / 4

_SHORT_RUN = (
    "if you trained it, train on more tokens, and in a short run set normalizer.center and "
    "normalizer.outlier_medians as in configs/quickstart.py; otherwise check --model and --site"
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The faults of an SAE, the worst first, and the next step; without faults, the step sums up its metrics."""

    faults: tuple[str, ...]
    step: str

    @property
    def line(self) -> str:
        """The faults and the next step in one line."""
        return f"{'; '.join(self.faults)}. Next: {self.step}" if self.faults else self.step


def verdict(numbers: Mapping[str, object], width: int, target_l0: float = 0.0) -> Verdict:
    """Judges an SAE by its delta loss, then by its sparsity; a low FVU alone does not make it good.

    Args:
      numbers: the metrics, as from `evaluation_file.numbers`; missing ones were not measured.
      width: the number of latents.
      target_l0: the L0 that it was trained for; 0: none.
    """

    number = functools.partial(_number, numbers)
    l0, fvu = number("l0"), number("fvu")
    if l0 == 0:
        step = (
            "if you trained it, lower sparsity_coefficients or initial_threshold of its bank; otherwise check "
            "--model and --site"
        )
        return Verdict(("no latent fires: the reconstruction is the bias alone",), step)
    found = _of_losses(number) if "delta_loss" in numbers else []
    if math.isnan(l0) or not fvu >= 0:
        found.append(
            (f"FVU {fvu:.3g} is meaningless: the activations do not vary", "check the text and the site")
        )
    if fvu > 1:
        found.append(
            (f"FVU {fvu:.3g} is above 1: the mean of the activations is a better reconstruction", _SHORT_RUN)
        )
    found += _of_sparsity(number, l0, width, target_l0)
    if found:
        return Verdict(tuple(fault for fault, _ in found), found[0][1])
    if "delta_loss" not in numbers:
        return Verdict(
            (),
            f"no faults at L0 {l0:.1f} and FVU {fvu:.3f}; run gemma-scope evaluate for delta loss, which decides",
        )
    cost = number("mean_ablation_loss") - number("clean_loss")
    said = f"delta loss is {number('delta_loss'):.3f} nats and mean ablation costs {cost:.2f} nats, at L0 {l0:.1f}"
    return Verdict((), f"no faults: {said}")


def _number(numbers: Mapping[str, object], name: str) -> float:
    """A metric by name; NaN if it was not measured or is no number."""
    value = numbers.get(name)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _of_losses(number: Callable[[str], float]) -> list[tuple[str, str]]:
    delta = number("delta_loss")
    if math.isnan(delta):
        return [("delta loss is not a number", "check Gemma's weights, --dtype and the SAE's arrays")]
    error = number("delta_loss_se")
    least = delta - (0 if math.isnan(error) else SURE * error)
    costs = {name: number(f"{name}_ablation_loss") - number("clean_loss") for name in ("mean", "zero")}
    # An ablation that lowers the loss, as at attn_out of some layers, counts as costing nothing.
    if worse := [f"{name} ablation ({cost:.3f})" for name, cost in costs.items() if least > max(cost, 0)]:
        return [(f"worse than {' and '.join(worse)}: delta loss is {delta:.3f} nats", _SHORT_RUN)]
    if costs["mean"] <= 0:
        fault = f"delta loss ({delta:.3f}) cannot judge it: mean ablation costs nothing ({costs['mean']:.3f} nats)"
        return [(fault, "compare KL and FVU instead")]
    if least > (1 - LEAST_RECOVERED) * costs["mean"]:
        fault = (
            f"recovers less than half: delta loss is {delta:.3f} nats and mean ablation costs "
            f"{costs['mean']:.2f} nats"
        )
        return [(fault, "train on more tokens or more latents, or lower sparsity_coefficients")]
    return []


def _of_sparsity(
    number: Callable[[str], float], l0: float, width: int, target_l0: float
) -> list[tuple[str, str]]:
    found = []
    mean_frequency = l0 / width
    if mean_frequency > HARDLY_SPARSE:
        step = "raise sparsity_coefficients, and bandwidth too if the log says that thresholds stand still"
        found.append((f"hardly sparse: {mean_frequency:.0%} of latents fire on an activation", step))
    if target_l0 and abs(l0 / target_l0 - 1) > OFF_TARGET:
        step = (
            f"{'raise' if l0 > target_l0 else 'lower'} sparsity_coefficients or train on more tokens; the objective "
            "'controlled' keeps to a target better than 'quadratic'"
        )
        off = f"{abs(l0 / target_l0 - 1):.0%} {'above' if l0 > target_l0 else 'below'}"
        found.append((f"L0 {l0:.1f} is {off} its target of {target_l0:g}", step))
    dead, activations = number("dead_fraction"), number("activations")
    is_telling = activations * mean_frequency >= TELLING_FIRINGS
    if dead > (MANY_DEAD if is_telling else MANY_SILENT):
        fault = f"{dead:.0%} of latents never fired on {activations:,.0f} activations"
        fault = f"{'dead' if is_telling else 'silent'}: {fault}"
        step = (
            "train fewer latents, or set normalizer.center and normalizer.outlier_medians"
            if is_telling
            else "give more --rows, to distinguish rare latents from dead ones"
        )
        found.append((fault, step))
    dense = number("dense_fraction")
    if mean_frequency <= NARROW and dense * jumprelu.DENSE > MUCH_OF_ALL_FIRINGS * mean_frequency:
        fault = f"dense: {dense:.1%} of latents fire on over {jumprelu.DENSE:.0%} of activations"
        found.append((fault, "raise sparsity_coefficients, or train more latents"))
    return found


def beside_own(numbers: Mapping[str, object], own: Mapping[str, object]) -> str:
    """A remark on an SAE whose delta loss is worse on another text than on its training text; empty otherwise.

    Args:
      numbers: the metrics on the other text.
      own: the metrics on held-out rows of the training text.
    """
    names = ("delta_loss", "delta_loss_se", "fvu")
    delta, error, fvu = (_number(numbers, name) for name in names)
    own_delta, own_error, own_fvu = (_number(own, name) for name in names)
    if not delta - own_delta > SURE * math.hypot(*(0 if math.isnan(e) else e for e in (error, own_error))):
        return ""
    said = f"delta loss is {delta:.3f}, and {own_delta:.3f} on the training text"
    return said + (f", although FVU is lower here ({fvu:.3f} and {own_fvu:.3f})" if fvu < own_fvu else "")


def lines(verdicts: Mapping[str, Verdict], most: int = 5) -> list[str]:
    """The verdicts as lines for a terminal: all of one SAE's verdict, or only those with faults of several SAEs'."""
    if not verdicts:
        return []
    if len(verdicts) == 1:
        return [f"Verdict: {next(iter(verdicts.values())).line}."]
    amiss = {name: one for name, one in verdicts.items() if one.faults}
    said = [f"Verdict: no faults in {len(verdicts) - len(amiss)} of {len(verdicts)} SAEs."]
    said += [f"{name}: {one.line}." for name, one in list(amiss.items())[:most]]
    return said + ([f"And {len(amiss) - most} more with faults."] if len(amiss) > most else [])
