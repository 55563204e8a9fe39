"""Both published aesthetic heads are read as the affine maps that they are."""

import numpy as np
import pytest
import safetensors.numpy

from paris_jax.errors import UserError
from paris_jax.evaluation.metrics.aesthetic import AestheticHead, aesthetic_scores

WIDTHS = (768, 1024, 128, 64, 16, 1)  # of version 2


@pytest.fixture
def frames():
    found = np.random.default_rng(0).standard_normal((3, 4, 768)).astype(np.float32)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def layers(rng):
    names = (0, 2, 4, 6, 7)  # dropout stands between them
    for name, inputs, outputs in zip(names, WIDTHS[:-1], WIDTHS[1:], strict=True):
        yield f"layers.{name}.weight", rng.standard_normal((outputs, inputs)).astype(np.float32) / inputs**0.5
        yield f"layers.{name}.bias", rng.standard_normal(outputs).astype(np.float32)


def test_the_first_version_is_one_layer(tmp_path, frames):
    weight, bias = np.random.default_rng(1).standard_normal((1, 768)).astype(np.float32), np.float32([5])
    safetensors.numpy.save_file({"weight": weight, "bias": bias}, tmp_path / "v1.safetensors")
    head = AestheticHead.load(tmp_path / "v1.safetensors")
    assert head.version == "v1"
    np.testing.assert_allclose(aesthetic_scores(head, frames), (frames @ weight[0] + 5).mean(1), rtol=1e-5)


def test_the_second_version_is_its_layers_one_after_another(tmp_path, frames):
    tensors = dict(layers(np.random.default_rng(2)))
    safetensors.numpy.save_file(tensors, tmp_path / "v2.safetensors")
    head = AestheticHead.load(tmp_path / "v2.safetensors")
    x = frames
    for i in (0, 2, 4, 6, 7):
        x = x @ tensors[f"layers.{i}.weight"].T + tensors[f"layers.{i}.bias"]
    assert head.version == "v2"
    np.testing.assert_allclose(aesthetic_scores(head, frames), x[..., 0].mean(1), rtol=1e-4)


def test_pytorchs_file_is_read(tmp_path, frames):
    torch = pytest.importorskip("torch", reason="PyTorch writes the published files; pip install torch==2.13.0")
    module = torch.nn.Linear(768, 1)
    torch.save(module.state_dict(), tmp_path / "v1.pth")
    with torch.no_grad():
        expected = module(torch.from_numpy(frames)).numpy()[..., 0].mean(1)
    np.testing.assert_allclose(aesthetic_scores(AestheticHead.load(tmp_path / "v1.pth"), frames), expected, rtol=1e-4)


def test_another_network_and_another_clip_are_refused(tmp_path, frames):
    safetensors.numpy.save_file({"conv.weight": np.ones((2, 3, 3, 3), np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no linear layer"):
        AestheticHead.load(tmp_path / "x.safetensors")
    head = AestheticHead(np.zeros(768), 0.0, "v1", "")
    with pytest.raises(UserError, match="ViT-L/14"):
        aesthetic_scores(head, frames[..., :512])
