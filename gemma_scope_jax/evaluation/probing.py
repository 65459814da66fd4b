"""Sparse probing: how well a few latents separate the classes of labelled texts, compared with as few dimensions.

T texts, U of them for testing. F features of a text: the means over its positions of latents, or of the dimensions of
the SAE's input.
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
from gemma_scope_jax.models import activations, masking
from gemma_scope_jax.models.gemma import Gemma
from gemma_scope_jax.models.sites import Site
from gemma_scope_jax.runtime import sharding
from gemma_scope_jax.runtime.errors import DataError
from gemma_scope_jax.runtime.printing import LONGEST, printable, quoted, well_formed
from gemma_scope_jax.saes import attached, jumprelu

FEATURES = (1, 2, 5, 20)  # The numbers of features of the probes.
FEWEST = 10  # Texts of a class; fewer are too few to measure anything.
PARTS = 3  # One part of this many is for testing.


class Labelled(NamedTuple):
    """Texts and their classes. The texts of a group are all for training or all for testing."""

    texts: list[str]
    labels: np.ndarray  # [T], strings
    groups: np.ndarray  # [T], numbers from 0


@dataclasses.dataclass(frozen=True)
class Probe:
    """The results of a classifier of one class against the others, on the U test texts."""

    features: tuple[
        int, ...
    ]  # The features used, those with the largest class differences first; empty: all.
    # 1 where a text is classified correctly, 0 where not; for a mean over tasks, the share of tasks.
    correct_U: np.ndarray

    @property
    def accuracy(self) -> float:
        """The share of test texts that are classified correctly."""
        return float(self.correct_U.mean())

    @property
    def accuracy_se(self) -> float:
        """The standard error of the accuracy over texts; binomial for a single task."""
        return float(self.correct_U.std() / np.sqrt(self.correct_U.size))


@dataclasses.dataclass(frozen=True)
class Task:
    """The probes of one class against the others."""

    label: str
    majority: Probe  # Always predicts the more frequent side of the training part.
    latents: Mapping[int, Probe]  # by the number of latents
    dimensions: Mapping[int, Probe]  # by the number of the activation's dimensions
    all_dimensions: Probe


def read_labelled(path: pathlib.Path) -> Labelled:
    """Reads labelled texts from a JSON Lines file with the fields `text`, `label` and optionally `group`.

    Texts of one `group` stay on one side of the split, since they may share more than their class. So do equal texts.

    Raises:
      ValueError: if the file does not exist, a line is not such an object, or there are too few texts or classes.
    """
    if not path.is_file():
        raise DataError(f"--labelled={path} does not exist; give a JSON Lines file")
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
            raise DataError(f"{where}: the label has {len(str(label)):,} characters; give at most {LONGEST}")
        found.append(well_formed(text))
        labels.append(well_formed(str(label)))
        groups.append(str(group))
    counts = dict(sorted(collections.Counter(labels).items()))
    if len(counts) < 2:
        raise DataError(f"{path} has texts of {len(counts)} classes; give at least two classes")
    if few := {label: count for label, count in counts.items() if count < FEWEST}:
        named = printable(", ".join(f"{label!r} {count}" for label, count in few.items()))
        raise DataError(f"{path} has too few texts of {named}; give at least {FEWEST} of each class")
    return Labelled(found, np.array(labels), _numbered(groups))


def _numbered(names: Sequence[str]) -> np.ndarray:
    """Numbers names from 0, equal names alike, since in an array of strings each takes the space of the longest."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names])


def _joined(labelled: Labelled) -> np.ndarray:
    """The number [T] of each text's group, after joining groups that share a text."""
    text_T, group_T = _numbered(labelled.texts), labelled.groups
    # A graph of texts and groups, in which each line of the file connects its text to its group.
    edges = (np.ones(len(text_T)), (text_T, text_T.max() + 1 + group_T))
    count = text_T.max() + group_T.max() + 2
    _, component = sparse.csgraph.connected_components(sparse.coo_array(edges, shape=(count, count)), False)
    return component[text_T]


def split(labelled: Labelled, seed: int) -> np.ndarray:
    """Which texts [T] are for testing: a third, in whole groups, with class shares as equal as the groups allow.

    Raises:
      ValueError: if there are too few groups, or a class is missing in one part.
    """
    groups = _joined(labelled)
    if (count := len(set(groups))) < PARTS:
        raise DataError(
            f"the texts are of {count} groups, which cannot be split; give at least {PARTS} groups"
        )
    folds = model_selection.StratifiedGroupKFold(PARTS, shuffle=True, random_state=seed)
    _, test = next(folds.split(np.zeros(len(labelled.labels)), labelled.labels, groups))
    is_test_T = np.isin(np.arange(len(labelled.labels)), test)
    for label in np.unique(labelled.labels).tolist():
        for part, is_in_T in (("test", is_test_T), ("training", ~is_test_T)):
            if label not in labelled.labels[is_in_T]:
                raise DataError(
                    f"no text of class {quoted(label)} is in the {part} part, since groups are not split; give "
                    "more groups of that class, or another --seed"
                )
    return is_test_T


def fit(
    values_TxF: np.ndarray, is_class_T: np.ndarray, is_test_T: np.ndarray, numbers: Sequence[int | None]
) -> dict[int | None, Probe]:
    """Fits logistic regressions on the features whose class means differ most, in standard deviations.

    Features are standardised with the means and standard deviations of the training part.

    Args:
      values_TxF: features of the texts.
      is_class_T: which texts are of the class.
      is_test_T: which texts are for testing.
      numbers: the number of features of each regression; None: all features.

    Returns:
      The probes by number of features.
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
    """The task of each class against the others; for two classes only the second, since both tasks are the same.

    Args:
      latents_TxM: pooled latents.
      x_TxD: pooled activations.
      labels: the classes [T].
      is_test_T: which texts are for testing; see `split`.
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
    """The mean over tasks with the same texts."""

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
    """The mean latents [S, M] over the positions that count; without an SAE, the mean activations [S, D]."""
    kept_SxL = masking.is_kept(tokens_SxL, 0)
    value_SxLxF = x_SxLxD.astype(jnp.float32)
    if subject is not None:
        f_BxM = jumprelu.encode(
            subject, value_SxLxF.reshape(-1, x_SxLxD.shape[-1]), jax.lax.Precision.HIGHEST
        )
        value_SxLxF = f_BxM.reshape(*kept_SxL.shape, -1)
    count_S = jnp.maximum(kept_SxL.sum(1), 1)  # At least 1, for rows of padding.
    pooled_SxF = jnp.where(kept_SxL[..., None], value_SxLxF, 0).sum(1) / count_S[:, None]
    return sharding.constrain(mesh, pooled_SxF, sharding.REPLICATED)


def pool(
    gemma: Gemma,
    subjects: Mapping[str, attached.Subject],
    tokens_TxL: np.ndarray,
    per_batch: int,
) -> tuple[dict[str, np.ndarray], dict[Site, np.ndarray]]:
    """The means over each row's positions of every SAE's latents [T, M], and of every site's activations [T, D]."""
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
    """A row of tokens [T, L] for each text, cut to `length` and padded; and the number of texts that were cut."""
    tokens = [[masking.BOS, *encode(text)] for text in texts]
    longest = min(max(map(len, tokens)), length)
    rows_TxL = np.full((len(texts), longest), masking.PAD, np.int32)
    for row_L, of_text in zip(rows_TxL, tokens, strict=True):
        row_L[: len(of_text)] = of_text[:longest]
    return rows_TxL, sum(len(of_text) > longest for of_text in tokens)


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
    """Prints the accuracies of every task by number of features; for more than three SAEs, the means over tasks."""
    first = next(iter(results.values()))
    tested = first[0].majority.correct_U.size
    about = f"Accuracy on {tested:,} test texts of {texts:,}, by number of features"
    title = f"{about}; guess: always the more frequent side"
    table = tables.Table("", "class", "features", title=title, keys=3)
    for column in (*map(str, FEATURES), "all", "guess"):
        table.add_column(column, justify="right")
    errors = []

    def shown(probe: Probe) -> str:
        errors.append(probe.accuracy_se)
        return f"{probe.accuracy:.3f}"

    for name, of in results.items():
        told = [mean(of)] if len(results) > 3 else [*of, *([mean(of)] if len(of) > 1 else [])]
        for task in told:
            guess = f"{task.majority.accuracy:.3f}"
            table.add_row(name, task.label, "latents", *map(shown, task.latents.values()), "", guess)
            dimensions = (*task.dimensions.values(), task.all_dimensions)
            table.add_row("", "", "dimensions", *map(shown, dimensions), "")
    tables.show(table)
    print(f"Standard errors are at most {max(errors):.3f}.", flush=True)
