"""The log of a run: `metrics.jsonl`, TensorBoard, the progress line, and warnings."""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Mapping

import numpy as np
from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2, summary_pb2

from gemma_scope_jax.data import token_rows
from gemma_scope_jax.runtime import files
from gemma_scope_jax.runtime.errors import NonFiniteError
from gemma_scope_jax.runtime.reporting import say
from gemma_scope_jax.saes import verdicts
from gemma_scope_jax.training import bank, shuffle_buffer, step

# By then every threshold that can move has moved.
WATCHED_UPDATES = 1000


def read_metrics(workdir: pathlib.Path) -> list[dict]:
    """The entries of `metrics.jsonl` in the order of their steps; damaged lines are skipped.

    Raises:
      ValueError: if the file cannot be read.
    """
    return _read(workdir / "metrics.jsonl")[0]


def _read(path: pathlib.Path) -> tuple[list[dict], int]:
    """The entries in the order of their steps, and the number of skipped lines.

    If a step is there twice, its last entry counts. An unfinished last line, which a killed process leaves, is not
    counted as skipped.
    """
    if not path.exists():
        return [], 0
    with files.open_regular(path) as file, files.reading(path):
        lines = file.read().split(b"\n")
    entries, damaged = {}, 0
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            is_whole = type(entry["step"]) is int and all(type(v) is dict for v in entry["sae"].values())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            is_whole = False
        if is_whole:
            damaged += entry["step"] in entries
            entries[entry["step"]] = entry
        else:
            damaged += number < len(lines)
    return [entries[step] for step in sorted(entries)], damaged


def last_values(workdir: pathlib.Path, step: int) -> dict[str, dict]:
    """The last logged values of each SAE up to a step; L0 and FVU are means over the last fiftieth of the entries.

    In these entries at the end of a run the learning rate is near zero, unlike in a whole window of updates.
    """
    trained = [entry["sae"] for entry in read_metrics(workdir) if entry["sae"] and entry["step"] <= step]
    last = trained[-max(len(trained) // 50, 1) :]

    def mean(name: str, key: str) -> float | None:
        known = [value for of in last if isinstance(value := of.get(name, {}).get(key), (int, float))]
        return float(np.mean(known)) if known else None

    return {
        name: values | {key: mean(name, key) for key in ("l0", "fvu")}
        for name, values in (last[-1] if last else {}).items()
    }


def _event(step: int, **content: object) -> event_pb2.Event:
    return event_pb2.Event(wall_time=time.time(), step=step, **content)


class MetricsLog:
    """Writes `metrics.jsonl` and TensorBoard. Entries after `last_step` are dropped; their steps will run again."""

    def __init__(self, workdir: pathlib.Path, last_step: int) -> None:
        path = workdir / "metrics.jsonl"
        entries, damaged = _read(path)
        if damaged:
            places = (path.with_name(f"{path.name}.damaged.{n}") for n in itertools.count(1))
            aside = next(place for place in places if not place.exists())
            shutil.copyfile(path, aside)
            say(
                f"{path}: {damaged} lines are damaged or repeat a step, and are left out; the original file is kept "
                f"as {aside}."
            )
        kept = [json.dumps(entry) + "\n" for entry in entries if entry["step"] <= last_step]
        self.is_new = not kept
        files.write_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # The thread of SummaryWriter dies if the disk is full, and then this thread would wait forever.
        self._board = event_file_writer.EventsWriter(str(folder / "events"))
        self._board.write_event(_event(last_step + 1, session_log=event_pb2.SessionLog(status="START")))

    def write(self, entry: dict) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        scalars = {f"speed/{key}": value for key, value in entry["speed"].items() if value is not None}
        for name, values in entry["sae"].items():
            scalars |= {f"{name}/{key}": value for key, value in values.items() if value is not None}
        for name, values in entry.get("held_out", {}).items():
            scalars |= {f"{name}/held_out_{key}": v for key, v in values.items() if v is not None}
        made = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._board.write_event(_event(entry["step"], summary=summary_pb2.Summary(value=made)))
        self._board.flush()

    def sync(self) -> None:
        """Flushes the log to the disk; a mounted bucket would otherwise keep it only when the file is closed."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._board.close()


@dataclasses.dataclass(frozen=True)
class Speed:
    """The speed of a step. Utilisations are shares of the chips' peak FLOPs in bfloat16; None if it is not known."""

    tokens_per_second: float
    data_wait_s: float  # Seconds that the host spent reading the next rows.
    gemma_utilisation: float | None
    saes_utilisation: float | None


def measure_speed(
    plan: step.Plan, seconds: float, data_wait_s: float, flops: tuple[int, int], peak: float | None
) -> Speed:
    """The speed of a step that took `seconds`, from Gemma's and the SAEs' FLOPs and the peak of all chips."""
    of_gemma, of_saes = flops
    return Speed(
        plan.activations / seconds,
        data_wait_s,
        of_gemma / seconds / peak if peak else None,
        of_saes / seconds / peak if peak else None,
    )


def entry(
    plan: step.Plan, number: int, metrics: step.Metrics, speed: Speed, held_out: Mapping | None = None
) -> dict:
    """One line of `metrics.jsonl`. It has no metrics of SAEs while the ring fills.

    `held_out` has the L0 and FVU of each SAE by name, for the steps at which they were measured.

    Raises:
      FloatingPointError: if a loss is not finite.
    """
    saes = {}
    for bank_plan in plan.banks if metrics.trained else ():
        of_bank = metrics.banks[bank_plan.name]
        for i, member in enumerate(bank_plan.members):
            saes[member.name] = _member_entry(bank_plan, of_bank, i)
            # The loss is not defined if no activation counts.
            if of_bank.activations_E[i] and not math.isfinite(of_bank.loss_E[i]):
                raise NonFiniteError(
                    f"the loss of {member.name} is {of_bank.loss_E[i]} at step {number}; the newest checkpoint has "
                    "the last good state. Start a new run in another folder, with a lower optimizer.learning_rate "
                    "or with normalizer.outlier_medians"
                )
    return {
        "step": number,
        "speed": dataclasses.asdict(speed),
        "same_document_pairs": same_document_share(metrics.source_Bx3, metrics.weight_B)
        if metrics.trained
        else None,
        "sae": saes,
        **({"held_out": held_out} if held_out else {}),
        **(
            {"nonfinite": skipped}
            if (skipped := sum(int(bad.count) for bad in metrics.nonfinite.values()))
            else {}
        ),
    }


def finite(value: float) -> float | None:
    """A number for JSON, which has no NaN or infinity: None if the value is not finite."""
    return float(value) if math.isfinite(value) else None


def undefined(of_step: Mapping) -> dict[str, str]:
    """The reason why numbers of an SAE are not defined in an entry, by SAE."""
    found = {}
    for name, values in of_step["sae"].items():
        if not values["activations"]:
            found[name] = (
                f"in step {of_step['step']} no activation counts for {name}: all are at BOS, EOS, PAD or the chat "
                "template, or are not finite"
            )
        elif values["fvu"] is None:
            found[name] = (
                f"in step {of_step['step']} all activations of {name} are the same, so its FVU is not defined"
            )
    return found


def _member_entry(plan: bank.Plan, metrics: bank.Metrics, place: int) -> dict:
    def of(values_E: np.ndarray) -> float | None:
        return finite(values_E[place])

    # They are counted over the last whole window, so they are unknown until the first window ends.
    counted = metrics.dead_E[place] >= 0
    return {
        "loss": of(metrics.loss_E),
        "l0": of(metrics.l0_E),
        "fvu": of(metrics.fvu_E),
        "activations": int(metrics.activations_E[place]),
        "dead_latents": int(metrics.dead_E[place]) if counted else None,
        "dense_latents": int(metrics.dense_E[place]) if counted else None,
        "learning_rate": of(metrics.learning_rate_E),
        "sparsity_coefficient": of(metrics.sparsity_coefficient_E),
        "threshold": of(metrics.threshold_E),
        "theta_from_error": of(metrics.theta_from_error_E),
        "theta_from_sparsity": of(metrics.theta_from_sparsity_E),
        "theta_reached": of(metrics.theta_reached_E),
    }


def progress(of_step: Mapping) -> str:
    """An entry as a short text after a progress bar; for several SAEs, it shows the lowest and highest values."""
    speed = of_step["speed"]
    text = f"{speed['tokens_per_second']:,.0f} tok/s"
    if speed["gemma_utilisation"] is not None:
        text += f", MFU Gemma {speed['gemma_utilisation']:.0%} SAEs {speed['saes_utilisation']:.0%}"
    saes = of_step["sae"].values()

    def span(key: str, form: str) -> str:
        known = [values[key] for values in saes if values[key] is not None]
        if not known:
            return "?"
        low, high = f"{min(known):{form}}", f"{max(known):{form}}"
        return low if low == high else f"{low}–{high}"

    if saes:
        text += f", L0 {span('l0', '.1f')}, FVU {span('fvu', '.3f')}, "
        text += f"dead {span('dead_latents', 'd')}, dense {span('dense_latents', 'd')}"
        if held_out := of_step.get("held_out"):
            values = [value["fvu"] for value in held_out.values() if value["fvu"] is not None]
            spread = f"–{max(values):.3f}" if len(values) > 1 else ""
            text += f", held out FVU {min(values):.3f}{spread}" if values else ", held out FVU ?"
        if len(saes) > 1:
            text += f", {len(saes)} SAEs"
    return text


def check_plan(plan: step.Plan, updates: int, learning_rates: float) -> list[str]:
    """Warnings before training, about thresholds that cannot move far enough and windows or warm-ups that never end.

    Args:
      plan: the run's plan.
      updates: the number of updates, at the end of the run, of the SAE with the fewest updates.
      learning_rates: the sum of the remaining learning rates of this SAE. Adam moves the logarithm of a threshold by
        about one learning rate per update.
    """
    warnings = [
        f"banks.{b.name}.window_updates is {b.window_updates} and there will be {updates} updates: dead and "
        "dense latents will be unknown, and L0 is measured over the whole training"
        for b in plan.banks
        if b.window_updates > updates
    ]
    for field, what in (("warmup_updates", "the learning rate"), ("sparsity_warmup_updates", "λ")):
        if (warmup := getattr(plan.optimizer, field)) > updates:
            warnings.append(
                f"optimizer.{field} is {warmup:,} and there will be {updates:,} updates: {what} does not rise to "
                "its configured value"
            )
    if learning_rates < 0.5:
        warnings.append(
            f"thresholds can change by a factor of {math.exp(learning_rates):.2f} at most in this run, so L0 will "
            "hardly change: their logarithms move by about optimizer.learning_rate per update. Gemma Scope's 7e-5 is "
            "for a million updates; raise optimizer.learning_rate or train.tokens"
        )
    return warnings


def watched_steps(plan: step.Plan) -> int:
    """The number of a run's first training steps that `stuck_thresholds` looks at."""
    return max(min(WATCHED_UPDATES, plan.total_updates // 2) // plan.updates_per_step, 1)


def stuck_thresholds(plan: step.Plan, entries: list[Mapping]) -> list[str]:
    """Warnings after a run's first updates, about SAEs whose thresholds hardly move or only one loss term moves."""
    warnings = []
    for bank_plan in plan.banks:
        for member in bank_plan.members:
            values = [e["sae"][member.name] for e in entries if member.name in e["sae"]]
            values = [v for v in values if v["l0"] is not None]
            if not values:
                continue
            recent = values[len(values) // 2 :]

            def mean(key: str, recent: list = recent) -> float:
                return float(np.mean([v[key] for v in recent]))

            at = f"banks.{bank_plan.name}"
            if (reached := mean("theta_reached")) < 0.1:
                warnings.append(
                    f"{member.name}: in a batch, only {reached:.1%} of thresholds have a pre-activation within the "
                    f"kernel ({at}.bandwidth {bank_plan.bandwidth:g}); the others stand still, at L0 "
                    f"{recent[-1]['l0']:.0f}; raise {at}.bandwidth together with {at}.initial_threshold"
                )
                continue
            error, sparsity = mean("theta_from_error"), mean("theta_from_sparsity")
            if bank_plan.objective.next_coefficient is not None:
                continue  # The objective adjusts λ.
            if now := mean("sparsity_coefficient"):
                sparsity *= member.sparsity_coefficient / now  # Its value after the warm-up of λ.
            if member.sparsity_coefficient and sparsity < 0.01 * error:
                warnings.append(
                    f"{member.name}: sparsity makes up {sparsity / (error + sparsity):.1%} of the thresholds' "
                    f"gradient, and L0 is {recent[-1]['l0']:.0f}; raise {at}.sparsity_coefficients"
                )
            elif sparsity > 100 * error:
                warnings.append(
                    f"{member.name}: the error makes up {error / (error + sparsity):.1%} of the thresholds' "
                    f"gradient, and L0 is {recent[-1]['l0']:.0f}; lower {at}.sparsity_coefficients"
                )
    return warnings


def judge(plan: step.Plan, workdir: pathlib.Path, number: int) -> dict[str, verdicts.Verdict]:
    """A verdict on each SAE from the log up to a step, without Gemma's losses; empty if there is no log."""
    last, found = last_values(workdir, number), {}
    for of_bank in plan.banks:
        for member in of_bank.members:
            if (values := last.get(member.name)) is None:
                continue
            numbers = {
                "l0": values["l0"],
                "fvu": values["fvu"],
                "activations": of_bank.window_updates * plan.batch,
            }
            for share in ("dead", "dense"):
                if (count := values.get(f"{share}_latents")) is not None:
                    numbers[f"{share}_fraction"] = count / member.width
            found[member.name] = verdicts.verdict(numbers, member.width, member.target_l0)
    return found


def same_document_share(source_Bx3: np.ndarray, weight_B: np.ndarray) -> float:
    """The share of pairs of activations in a batch that come from the same document."""
    _, counts = np.unique(source_Bx3[weight_B > 0, shuffle_buffer.DOCUMENT], return_counts=True)
    total = counts.sum()
    return float((counts * (counts - 1)).sum() / max(total * (total - 1), 1))


def shuffle_quality(workdir: pathlib.Path, rows: token_rows.Rows, sample: int = 4096) -> tuple[float, float]:
    """The share of same-document pairs in a batch, as logged and as estimated for a perfect shuffle."""
    logged = [
        e["same_document_pairs"] for e in read_metrics(workdir) if e.get("same_document_pairs") is not None
    ]
    count = min(sample, len(rows))
    first_documents = rows.read(token_rows.order(len(rows), 0, 0, count)).first_document
    _, counts = np.unique(first_documents, return_counts=True)
    pairs_of_rows = (counts * (counts - 1)).sum() / max(count * (count - 1), 1)
    return float(np.mean(logged)), float(pairs_of_rows + 1 / len(rows))
