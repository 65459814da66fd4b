"""Opens the SAEs at a path, of a run or in files, with the config of the model and the rows to evaluate them on."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence

from gemma_scope_jax import config as config_lib
from gemma_scope_jax.data import prepare, sources, token_rows
from gemma_scope_jax.evaluation import output
from gemma_scope_jax.models import registry
from gemma_scope_jax.runtime import files
from gemma_scope_jax.runtime.errors import InputError, NotFoundError, RunError
from gemma_scope_jax.runtime.printing import printable, well_formed
from gemma_scope_jax.runtime.reporting import say
from gemma_scope_jax.saes import attached, finding, loading, naming
from gemma_scope_jax.saes.formats import common


@dataclasses.dataclass(frozen=True)
class Opened:
    """The SAEs at a path, and what to evaluate them with."""

    config: config_lib.Config  # the config to evaluate with
    subjects: dict[str, attached.Subject]  # the SAEs by name
    prepare_rows: Callable[[], pathlib.Path]  # makes the rows of the text to evaluate on
    members: dict[str, naming.Member]  # a run's members by name; empty for files
    step: int | None = None  # the training step of a run's SAEs
    # The config of the run or file, without overrides; other people's files leave most of it at its defaults.
    own: config_lib.Config = config_lib.Config()
    is_text_known: bool = True  # Whether `own` has the text that the SAEs were trained on.
    location: str | pathlib.Path = "."  # where the SAEs were found
    baselines: tuple[str, ...] = ()  # the names of the subjects that are baselines

    @property
    def text_trained_on(self) -> str | None:
        """The text that the SAEs were trained on; None if unknown."""
        return self.own.data.text if self.is_text_known else None

    @property
    def is_other_text(self) -> bool:
        """Whether the text to evaluate on is known to differ from the training text."""
        return self.is_text_known and not sources.is_same_text(self.config.data.text, self.own.data.text)

    @functools.cached_property
    def rows(self) -> pathlib.Path:
        """The folder of the rows to evaluate on, made on first use, since not every caller needs rows."""
        return self.prepare_rows()


# Overrides that apply only to SAEs in files.
_OF_FILES = ("site", "target_site")


def open_path(location: str | pathlib.Path, trust: bool | None = None, **overrides: str | None) -> Opened:
    """Opens the SAEs of a run, or of files in any format, with the config and rows to evaluate them on.

    Args:
      location: a run directory; or a path or `hf://OWNER/NAME/FOLDER` of an SAE, or of several with `*`.
      trust: whether to use the text, weights and tokenizer that a file outside a run directory names.
      **overrides: `text`, `model`, `weights`, `tokenizer`, `dtype` and `turns`; for files also `site` and
        `target_site`. None: the value of the run or file.

    Raises:
      ValueError: if no run or SAE is at the location, an SAE does not fit the model, or a run is given an override
        for files.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    path = None if finding.is_pattern(str(location)) else finding.local(str(location))
    # A download from the hub is never opened as a run, since a run's config is trusted to name text and weights.
    if path is None or str(location).startswith("hf://") or not loading.is_run(path):
        return _open_stored(str(location), given, bool(trust))
    for name in _OF_FILES:
        if name in given:
            raise InputError(f"--{name} is for SAEs in files; leave it out for a run, whose config has it")
    return _open_run(path, given)


def _open_run(path: pathlib.Path, given: dict[str, str]) -> Opened:
    own = loading.run_config(path)
    members = {member.name: member for bank in own.banks.values() for member in naming.members(bank)}
    places = {name: path / "sae" / name for name in members}
    if missing := [name for name, place in places.items() if not place.exists()]:
        raise NotFoundError(
            f"{path} has no {missing[0]} in its folder sae yet; finish training, or call training.export.refresh to "
            "export its newest checkpoint"
        )
    say(f"Reading the SAEs of {path} …")
    found = {name: one for name, place in places.items() for one in loading.read(place)}
    config = _changed(own, given)
    for name, one in found.items():
        loading.check(name, config.model, one.sae, one.site, one.target_site)
    subjects = {
        name: attached.Subject(one.sae, one.site, one.about.site_mean_O, one.target_site)
        for name, one in found.items()
    }
    packed = ("text", "turns", "tokenizer")
    # Another model with the same tokens gets the same rows, so that the two can be compared.
    is_other = bool(given.keys() & set(packed))

    def rows() -> pathlib.Path:
        return prepare.rows_of_once(config) if is_other else prepare.rows_of_run(own, path)

    steps = {one.about.step for one in found.values()}
    if len(steps) > 1:
        raise RunError(
            f"the SAEs in {path / 'sae'} are of different steps; remove that folder, and it is written again"
        )
    (step,) = steps
    if step is None:  # An older SAE without a step, written at the end of the run.
        step = max(int(saved.name) for saved in (path / "checkpoints").iterdir() if saved.name.isdecimal())
    return Opened(config, subjects, rows, members, step, own, location=path)


def _changed(config: config_lib.Config, given: dict[str, str]) -> config_lib.Config:
    """The config with overrides applied."""
    if given.get("model", config.model) != config.model:
        config = dataclasses.replace(config, model=given["model"], weights="", tokenizer="")
    names = {"weights": "weights", "tokenizer": "tokenizer", "dtype": "gemma_dtype"}
    changes = {names[name]: value for name, value in given.items() if name in names}
    config = dataclasses.replace(config, **changes)
    if "turns" in given:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, chat_template=True))
    if not sources.is_same_text(given.get("text", config.data.text), config.data.text):
        config = dataclasses.replace(config, data=_other_text(config.data, given["text"]))
    return config


def _other_text(trained: config_lib.DataConfig, text: str) -> config_lib.DataConfig:
    """The data config of a text that was not trained on, all of which is held out."""
    if shared := sources.files_of(trained.text) & sources.files_of(text):
        say(
            f"Files of {text} that are also in the training text: {len(shared)}, such as {min(shared)}. "
            "Measurements on them are not held out."
        )
    return dataclasses.replace(trained, text=text, documents=0, held_out_fraction=1.0)


def on_text(opened: Opened, text: str) -> Opened:
    """The same SAEs with the rows of another text, or of the training text."""
    if sources.is_same_text(text, opened.config.data.text):
        return opened
    is_chat = opened.config.data.chat_template
    trained = dataclasses.replace(opened.own.data, chat_template=is_chat)
    changed = trained if sources.is_same_text(text, trained.text) else _other_text(trained, text)
    config = dataclasses.replace(opened.config, data=changed)
    return dataclasses.replace(
        opened, config=config, prepare_rows=functools.partial(prepare.rows_of_once, config)
    )


def _open_stored(location: str, given: dict[str, str], trust: bool) -> Opened:
    say(f"Reading the SAEs at {location} …")
    found = list(loading.read(location, *(given.get(name, "") for name in ("model", "site", "target_site"))))
    return of_saes(found, given, trust, location)


def of_saes(
    found: Sequence[loading.LoadedSAE],
    given: Mapping[str, str],
    trust: bool = False,
    location: str = "the list of SAEs",
) -> Opened:
    """Opens SAEs that are already loaded, with the config and rows to evaluate them on.

    Args:
      found: the SAEs.
      given: the overrides of `open_path`, without None.
      trust: whether to use the text, weights and tokenizer that the files name.
      location: where the SAEs came from, for messages.

    Raises:
      ValueError: if the SAEs are of several models or two have one name, or as in `open_path`.
    """
    about, model = found[0].about, found[0].model
    if others := {one.model for one in found} - {model}:
        raise InputError(
            f"{location} has SAEs of {model} and of {', '.join(others)}; give the SAEs of one model"
        )
    named = {name: value for name in ("text", "weights", "tokenizer") if (value := getattr(about, name))}
    says = ", ".join(f"{name} {printable(value)}" for name, value in named.items() if name not in given)
    is_used = trust or all(one.is_of_run for one in found)
    if says and is_used:
        say(f"The file names {says}.")
    elif says:
        say(f"The file names {says}. They are not used unless you give --trust, or each by its own flag.")
    if not is_used:
        about = _without_named(about, keep={name for name in named if given.get(name) == named[name]})
    for name in ("weights", "tokenizer"):
        chosen = given.get(name) or getattr(about, name)
        if chosen and "://" not in chosen and not files.expanded(chosen).exists():
            raise InputError(
                f"{location}: {name} {printable(chosen)} does not exist here; give another --{name}"
            )
    # Other people's files do not say how they were trained, so the defaults apply, with Gemma in float32.
    trained = config_lib.from_dict(
        {
            "model": model,
            "weights": about.weights,
            "tokenizer": about.tokenizer,
            "gemma_dtype": about.gemma_dtype,
            "data": {
                "text": about.text or config_lib.DataConfig().text,
                "context_length": about.context_length,
                "held_out_fraction": about.held_out_fraction,
                "seed": about.data_seed,
                "chat_template": about.chat_template,
            },
        }
    )
    config = _changed(trained, {name: value for name, value in given.items() if name not in _OF_FILES})
    for one in found:
        if one.site.layer != one.target_site.layer:
            raise InputError(
                f"{location} reads {one.site} and predicts {one.target_site}; only SAEs within one layer can be "
                "evaluated"
            )
    subjects = {
        well_formed(one.name): attached.Subject(one.sae, one.site, one.about.site_mean_O, one.target_site)
        for one in found
    }
    if len(subjects) < len(found):
        raise InputError(
            f"{location} has two SAEs with the same name; rename one of their folders, or give a dict of SAEs by name"
        )
    is_as_trained = config.data == trained.data and "tokenizer" not in given

    def rows() -> pathlib.Path:
        made = token_rows.cached(config.data, about.rows) if about.rows and is_as_trained else None
        return made or prepare.rows_of_once(config)

    if not about.rows:  # Other people's files name no weights, so the given ones count as their own.
        trained = dataclasses.replace(trained, weights=config.weights, tokenizer=config.tokenizer)
    if (
        about.model_name
        and registry.spec(model).hugging_face.split("/")[-1] != about.model_name.split("/")[-1]
    ):
        trained = dataclasses.replace(trained, model=about.model_name)
    return Opened(config, subjects, rows, {}, own=trained, is_text_known=bool(about.text), location=location)


def options_of(
    opened: Opened, split: str = token_rows.HELD_OUT, turns: str | None = None, kind: str = ""
) -> str:
    """The options of results that differ from the SAEs' own, except the text, as a folder name: `bfloat16_train`."""

    def other(name: str) -> str:
        value = getattr(opened.config, name)
        return "" if value == getattr(opened.own, name) else value

    parts = [
        other("model"),
        text_label(other("weights")),
        text_label(other("tokenizer")),
        other("gemma_dtype"),
        f"turns_{turns}" if turns else "",
        "" if split == token_rows.HELD_OUT else split,
        kind,
    ]
    return "_".join(filter(None, parts))


def results_folder(
    opened: Opened,
    location: str | pathlib.Path,
    out: pathlib.Path | None,
    text: str | None = None,
    options: str = "",
) -> pathlib.Path:
    """The folder for results, created by `output.made_folder`.

    Results on another text, model or option get a separate folder, so that they never overwrite the SAEs' own.

    Args:
      opened: the SAEs at the location.
      location: a path, or `hf://OWNER/NAME/FOLDER`.
      out: the folder; None: chosen here.
      text: the folder name of another text; None: its file name.
      options: the result of `options_of`; empty: computed here.
    """
    is_other = not sources.is_same_text(opened.config.data.text, opened.own.data.text)
    name = text or text_label(opened.config.data.text)
    label = pathlib.Path(options or options_of(opened), name if is_other else "")
    return output.made_folder(location, out, None if label == pathlib.Path() else label)


def text_label(source: str) -> str:
    """The last part of a text's or path's name, with characters that a folder name cannot have replaced by _."""
    return re.sub(r"[^\w-]+", "_", pathlib.PurePosixPath(source).stem)


def _without_named(about: common.About, keep: Collection[str]) -> common.About:
    """A file's metadata without the places that it names, except those that the user named as well."""
    cleared = dict.fromkeys({"rows", "weights", "tokenizer"} - set(keep), "")
    if "text" not in keep:  # Without the text, its held-out part does not matter.
        plain = common.About()
        cleared |= {name: getattr(plain, name) for name in ("text", "held_out_fraction", "data_seed")}
    return dataclasses.replace(about, **cleared)
