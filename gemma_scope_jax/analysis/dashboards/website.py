"""Writes dashboards as pages that need neither a server nor a network.

Each SAE has an `index.html`. The summary of all its latents is in `data/index.js`. The details of each latent are
in files of `PER_FILE` latents, which the page loads as needed. These files are scripts rather than JSON because a
browser does not read JSON files from disk. All text of the corpus is data in the scripts, never HTML.
"""

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from gemma_scope_jax.analysis.dashboards import collect
from gemma_scope_jax.analysis.dashboards.collect import Gathered, Passages
from gemma_scope_jax.analysis.decoder_directions import Logits
from gemma_scope_jax.display import html
from gemma_scope_jax.runtime import files, reporting
from gemma_scope_jax.runtime.errors import InputError
from gemma_scope_jax.saes import attached

PER_FILE = 256  # latents
PEAKS = 5  # The most frequent peak tokens of a latent's top passages that are listed in the index.


@dataclasses.dataclass(frozen=True)
class Dashboards:
    """The contents of one SAE's dashboards."""

    name: str
    model: str
    subject: attached.Subject
    text: str  # the name of the text that was read
    gathered: Gathered
    logits: Logits | None  # None: the SAE's output is not added to the residual stream
    nearest_MxN: np.ndarray
    cosine_MxN: np.ndarray
    passages: Passages

    @property
    def width(self) -> int:
        """M, the number of latents."""
        return self.gathered.count_M.size


class _Vocabulary:
    """The distinct tokens of a file."""

    def __init__(self, text_of: Callable[[int], str]) -> None:
        self.texts: list[str] = []
        self._text_of = text_of
        self._places: dict[int, int] = {}

    def __call__(self, token: int) -> int:
        """The index of a token in `texts`; adds the token if it is new."""
        token = int(token)
        if token not in self._places:
            self._places[token] = len(self.texts)
            self.texts.append(self._text_of(token))
        return self._places[token]


def write(folder: pathlib.Path, shown: Dashboards, text_of: Callable[[int], str]) -> None:
    """Writes the pages of one SAE.

    Args:
      folder: the folder to write to, which can already exist.
      shown: the contents of the pages.
      text_of: returns the text of a token id.
    """
    with reporting.bar("Writing", "latent", shown.width) as bar:
        for start in range(0, shown.width, PER_FILE):
            vocabulary = _Vocabulary(text_of)
            end = min(start + PER_FILE, shown.width)
            latents = [_latent(shown, latent, vocabulary) for latent in range(start, end)]
            value = {"tokens": vocabulary.texts, "latents": latents}
            number = start // PER_FILE
            _write_script(folder / "data" / f"latents_{number}.js", f"window.latents[{number}]", value)
            bar.update(end - start)
    _write_script(folder / "data" / "index.js", "window.about", _index(shown, text_of))
    html.render(
        folder / "index.html", "analysis/dashboards/website.html.jinja", name=shown.name, model=shown.model
    )


def write_links(path: pathlib.Path, folders: Mapping[str, str], all_shown: Mapping[str, Dashboards]) -> None:
    """Writes a page with a link to each SAE's page, which is in the SAE's folder in `folders`."""
    table = {}
    for name, shown in all_shown.items():
        g = shown.gathered
        table[name] = {
            "folder": folders[name],
            "latents": f"{shown.width:,}",
            "l0": f"{g.frequency_M.sum():.1f}",
            "dead": f"{g.is_dead_M.mean():.1%}",
            "dense": f"{g.is_dense_M.mean():.1%}",
        }
    first = next(iter(all_shown.values()))
    html.render(
        path, "analysis/dashboards/index.html.jinja", model=first.model, text=first.text,
        activations=f"{first.gathered.activations:,}", table=table,
    )  # fmt: skip


def _write_script(path: pathlib.Path, variable: str, value: object) -> None:
    """Writes a script that sets a variable; `<` is escaped so that no value ends the script or begins a tag."""
    encoded = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    files.write_text(path, f"{variable}={encoded};\n")


def rounded(value: float) -> float | int:
    """A value rounded to three significant digits; an `int` if it is whole, which is shorter in JSON."""
    value = float(value)
    if not math.isfinite(value):
        raise InputError(f"a value of the dashboards is {value}; it must be finite")
    short = float(f"{value:.3g}")
    return int(short) if short.is_integer() else short


def _index(shown: Dashboards, text_of: Callable[[int], str]) -> dict:
    """The summary of all latents, with which the page sorts, filters and searches them by token."""
    g, vocabulary = shown.gathered, _Vocabulary(text_of)
    peaks = []
    for latent in range(shown.width):
        places = zip(g.top.row_MxK[latent], g.top.position_MxK[latent], strict=True)
        counted = collections.Counter(shown.passages.token(*place) for place in places if place[0] >= 0)
        peaks.append([vocabulary(token) for token, _ in counted.most_common(PEAKS)])
    raises = None
    if shown.logits is not None:
        raises = [[vocabulary(token) for token in tokens] for tokens in shown.logits.highest_token_MxT]
    subject = shown.subject
    return {
        "name": shown.name,
        "model": shown.model,
        "site": str(subject.site),
        "target_site": str(subject.spliced),
        "text": shown.text,
        "rows": g.rows,
        "activations": g.activations,
        "per_file": PER_FILE,
        "histogram": [collect.LOWEST_OCTAVE, collect.BINS_PER_OCTAVE],
        "count": g.count_M.tolist(),
        "max": [rounded(value) for value in g.max_M],
        "dense": np.flatnonzero(g.is_dense_M).tolist(),
        "peaks": peaks,
        "raises": raises,
        "tokens": vocabulary.texts,
    }


def _latent(shown: Dashboards, latent: int, vocabulary: _Vocabulary) -> dict:
    """The details of one latent; a passage is [row, index of the firing, tokens, activations]."""
    g = shown.gathered

    def passage(firings: collect.Firings, index: int) -> list:
        found = shown.passages(g.options, firings, latent, index)
        tokens = [vocabulary(token) for token in found.tokens]
        return [found.row, found.peak, tokens, [rounded(value) for value in found.values]]

    bins = np.flatnonzero(g.histogram_MxH[latent])
    first, last = (int(bins[0]), int(bins[-1])) if bins.size else (0, -1)
    made = {
        "mean": rounded(g.mean_M[latent]),
        "histogram": [first, *g.histogram_MxH[latent, first : last + 1].tolist()],
        "top": [passage(g.top, int(i)) for i in np.flatnonzero(g.top.row_MxK[latent] >= 0)],
        "bands": [passage(g.sample, int(band[0])) for band in collect.bands(g, latent)],
        "nearest": [
            [int(other), rounded(cosine)]
            for other, cosine in zip(shown.nearest_MxN[latent], shown.cosine_MxN[latent], strict=True)
        ],
    }
    if shown.logits is not None:
        tokens_up, up, tokens_down, down = (part[latent] for part in shown.logits)
        for name, tokens, values in (("up", tokens_up, up), ("down", tokens_down, down)):
            made[name] = [[vocabulary(t), rounded(v)] for t, v in zip(tokens, values, strict=True)]
    return made
