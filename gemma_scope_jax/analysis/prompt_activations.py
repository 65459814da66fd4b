"""The latents of every SAE that fire on each token of a prompt."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping

import matplotlib.figure
import numpy as np
import rich.console
import rich.table
import rich.text

from gemma_scope_jax.analysis.session import RUNNING, Scope, place_copies, prompt, reconstruct
from gemma_scope_jax.display import html, plotting, tables
from gemma_scope_jax.display.results import Result
from gemma_scope_jax.models import passes
from gemma_scope_jax.runtime import distributed
from gemma_scope_jax.runtime.printing import printable
from gemma_scope_jax.runtime.reporting import say
from gemma_scope_jax.saes import jumprelu


@dataclasses.dataclass(frozen=True)
class Reading(Result):
    """The latents that fire on the tokens of a prompt. BOS is left out: no SAE was trained on it."""

    model: str
    tokens: tuple[str, ...]  # the texts of the L tokens
    latents: Mapping[str, np.ndarray]  # by SAE: activations [L, M]
    error: Mapping[str, np.ndarray]  # by SAE: ‖y − ŷ‖ / ‖y‖ [L]
    frequency: Mapping[str, np.ndarray]  # by SAE, if known: each latent's frequency [M]; see `session.Scope`

    def is_dense(self, name: str) -> np.ndarray:
        """Which latents [M] are muted: they fire on over a tenth of the text, or of half this prompt if unknown."""
        if name in self.frequency:
            return self.frequency[name] > jumprelu.DENSE
        return (self.latents[name] > 0).mean(0) > 0.5

    def strongest(self, name: str, token: int, top: int = 5) -> list[tuple[int, float]]:
        """The latents of an SAE with the largest activations on a token, without dense ones: (latent, activation)."""
        f_M = np.where(self.is_dense(name), 0, self.latents[name][token])
        order = np.argsort(-f_M, kind="stable")[:top]
        return [(int(latent), float(f_M[latent])) for latent in order if f_M[latent] > 0]

    def records(self) -> Iterator[dict[str, object]]:
        """A row for each firing of a latent on a token; positions count from 1, since BOS is at 0."""
        for name, f_LxM in self.latents.items():
            dense_M = self.is_dense(name)
            for t, latent in zip(*np.nonzero(f_LxM), strict=True):
                yield {
                    "sae": name,
                    "position": int(t) + 1,
                    "token": self.tokens[t],
                    "latent": int(latent),
                    "activation": float(f_LxM[t, latent]),
                    "is_dense": bool(dense_M[latent]),
                }

    def show(self, top: int = 5) -> None:
        """Prints a table for each SAE, with the strongest latents of each token as latent:activation.

        A brighter latent fires more strongly, relative to the whole prompt.
        """
        for name, f_LxM in self.latents.items():
            table = tables.Table("token", title=name)
            for heading in ("L0", "dense", "error"):
                table.add_column(heading, justify="right")
            table.add_column(f"strongest {top}, as latent:activation")
            dense_M, largest = self.is_dense(name), self._largest(name)
            for t, token in enumerate(self.tokens):
                line = rich.text.Text()
                for latent, value in self.strongest(name, t, top):
                    green = round(90 + 165 * min(value / largest, 1))
                    line.append(f"{latent}", style=f"bold rgb(40,{green},90)")
                    line.append(f":{value:.0f} " if value >= 100 else f":{value:.3g} ", style="dim")
                counts = (f_LxM[t] > 0).sum(), ((f_LxM[t] > 0) & dense_M).sum()
                shown = (repr(token), *map(str, counts), f"{self.error[name][t]:.0%}")
                table.add_row(*shown, line)
            tables.show(table)

    def figure(self, name: str | None = None, top: int = 20) -> matplotlib.figure.Figure:
        """A heat map of activations: tokens across, latents down, without dense latents.

        Args:
          name: the name of the SAE; None: the first SAE.
          top: how many latents to show: those with the largest activations on any token.
        """
        name = next(iter(self.latents)) if name is None else name
        f_LxM = np.where(self.is_dense(name)[None], 0, self.latents[name])
        chosen = np.argsort(-f_LxM.max(0), kind="stable")[:top]
        chosen = chosen[f_LxM[:, chosen].max(0) > 0]
        # Sorted by the token of their largest activation, so that the picture has a diagonal.
        chosen = chosen[np.argsort(f_LxM[:, chosen].argmax(0), kind="stable")][::-1]
        size = (max(0.3 * len(self.tokens) + 1.6, 4), 0.19 * len(chosen) + 1.4)
        figure, ((axis,),) = plotting.new_figure(1, 1, *size)
        plotting.heat_map(
            figure, axis, f_LxM[:, chosen].T, "linear", f"{printable(name, 60)}: activations by token"
        )
        plotting.label_tokens(axis, self.tokens)
        plotting.label_rows(axis, list(map(str, chosen)))
        axis.set_ylabel("latent", fontsize=8)
        return figure

    def write_html(self, path: str | pathlib.Path, top: int = 12) -> None:
        """Writes a page that needs no network: tokens across, SAEs down; a click on a cell lists its latents."""
        cells = {
            name: [
                {
                    "l0": int((f_LxM[t] > 0).sum()),
                    "error": float(self.error[name][t]),
                    "latents": self.strongest(name, t, top),
                }
                for t in range(len(self.tokens))
            ]
            for name, f_LxM in self.latents.items()
        }
        largest = {name: self._largest(name) for name in self.latents}
        html.render(
            pathlib.Path(path), "analysis/prompt_activations.html.jinja", model=self.model, tokens=self.tokens,
            cells=cells, largest=largest, top=top,
        )  # fmt: skip

    def _largest(self, name: str) -> float:
        """The largest activation on this prompt of a latent that is not dense."""
        return max(float(self.latents[name][:, ~self.is_dense(name)].max(initial=0)), 1e-30)


def read(scope: Scope, text: str) -> Reading:
    """Runs a prompt once through Gemma and every SAE.

    Raises:
      ValueError: if the text has no tokens.
    """
    row = prompt(scope, text)
    placed = place_copies(scope, row, 1)
    say(RUNNING)
    _, values, _ = passes.clean(scope.gemma, placed, scope.sites)
    latents, error = {}, {}
    for name, subject in scope.subjects.items():
        x, y = values[subject.site], values[subject.spliced]
        found = reconstruct(scope.gemma.mesh, scope.placed[name], x, y)
        f_LxM, error_L = distributed.fetch((found["f_LxM"], found["error_L"]))
        latents[name], error[name] = f_LxM[1 : len(row)], error_L[1 : len(row)]
    words = tuple(scope.tokenizer.decode([token]) for token in row[1:])
    return Reading(scope.config.model, words, latents, error, scope.frequency)
