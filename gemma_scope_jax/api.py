"""What `import gemma_scope_jax as gs` gives: SAEs, models, training, evaluation and a session to look inside.

Nothing here prints or writes unasked. `logging` has messages (logger `gemma_scope_jax`), `progress=True` shows bars.
"""

import dataclasses
import pathlib
import typing
from collections.abc import Iterable, Mapping

import jax.numpy as jnp

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.evaluation import opening, report
from gemma_scope_jax.models import placement, registry, tokenizer
from gemma_scope_jax.models.language_model import LanguageModel
from gemma_scope_jax.models.sites import blocks_needed
from gemma_scope_jax.runtime import extras, files, reporting
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.runtime.printing import quoted
from gemma_scope_jax.saes import loading
from gemma_scope_jax.saes.loading import LoadedSAE
from gemma_scope_jax.training import config_files, export, loop
from gemma_scope_jax.training.trained import TrainedRun

if typing.TYPE_CHECKING:
    from gemma_scope_jax.analysis import Scope

# What SAEs are given as: a run, or where one or some lie; or those that are loaded.
SAEs = str | pathlib.Path | TrainedRun | LoadedSAE | Mapping[str, LoadedSAE] | Iterable[LoadedSAE]


def load_sae(
    location: str | pathlib.Path, *, model: str = "", site: str = "", target_site: str = ""
) -> LoadedSAE:
    """The SAE at a path or on the hub, in any format, with its `encode` and `decode`.

    Args:
      location: a path, or `hf://OWNER/NAME/FOLDER`.
      model: as in `gemma2_2b`, where the file does not say it.
      site: what it reads, as in `layer_20_resid_post`, likewise.
      target_site: what a transcoder predicts, likewise.

    Raises:
      ValueError: there is none, or several; it is broken, or does not fit its model.
    """
    found = load_saes(location, model=model, site=site, target_site=target_site)
    if len(found) > 1:
        raise InputError(f"{location} has {len(found)} SAEs, {', '.join(found)}; load_saes loads them all")
    return next(iter(found.values()))


def load_saes(
    location: str | pathlib.Path, *, model: str = "", site: str = "", target_site: str = ""
) -> dict[str, LoadedSAE]:
    """The SAEs of a run directory, at a path with `*`, or of a set in one folder, by name; see `load_sae`."""
    path = files.expanded(location)
    if loading.is_run(path):
        return dict(TrainedRun(path).saes)
    return {one.name: one for one in loading.read(location, model, site, target_site)}


def load_model(
    model: str | LoadedSAE,
    *,
    weights: str = "",
    tokenizer_path: str = "",
    dtype: str = "",
    layers: int | None = None,
) -> LanguageModel:
    """A Gemma with its tokenizer; split over the devices where it would not fit on one.

    Args:
      model: its name, as in `gemma2_2b`; or an SAE, for the blocks that its activations take. What is not given is
        then as in the run that it was read from; a file outside of one has no say in it.
      weights: where they lie, as `weights` of a config. Empty: those of the model's own.
      tokenizer_path: where it lies; empty: beside the weights, else the model's own.
      dtype: of the model's arithmetic, `bfloat16` or `float32`; empty: `bfloat16`.
      layers: how many blocks to load, the first ones; None: all, or of an SAE's what it takes.

    Raises:
      ValueError: there is no such model, or its weights or tokenizer cannot be had.
    """
    name = model.model if isinstance(model, LoadedSAE) else model
    if isinstance(model, LoadedSAE):
        layers = blocks_needed([model.site, model.target_site]) if layers is None else layers
        if model.is_of_run and not weights:
            weights = model.about.weights
            tokenizer_path = tokenizer_path or model.about.tokenizer
        dtype = dtype or (model.about.gemma_dtype if model.is_of_run else "")
    fields = {
        "model": name,
        "weights": weights,
        "tokenizer": tokenizer_path,
        "gemma_dtype": dtype or "bfloat16",
    }
    config = config_lib.from_dict(fields)
    return LanguageModel(placement.load_gemma(config, layers), tokenizer.load(name, tokenizer_path, weights))


def train(
    config: str | pathlib.Path | config_lib.Config,
    workdir: str | pathlib.Path,
    *,
    progress: bool = False,
    **fields: object,
) -> TrainedRun:
    """Trains the SAEs of a config, or goes on with the run in `workdir`, to its end.

    Ctrl-C ends the step that is under way, saves a checkpoint, and raises KeyboardInterrupt; the same call goes on.
    With several processes it ends them without a save.

    Args:
      config: a config's name, such as `quickstart` or `gemma2_2b:resid_post_65k`; a config file; or a `Config`.
      workdir: the run's folder.
      progress: whether to show a bar.
      **fields: of the config, by their last names (`width=4096`), or by whole ones with `__` for dots.

    Raises:
      ValueError: the config does not fit itself, its inputs, or the run in `workdir`.
      FloatingPointError: a loss is not finite.
    """
    values = (
        config_lib.to_dict(config)
        if isinstance(config, config_lib.Config)
        else config_files.load(str(config))
    )
    named = {name.replace("__", "."): value for name, value in fields.items()}
    made = config_lib.from_dict(config_files.with_fields(values, named))
    path = files.expanded(workdir)
    with reporting.showing_progress(progress):
        loop.train(made, path)
    return TrainedRun(path)


def evaluate(
    saes: SAEs,
    model: LanguageModel | None = None,
    *,
    text: str | None = None,
    rows: int | None = None,
    rows_per_batch: int | None = None,
    split: str = "held_out",
    turns: str | None = None,
    fast: bool = False,
    baselines: bool = False,
    trust: bool = False,
    progress: bool = False,
) -> report.Results:
    """Evaluates SAEs: sparsity, reconstruction, and what they cost the model's predictions.

    Args:
      saes: a run, where one or some lie, or SAEs that are loaded.
      model: all of it; None: it is loaded as the run or the SAEs say.
      text: to evaluate on, as `data.text` of a config; None: the one that they were trained on, if that is known.
      rows: of it, at most all; None: as the run's config says, of SAEs in files 512.
      rows_per_batch: in one pass; None: likewise, else 8.
      split: `held_out`, or `train`.
      turns: in the chat template, whose turns count: `all`, `user` or `model`.
      fast: without KL and r_L0.
      baselines: beside each SAE its own top k, a random decoder, an untrained SAE and principal components.
      trust: use the text, weights and tokenizer that a file outside a run directory names.
      progress: whether to show a bar.

    Raises:
      ValueError: there is no SAE, or the model is another or not whole.
      FloatingPointError: what is measured is not finite.
    """
    opened, loaded = _opened(saes, model, text=text, turns=turns, trust=trust)
    asked = opened.config.evaluation
    rows = asked.rows if rows is None else rows
    rows_per_batch = asked.rows_per_batch if rows_per_batch is None else rows_per_batch
    options = report.Options(rows, rows_per_batch, split, turns, fast, baselines)
    with reporting.showing_progress(progress):
        gemma = loaded.gemma if loaded else placement.load_gemma(opened.config)
        if baselines:
            opened = report.with_baselines(opened, gemma, rows_per_batch)
        return report.evaluate_opened(opened, gemma, options)


def session(
    saes: SAEs, model: LanguageModel | None = None, *, text: str | None = None, trust: bool = False
) -> "Scope":
    """A model with SAEs, to look inside with `gemma_scope_jax.analysis`; the arguments are those of `evaluate`."""
    with extras.needed():
        from gemma_scope_jax.analysis import session as session_lib

    opened, loaded = _opened(saes, model, text=text, trust=trust)
    return session_lib.open_session(opened, loaded)


def _opened(
    saes: SAEs, model: LanguageModel | None, trust: bool, **overrides: str | None
) -> tuple[opening.Opened, LanguageModel | None]:
    """SAEs with what it takes to look at them; checks that a given model is theirs, and whole."""
    if isinstance(saes, TrainedRun):
        saes = saes.path
    if model is not None:
        overrides["dtype"] = "float32" if model.gemma.dtype == jnp.float32 else "bfloat16"
    if isinstance(saes, (str, pathlib.Path)):
        if not str(saes).startswith("hf://") and loading.is_run(place := files.expanded(saes)):
            export.refresh(place)
        opened = opening.open_path(saes, trust=trust, **overrides)
    else:
        if isinstance(saes, LoadedSAE):
            some = [saes]
        elif isinstance(saes, Mapping):
            some = [dataclasses.replace(one, name=name) for name, one in saes.items()]
        elif isinstance(saes, Iterable):
            some = list(saes)
        else:
            raise InputError(f"{saes!r} is no SAE; give one, some, or where some lie")
        if not some:
            raise InputError("there is no SAE; give one, or where some lie")
        given = {name: value for name, value in overrides.items() if value is not None}
        opened = opening.of_saes(some, given, trust)
    if model is not None:
        if registry.spec(model.name) != registry.spec(opened.config.model):
            raise InputError(f"the SAEs are of {opened.config.model}, the model is {quoted(model.name)}")
        if model.gemma.num_layers < len(model.gemma.layers):
            raise InputError(
                f"only {model.gemma.num_layers} of {model.name}'s {len(model.gemma.layers)} blocks are loaded; "
                "load the whole model"
            )
    return opened, model
