"""`paris-jax sample`: every flag reaches the sampler, and invalid values give a one-sentence error."""

import os

import numpy as np
import pytest

from paris_jax import Ensemble, cli
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.commands import sample as stage
from paris_jax.commands.sample import Output
from paris_jax.data.decoding import footage
from paris_jax.ensemble import sampling_params

ENSEMBLE = ["--ensemble=bundled:shapes"]
PROMPT = "--prompt=a large red circle moving right fast on a white ground"


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """Returns the options and parameters that a command line passes to the ensemble, without sampling."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        call = {}

        class Recorder:
            clusters = (0, 1)

            @classmethod
            def load(cls, path, **options):
                call.update(path=path, options=options)
                return cls()

            def sample(self, prompts, **params):
                call.update(prompts=prompts, params=params)
                raise SystemExit(0)

        monkeypatch.setattr(stage, "Ensemble", Recorder)
        with pytest.raises(SystemExit):
            cli.run(["sample", "--ensemble=bundled:shapes", PROMPT, *flags])
        return call

    return run


def test_omitted_flags_keep_the_parameters_of_the_ensemble(parsed):
    call = parsed()
    options = {"mesh": None, "weights_dtype": "auto", "compute_dtype": "", "offload": False, "encoders": {}}
    assert call["options"] == options | {"drop_encoders": True}  # all prompts are encoded up front
    assert call["params"] == {"progress": True}


def test_every_flag_reaches_the_sampler(parsed):
    params = {
        **{"negative_prompt": "a", "num_inference_steps": 7, "seed": [4, 5], "fixed_expert": [0, 1]},
        **{
            "timestep_shift": 2.5,
            "timesteps": [1, 0.5, 0],
            "drop_experts": [1, 2],
            "on_nonfinite": "drop",
            "preview_every_steps": 3,
        },
        **{"num_frames": 6, "height": 12, "width": 16, "solver": "ab2", "guidance_scale": 2.5},
        **{"guidance_method": "projected", "guidance_interval": [0.1, 0.8], "guidance_rescale": 0.5},
        **{"guidance_momentum": -0.2, "guidance_norm_threshold": 3.0, "guidance_eta": 0.5, "image": "a.png"},
        **{"last_image": "b.png", "video": "c.mp4", "num_cond_frames": 2, "fit": "crop", "image_guidance_scale": 2.0},
        **{"guidance_oscillation": "both", "image_guidance_ramp": True, "router_temperature": 2.0, "top_k": 2},
        **{"router_conditioning": "branch", "routing": "top_k", "threshold": 0.5, "expert_batch_size": 1},
    }
    assert params.keys() == set(sampling_params.FIELD_NAMES)

    def as_text(value):
        return ",".join(map(str, value)) if isinstance(value, list) else value

    flags = [f"--{name}={as_text(value)}" for name, value in params.items()]
    call = parsed(
        *flags,
        "--mesh=expert:3,fsdp:2",
        "--weights_dtype=int8",
        "--compute_dtype=bfloat16",
        "--offload",
        "--vae=v",
        "--t5=t",
    )
    assert call["options"] == {
        **{"mesh": {"expert": 3, "fsdp": 2}, "weights_dtype": "int8", "compute_dtype": "bfloat16", "offload": True},
        "encoders": {"vae": "v", "t5": "t"},
        "drop_encoders": True,
    }
    assert {k: v for k, v in call["params"].items() if k != "on_preview"} == params | {"progress": True}


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--mesh=expert3", "--mesh=expert3: must be axes with their sizes, such as expert:3"),
        ("--mesh=expert:two", "--mesh=expert:two: must be axes"),
        ("--seed=1,b", "--seed=1,b: must be whole numbers, such as 0,7"),
        ("--timesteps=1,half,0", "--timesteps=1,half,0: must be numbers, such as 1,0.9,0.6,0"),
        ("--weights_dtype=int4", "--weights_dtype"),
        ("--solver=eular", "solver='eular': must be one of"),
        ("--mesh=expert:99", "mesh expert=99 = 99 devices: there are 1"),
    ],
)
def test_invalid_values_are_refused(flag, message, capsys):
    assert cli.run(["sample", "--ensemble=bundled:shapes", PROMPT, flag]) == 1
    assert message in capsys.readouterr().err


def test_a_command_with_many_flags_writes_only_its_output_file(tmp_path):
    out, own = tmp_path / "both.png", tmp_path / "both-preview.png"
    own.write_text("of the user")
    flags = [
        "--negative_prompt=a small digit",
        "--seed=3,4",
        "--drop_experts=1",
        "--solver=ancestral",
        "--num_inference_steps=3",
        "--offload",
    ]
    prompts = [PROMPT, "--prompt=a small blue ball"]
    assert cli.run(["sample", *ENSEMBLE, *prompts, *flags, f"--out={out}", "--grid", "--weights_dtype=int8"]) == 0
    assert out.stat().st_size > 1000 and own.read_text() == "of the user"


def test_samples_of_a_run_are_written_to_its_folder(tmp_path):
    RunFolder(tmp_path).claim({}, "0")
    for inside in ("ensemble", "monolith/export", "experts/0/export"):
        paths = Output().paths(str(tmp_path / inside), ["a ball", "A Ball!"], [1, 2])
        assert paths == [tmp_path / "samples/a-ball-seed1.mp4", tmp_path / "samples/a-ball-seed2.mp4"]
    assert str(Output().paths("bundled:shapes", ["a ball"], [0])[0]) == "samples/a-ball-seed0.mp4"


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("一个红色的圆", "一个红色的圆-seed0"),
        ("Ein größerer Kreis, 2x!", "ein-größerer-kreis-2x-seed0"),
        ("دائرة حمراء", "دائرة-حمراء-seed0"),
        ("../../etc/passwd", "etc-passwd-seed0"),
        ("🔴🔴", "video-seed0"),
        ("word " * 40, "word-" * 12 + "seed0"),
    ],
)
def test_file_names_keep_letters_of_any_script(prompt, name, tmp_path):
    (path,) = Output(folder=str(tmp_path)).paths("bundled:shapes", [prompt], [0])
    assert path.parent == tmp_path and path.name == f"{name}.mp4"
    assert len(path.name.encode()) < 255


def test_file_names_collide_neither_with_each_other_nor_with_existing_files(tmp_path):
    (tmp_path / "a-ball-seed0.mp4").write_text("mine")
    paths = Output(folder=str(tmp_path)).paths("bundled:shapes", ["a ball", "A ball?", "a ball"], [0, 0, 1])
    assert [path.name for path in paths] == ["a-ball-seed0-2.mp4", "a-ball-seed0-3.mp4", "a-ball-seed1.mp4"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--out=there.mp4"], "--out=there.mp4 exists already; choose another name, or add --overwrite"),
        (["--out=there.mp4/x.mp4"], "there.mp4 is a file, where a folder for the videos is needed"),
        (["--out=x.avi"], "--out=x.avi has the ending '.avi'; allowed are .mp4"),
        (["--out=x.mp4", "--prompt=another"], "--out=x.mp4 names one file for 2 prompts; add --grid"),
        (["--out=x.mp4", "--out_dir=y"], "--out names one file and --out_dir a folder; give one of them"),
        (["--out_dir=/proc/x"], "is not writable"),
        (["--prompts_file=none.txt"], "--prompts_file=none.txt cannot be read"),
        (["--prompts_file=empty.txt"], "--prompts_file=empty.txt has no prompt; write one per line"),
        (["--prompts_file=bad.jsonl"], "--prompts_file=bad.jsonl, line 1: promt is unknown; allowed are prompt,"),
        (["--prompts_file=worse.jsonl"], "--prompts_file=worse.jsonl, line 1: seed='7' must be an int"),
    ],
)
def test_outputs_and_prompts_are_checked_before_sampling(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.mp4").write_text("mine")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text('{"promt": "a ball"}')
    (tmp_path / "worse.jsonl").write_text('{"prompt": "a ball", "seed": "7"}')
    monkeypatch.setattr(stage.Ensemble, "load", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr(stage.os, "access", lambda path, mode: str(path) != "/proc" and os.access(path, mode))
    before = sorted(tmp_path.rglob("*"))
    assert cli.run(["sample", *ENSEMBLE, PROMPT, *flags]) == 1
    assert said in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "there.mp4").read_text() == "mine"


def test_a_prompts_file_is_sampled_in_batches_with_a_seed_per_prompt(tmp_path, monkeypatch):
    lines = ["a small blue ball", "", '{"prompt": "a red square", "seed": 5}', "a ball"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    arguments = [f"--prompts_file={tmp_path}/prompts.txt", f"--out_dir={tmp_path}/out", "--num_inference_steps=1"]
    assert cli.run(["sample", *ENSEMBLE, *arguments, "--seed=3", "--batch_size=2"]) == 0
    names = ["a-ball-seed5.mp4", "a-red-square-seed5.mp4", "a-small-blue-ball-seed3.mp4"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    # Each sample equals that of its prompt and seed alone.
    alone = Ensemble.load("bundled:shapes").sample(["a red square"], seed=[5], num_inference_steps=1)
    (path,) = [path for path in (tmp_path / "out").iterdir() if "red" in path.name]
    frames = np.stack(list(footage.at_rate(path, alone.fps))).astype(float)
    assert np.abs(frames[:, ::8, ::8].mean() - alone.pixels()[0].mean()) < 12  # of 255, after the video codec


def test_prompts_with_the_same_fields_share_a_batch():
    requests = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "negative_prompt": "d"}, {"prompt": "e"}]
    batches = stage.file_batches(requests, {"top_k": 2}, 16)
    assert batches == [
        (["a", "b"], {"top_k": 2, "seed": [0, 1]}),
        (["c"], {"top_k": 2, "seed": [2], "negative_prompt": ["d"]}),
        (["e"], {"top_k": 2, "seed": [3]}),
    ]
    assert [names for names, _ in stage.file_batches(requests[:2] * 2, {}, 3)] == [["a", "b", "a"], ["b"]]
