"""HTML of the page: a card for each column, and sentences. All text is escaped here; videos are data: addresses."""

import html

import numpy as np

from paris_jax.data import pages
from paris_jax.data import video as video_io
from paris_jax.ensemble.samples import COLOURS
from paris_jax.serving.side_by_side import Update

CHART = (320, 56)  # width and height of the routing chart, in its own units


class Card:
    """The card of one column, which keeps the newest video while updates without one arrive."""

    def __init__(self, column: str, prompt: str):
        self.column, self.prompt = column, prompt
        self.player = '<div class="empty" aria-hidden="true"></div>'
        self.links = ""

    def waiting(self) -> str:
        """The card before its turn."""
        return self._article("waiting")

    def show(self, update: Update) -> str:
        """The card after an update."""
        if update.video is not None:
            self.player = self._player(update.video, update.fps, update.finished)
        state = f"step {update.done} of {update.steps}" if update.done else "preparing"
        share = 100 * update.done / update.steps
        bar = "" if update.finished else f'<div class="bar"><i style="width:{share:.0f}%"></i></div>'
        return self._article(state, bar + routing(update))

    def stopped(self, update: Update | None) -> str:
        """The card of a column that was not finished."""
        sampled = f"stopped after {update.done} of {update.steps} steps" if update and update.done else "not sampled"
        return self._article(sampled)

    def _player(self, video: np.ndarray, fps: float, finished: bool) -> str:
        address, first = pages.video_address(video, fps), pages.image_address(video_io.enlarge(video[:1])[0])
        if finished:
            name = html.escape(self.column.replace(" ", "-"))
            self.links = f'<a download="{name}.mp4" href="{address}">save</a>'
        label, state = html.escape(f"{self.column}: {self.prompt}"), "finished" if finished else "preview"
        return (
            f'<video class="{state}" autoplay loop muted playsinline{" controls" * finished} poster="{first}" '
            f'aria-label="{label}" src="{address}"></video>'
        )

    def _article(self, state: str, below: str = "") -> str:
        name = f'<h3>{html.escape(self.column)}</h3><span class="steps">{self.links or state}</span>'
        return f'<article class="sample"><header>{name}</header>{self.player}{below}</article>'


def routing(update: Update) -> str:
    """Stacked bars of the routing weights, one for each step, with a legend; "" without weights."""
    if not update.routing.size:
        return ""
    width, height = CHART
    each = width / update.steps
    gap = min(1.0, each / 6)
    bars = []
    for step, weights in enumerate(update.routing):
        tops = height * (1 - np.cumsum(weights / weights.sum()))
        for e, weight in enumerate(weights / weights.sum()):
            if weight >= 0.001:
                title = f"step {step + 1}, expert {update.clusters[e]}: {weight:.2f}"
                bars.append(
                    f'<rect x="{step * each:.2f}" y="{tops[e]:.2f}" width="{each - gap:.2f}" '
                    f'height="{weight * height:.2f}" fill="{colour(update.clusters[e])}"><title>{title}</title></rect>'
                )
    means = update.routing.mean(0)
    legend = "".join(
        f'<li><i style="background:{colour(k)}"></i>expert {k} <b>{mean:.0%}</b></li>'
        for k, mean in zip(update.clusters, means, strict=True)
    )
    label = "Routing weights over the steps; mean: " + ", ".join(
        f"expert {k} {mean:.0%}" for k, mean in zip(update.clusters, means, strict=True)
    )
    return (
        f'<figure class="routing"><svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}">{"".join(bars)}</svg><figcaption>routing weights, from noise to video</figcaption>'
        f"<ul>{legend}</ul></figure>"
    )


def colour(cluster: int) -> str:
    return COLOURS[cluster % len(COLOURS)]


def sentence(text: str, kind: str = "") -> str:
    """A sentence above the cards: "" for what happens, "warning" or "fault"."""
    role = "alert" if kind == "fault" else "status"
    return f'<p class="{kind or "note"}" role="{role}">{html.escape(text)}</p>'


def title(name: str, about: str) -> str:
    """The heading of the page."""
    return f'<header class="title"><h1>{html.escape(name)}</h1><p>{html.escape(about)}</p></header>'
