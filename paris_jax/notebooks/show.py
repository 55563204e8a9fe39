"""Shows videos with their captions, and the pages of a run, inside a notebook. Captions stay text."""

import html
from collections.abc import Sequence

import numpy as np
from etils import epath

from paris_jax.ensemble import samples
from paris_jax.errors import UserError


class Html:
    """A piece of HTML that a notebook shows, with a text for viewers without HTML."""

    def __init__(self, markup: str, text: str):
        self._markup, self._text = markup, text

    def __repr__(self) -> str:
        return self._text

    def _repr_html_(self) -> str:
        return self._markup


def gallery(videos: np.ndarray, captions: Sequence[str], fps: float) -> Html:
    """Videos (N, T, H, W, 3) uint8, playing, each above its caption."""
    return Html(samples.gallery(videos, captions, fps), f"{len(videos)} videos")


def page(path: epath.PathLike, height: int = 900) -> Html:
    """A page of a run, such as RUN/partition/report.html, in a frame of its own `height` pixels high.

    The frame shares nothing with the notebook: script in captions reaches neither its kernel nor its cells.

    Raises:
      UserError: there is no such page.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"There is no page at {path}; run the command that writes it first")
    content = html.escape(path.read_text(), quote=True)
    frame = f'style="width:100%;height:{height}px;border:1px solid #8884;border-radius:8px"'
    return Html(f'<iframe sandbox="allow-scripts" {frame} srcdoc="{content}"></iframe>', f"open {path}")
