"""What a run says of itself: `metrics.jsonl`, TensorBoard, the progress line, and warnings of what goes wrong."""

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

# By then a threshold that can move has moved.
WATCHED_UPDATES = 1000


def read_metrics(workdir: pathlib.Path) -> list[dict]:
    """The entries of `metrics.jsonl` by their steps; lines that are damaged are passed over.

    Raises:
      ValueError: it cannot be read.
    """
    return _read(workdir / "metrics.jsonl")[0]


def _read(path: pathlib.Path) -> tuple[list[dict], int]:
    """The entries, of a step that is there twice the last, and how many lines are passed over.

    A last line that a killed process left unfinished is not counted.
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
    """The last values of each SAE that were logged up to a step, L0 and FVU as means over the last fiftieth of all.

    At a run's end the learning rate is near zero there; a window may hold all of its fall.
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
    """`metrics.jsonl` and TensorBoard. Steps after `last_step` are dropped, they will be done again."""

    def __init__(self, workdir: pathlib.Path, last_step: int) -> None:
        path = workdir / "metrics.jsonl"
        entries, damaged = _read(path)
        if damaged:
            places = (path.with_name(f"{path.name}.damaged.{n}") for n in itertools.count(1))
            aside = next(place for place in places if not place.exists())
            shutil.copyfile(path, aside)
            say(
                f"{path}: {damaged} lines are damaged, or of a step that is there twice, and are left out; the file "
                f"as it was is kept in {aside}."
            )
        kept = [json.dumps(entry) + "\n" for entry in entries if entry["step"] <= last_step]
        self.is_new = not kept
        files.write_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # Not its SummaryWriter, whose thread dies on a full disk and then leaves this one waiting for ever.
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
        """Has the disk keep what was written, which a mounted bucket else does at the end."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._board.close()


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast a step was. A FLOP utilisation is of the chips' peak in bfloat16; None where that is not known."""

    tokens_per_second: float
    data_wait_s: float  # That the host spent reading the next rows.
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
    """One line of `metrics.jsonl`. While the ring fills there is nothing to say of the SAEs.

    `held_out` has L0 and FVU of each by name, at steps at which they were measured.

    Raises:
      FloatingPointError: a loss is not finite.
    """
    saes = {}
    for bank_plan in plan.banks if metrics.trained else ():
        of_bank = metrics.banks[bank_plan.name]
        for i, member in enumerate(bank_plan.members):
            saes[member.name] = _member_entry(bank_plan, of_bank, i)
            # Without activations there is no loss.
            if of_bank.activations_E[i] and not math.isfinite(of_bank.loss_E[i]):
                raise NonFiniteError(
                    f"the loss of {member.name} is {of_bank.loss_E[i]} at step {number}; the last good state is "
                    "in the newest checkpoint. In another folder, lower optimizer.learning_rate or set "
                    "normalizer.outlier_medians"
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
    """A number for JSON, which knows no NaN."""
    return float(value) if math.isfinite(value) else None


def undefined(of_step: Mapping) -> dict[str, str]:
    """Which numbers of an entry's SAEs are not defined, and why, by SAE."""
    found = {}
    for name, values in of_step["sae"].items():
        if not values["activations"]:
            found[name] = (
                f"in step {of_step['step']} no activation counts for {name}: all are of BOS, EOS, PAD or the chat "
                "template, or not finite"
            )
        elif values["fvu"] is None:
            found[name] = (
                f"in step {of_step['step']} all activations of {name} are the same, so that its FVU is not defined"
            )
    return found


def _member_entry(plan: bank.Plan, metrics: bank.Metrics, place: int) -> dict:
    def of(values_E: np.ndarray) -> float | None:
        return finite(values_E[place])

    # Shares of the last whole window, and so unknown until the first has ended.
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
    """An entry in so few words that it stands behind a progress bar; of several SAEs, the lowest to the highest."""
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
    """Warnings before training: of thresholds that could not move far enough, and of windows that never end.

    Args:
      plan: of the run.
      updates: how many the SAE will have had at the end that has had fewest.
      learning_rates: the sum of its own to come; Adam moves a threshold's logarithm by about one an update.
    """
    warnings = [
        f"banks.{b.name}.window_updates is {b.window_updates} and there will be {updates} updates: dead and "
        "dense latents will not be known, and the L0 measured is that of all of training"
        for b in plan.banks
        if b.window_updates > updates
    ]
    for field, what in (("warmup_updates", "the learning rate"), ("sparsity_warmup_updates", "λ")):
        if (warmup := getattr(plan.optimizer, field)) > updates:
            warnings.append(
                f"optimizer.{field} is {warmup:,} and there will be {updates:,} updates: {what} does not rise to "
                "what it is set to"
            )
    if learning_rates < 0.5:
        warnings.append(
            "thresholds are trained as logarithms, which move by about optimizer.learning_rate an update: in this "
            f"run by a factor of {math.exp(learning_rates):.2f} at most, so L0 will not get far. Gemma Scope's rate "
            "of 7e-5 is for a million updates; raise optimizer.learning_rate, or train.tokens"
        )
    return warnings


def watched_steps(plan: step.Plan) -> int:
    """How many of a run's first training steps `stuck_thresholds` is to see."""
    return max(min(WATCHED_UPDATES, plan.total_updates // 2) // plan.updates_per_step, 1)


def stuck_thresholds(plan: step.Plan, entries: list[Mapping]) -> list[str]:
    """Warnings from a run's first updates, of SAEs whose thresholds nothing or only one side moves."""
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
                    f"{member.name}: in a batch only {reached:.1%} of thresholds have a pre-activation within "
                    f"{at}.bandwidth ({bank_plan.bandwidth:g}) of them, the others stand still at L0 "
                    f"{recent[-1]['l0']:.0f}; raise {at}.bandwidth, and {at}.initial_threshold with it"
                )
                continue
            error, sparsity = mean("theta_from_error"), mean("theta_from_sparsity")
            if bank_plan.objective.next_coefficient is not None:
                continue  # Its λ moves by itself.
            if now := mean("sparsity_coefficient"):
                sparsity *= member.sparsity_coefficient / now  # While λ warms up: as it will be.
            if member.sparsity_coefficient and sparsity < 0.01 * error:
                warnings.append(
                    f"{member.name}: sparsity makes up {sparsity / (error + sparsity):.1%} of what moves the "
                    f"thresholds, L0 is {recent[-1]['l0']:.0f}; raise {at}.sparsity_coefficients"
                )
            elif sparsity > 100 * error:
                warnings.append(
                    f"{member.name}: the error makes up {error / (error + sparsity):.1%} of what moves the "
                    f"thresholds, which another λ would hardly change: L0 is {recent[-1]['l0']:.0f}; lower "
                    f"{at}.sparsity_coefficients"
                )
    return warnings


def judge(plan: step.Plan, workdir: pathlib.Path, number: int) -> dict[str, verdicts.Verdict]:
    """What the log up to a step says of each SAE, without losses of Gemma's; of no log nothing."""
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
    """The share of pairs in a batch that come from one document."""
    _, counts = np.unique(source_Bx3[weight_B > 0, shuffle_buffer.DOCUMENT], return_counts=True)
    total = counts.sum()
    return float((counts * (counts - 1)).sum() / max(total * (total - 1), 1))


def shuffle_quality(workdir: pathlib.Path, rows: token_rows.Rows, sample: int = 4096) -> tuple[float, float]:
    """The share of same-document pairs in a batch, in the run's log and (estimated) under a perfect shuffle."""
    logged = [
        e["same_document_pairs"] for e in read_metrics(workdir) if e.get("same_document_pairs") is not None
    ]
    count = min(sample, len(rows))
    first_documents = rows.read(token_rows.order(len(rows), 0, 0, count)).first_document
    _, counts = np.unique(first_documents, return_counts=True)
    pairs_of_rows = (counts * (counts - 1)).sum() / max(count * (count - 1), 1)
    return float(np.mean(logged)), float(pairs_of_rows + 1 / len(rows))
