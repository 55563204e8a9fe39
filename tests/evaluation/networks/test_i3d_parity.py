"""I3D is that of the published Frechet video distance, layer by layer, and with the published weights."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from paris_jax.errors import UserError
from paris_jax.evaluation.metrics.frechet import frechet_distance
from paris_jax.evaluation.networks import i3d, i3d_weights

torch = pytest.importorskip("torch", reason="the second implementation is PyTorch's; pip install torch==2.13.0")


def published():
    """The published weights, where their package is installed."""
    try:
        return i3d_weights.load()
    except UserError as error:
        pytest.skip(f"needs the published weights: {error}")


def videos(count: int, frames: int, side: int, seed: int = 0) -> np.ndarray:
    """Smooth random videos (N, T, H, W, 3) float32 in [-1, 1]."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(-1, 1, (count, frames, side // 8, side // 8, 3))
    return coarse.repeat(8, 2).repeat(8, 3).astype(np.float32)


class Holder(torch.nn.Module):
    """A module around a network, whose trace is quick to make and holds the network's parameters."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return x


def of_torch(x: "torch.Tensor") -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 4, 1) if x.ndim == 5 else x.detach().numpy()


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_every_layer_is_that_of_the_second_implementation(tmp_path):
    from tests.oracles.i3d import randomised

    network = randomised("short", seed=1)
    torch.save(network.state_dict(), tmp_path / "i3d.pt")
    params = i3d_weights.load(tmp_path / "i3d.pt").params
    x = videos(1, 10, 224)  # an even number of frames: the padding is uneven
    ours = i3d.layers(params, jnp.asarray(x))
    with torch.no_grad():
        theirs = network.layers(torch.from_numpy(x.transpose(0, 4, 1, 2, 3).copy()))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert difference(np.asarray(ours[name]), of_torch(value)) < 2e-5, name


def test_the_published_weights_give_the_second_implementations_logits_and_distance():
    from tests.oracles.i3d import I3D

    found = published()
    network, tensors = I3D("short").eval(), i3d_weights.read(i3d_weights.find())
    state = network.state_dict()
    for unit in i3d.units():
        for part, name in i3d_weights._names("pytorch-i3d", unit).items():
            values = tensors[f"{unit}/{part}"]
            state[name] = torch.tensor(values.transpose(4, 3, 0, 1, 2) if part == "kernel" else values)
    network.load_state_dict(state)
    x = videos(8, 9, 64, seed=3)
    x[4:] = np.roll(x[4:], 1, axis=2) * 0.7
    ours = np.concatenate([i3d.features(found.params, jnp.asarray(part)) for part in np.split(x, 4)])
    resized = np.asarray(i3d.resize(jnp.asarray(x)))
    with torch.no_grad():
        theirs = network(torch.from_numpy(resized.transpose(0, 4, 1, 2, 3).copy())).numpy()
    assert difference(ours, theirs) < 2e-5
    assert frechet_distance(ours[:4], ours[4:]) == pytest.approx(by_matrix_root(theirs[:4], theirs[4:]), rel=1e-3)


def by_matrix_root(first: np.ndarray, second: np.ndarray) -> float:
    """The Frechet distance as it is usually computed, with scipy's matrix square root."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    c1, c2 = np.cov(first.T), np.cov(second.T)
    root = scipy.linalg.sqrtm(c1 @ c2 + 1e-9 * np.eye(len(c1))).real
    return float(((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * root))


@pytest.mark.parametrize("naming", ["short", "lower"])
@pytest.mark.parametrize("kind", ["state", "script"])
def test_pytorchs_files_are_read_without_running_them(tmp_path, naming, kind):
    from tests.oracles.i3d import randomised

    network, path = randomised(naming, seed=2), tmp_path / "i3d.pt"
    if kind == "state":
        torch.save(network.state_dict(), path)
    else:
        torch.jit.save(torch.jit.trace(Holder(network), torch.zeros(1)), path)
    tensors = i3d_weights.read(path)
    layout = "pytorch-i3d" if naming == "short" else "kinetics_i3d_pytorch"
    unit = "Mixed_4c/Branch_2/Conv3d_0b_3x3"
    kernel = dict(network.named_parameters())[i3d_weights._names(layout, unit)["kernel"]].detach().numpy()
    np.testing.assert_array_equal(tensors[f"{unit}/kernel"], kernel.transpose(2, 3, 4, 1, 0))
