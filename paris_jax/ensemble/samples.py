"""Sampled videos with their parameters and routing: they save and show themselves."""

import base64
import dataclasses
import html
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from paris_jax.data import video as video_io
from paris_jax.encoders.codecs import to_uint8
from paris_jax.errors import UserError

FORMATS = (".mp4", ".gif", ".webm", ".png")
COLOURS = ("#d9822b", "#2a8f83", "#7a63c7", "#c2557f", "#5b8bd0", "#8f9a3b", "#a0673f", "#7d8590")
SHOWN = 12  # panels of a plot at most


@dataclasses.dataclass(frozen=True, repr=False)
class Samples:
    """Videos drawn from an ensemble.

    Attributes:
      videos: (N, T, H, W, 3) float32 in [-1, 1].
      prompts: N texts.
      fps: frames a second.
      routing: (S, N, E) float32, each expert's weight at each solver step.
      clusters: the experts' clusters, E of them.
    """

    videos: np.ndarray
    prompts: list[str]
    fps: float
    routing: np.ndarray
    clusters: list[int]

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> "Samples":
        """One of the videos."""
        i = range(len(self))[index]
        return Samples(
            self.videos[i : i + 1], self.prompts[i : i + 1], self.fps, self.routing[:, i : i + 1], self.clusters
        )

    def __repr__(self) -> str:
        count, frames, height, width, _ = self.videos.shape
        return f"Samples({count} videos of {frames} frames, {height} x {width}, at {self.fps:g} frames a second)"

    def pixels(self) -> np.ndarray:
        """The videos as (N, T, H, W, 3) uint8."""
        return to_uint8(self.videos)

    def grid(self) -> np.ndarray:
        """All videos tiled into one, (T, rows * H, columns * W, 3) uint8."""
        pixels = self.pixels()
        count, frames, height, width, _ = pixels.shape
        columns = int(np.ceil(np.sqrt(count)))
        rows = -(-count // columns)
        padded = np.zeros((rows * columns, frames, height, width, 3), np.uint8)
        padded[:count] = pixels
        tiled = padded.reshape(rows, columns, frames, height, width, 3).transpose(2, 0, 3, 1, 4, 5)
        return tiled.reshape(frames, rows * height, columns * width, 3)

    def save(self, path: epath.PathLike) -> epath.Path:
        """Writes all videos as one grid: .mp4, .webm or .gif, or frame by frame as a .png contact sheet."""
        path = epath.Path(path)
        if path.suffix.lower() not in FORMATS:
            raise UserError(f"{path} has the ending {path.suffix!r}; allowed are {', '.join(FORMATS)}")
        if path.suffix.lower() == ".png":
            video_io.write_png(path, video_io.contact_sheet(self.pixels(), self.prompts))
        else:
            video_io.write_video(path, self.grid(), self.fps)
        return path

    def usage(self) -> np.ndarray:
        """Mean weight of each expert over steps and samples, (E,)."""
        return self.routing.mean((0, 1))

    def bars(self, width: int = 40) -> str:
        """Expert use as text, one bar an expert."""
        digits = max(len(str(cluster)) for cluster in self.clusters)
        return "\n".join(
            f"expert {cluster:>{digits}}  {'█' * round(share * width):<{width}} {share:6.1%}"
            for cluster, share in zip(self.clusters, self.usage(), strict=True)
        )

    def plot_routing(self):
        """Each expert's weight over the steps, a panel for each of the first samples (a matplotlib figure)."""
        import matplotlib.pyplot as plt
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import MaxNLocator

        shown = min(len(self), SHOWN)
        columns = min(shown, 4)
        rows = -(-shown // columns)
        figure, axes = plt.subplots(
            rows, columns, figsize=(2.9 * columns, 0.5 + 2.3 * rows), sharex=True, sharey=True, squeeze=False
        )
        # One flat stretch a step, also where there is only one.
        edges = np.arange(len(self.routing) + 1)
        for i, axis in enumerate(axes.flat):
            if i >= shown:
                axis.set_visible(False)
                continue
            weights = np.concatenate([self.routing[:, i], self.routing[-1:, i]]).T
            axis.stackplot(edges, weights, colors=self._colours(), step="post", linewidth=0)
            axis.set(xlim=(0, edges[-1]), ylim=(0, 1), xlabel="step, noise to data" if i >= shown - columns else "")
            axis.set_title(textwrap.fill(self.prompts[i], 34), fontsize=8, parse_math=False)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            axis.tick_params(labelsize=8, labelbottom=i >= shown - columns)
        for axis in axes[:, 0]:
            axis.set_ylabel("weight")
        patches = [Rectangle((0, 0), 1, 1, color=colour) for colour in self._colours()]
        labels = [f"expert {cluster}" for cluster in self.clusters]
        figure.legend(patches, labels, loc="lower center", ncols=min(len(labels), 8), frameon=False)
        figure.tight_layout(rect=(0, 0.35 / figure.get_figheight(), 1, 1))
        plt.close(figure)  # a notebook shows the value a cell returns; an open figure would be shown a second time
        return figure

    def _colours(self) -> list[str]:
        return [COLOURS[cluster % len(COLOURS)] for cluster in self.clusters]

    def _repr_html_(self) -> str:
        """A notebook shows each video, playing, above its prompt."""
        return gallery(self.pixels(), self.prompts, self.fps)


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """Samples of the same prompts side by side: a row a prompt, a column a way of sampling."""

    columns: dict[str, Samples]

    def __repr__(self) -> str:
        return f"Comparison of {', '.join(self.columns)}: {next(iter(self.columns.values()))!r} each"

    def _repr_html_(self) -> str:
        first = next(iter(self.columns.values()))
        cell = 'style="padding:4px 8px;text-align:left;vertical-align:top;max-width:180px"'
        head = "".join(f"<th {cell}>{html.escape(name)}</th>" for name in ("", *self.columns))
        rows = []
        for i, prompt in enumerate(first.prompts):
            entries = [html.escape(prompt), *(_figure(s.pixels()[i], s.fps, "") for s in self.columns.values())]
            rows.append("<tr>" + "".join(f"<td {cell}>{entry}</td>" for entry in entries) + "</tr>")
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def compare(columns: Mapping[str, Samples]) -> Comparison:
    """Puts samples of the same prompts side by side, each under its name, to be shown in a notebook."""
    if not columns:
        raise UserError("There is nothing to compare; name at least one set of samples")
    prompts = [samples.prompts for samples in columns.values()]
    if any(p != prompts[0] for p in prompts):
        raise UserError("Samples of different prompts cannot stand side by side; sample the same prompts for each")
    return Comparison(dict(columns))


def gallery(videos: np.ndarray, captions: Sequence[str], fps: float) -> str:
    """HTML of videos (N, T, H, W, 3) uint8 that play, each above its caption."""
    cells = (_figure(video, fps, html.escape(caption)) for video, caption in zip(videos, captions, strict=True))
    return f'<div style="display:flex;flex-wrap:wrap;gap:12px">{"".join(cells)}</div>'


def _figure(video: np.ndarray, fps: float, caption: str) -> str:
    """One video (T, H, W, 3) uint8 as HTML that plays on its own, over a caption that is already escaped."""
    data = base64.b64encode(video_io.video_bytes(video, fps)).decode()
    return (
        '<figure style="margin:0;width:160px"><video autoplay loop muted playsinline width="160" '
        f'style="border-radius:6px;display:block" src="data:video/mp4;base64,{data}"></video>'
        f'<figcaption style="font-size:12px;line-height:1.3;margin-top:4px">{caption}</figcaption></figure>'
    )
