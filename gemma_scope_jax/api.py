"""The functions of `import gemma_scope_jax as gs`: SAEs, models, training, evaluation and a session for analysis.

Nothing here prints. Messages go to the logger `gemma_scope_jax`; `progress=True` shows progress bars.
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

# A run, a path or hub address of SAEs, or loaded SAEs.
SAEs = str | pathlib.Path | TrainedRun | LoadedSAE | Mapping[str, LoadedSAE] | Iterable[LoadedSAE]


def load_sae(
    location: str | pathlib.Path, *, model: str = "", site: str = "", target_site: str = ""
) -> LoadedSAE:
    """Loads an SAE in any format from a path or Hugging Face's hub.

    Args:
      location: a path, or `hf://OWNER/NAME/FOLDER`.
      model: the name of the model, as in `gemma2_2b`; needed only if the file does not name it.
      site: the site that the SAE reads, as in `layer_20_resid_post`; needed only if the file does not name it.
      target_site: the site that a transcoder predicts; needed only if the file does not name it.

    Returns:
      The SAE, with its methods `encode` and `decode`.

    Raises:
      ValueError: if there is no SAE or more than one at the location, it is damaged, or it does not fit its model.
    """
    found = load_saes(location, model=model, site=site, target_site=target_site)
    if len(found) > 1:
        raise InputError(f"{location} has {len(found)} SAEs, {', '.join(found)}; load them with load_saes")
    return next(iter(found.values()))


def load_saes(
    location: str | pathlib.Path, *, model: str = "", site: str = "", target_site: str = ""
) -> dict[str, LoadedSAE]:
    """Loads all SAEs of a run directory, a folder or a path with `*`, by name; the arguments are `load_sae`'s."""
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
    """Loads a Gemma model with its tokenizer; a model that is too large for one device is split over all of them.

    Args:
      model: the name of the model, as in `gemma2_2b`; or an SAE, to load the model that it was trained on. The
        arguments that are not given then come from the run that the SAE was read from; an SAE file outside a run
        directory sets only the model's name and the dtype.
      weights: the path or address of the weights, as `weights` of a config. Empty: the model's own weights.
      tokenizer_path: the path of the tokenizer. Empty: the one beside the weights or, if there is none, the model's
        own.
      dtype: the dtype of the model's weights and arithmetic, `bfloat16` or `float32`. Empty: the dtype that the
        SAE's run or file names; `float32` if a file names none, and `bfloat16` for a model by name.
      layers: the number of blocks to load, from the first. None: all blocks or, if `model` is an SAE, the blocks
        that its sites need.

    Raises:
      ValueError: if there is no model of this name, or its weights or tokenizer cannot be loaded.
    """
    name = model.model if isinstance(model, LoadedSAE) else model
    if isinstance(model, LoadedSAE):
        layers = blocks_needed([model.site, model.target_site]) if layers is None else layers
        if model.is_of_run and not weights:
            weights = model.about.weights
            tokenizer_path = tokenizer_path or model.about.tokenizer
        dtype = dtype or model.about.gemma_dtype
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
    """Trains the SAEs of a config; an unfinished run in `workdir` is continued.

    Ctrl-C finishes the current step, saves a checkpoint and raises KeyboardInterrupt; the same call then continues
    the run. With several processes, Ctrl-C ends them without saving.

    Args:
      config: a config's name, such as `quickstart` or `gemma2_2b:resid_post_65k`; a config file; or a `Config`.
      workdir: the run directory.
      progress: whether to show a progress bar.
      **fields: fields of the config to change, by their last name (`width=4096`) or by their whole name with `__` for
        dots (`banks__main__width=4096`).

    Returns:
      The finished run.

    Raises:
      ValueError: if fields of the config do not fit each other, the inputs, or the run in `workdir`.
      FloatingPointError: if a loss is not finite.
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
    """Evaluates SAEs: their sparsity, their reconstruction error, and their effect on the model's predictions.

    Args:
      saes: a run, a path or hub address of SAEs, or loaded SAEs.
      model: the whole model; None: load the model that the run or the SAEs name.
      text: the text to evaluate on, as `data.text` of a config; None: the text that the SAEs were trained on, if it
        is known.
      rows: the number of rows to evaluate on, at most all of the split; None: the number in the run's config, or 512
        for SAEs outside a run.
      rows_per_batch: rows in one forward pass of the model; None: the number in the run's config, or 8 for SAEs
        outside a run.
      split: the rows to evaluate on, `held_out` or `train`.
      turns: apply the chat template, and evaluate only on the tokens of these turns: `all`, `user` or `model`. None:
        as in the run's config.
      fast: skip KL and r_L0.
      baselines: also evaluate, for each SAE, the top k of its own latents, a random decoder, an untrained SAE and
        principal components.
      trust: use the text, weights and tokenizer that an SAE file outside a run directory names.
      progress: whether to show a progress bar.

    Returns:
      The results.

    Raises:
      ValueError: if there is no SAE, or `model` is not the SAEs' model or lacks some of its blocks.
      FloatingPointError: if a measured value is not finite.
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
    """Opens a model with SAEs for `gemma_scope_jax.analysis`; the arguments are those of `evaluate`."""
    with extras.needed():
        from gemma_scope_jax.analysis import session as session_lib

    opened, loaded = _opened(saes, model, text=text, trust=trust)
    return session_lib.open_session(opened, loaded)


def _opened(
    saes: SAEs, model: LanguageModel | None, trust: bool, **overrides: str | None
) -> tuple[opening.Opened, LanguageModel | None]:
    """Opens SAEs, and checks that a given model is the SAEs' own and that all of its blocks are loaded."""
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
            raise InputError(f"{saes!r} is not an SAE; give SAEs, a run or a path")
        if not some:
            raise InputError("no SAEs are given; give SAEs, a run or a path")
        given = {name: value for name, value in overrides.items() if value is not None}
        opened = opening.of_saes(some, given, trust)
    if model is not None:
        if registry.spec(model.name) != registry.spec(opened.config.model):
            raise InputError(f"the SAEs are for {opened.config.model}, but the model is {quoted(model.name)}")
        if model.gemma.num_layers < len(model.gemma.layers):
            raise InputError(
                f"only {model.gemma.num_layers} of {model.name}'s {len(model.gemma.layers)} blocks are loaded; "
                "load the whole model"
            )
    return opened, model
