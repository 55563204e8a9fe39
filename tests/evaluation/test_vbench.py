"""Videos are written as VBench names them, each with its own seed, and an interrupted call goes on."""

import json

import pytest

from paris_jax import Ensemble
from paris_jax.data.decoding import footage
from paris_jax.errors import UserError
from paris_jax.evaluation import vbench


def test_files_are_named_by_prompt_and_number(trained, tmp_path):
    model, out = Ensemble.load(trained.ensemble), tmp_path / "videos"
    prompts = ["a red circle moving right", "a large blue square on white"]
    assert vbench.write(model, prompts, out, seed=7, per_prompt=2, batch_size=3) == 4
    assert sorted(p.name for p in out.iterdir()) == sorted(f"{p}-{i}.mp4" for p in prompts for i in (0, 1))
    first, second = (footage.read_image(out / f"{prompts[0]}-{i}.mp4") for i in (0, 1))
    assert (first != second).any()
    protocol = json.loads((tmp_path / "videos.protocol.json").read_text())
    assert protocol["seeds"] == [7, 8] and protocol["sampling"]["num_inference_steps"] == 3
    (out / f"{prompts[1]}-1.mp4").unlink()
    assert vbench.write(model, prompts, out, seed=7, per_prompt=2) == 1


@pytest.mark.parametrize(
    ("prompts", "said"), [([], "no prompt"), (["a", "a"], "twice"), (["a/b"], "slash"), (["x" * 300], "240 bytes")]
)
def test_prompts_that_cannot_be_file_names_are_refused(tmp_path, prompts, said):
    with pytest.raises(UserError, match=said):
        vbench.write(None, prompts, tmp_path)
