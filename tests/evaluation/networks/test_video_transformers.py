"""VideoMAE and V-JEPA 2 have the outputs of transformers' implementations, from the files that it writes."""

import json

import numpy as np
import pytest
import safetensors.numpy

from paris_jax.errors import UserError
from paris_jax.evaluation.networks import video_transformers

WHY = "transformers is the second implementation; pip install torch==2.13.0 transformers"
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}


def loaded(folder):
    network, params = video_transformers.read(folder)
    return network, video_transformers.put(params, None)


@pytest.fixture
def videomae(tmp_path):
    torch = pytest.importorskip("torch", reason=WHY)
    transformers = pytest.importorskip("transformers", reason=WHY)
    torch.manual_seed(0)
    config = transformers.VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=4, use_mean_pooling=False, layer_norm_eps=1e-6, **SIZES
    )
    model = transformers.VideoMAEModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    model.save_pretrained(tmp_path / "videomae")
    return tmp_path / "videomae", model, torch


def expected(model, torch, video):
    mean, spread = (np.asarray(v, np.float32) for v in video_transformers.COLOURS)
    pixels = ((video - mean) / spread).transpose(0, 1, 4, 2, 3).astype(np.float32)
    with torch.no_grad():
        return model(torch.from_numpy(pixels))[0].numpy()


def test_videomae_has_transformers_outputs(videomae):
    folder, model, torch = videomae
    network, params = loaded(folder)
    video = np.random.default_rng(0).uniform(0, 1, (2, 4, 32, 32, 3)).astype(np.float32)
    theirs = expected(model, torch, video)
    ours = np.asarray(video_transformers.tokens(network, params, video))
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 2e-6
    np.testing.assert_allclose(video_transformers.features(network, params, video), ours.mean(1), rtol=1e-5)


def test_videomae_v2_is_the_same_network_under_other_names(videomae, tmp_path):
    folder, model, _ = videomae
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    renamed = {"model.patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
               "model.patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
               "model.norm.weight": state["layernorm.weight"], "model.norm.bias": state["layernorm.bias"]}  # fmt: skip
    names = {"layernorm_before": "norm1", "layernorm_after": "norm2", "attention.output.dense": "attn.proj",
             "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}  # fmt: skip
    for i in range(2):
        for theirs, ours in names.items():
            for kind in ("weight", "bias"):
                renamed[f"model.blocks.{i}.{ours}.{kind}"] = state[f"encoder.layer.{i}.{theirs}.{kind}"]
        own = f"encoder.layer.{i}.attention.attention"
        renamed[f"model.blocks.{i}.attn.qkv.weight"] = np.concatenate(
            [state[f"{own}.{part}.weight"] for part in ("query", "key", "value")]
        )
        renamed[f"model.blocks.{i}.attn.q_bias"] = state[f"{own}.query.bias"]
        renamed[f"model.blocks.{i}.attn.v_bias"] = state[f"{own}.value.bias"]
    (tmp_path / "v2").mkdir()
    safetensors.numpy.save_file(renamed, tmp_path / "v2" / "model.safetensors")
    sizes = {"embed_dim": 32, "num_heads": 2, "img_size": 32, "num_frames": 4}
    (tmp_path / "v2" / "config.json").write_text(json.dumps({"model_config": sizes}))
    video = np.random.default_rng(1).uniform(0, 1, (1, 4, 32, 32, 3)).astype(np.float32)
    first, second = (video_transformers.features(*loaded(place), video) for place in (folder, tmp_path / "v2"))
    np.testing.assert_allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("frames", [4, 8])  # as trained, and more
def test_vjepa2_has_transformers_outputs(tmp_path, frames):
    torch = pytest.importorskip("torch", reason=WHY)
    transformers = pytest.importorskip("transformers", reason=WHY)
    torch.manual_seed(0)
    config = transformers.VJEPA2Config(
        crop_size=48, patch_size=16, frames_per_clip=4, hidden_size=40, num_attention_heads=2, num_hidden_layers=2,
        mlp_ratio=2, pred_hidden_size=40, pred_num_attention_heads=2, pred_num_hidden_layers=1,
    )  # fmt: skip
    model = transformers.VJEPA2Model(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    model.save_pretrained(tmp_path)
    network, params = loaded(tmp_path)
    video = np.random.default_rng(2).uniform(0, 1, (2, frames, 48, 48, 3)).astype(np.float32)
    theirs = expected(model, torch, video)
    ours = np.asarray(video_transformers.tokens(network, params, video))
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 2e-6


def test_another_network_is_refused(tmp_path):
    safetensors.numpy.save_file({"a.weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="neither VideoMAE nor V-JEPA 2"):
        video_transformers.read(tmp_path)
