"""Sparse probing: how well a few latents tell the classes of labelled texts apart, beside as few dimensions.

T texts, U of them for testing, F features of a text: means over its positions of latents, or of what an SAE reads.
"""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse
from sklearn import linear_model, model_selection

from gemma_scope_jax.data import sources
from gemma_scope_jax.display import tables
from gemma_scope_jax.evaluation import opening
from gemma_scope_jax.models import activations, masking, placement, tokenizer
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import files, printing, ranges, sharding
from gemma_scope_jax.runtime.errors import DataError
from gemma_scope_jax.runtime.printing import LONGEST, printable, quoted, well_formed
from gemma_scope_jax.runtime.reporting import say
from gemma_scope_jax.saes import attached, jumprelu

FEATURES = (1, 2, 5, 20)  # So many are probed with.
FEWEST = 10  # Texts of a class: with less there is nothing to measure.
PARTS = 3  # One of so many is for testing.


class Labelled(NamedTuple):
    """Texts and their classes. Those of one group are all trained on or all tested on."""

    texts: list[str]
    labels: np.ndarray  # [T], strings
    groups: np.ndarray  # [T], numbers from 0


@dataclasses.dataclass(frozen=True)
class Probe:
    """A classifier of one class against the others, on the U texts that it was not fitted to."""

    features: tuple[int, ...]  # That it is of, those that differ most first; empty: all of them.
    # 1 where a text is classified rightly, else 0; of a mean over tasks, in what share of them it is.
    correct_U: np.ndarray

    @property
    def accuracy(self) -> float:
        """The share that is classified rightly."""
        return float(self.correct_U.mean())

    @property
    def accuracy_se(self) -> float:
        """Its standard error over texts; of one task the binomial one."""
        return float(self.correct_U.std() / np.sqrt(self.correct_U.size))


@dataclasses.dataclass(frozen=True)
class Task:
    """One class against the others. By the number of features: of latents, and of the activation's dimensions."""

    label: str
    majority: Probe  # Always says what is more frequent in the training part.
    latents: Mapping[int, Probe]
    dimensions: Mapping[int, Probe]
    all_dimensions: Probe


def read_labelled(path: pathlib.Path) -> Labelled:
    """The texts of a JSON Lines file: `text`, `label`, and perhaps `group`.

    Texts of one `group` are not divided, where they would be told by more than their class. Nor are equal ones.

    Raises:
      ValueError: there is no such file, a line is not such an object, or there are too few texts or classes.
    """
    if not path.is_file():
        raise DataError(f"--labelled={path}: there is no such file")
    found, labels, groups = [], [], []
    for number, one in sources.read_objects(path):
        where = f"{path}:{number}"
        if not {"text", "label"} <= one.keys():
            raise DataError(f'{where} is not a JSON object with a "text" and a "label"')
        text, label, group = one["text"], one["label"], one.get("group", one["text"])
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: the text is {quoted(text)}, expected a string that is not empty")
        for name, value in (("label", label), ("group", group)):
            if not isinstance(value, (str, int)) or isinstance(value, bool):
                raise DataError(
                    f"{where}: the {name} is {quoted(value)}, expected a string or a whole number"
                )
        if len(str(label)) > LONGEST:
            raise DataError(
                f"{where}: the label has {len(str(label)):,} characters, at most {LONGEST} are taken"
            )
        found.append(well_formed(text))
        labels.append(well_formed(str(label)))
        groups.append(str(group))
    counts = dict(sorted(collections.Counter(labels).items()))
    if len(counts) < 2:
        raise DataError(f"{path} has texts of {len(counts)} classes; it takes two to tell apart")
    if few := {label: count for label, count in counts.items() if count < FEWEST}:
        named = printable(", ".join(f"{label!r} {count}" for label, count in few.items()))
        raise DataError(f"{path} has too few texts of {named}; give at least {FEWEST} of each class")
    return Labelled(found, np.array(labels), _numbered(groups))


def _numbered(names: Sequence[str]) -> np.ndarray:
    """Equal names as equal numbers from 0: an array of strings would give each the room of the longest."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names])


def _joined(labelled: Labelled) -> np.ndarray:
    """Numbers [T] of groups that share no text."""
    text_T, group_T = _numbered(labelled.texts), labelled.groups
    # A graph of texts and groups, in which each line of the file ties its text to its group.
    edges = (np.ones(len(text_T)), (text_T, text_T.max() + 1 + group_T))
    count = text_T.max() + group_T.max() + 2
    _, component = sparse.csgraph.connected_components(sparse.coo_array(edges, shape=(count, count)), False)
    return component[text_T]


def split(labelled: Labelled, seed: int) -> np.ndarray:
    """Which texts [T] are for testing: a third, whole groups, with the classes' shares as near as groups allow.

    Raises:
      ValueError: there are too few groups, or a class is not in both parts.
    """
    groups = _joined(labelled)
    if (count := len(set(groups))) < PARTS:
        raise DataError(
            f"the texts are of {count} groups, which are not divided; give at least {PARTS} groups"
        )
    folds = model_selection.StratifiedGroupKFold(PARTS, shuffle=True, random_state=seed)
    _, test = next(folds.split(np.zeros(len(labelled.labels)), labelled.labels, groups))
    is_test_T = np.isin(np.arange(len(labelled.labels)), test)
    for label in np.unique(labelled.labels).tolist():
        for part, is_in_T in (("test", is_test_T), ("training", ~is_test_T)):
            if label not in labelled.labels[is_in_T]:
                raise DataError(
                    f"no text of class {quoted(label)} is in the {part} part, since groups are not divided; "
                    "give more groups of that class, or another --seed"
                )
    return is_test_T


def fit(
    values_TxF: np.ndarray, is_class_T: np.ndarray, is_test_T: np.ndarray, numbers: Sequence[int | None]
) -> dict[int | None, Probe]:
    """Logistic regressions on the features whose class means differ most, in standard deviations.

    Means and standard deviations are of the training part, and features are standardised by them.

    Args:
      values_TxF: features of the texts.
      is_class_T: which texts are of the class.
      is_test_T: which are not to be fitted to.
      numbers: of how many features, one regression each; None: of all.
    """
    is_training_T = ~is_test_T

    def mean_of(which_T: np.ndarray) -> np.ndarray:
        return values_TxF[which_T].mean(0, dtype=np.float64)

    scale_F = values_TxF[is_training_T].std(0, dtype=np.float64)
    scale_F = np.where(scale_F > 0, scale_F, 1)
    difference_F = (mean_of(is_training_T & is_class_T) - mean_of(is_training_T & ~is_class_T)) / scale_F
    ranked_F, centre_F = np.argsort(-np.abs(difference_F), kind="stable"), mean_of(is_training_T)
    probes = {}
    for number in numbers:
        chosen = ranked_F[:number]
        x = (values_TxF[:, chosen] - centre_F[chosen]) / scale_F[chosen]
        model = linear_model.LogisticRegression(max_iter=1000).fit(
            x[is_training_T], is_class_T[is_training_T]
        )
        correct_U = model.predict(x[is_test_T]) == is_class_T[is_test_T]
        features = () if number is None else tuple(map(int, chosen))
        probes[number] = Probe(features, correct_U.astype(np.float64))
    return probes


def tasks(
    latents_TxM: np.ndarray, x_TxD: np.ndarray, labels: np.ndarray, is_test_T: np.ndarray
) -> list[Task]:
    """Each class against the others; of two classes the second alone, as telling one is telling the other.

    Args:
      latents_TxM: pooled latents.
      x_TxD: pooled activations.
      labels: the classes [T].
      is_test_T: see `split`.
    """
    found = [str(label) for label in np.unique(labels)]
    results = []
    for label in found[1:] if len(found) == 2 else found:
        is_class_T = labels == label
        guess = is_class_T[~is_test_T].mean() > 0.5
        majority = Probe((), (is_class_T[is_test_T] == guess).astype(np.float64))
        latents = fit(latents_TxM, is_class_T, is_test_T, FEATURES)
        dimensions = fit(x_TxD, is_class_T, is_test_T, (*FEATURES, None))
        all_dimensions = dimensions.pop(None)
        results.append(Task(label, majority, latents, dimensions, all_dimensions))
    return results


def mean(of: Sequence[Task]) -> Task:
    """The mean of tasks over the same texts."""

    def over(probes: Sequence[Probe]) -> Probe:
        return Probe((), np.mean([probe.correct_U for probe in probes], axis=0))

    return Task(
        "mean",
        over([task.majority for task in of]),
        {n: over([task.latents[n] for task in of]) for n in FEATURES},
        {n: over([task.dimensions[n] for task in of]) for n in FEATURES},
        over([task.all_dimensions for task in of]),
    )


@functools.partial(jax.jit, static_argnames="mesh")
def _pooled(
    mesh: jax.sharding.Mesh, subject: jumprelu.SAE | None, x_SxLxD: jax.Array, tokens_SxL: jax.Array
) -> jax.Array:
    """The mean of latents [S, M] over the positions that count; without an SAE that of x, [S, D]."""
    kept_SxL = masking.is_kept(tokens_SxL, 0)
    value_SxLxF = x_SxLxD.astype(jnp.float32)
    if subject is not None:
        f_BxM = jumprelu.encode(
            subject, value_SxLxF.reshape(-1, x_SxLxD.shape[-1]), jax.lax.Precision.HIGHEST
        )
        value_SxLxF = f_BxM.reshape(*kept_SxL.shape, -1)
    count_S = jnp.maximum(kept_SxL.sum(1), 1)  # A row of padding has none.
    pooled_SxF = jnp.where(kept_SxL[..., None], value_SxLxF, 0).sum(1) / count_S[:, None]
    return sharding.constrain(mesh, pooled_SxF, sharding.REPLICATED)


def pool(
    gemma: Gemma,
    subjects: Mapping[str, attached.Subject],
    tokens_TxL: np.ndarray,
    per_batch: int,
) -> tuple[dict[str, np.ndarray], dict[Site, np.ndarray]]:
    """The means over each row's positions: of every SAE's latents [T, M], and of every site's activations [T, D]."""
    sites = tuple(dict.fromkeys(subject.site for subject in subjects.values()))
    encoders = {name: attached.encoder(gemma.mesh, subject.sae) for name, subject in subjects.items()}
    latents, values = {name: [] for name in subjects}, {site: [] for site in sites}
    for batch in activations.batches(gemma, sites, tokens_TxL, per_batch, "Probing"):
        for name, subject in subjects.items():
            f_SxM = _pooled(gemma.mesh, encoders[name], batch.values[subject.site], batch.tokens_SxL)
            latents[name].append(np.asarray(f_SxM[: batch.count]))
        for site in sites:
            x_SxD = _pooled(gemma.mesh, None, batch.values[site], batch.tokens_SxL)
            values[site].append(np.asarray(x_SxD[: batch.count]))
    return tuple({key: np.concatenate(parts) for key, parts in found.items()} for found in (latents, values))


def rows_of(texts: Sequence[str], encode: Callable[[str], list[int]], length: int) -> tuple[np.ndarray, int]:
    """A row of tokens [T, L] for each text, cut to `length` and padded to the longest; and how many were cut."""
    tokens = [[masking.BOS, *encode(text)] for text in texts]
    longest = min(max(map(len, tokens)), length)
    rows_TxL = np.full((len(texts), longest), masking.PAD, np.int32)
    for row_L, of_text in zip(rows_TxL, tokens, strict=True):
        row_L[: len(of_text)] = of_text[:longest]
    return rows_TxL, sum(len(of_text) > longest for of_text in tokens)


def probe_path(
    path: str | pathlib.Path,
    labelled: pathlib.Path,
    seed: int = 0,
    rows_per_batch: int | None = None,
    out: pathlib.Path | None = None,
    **overrides: str | None,
) -> dict[str, list[Task]]:
    """Probes the SAEs that lie at a path; writes probing.json and prints a table.

    Args:
      path: see `opening.open_path`.
      labelled: see `read_labelled`.
      seed: of the split into training and test texts.
      rows_per_batch: texts in one pass; None: as the config says.
      out: the folder to write to; None: see `opening.results_folder`.
      **overrides: see `opening.open_path`.

    Returns:
      The tasks of each SAE.
    """
    ranges.check("--seed", seed, ranges.SEED)
    given = read_labelled(labelled)
    is_test_T = split(given, seed)
    opened = opening.open_path(path, **overrides)
    config = opened.config
    per_batch = config.evaluation.rows_per_batch if rows_per_batch is None else rows_per_batch
    ranges.check("--rows_per_batch", per_batch, ranges.COUNT)
    given_out, out = out, opening.results_folder(opened, path, out)
    if given_out is None and (out / "probing.json").exists():
        before = printing.shareable(files.read_json(out / "probing.json").get("labelled"))
        if before != printing.shareable(labelled):
            raise DataError(f"{out / 'probing.json'} is of {printing.printable(before)}; give another --out")
    encode = tokenizer.load(config.model, config.tokenizer, config.weights).encode
    tokens_TxL, cut = rows_of(given.texts, encode, config.data.context_length)
    gemma = placement.load_gemma(config)
    latents, values = pool(gemma, opened.subjects, tokens_TxL, per_batch)
    results = {
        name: tasks(latents[name], values[subject.site], given.labels, is_test_T)
        for name, subject in opened.subjects.items()
    }
    labels, counts = np.unique(given.labels, return_counts=True)
    about = {
        "model": config.model,
        "step": opened.step,
        "labelled": printing.shareable(labelled),
        "classes": {str(label): int(count) for label, count in zip(labels, counts, strict=True)},
        "test_texts": int(is_test_T.sum()),
        "cut_texts": cut,
        "seed": seed,
    }
    written = {name: [as_numbers(task) for task in of] for name, of in results.items()}
    files.write_json(out / "probing.json", about | {"sae": written})
    print_table(results, len(given.texts))
    if cut:
        say(f"{cut:,} texts are longer than {config.data.context_length} tokens and were cut.")
    say(f"Wrote {out / 'probing.json'}")
    return results


def as_numbers(task: Task) -> dict:
    """A task as it is written to a file."""

    def of(probe: Probe) -> dict:
        return {"accuracy": probe.accuracy, "accuracy_se": probe.accuracy_se, "features": probe.features}

    return {
        "class": task.label,
        "majority": task.majority.accuracy,
        "latents": {n: of(probe) for n, probe in task.latents.items()},
        "dimensions": {n: of(probe) for n, probe in task.dimensions.items()},
        "all_dimensions": of(task.all_dimensions),
    }


def print_table(results: Mapping[str, Sequence[Task]], texts: int) -> None:
    """Accuracies by the number of features: of every task, or of more than three SAEs the means over tasks."""
    first = next(iter(results.values()))
    tested = first[0].majority.correct_U.size
    table = tables.Table(title=f"Accuracy on {tested:,} of {texts:,} texts, by the number of features")
    for column in ("", "class", ""):
        table.add_column(column, overflow="fold")
    for column in (*map(str, FEATURES), "all", "majority"):
        table.add_column(column, justify="right", no_wrap=True)

    def shown(probe: Probe) -> str:
        return f"{probe.accuracy:.3f} ± {probe.accuracy_se:.3f}"

    for name, of in results.items():
        told = [mean(of)] if len(results) > 3 else [*of, *([mean(of)] if len(of) > 1 else [])]
        for task in told:
            guess = f"{task.majority.accuracy:.3f}"
            table.add_row(name, task.label, "latents", *map(shown, task.latents.values()), "", guess)
            dimensions = (*task.dimensions.values(), task.all_dimensions)
            table.add_row("", "", "dimensions", *map(shown, dimensions), "")
    tables.show(table, least_width=tables.width(results) + 120)
