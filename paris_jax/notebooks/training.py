"""Trains roles in this process, with a plot of their losses that grows in the notebook."""

import contextlib
import contextvars
import logging
import threading
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.commands.train import train
from paris_jax.config.experiment import Experiment
from paris_jax.ensemble.samples import COLOURS
from paris_jax.training import metrics

EVERY = 1.0  # seconds between two looks at the metrics
MEASURES = {"expert": "loss", "monolith": "loss", "router": "loss (cross entropy)"}


def train_and_watch(experiment: Experiment, run: RunFolder, roles: Sequence[Role]) -> None:
    """Trains roles one after another, with one plot of their losses.

    Trained networks are not trained again. Interrupting the cell saves; running it again resumes.

    Raises:
      UserError: as `commands.train.train`.
    """
    with _plotted(experiment, run, roles):
        for role in roles:
            train(experiment, run, role)


@contextlib.contextmanager
def _plotted(experiment: Experiment, run: RunFolder, roles: Sequence[Role]) -> Iterator[None]:
    from IPython.display import DisplayHandle, Image

    ended, drawn = threading.Event(), [lines(run, roles)]
    handle = DisplayHandle()
    handle.display(Image(figure(experiment, roles, drawn[0])))

    def draw() -> None:
        found = lines(run, roles)
        if found != drawn[0]:
            drawn[0] = found
            handle.update(Image(figure(experiment, roles, found)))

    def watch() -> None:
        while not ended.wait(EVERY):
            draw()

    # Outputs of a thread belong to the cell whose context it has.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(watch,), daemon=True)
    thread.start()
    lines_of_steps = logging.getLogger(metrics.__name__)  # are in the plot
    before = lines_of_steps.level
    lines_of_steps.setLevel(logging.WARNING)
    try:
        yield
    finally:
        lines_of_steps.setLevel(before)
        ended.set()
        thread.join()
        draw()


def lines(run: RunFolder, roles: Sequence[Role]) -> list[list[dict[str, float]]]:
    """The lines of metrics that each role has written so far."""
    return [metrics.read(run.metrics(role)) for role in roles]


def figure(experiment: Experiment, roles: Sequence[Role], found: Sequence[Sequence[dict[str, float]]]) -> bytes:
    """PNG of the loss of each role over its steps."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7.5, 3), dpi=110, layout="constrained")
    axis: Any = drawing.subplots()
    for number, (role, written) in enumerate(zip(roles, found, strict=True)):
        colour = COLOURS[(role.cluster if role.cluster is not None else number) % len(COLOURS)]
        axis.plot(
            [line["step"] for line in written],
            [line["loss"] for line in written],
            color=colour,
            marker="o" if len(written) == 1 else "",
            label=f"{role.name}: {_state(written, experiment.steps(role.kind))}",
        )
    axis.set(xlim=(0, max(experiment.steps(role.kind) for role in roles)), xlabel="step")
    axis.set_ylabel(MEASURES[roles[0].kind])
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9)
    png = BytesIO()
    drawing.savefig(png, format="png")
    return png.getvalue()


def _state(written: Sequence[dict[str, float]], steps: int) -> str:
    if not written:
        return "waiting, or compiling"
    line = written[-1]
    if line["step"] == steps:
        return f"done, loss {line['loss']:.3f}"
    left = (steps - line["step"]) * line["seconds_per_step"]
    return f"step {line['step']:.0f} of {steps}, loss {line['loss']:.3f}, {left:.0f} s left"
