"""`paris-jax evaluate`: of a run, of folders of videos, of several ensembles, as a sweep, or for VBench."""

from typing import Any, Protocol

from etils import epath

from paris_jax.artifacts import safe_files
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.config.experiment import Experiment
from paris_jax.errors import UserError
from paris_jax.evaluation import features, folder_scores, protocol, systems, vbench
from paris_jax.evaluation.features import WeightFiles
from paris_jax.evaluation.folders import ClipRule

WEIGHTS = ("i3d", "videomae", "vjepa2", "dinov2", "inception", "clip", "aesthetic")
OF_FOLDERS = ("num_clips", "num_frames", "fps", "size", "clip_choice", "seed", "allow_degenerate")


class Arguments(Protocol):
    """The flags of the command (`commands.table.Call`)."""

    def __getitem__(self, name: str) -> Any: ...
    @property
    def run(self) -> RunFolder: ...
    def experiment(self, run: RunFolder | None) -> Experiment: ...


def evaluate(call: Arguments) -> Any:
    """Runs the mode that the flags choose.

    Raises:
      UserError: flags of two modes, or none that the mode needs.
    """
    if call["generated"] or call["reference"]:
        _refuse(call, ("ensemble", "vary", "vbench", "prompts_file"), "--generated and --reference")
        return _folders(call)
    _refuse(call, tuple(n for n in OF_FOLDERS if n != "seed"), "", "are for --generated and --reference")
    if call["vbench"]:
        return _vbench(call)
    run = call.run
    experiment = call.experiment(run)
    if call["ensemble"] or call["vary"]:
        named = call["ensemble"] or [str(run.ensemble)]
        kind = protocol.SWEEP if call["vary"] else "comparisons"
        compared = systems.systems(named, call["vary"])
        return systems.evaluate_systems(experiment, run, compared, _weights(call), call["out"] or run.path / kind)
    if call["out"]:
        raise UserError("--out is for folders, ensembles and sweeps; a run's report is written to RUN/evaluation")
    return protocol.evaluate(experiment, run, _weights(call))


def _folders(call: Arguments) -> Any:
    for name in ("generated", "reference"):
        if not call[name]:
            raise UserError(f"--{name} is missing; name a folder of videos")
    rule = ClipRule(
        call["num_frames"] or 16, call["fps"], _size(call["size"]), call["clip_choice"] or "first", call["seed"]
    )
    if rule.num_frames < 1 or (rule.fps is not None and not rule.fps > 0):
        raise UserError(f"--num_frames={rule.num_frames} --fps={rule.fps}: must be above 0")
    request = folder_scores.FolderRequest(
        call["generated"], call["reference"], call["out"] or "", call["num_clips"], rule,
        _weights(call, default_i3d=features.INSTALLED), call["allow_degenerate"],
    )  # fmt: skip
    return folder_scores.evaluate_folders(request)


def _vbench(call: Arguments) -> int:
    from paris_jax.ensemble.pipeline import Ensemble

    if len(call["ensemble"]) != 1 or not call["prompts_file"]:
        raise UserError("--vbench=DIR needs one --ensemble and --prompts_file=FILE with a prompt on each line")
    data = safe_files.read_bytes(epath.Path(call["prompts_file"]), follow_links=True)
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompts_file={call['prompts_file']} is not UTF-8 ({error.reason}); save it as UTF-8"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    model = Ensemble.load(call["ensemble"][0])
    return vbench.write(model, prompts, call["vbench"], call["seed"])


def _weights(call: Arguments, default_i3d: str = "") -> WeightFiles:
    named = {name: call[name] or "" for name in WEIGHTS}
    named["i3d"] = {"": default_i3d, "none": ""}.get(named["i3d"], named["i3d"])
    return WeightFiles(**named)


def _size(text: list[str]) -> tuple[int, int] | None:
    if not text:
        return None
    if len(text) != 2 or not all(part.isdigit() and int(part) for part in text):
        raise UserError(f"--size={','.join(text)}: must be height and width in pixels, such as 256,256")
    return int(text[0]), int(text[1])


def _refuse(call: Arguments, names: tuple[str, ...], mode: str, why: str = "") -> None:
    given = [f"--{name}" for name in names if call[name] not in (None, [], False, "")]
    if given:
        raise UserError(f"{', '.join(given)} {why or f'cannot be given with {mode}'}; leave it out")
