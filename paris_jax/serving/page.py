"""The page as Gradio blocks. Its controls follow the fields of `SamplingParams`: name, help, range, choices, type."""

import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import themes

from paris_jax.config import fields
from paris_jax.errors import UserError
from paris_jax.serving import cards, requests
from paris_jax.serving.limits import Limits
from paris_jax.serving.requests import ENSEMBLE, FIELDS, FRAMES, MAIN, MORE, ROUTING
from paris_jax.serving.side_by_side import SideBySide, Update

logger = logging.getLogger(__name__)

FONT = ("ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "DejaVu Sans", "sans-serif")
MONOSPACE = ("ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace")
SLIDER_RANGE = 1000  # larger ranges get a field for a number
PICKER = """
<label class="picker"><span>picture</span>
<input type="file" accept="image/*" aria-label="picture"><img alt="" hidden></label>
"""
PICK = """
const input = element.querySelector('input'), shown = element.querySelector('img');
input.addEventListener('change', () => {
  const file = input.files[0];
  shown.hidden = !file;
  if (!file) { props.value = ''; return; }
  const reader = new FileReader();
  reader.onload = () => { props.value = reader.result; shown.src = reader.result; };
  reader.readAsDataURL(file);
});
"""
# On a telephone the cards are below the controls.
SCROLL = "() => { if (innerWidth < 700) document.querySelector('#results').scrollIntoView({behavior: 'smooth'}); }"
EACH = ": one for all prompts, or one for each"  # in the help of fields; the page has one prompt
NOW = "() => Date.now()"
RANDOM_SEED = "() => Math.floor(Math.random() * 4294967296)"


def theme() -> themes.Base:
    """A theme of the fonts of the browser's machine: nothing is fetched from elsewhere."""
    return themes.Base(primary_hue="teal", neutral_hue="stone", font=FONT, font_mono=MONOSPACE)


def style() -> str:
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def build(name: str, models: SideBySide, limits: Limits) -> gr.Blocks:
    """The page for an ensemble of this name."""
    page = Page(name, models, limits)
    with gr.Blocks(title=f"paris_jax: {name}", analytics_enabled=False, fill_width=True) as blocks:
        page.lay_out()
    # One request is sampled at a time; the others wait, and no more than so many.
    blocks.queue(max_size=limits.max_waiting, default_concurrency_limit=1, api_open=False)
    return blocks


class Page:
    """Controls on the left, a card for each chosen model on the right."""

    def __init__(self, name: str, models: SideBySide, limits: Limits):
        self.name, self.models, self.limits = name, models, limits
        self.ensemble = models.ensemble
        self.slots = min(len(models.columns), limits.max_columns)
        self.controls: dict[str, Any] = {}
        self.running: tuple[str | None, threading.Event] = (None, threading.Event())  # session, and whether to stop
        self.stops = Stops()

    def about(self) -> str:
        """Sizes of the ensemble in a line."""
        size, count = self.ensemble.size, len(self.ensemble.clusters)
        who = f"{count} experts and their router" if count > 1 else "One network"
        fps = f"{self.ensemble.fps:g} frames a second"
        return f"{who}; videos of {size['num_frames']} frames, {size['width']} x {size['height']}, {fps}"

    def lay_out(self) -> None:
        gr.HTML(cards.title(self.name, self.about()), elem_id="title")
        with gr.Row(elem_id="columns"):
            with gr.Column(elem_id="controls", min_width=300, scale=2):
                self._first_controls()
                with gr.Row():
                    start = gr.Button("Sample", variant="primary", elem_id="sample", min_width=120)
                    stop = gr.Button("Stop", elem_id="stop", min_width=120)
                self._other_controls()
            with gr.Column(elem_id="results", min_width=300, scale=5):
                says = gr.HTML(cards.sentence("Describe a video, then press Sample"), elem_id="says")
                with gr.Row(elem_id="samples"):
                    slots = [gr.HTML(visible=False, elem_classes="slot") for _ in range(self.slots)]
        outputs = [says, *slots]
        # Values arrive as the browser sent them: `requests.read` checks them all, and reports faults.
        options = {"outputs": outputs, "preprocess": False, "concurrency_limit": 1, "api_visibility": "private"}
        # A request made while this browser's last one is sampled comes after it.
        options |= {"show_progress": "minimal", "show_progress_on": says, "trigger_mode": "always_last"}
        # By the times of both clicks, on the browser's clock, a request that waits is known to be stopped.
        started, ended = gr.Number(0, visible=False), gr.Number(0, visible=False)
        made = gr.on(
            [start.click, self.controls["prompt"].submit], None, outputs=started, js=NOW, api_visibility="private"
        )
        made.then(self.sample, [started, *self.controls.values()], **options)
        start.click(None, js=SCROLL, api_visibility="private")
        pressed = stop.click(None, outputs=ended, js=NOW, api_visibility="private")
        options = {"preprocess": False, "concurrency_limit": None, "api_visibility": "private"}
        pressed.then(self.stop, ended, says, show_progress="hidden", **options)

    def _first_controls(self) -> None:
        options = {"max_length": self.limits.max_prompt_length, "autofocus": True}
        self._add("prompt", gr.Textbox(label="prompt", lines=3, elem_id="prompt", **options))
        columns = list(self.models.columns)
        options = {"label": "models, side by side", "visible": len(columns) > 1}
        self._add("columns", gr.CheckboxGroup(columns, value=[ENSEMBLE], **options))

    def _other_controls(self) -> None:
        alone = len(self.ensemble.clusters) == 1
        for name in MAIN:
            self._add(name, self._control(name))
        again = gr.Button("another seed", size="sm")
        again.click(None, outputs=[self.controls["seed"]], js=RANDOM_SEED, api_visibility="private")
        with gr.Accordion("routing", open=False, visible=not alone):
            for name in ROUTING:
                self._add(name, self._control(name))
        with gr.Accordion("picture to start from", open=False, visible=self.ensemble.takes_images):
            picker = gr.HTML("", html_template=PICKER, js_on_load=PICK, elem_id="picture")
            self._add("image", picker)
            for name in FRAMES:
                self._add(name, self._control(name))
        with gr.Accordion("more", open=False):
            for name in MORE:
                self._add(name, self._control(name, visible=not (alone and name in ("drop_experts", "on_nonfinite"))))

    def _add(self, name: str, component: Any) -> None:
        self.controls[name] = component

    def _control(self, name: str, visible: bool = True) -> Any:
        """The control of a field of `SamplingParams`; its default is the ensemble's own."""
        metadata, value, kind = FIELDS[name].metadata, getattr(self.ensemble.params, name), requests.kind(name)
        info, bounds = metadata["help"].replace(EACH, ""), self._bounds(name)
        options = {"label": name, "info": info, "visible": visible, "elem_id": f"field-{name}"}
        if name in ("fixed_expert", "drop_experts"):
            several = name == "drop_experts"
            return gr.Dropdown(self.ensemble.clusters, value=[] if several else None, multiselect=several, **options)
        if choices := requests.choices(name):
            return gr.Dropdown(list(choices), value=value, **options)
        if kind is str:
            return gr.Textbox(lines=1, max_length=self.limits.max_prompt_length, **options)
        low, high = bounds.get("at_least"), bounds.get("at_most")
        if value is not None and low is not None and high is not None and high - low <= SLIDER_RANGE:
            return gr.Slider(low, high, value=min(value, high), step=1 if kind is int else 0.01, **options)
        allowed = fields.describe_range(fields.setting(None, "", **bounds))
        options["info"] = f"{info} ({allowed})" if allowed else info
        if value is None:  # gr.Number would show 0
            return gr.Textbox(lines=1, placeholder="default", **options)
        return gr.Number(value, precision=0 if kind is int else None, step=1 if kind is int else 0.1, **options)

    def _bounds(self, name: str) -> dict[str, float]:
        """The bounds of a field, narrowed by the ensemble and by the limits of the page."""
        most = requests.most(self.limits, self.ensemble.size["num_frames"], len(self.ensemble.clusters))
        return FIELDS[name].metadata["bounds"] | ({"at_most": most[name]} if name in most else {})

    def read(self, values: Sequence[Any]) -> requests.Request:
        """The request of the controls' values, in their order."""
        form = dict(zip(self.controls, values, strict=True))
        most = requests.most(self.limits, self.ensemble.size["num_frames"], len(self.ensemble.clusters))
        return requests.read(form, self.limits, self.models.columns, most)

    def sample(self, session: gr.Request, clicked: Any, *values: Any) -> Iterator[list[Any]]:
        """Samples as the controls are set, and yields the sentence and the cards as they change."""
        if self.stops.is_after(session.session_hash, clicked):
            yield self._outputs(cards.sentence("Stopped"))
            return
        try:
            request = self.read(values)
        except UserError as error:
            yield self._outputs(cards.sentence(str(error), "fault"))
            return
        began, shown = time.monotonic(), [cards.Card(column, request.prompt) for column in request.columns]
        latest: dict[str, Update] = {}
        stopped = threading.Event()
        self.running = session.session_hash, stopped
        unknown = self.ensemble.describe_unknown_words([request.prompt])
        note = cards.sentence(
            f"{unknown[:1].upper()}{unknown[1:]}" if unknown else "Sampling", "warning" * bool(unknown)
        )
        try:
            first = {i: gr.update(value=card.waiting(), visible=True) for i, card in enumerate(shown)}
            yield self._outputs(note, {i: gr.update(value="", visible=False) for i in range(self.slots)} | first)
            for update in self.models.sample(request, stopped):
                latest[update.column] = update
                slot = request.columns.index(update.column)
                yield self._outputs(note, {slot: shown[slot].show(update)})
        except UserError as error:
            said = cards.sentence(str(error), "fault")
        except Exception:
            logger.exception("a request failed")
            said = cards.sentence("Sampling failed; the log of the server says why", "fault")
        else:
            took = cards.sentence(f"Sampled in {time.monotonic() - began:.1f} seconds")
            said = cards.sentence("Stopped") if stopped.is_set() else note if unknown else took
        self.running = None, stopped
        unfinished = {i: card.stopped(latest.get(card.column)) for i, card in enumerate(shown) if not card.links}
        yield self._outputs(said, unfinished)

    def _outputs(self, said: str, changed: dict[int, Any] | None = None) -> list[Any]:
        return [said, *((changed or {}).get(i, gr.skip()) for i in range(self.slots))]

    def stop(self, session: gr.Request, clicked: Any) -> Any:
        """Stops this browser's request: after the present step, or before it is sampled if it waits."""
        self.stops.add(session.session_hash, clicked)
        running, stopped = self.running
        if running != session.session_hash:
            return gr.skip()
        stopped.set()
        return cards.sentence("Stopping after this step")


class Stops:
    """When each session pressed Stop last, by the clock of its browser; the newest sessions only."""

    SESSIONS = 1000

    def __init__(self):
        self._times: dict[str | None, float] = {}

    def add(self, session: str | None, clicked: Any) -> None:
        if isinstance(clicked, int | float):
            self._times.pop(session, None)
            self._times[session] = clicked
            if len(self._times) > self.SESSIONS:
                del self._times[next(iter(self._times))]

    def is_after(self, session: str | None, clicked: Any) -> bool:
        """Whether Stop was pressed after a request was made."""
        return isinstance(clicked, int | float) and clicked <= self._times.get(session, -math.inf)
