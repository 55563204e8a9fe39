"""The Inception v3 of FID is that of the published description, read from pytorch-fid's names."""

import numpy as np
import pytest
import safetensors.numpy

from paris_jax.errors import UserError
from paris_jax.evaluation.networks import inception


def test_features_are_those_of_the_second_implementation(tmp_path):
    torch = pytest.importorskip("torch", reason="the second implementation is PyTorch's; pip install torch==2.13.0")
    from tests.oracles.inception import Inception

    torch.manual_seed(0)
    network = Inception().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.7, 1.3)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    image = np.random.default_rng(0).uniform(-1, 1, (1, 299, 299, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = network(torch.from_numpy(image.transpose(0, 3, 1, 2).copy())).numpy()
    ours = np.asarray(inception.features(inception.read(tmp_path / "inception.pth"), image))
    assert ours.shape == (1, inception.FEATURES)
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 2e-5


def test_other_weights_are_refused(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="94 tensors of Inception v3 are missing"):
        inception.read(tmp_path / "x.safetensors")
