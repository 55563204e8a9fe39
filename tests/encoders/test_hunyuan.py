"""The causal VAE: no look ahead, pieces that fit together, and a codec like any other (parity: test_published.py)."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paris_jax import Ensemble
from paris_jax.artifacts.run_folder import Role, RunFolder, roles
from paris_jax.clustering.build import cluster
from paris_jax.commands.assemble import assemble
from paris_jax.commands.train import train
from paris_jax.config.experiment import Experiment
from paris_jax.data.preparation import prepare
from paris_jax.encoders import codecs, hunyuan
from paris_jax.errors import UserError
from tests.conftest import micro_config
from tests.oracles import encoders as oracle

FOLDER = str(oracle.FOLDER / "hunyuan")
BLOCKS = {"time": 4, "height": 8, "width": 8}


@pytest.fixture(scope="module")
def vae():
    config, params = hunyuan.read(FOLDER)
    return config, jax.tree.map(jnp.asarray, oracle.whole(params))


@pytest.fixture(scope="module")
def codec():
    return codecs.codec("hunyuan", weights=FOLDER, **BLOCKS)


def test_a_convolution_sees_no_later_frame_and_repeats_the_edges(vae):
    weights = vae[1]["encoder"]["in"]
    x = jax.random.normal(jax.random.key(0), (1, 6, 4, 5, 3))
    y = hunyuan.convolve(weights, x)
    later = hunyuan.convolve(weights, x.at[:, 4:].set(9.0))
    assert y.shape == (1, 6, 4, 5, 8)
    np.testing.assert_array_equal(later[:, :4], y[:, :4])
    assert np.abs(later[:, 4:] - y[:, 4:]).max() > 0.1
    still = hunyuan.convolve(weights, jnp.ones((1, 3, 4, 5, 3)))  # of a constant, the same everywhere, edges included
    np.testing.assert_allclose(still, np.broadcast_to(still[:, :1, :1, :1], still.shape), atol=1e-5)


def test_attention_sees_no_later_frame(vae, monkeypatch):
    monkeypatch.setattr(hunyuan, "group_norm", lambda vae, weights, x: x)  # its statistics are of all frames
    weights = vae[1]["encoder"]["attention"]
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 3, 16))
    y, later = (hunyuan._attend(vae[0], weights, a) for a in (x, x.at[:, 2:].set(3.0)))
    np.testing.assert_allclose(later[:, :2], y[:, :2], atol=1e-5)
    assert np.abs(later[:, 2:] - y[:, 2:]).max() > 0.1


@pytest.mark.parametrize("frames, height, width", [(1, 8, 8), (5, 16, 24), (13, 8, 40)])
def test_sizes_go_there_and_back(codec, frames, height, width):
    video = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)
    latent = codec.encode(video)
    assert latent.shape == codec.latent_shape(frames, height, width) and latent.dtype == np.float32
    assert codec.decode(latent).shape == video.shape
    both = codec.encode(np.stack([video, video[::-1]]))
    np.testing.assert_allclose(both[0], latent, atol=1e-4)
    np.testing.assert_allclose(codec.encode(codecs.to_float(video)), latent, atol=1e-5)


def test_latents_are_scaled_as_published(codec, vae):
    video = oracle.inputs("hunyuan")["video"]
    np.testing.assert_allclose(
        codec.encode(video), 0.476986 * np.asarray(hunyuan.encode(*vae, video))[..., :4], atol=1e-5
    )


def test_a_sample_of_the_posterior_has_its_mean_and_spread_and_depends_on_the_video_alone(codec, vae):
    sampler = codecs.codec("hunyuan", weights=FOLDER, posterior="sample", **BLOCKS)
    videos = np.random.default_rng(3).integers(0, 256, (4, 9, 32, 32, 3), np.uint8)
    drawn = sampler.encode(videos)
    np.testing.assert_array_equal(sampler.encode(codecs.to_float(videos)), drawn)
    np.testing.assert_array_equal(sampler.encode(videos[2]), sampler.encode(videos[2]))
    log_variance = np.asarray(hunyuan.encode(*vae, codecs.to_float(videos)))[..., 4:]
    noise = (drawn - codec.encode(videos)) / (hunyuan.SCALE * np.exp(0.5 * log_variance))
    assert noise.size == 768 and abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert sampler.describe().posterior == "sample" and codec.describe().posterior == "mean"


def test_a_last_frame_encoded_as_an_image_is_another_latent_than_the_clip_s_last(codec):
    """The clip's causal latent knows all frames before it, and stands for four of them."""
    clip = np.random.default_rng(5).integers(0, 256, (9, 32, 32, 3), np.uint8)
    latent, images = codec.encode(clip), codecs.encode_images(codec, clip[[0, -1]])
    for image, frame in zip(images, (clip[:1], clip[-1:]), strict=True):
        np.testing.assert_allclose(image, codec.encode(frame)[0], atol=1e-5)
    assert np.linalg.norm(images[1] - latent[-1]) > 0.02 * np.linalg.norm(latent[-1])


def test_time_is_tiled_only_where_the_memory_asks_for_it():
    """Published use has no tiles in time: 33 and 129 frames of 256 pixels are whole on an H100, 33 with 24 GB."""
    frames = lambda gib, dtype: hunyuan.Tiling.within(gib * 2**30, dtype).frames  # noqa: E731
    assert frames(0.25 * 80, "bfloat16") >= 33 and frames(0.5 * 24, "float32") >= 9
    assert frames(0.25 * 16, "bfloat16") == 8 and frames(1, "float32") == hunyuan.Tiling().frames
    assert hunyuan.Tiling.within(2**30, "float32") == hunyuan.Tiling()


@pytest.mark.parametrize("way", ["encode", "decode"])
@pytest.mark.parametrize("T, H, W", [(9, 4, 4), (3, 10, 4), (7, 10, 12)])
def test_pieces_of_what_sees_its_place_only_are_the_whole(way, T, H, W):
    """With a coder that looks at single blocks, any tiling is exact: every piece lies where it belongs."""
    tiling, rng = hunyuan.Tiling(frames=4, side=6, shared_frames=1, shared=2), np.random.default_rng(0)
    video = rng.standard_normal((2, 4 * T - 3, 8 * H, 8 * W, 1)).astype(np.float32)

    def down(x):
        x = np.concatenate([np.repeat(x[:, :1], 3, 1), x], 1)
        return x.reshape(len(x), -1, 4, x.shape[2] // 8, 8, x.shape[3] // 8, 8, 1)[:, :, 3:].mean((2, 4, 6))

    def up(x):
        x = x.repeat(8, 2).repeat(8, 3)
        return np.concatenate([x[:, :1], x[:, 1:].repeat(4, 1)], 1)

    run, tiled, given = {
        "encode": (down, hunyuan.encode_tiled, video),
        "decode": (up, hunyuan.decode_tiled, rng.standard_normal((2, T, H, W, 3)).astype(np.float32)),
    }[way]
    pieces = []
    made = tiled(lambda x: pieces.append(x.shape) or run(x), given, tiling)
    np.testing.assert_allclose(made, run(given), atol=1e-5)
    assert len(pieces) > 1
    limit = (4 * 4 + 1, 48, 48) if way == "encode" else (5, 6, 6)
    assert all(size <= most for shape in pieces for size, most in zip(shape[1:4], limit, strict=True))


def test_pieces_of_the_network_are_near_the_whole_and_have_no_seams(vae):
    """Not equal: group norms see a piece only. The step across a seam is no larger than elsewhere."""
    run = lambda piece: hunyuan.decode(*vae, piece)  # noqa: E731
    latent = 0.5 * np.random.default_rng(0).standard_normal((1, 3, 12, 12, 4)).astype(np.float32)
    whole, tiled = np.asarray(run(latent)), hunyuan.decode_tiled(run, latent, hunyuan.Tiling(5, 8, 1, 4))
    assert np.linalg.norm(tiled - whole) / np.linalg.norm(whole - whole.mean()) < 0.15
    steps = np.abs(np.diff(tiled - whole, axis=2)).mean((0, 1, 3, 4))
    assert steps.max() < 4 * np.median(steps)


def test_sizes_that_it_cannot_take_are_refused_with_the_nearest(codec):
    with pytest.raises(UserError, match="frames=12: must be 1 more than a multiple of the codec's 4"):
        codec.encode(np.zeros((12, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="height=12: must be a multiple of the codec's 8"):
        codec.encode(np.zeros((5, 12, 8, 3), np.uint8))


def test_frames_that_are_given_are_whole_latent_frames(codec):
    mask = np.array([[True, False, True], [False, True, False]])
    assert codec.frames_of(mask).astype(int).tolist() == [[1, 0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0, 0, 0]]


def test_other_weights_are_refused_by_name(codec, tmp_path):
    described = codec.describe()
    assert codecs.from_description(described, FOLDER).describe() == described
    shutil.copytree(FOLDER, tmp_path / "other")
    data = bytearray((tmp_path / "other" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "other" / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"codec\.weights=.*this data was made with"):
        codecs.from_description(described, str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"codec\.weights is empty"):
        codecs.from_description(described)


def test_videos_go_through_it_from_clips_to_samples(tmp_path):
    """Every stage in its latents, and from there a video from an image and one of another length."""
    config = micro_config()
    config.data.update(num_clips=30, num_frames=9, height=16, width=16)
    config.codec.update(name="hunyuan", weights=FOLDER, **BLOCKS)
    config.training.update(steps=4)
    config.router_training.update(steps=4)
    config.clustering.num_clusters = 2
    experiment, run = Experiment.from_config(config), RunFolder(tmp_path / "run")
    assert codecs.latent_shape(experiment) == (3, 2, 2, 4)
    prepare(experiment, run)
    cluster(experiment, run)
    latent = json.loads((run.data / "manifest.json").read_text())["latent"]
    assert latent == {"shape": [3, 2, 2, 4], "mean": [0.0], "spread": [1.0]}  # as published networks expect them
    for role in roles(2):
        if role != Role("monolith"):
            train(experiment, run, role)
    assemble(experiment, run)
    ensemble = Ensemble.load(run.ensemble, encoders={"vae": FOLDER})
    prompt, picture = ["a large red circle moving right fast on a white ground"], np.full((16, 16, 3), 99, np.uint8)
    assert ensemble.sample(prompt, num_inference_steps=2).videos.shape == (1, 9, 16, 16, 3)
    assert ensemble.sample(prompt, num_inference_steps=2, num_frames=13, image=picture).videos.shape == (
        1,
        13,
        16,
        16,
        3,
    )
    assert ensemble.sample(prompt, num_inference_steps=2, video=np.stack([picture] * 5)).videos.shape == (
        1,
        9,
        16,
        16,
        3,
    )
    with pytest.raises(UserError, match="frames=12: must be 1 more than a multiple of 4; the nearest is 9 or 13"):
        ensemble.sample(prompt, num_frames=12)
    with pytest.raises(UserError, match=r"video has 4 frames: .* must be one of 1;"):
        ensemble.sample(prompt, video=np.stack([picture] * 4))
