"""The flags of `evaluate` choose one mode, and what belongs to another one is refused."""

import pytest

from paris_jax import cli
from paris_jax.commands import evaluate as command
from paris_jax.commands.table import COMMANDS
from paris_jax.errors import UserError
from paris_jax.evaluation.networks import i3d_weights


@pytest.fixture
def called(monkeypatch, finished):
    """Parses flags, and returns the arguments of the mode that would run."""
    found = []
    for module, name in (
        (command.folder_scores, "evaluate_folders"), (command.systems, "evaluate_systems"),
        (command.protocol, "evaluate"), (command.vbench, "write"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *args, name=name: found.append((name, args)))

    def run(*flags):
        name, call = cli.parse(["evaluate", *flags])
        COMMANDS[name].run(call)
        return found[-1]

    return run


def test_a_workdir_alone_is_a_run(called, finished):
    name, (experiment, run, files) = called(f"--workdir={finished}", "--i3d=installed")
    assert name == "evaluate" and run.path == finished.path and experiment.name == "micro"
    assert files.i3d == "installed" and files.clip == ""


def test_two_folders_are_scored_with_i3d_unless_it_is_left_out(called):
    name, (request,) = called("--generated=a", "--reference=b", "--num_clips=9", "--size=32,48", "--clip_choice=middle")
    assert name == "evaluate_folders" and request.files.i3d == "installed"
    assert request.num_clips == 9 and request.rule.size == (32, 48) and request.rule.choice == "middle"
    assert str(request.folder) == "a.evaluation"
    assert called("--generated=a", "--reference=b", "--i3d=none")[1][0].files.i3d == ""


def test_a_varied_setting_is_a_sweep_of_the_runs_ensemble(called, finished):
    name, (_, _, compared, _, out) = called(f"--workdir={finished}", "--vary=top_k=1,2")
    assert name == "evaluate_systems" and [s.overrides for s in compared] == [(("top_k", 1),), (("top_k", 2),)]
    assert {s.path for s in compared} == {str(finished.ensemble)} and out == finished.path / "sweeps/sampling"


def test_two_ensembles_are_compared(called, finished):
    _, (_, _, compared, _, out) = called(f"--workdir={finished}", "--ensemble=a", "--ensemble=b")
    assert [s.path for s in compared] == ["a", "b"] and out == finished.path / "comparisons"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--generated=a",), "--reference is missing"),
        (("--generated=a", "--reference=b", "--vary=top_k=1"), "--vary cannot be given with --generated"),
        (("--workdir=RUN", "--fps=8"), "--fps are for --generated and --reference"),
        (("--generated=a", "--reference=b", "--size=32"), "must be height and width"),
        (("--generated=a", "--reference=b", "--fps=0"), "must be above 0"),
        (("--vbench=out",), "needs one --ensemble"),
        (("--workdir=RUN", "--out=x"), "written to RUN/evaluation"),
    ],
)
def test_flags_of_another_mode_are_refused(called, finished, flags, said):
    with pytest.raises(UserError, match=said):
        called(*(flag.replace("RUN", str(finished)) for flag in flags))


def test_prompts_for_vbench_are_read_a_line_at_a_time(called, monkeypatch, tmp_path):
    import paris_jax.ensemble.pipeline as pipeline

    monkeypatch.setattr(pipeline.Ensemble, "load", lambda path: path)
    (tmp_path / "prompts.txt").write_text("a red ball\n\n a\u2028b \n")
    name, (model, prompts, out, seed) = called(
        "--vbench=out", "--ensemble=e", f"--prompts_file={tmp_path}/prompts.txt", "--seed=3"
    )
    assert (name, model, prompts, out, seed) == ("write", "e", ["a red ball", "a\u2028b"], "out", 3)


def test_i3d_is_imported_to_safetensors_that_evaluate_reads(tmp_path):
    try:
        i3d_weights.find()
    except UserError as error:
        pytest.skip(f"needs the published weights: {error}")
    name, call = cli.parse(["import", "--source=i3d", f"--out={tmp_path}/i3d.safetensors"])
    COMMANDS[name].run(call)
    assert i3d_weights.load(tmp_path / "i3d.safetensors").sha256 == i3d_weights.SHA256
    with pytest.raises(UserError, match="at most one FILE"):
        COMMANDS[name].run(cli.parse(["import", "--source=i3d", "a", "b", "--out=x.safetensors"])[1])
