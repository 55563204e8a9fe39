"""Sampled videos with what is known of their making: they save and show themselves."""

import base64
import dataclasses
import html

import numpy as np
from etils import epath

from paris_jax.data import video as video_io
from paris_jax.encoders.codecs import to_uint8
from paris_jax.errors import Refused

FORMATS = (".mp4", ".gif", ".webm", ".png")


@dataclasses.dataclass(frozen=True)
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
            raise Refused(f"{path} has the ending {path.suffix!r}; allowed are {', '.join(FORMATS)}")
        path.parent.mkdir(parents=True, exist_ok=True)
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
        return "\n".join(
            f"expert {cluster}  {'█' * round(share * width):<{width}} {share:6.1%}"
            for cluster, share in zip(self.clusters, self.usage(), strict=True)
        )

    def plot_routing(self):
        """Weights over the steps, one panel a sample (a matplotlib figure)."""
        import matplotlib.pyplot as plt

        shown = min(len(self), 12)
        figure, axes = plt.subplots(1, shown, figsize=(2.2 * shown + 1, 2.4), sharey=True, squeeze=False)
        steps = np.arange(self.routing.shape[0])
        for i, axis in enumerate(axes[0]):
            labels = [f"expert {k}" for k in self.clusters]
            axis.stackplot(steps, self.routing[:, i].T, labels=labels, step="mid")
            axis.set(title=f"sample {i}", xlabel="step (noise to data)", xlim=(0, max(len(steps) - 1, 1)), ylim=(0, 1))
        axes[0][0].set_ylabel("weight")
        axes[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
        figure.tight_layout()
        return figure

    def _repr_html_(self) -> str:
        """A notebook shows each video, playing, above its prompt."""
        cells = []
        for pixels, prompt in zip(self.pixels(), self.prompts, strict=True):
            data = base64.b64encode(video_io.video_bytes(pixels, self.fps)).decode()
            cells.append(
                '<figure style="margin:6px;width:180px"><video autoplay loop muted playsinline width="180" '
                f'src="data:video/mp4;base64,{data}"></video><figcaption style="font-size:12px">{html.escape(prompt)}'
                "</figcaption></figure>"
            )
        return f'<div style="display:flex;flex-wrap:wrap">{"".join(cells)}</div>'
