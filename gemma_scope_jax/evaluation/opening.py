"""What lies at a path: a run's SAEs or those of files, with the model and the rows to look at them with."""

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
    """What lies at a path."""

    config: config_lib.Config  # to evaluate with
    subjects: dict[str, attached.Subject]
    prepare_rows: Callable[[], pathlib.Path]  # of the text to evaluate on
    members: dict[str, naming.Member]  # of a run
    step: int | None = None  # of a run, at which they are as they are here
    # As the run or the file says, whatever was given; a stranger's file leaves the most of it open.
    own: config_lib.Config = config_lib.Config()
    is_text_known: bool = True  # Whether `own` has the text that they were trained on.
    location: str | pathlib.Path = "."  # where they were found
    baselines: tuple[str, ...] = ()  # the names of those subjects that only are to be held against

    @property
    def text_trained_on(self) -> str | None:
        """None where it is not known."""
        return self.own.data.text if self.is_text_known else None

    @property
    def is_other_text(self) -> bool:
        """Whether what they are evaluated on is known to be another text than what they were trained on."""
        return self.is_text_known and not sources.is_same_text(self.config.data.text, self.own.data.text)

    @functools.cached_property
    def rows(self) -> pathlib.Path:
        """The folder of the rows to evaluate on, made when it is first asked for: not all look at text of its own."""
        return self.prepare_rows()


# What only files leave open.
_OF_FILES = ("site", "target_site")


def open_path(location: str | pathlib.Path, trust: bool | None = None, **overrides: str | None) -> Opened:
    """The SAEs of a run, or of files in any format, and what to evaluate them on.

    Args:
      location: a run directory; or a path or `hf://OWNER/NAME/FOLDER` of an SAE, or of several with `*`.
      trust: whether the text, weights and tokenizer that a file names are used where it lies in no run directory.
      **overrides: `text`, `model`, `weights`, `tokenizer`, `dtype` and `turns`, and of files `site` and
        `target_site`; None: as the run or file says.

    Raises:
      ValueError: there is neither, it does not fit the model, or options were given that only files take.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    path = None if finding.is_pattern(str(location)) else finding.local(str(location))
    # What is fetched from the hub is never a run, which may name any text and weights.
    if path is None or str(location).startswith("hf://") or not loading.is_run(path):
        return _open_stored(str(location), given, bool(trust))
    for name in _OF_FILES:
        if name in given:
            raise InputError(f"--{name} is for SAEs in files; a run says it itself")
    return _open_run(path, given)


def _open_run(path: pathlib.Path, given: dict[str, str]) -> Opened:
    own = loading.run_config(path)
    members = {member.name: member for bank in own.banks.values() for member in naming.members(bank)}
    places = {name: path / "sae" / name for name in members}
    if missing := [name for name, place in places.items() if not place.exists()]:
        raise NotFoundError(
            f"{path} has no {missing[0]} in its folder sae yet; train it to its end, or call training.export.refresh "
            "for what its newest checkpoint has"
        )
    found = {name: one for name, place in places.items() for one in loading.read(place)}
    config = _changed(own, given)
    for name, one in found.items():
        loading.check(name, config.model, one.sae, one.site, one.target_site)
    subjects = {
        name: attached.Subject(one.sae, one.site, one.about.site_mean_O, one.target_site)
        for name, one in found.items()
    }
    packed = ("text", "turns", "tokenizer")
    # Of another model of the same tokens the same rows, so that the two can be compared.
    is_other = bool(given.keys() & set(packed))

    def rows() -> pathlib.Path:
        return prepare.rows_of_once(config) if is_other else prepare.rows_of_run(own, path)

    steps = {one.about.step for one in found.values()}
    if len(steps) > 1:
        raise RunError(
            f"the SAEs in {path / 'sae'} are of different steps; remove that folder, and it is written anew"
        )
    (step,) = steps
    if step is None:  # Written before SAEs said it, at the end of the run.
        step = max(int(saved.name) for saved in (path / "checkpoints").iterdir() if saved.name.isdecimal())
    return Opened(config, subjects, rows, members, step, own, location=path)


def _changed(config: config_lib.Config, given: dict[str, str]) -> config_lib.Config:
    """The config with what is given in the place of what it says."""
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
    """Of a text that was not trained on all is held out."""
    if shared := sources.files_of(trained.text) & sources.files_of(text):
        say(
            f"Of the files of {text} {len(shared)} are of the text that was trained on, {min(shared)} among them: "
            "what is measured on them is not held out."
        )
    return dataclasses.replace(trained, text=text, documents=0, held_out_fraction=1.0)


def on_text(opened: Opened, text: str) -> Opened:
    """The same with the rows of another text, or of the one that was trained on."""
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
    found = list(loading.read(location, *(given.get(name, "") for name in ("model", "site", "target_site"))))
    return of_saes(found, given, trust, location)


def of_saes(
    found: Sequence[loading.LoadedSAE],
    given: Mapping[str, str],
    trust: bool = False,
    location: str = "the list of SAEs",
) -> Opened:
    """SAEs that are loaded already, and what to evaluate them on.

    Args:
      found: the SAEs.
      given: what `open_path` takes as `overrides`.
      trust: see `open_path`.
      location: where they came from.

    Raises:
      ValueError: they are of several models, or of one name; else as `open_path`.
    """
    about, model = found[0].about, found[0].model
    if others := {one.model for one in found} - {model}:
        raise InputError(
            f"{location} has SAEs of {model} and of {', '.join(others)}; give those of one model"
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
    # Files of others do not say how they were trained: the defaults then, with Gemma in float32.
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
                f"{location} reads {one.site} and predicts {one.target_site}; only one layer at a time is evaluated"
            )
    subjects = {
        well_formed(one.name): attached.Subject(one.sae, one.site, one.about.site_mean_O, one.target_site)
        for one in found
    }
    if len(subjects) < len(found):
        raise InputError(
            f"{location} has two SAEs of one name; rename one of their folders, or give them as a dict by name"
        )
    is_as_trained = config.data == trained.data and "tokenizer" not in given

    def rows() -> pathlib.Path:
        made = token_rows.cached(config.data, about.rows) if about.rows and is_as_trained else None
        return made or prepare.rows_of_once(config)

    if not about.rows:  # A stranger's file leaves weights open; those given are no others.
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
    """What results are of that is not the SAEs' own, but for the text, as a folder's name: `bfloat16_train`."""

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
    """`output.made_folder`; results that are not of the SAEs' own text and model overwrite none that are.

    Args:
      opened: what lies at the location.
      location: a path, or `hf://OWNER/NAME/FOLDER`.
      out: the folder, if it is given.
      text: what to call the text if it is another; None: by its file.
      options: see `options_of`.
    """
    is_other = not sources.is_same_text(opened.config.data.text, opened.own.data.text)
    name = text or text_label(opened.config.data.text)
    label = pathlib.Path(options or options_of(opened), name if is_other else "")
    return output.made_folder(location, out, None if label == pathlib.Path() else label)


def text_label(source: str) -> str:
    """A text or a path by its last name, without what a folder's name cannot have."""
    return re.sub(r"[^\w-]+", "_", pathlib.PurePosixPath(source).stem)


def _without_named(about: common.About, keep: Collection[str]) -> common.About:
    """What a file says without the places that it names, but for those that the user named as well."""
    cleared = dict.fromkeys({"rows", "weights", "tokenizer"} - set(keep), "")
    if "text" not in keep:  # Then it does not matter which part of that text was held out.
        plain = common.About()
        cleared |= {name: getattr(plain, name) for name in ("text", "held_out_fraction", "data_seed")}
    return dataclasses.replace(about, **cleared)
