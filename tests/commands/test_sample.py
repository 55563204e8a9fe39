"""`paris-jax sample` as it is typed: every flag reaches the sampler, and nonsense is refused in a sentence."""

import pytest

from paris_jax import cli
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.commands import sample as stage

PROMPT = "--prompt=a large red circle moving right fast on a white ground"


@pytest.fixture
def asked(monkeypatch):
    """What the ensemble was asked for by a command line; nothing is drawn."""

    def run(*flags):
        found = {}

        class Recorder:
            text = type("Text", (), {"unknown_words": staticmethod(lambda prompt: [])})

            @classmethod
            def load(cls, path, **keeping):
                found.update(path=path, keeping=keeping)
                return cls()

            def sample(self, prompts, **how):
                found.update(prompts=prompts, how={k: v for k, v in how.items() if v is not None})
                raise SystemExit(0)

        monkeypatch.setattr(stage, "Ensemble", Recorder)
        with pytest.raises(SystemExit):
            cli.run(["sample", "--ensemble=bundled:shapes", PROMPT, *flags])
        return found

    return run


def test_what_is_not_said_is_left_to_the_ensemble(asked):
    found = asked()
    kept = {"mesh": None, "weights": "auto", "offload": False, "encoders": {}}
    assert found["keeping"] == kept | {"drop_encoders": True}  # all prompts are known
    assert found["how"] == {"seed": 0, "drop": [], "broken": "refuse", "preview_every": 0, "progress": True}


def test_every_flag_reaches_the_sampler(asked):
    found = asked(
        *("--negative=a", "--num_steps=7", "--seed=4,5", "--experts=0,1", "--times=1,0.5,0", "--drop=1,2"),
        *("--vae=v", "--t5=t", "--image=a.png", "--last_image=b.png", "--fit=crop", "--guidance_image=2"),
        *("--guidance_oscillation=both", "--guidance_ramp"),
        *("--mesh=expert:3,fsdp:2", "--weights=int8", "--offload", "--broken=drop", "--preview_every=3"),
        *("--frames=6", "--height=12", "--width=16", "--solver=ab2", "--guidance=2.5", "--guidance_method=projected"),
        *("--guidance_low=0.1", "--guidance_high=0.8", "--guidance_rescale=0.5", "--guidance_momentum=-0.2"),
        *("--guidance_radius=3", "--guidance_parallel=0.5", "--temperature=2", "--routed_by=branch", "--top_k=2"),
        "--rows_at_once=1",
    )
    assert found["keeping"] == {
        **{"mesh": {"expert": 3, "fsdp": 2}, "weights": "int8", "offload": True},
        "encoders": {"vae": "v", "t5": "t"},
        "drop_encoders": True,
    }
    how = {"negative": "a", "num_steps": 7, "seed": [4, 5], "experts": [0, 1], "times": [1, 0.5, 0], "drop": [1, 2]}
    how |= {"broken": "drop", "preview_every": 3, "frames": 6, "height": 12, "width": 16, "solver": "ab2"}
    how |= {"guidance": 2.5, "guidance_method": "projected", "guidance_low": 0.1, "guidance_high": 0.8}
    how |= {"guidance_rescale": 0.5, "guidance_momentum": -0.2, "guidance_radius": 3.0, "guidance_parallel": 0.5}
    how |= {"image": "a.png", "last_image": "b.png", "fit": "crop", "guidance_image": 2.0}
    how |= {"guidance_oscillation": "both", "guidance_ramp": True}
    how |= {"temperature": 2.0, "routed_by": "branch", "top_k": 2, "progress": True, "rows_at_once": 1}
    assert {k: v for k, v in found["how"].items() if k != "on_preview"} == how


def test_every_setting_of_the_ensemble_has_its_flag():
    from paris_jax.commands.flag_groups import SAMPLING_FLAGS
    from paris_jax.ensemble import sampling_params

    assert set(SAMPLING_FLAGS) == set(sampling_params.FIELD_NAMES)


@pytest.mark.parametrize(
    "flag, told",
    [
        ("--mesh=expert3", "--mesh=expert3: must be axes with their sizes, such as expert:3"),
        ("--mesh=expert:two", "--mesh=expert:two: must be axes"),
        ("--seed=1,b", "--seed=1,b: must be whole numbers, such as 0,7"),
        ("--times=1,half,0", "--times=1,half,0: must be numbers, such as 1,0.9,0.6,0"),
        ("--weights=int4", "--weights"),
        ("--solver=eular", "solver='eular': must be one of"),
        ("--mesh=expert:99", "mesh expert=99 = 99 devices: there are 1"),
    ],
)
def test_nonsense_is_refused_in_a_sentence(flag, told, capsys):
    assert cli.run(["sample", "--ensemble=bundled:shapes", PROMPT, flag]) == 1
    assert told in capsys.readouterr().err


def test_a_command_with_many_flags_writes_its_file_and_touches_no_other(tmp_path):
    out, own = tmp_path / "both.png", tmp_path / "both-preview.png"
    own.write_text("of the user")
    flags = ["--negative=a small digit", "--seed=3,4", "--drop=1", "--solver=ancestral", "--num_steps=3", "--offload"]
    prompts = [PROMPT, "--prompt=a small blue ball"]
    assert cli.run(["sample", "--ensemble=bundled:shapes", *prompts, *flags, f"--out={out}", "--weights=int8"]) == 0
    assert out.stat().st_size > 1000 and own.read_text() == "of the user"


def test_samples_of_a_run_lie_in_its_folder(tmp_path):
    RunFolder(tmp_path).claim({}, "0")
    for inside in ("ensemble", "monolith/export", "experts/0/export"):
        assert (
            stage._default_paths(str(tmp_path / inside), "a ball", [1, 2])[0] == tmp_path / "samples/a-ball-seed1-2.mp4"
        )
    assert str(stage._default_paths("bundled:shapes", "a ball", 0)[0]) == "samples/a-ball-seed0.mp4"
