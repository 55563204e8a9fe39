"""A published video network, imported with the config that says how it is used, is an ensemble of one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from paris_jax import Ensemble, cli
from paris_jax.artifacts import exported
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.artifacts.tensors import Tensors
from paris_jax.clustering.build import cluster
from paris_jax.commands import train as stage
from paris_jax.commands.import_weights import import_weights
from paris_jax.commands.train import train
from paris_jax.config.experiment import Experiment
from paris_jax.data import records
from paris_jax.data.preparation import prepare
from paris_jax.encoders import codecs, published, t5, text
from paris_jax.encoders.tokens import tokenizer
from paris_jax.errors import UserError
from paris_jax.models import functional
from paris_jax.training.job import cluster_folders
from paris_jax.weights import convert
from tests.conftest import micro_config
from tests.oracles import encoders as oracle

FOLDERS = {name: str(oracle.FOLDER / name) for name in ("t5", "clip", "hunyuan")}
ENCODERS = {"vae": FOLDERS["hunyuan"], "t5": FOLDERS["t5"], "clip": FOLDERS["clip"]}
PROMPTS = ["a large red circle", "a striped ball moving"]
TOKENS = 96


def config():
    """Tiny networks of the published kinds, texts filled up to 96 tokens."""
    made = micro_config()
    made.data.update(num_clips=30, num_frames=9, height=16, width=16)
    made.codec.update(name="hunyuan", time=4, height=8, width=8, weights=FOLDERS["hunyuan"])
    made.text.update(name="t5+clip", max_tokens=TOKENS, pad_to_max_tokens=True, t5=FOLDERS["t5"], clip=FOLDERS["clip"])
    made.clustering.num_clusters = 2
    made.training.update(steps=4)
    made.sampling.update(num_inference_steps=3, guidance_scale=2.0)
    return made


def network(experiment):
    width, pooled = text.widths_of(experiment)
    sizes = {"channels": codecs.latent_shape(experiment)[-1], "text_width": width, "pooled_width": pooled}
    return functional.network_config(experiment.network, **sizes, cond_frames=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A random network under Open-Sora 2.0's names, imported by the command, and its parameters."""
    folder = tmp_path_factory.mktemp("opensora")
    of = network(Experiment.from_config(config()))
    leaves, structure = jax.tree.flatten(functional.abstract(of))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(structure, drawn)
    safetensors.numpy.save_file({n: np.asarray(a) for n, a in functional.to_names(params).items()}, folder / "ours")
    (folder / "ours").rename(folder / "ours.safetensors")
    theirs = folder / "Open_Sora_v2.safetensors"
    convert.export_network(Tensors(folder / "ours.safetensors"), of, "opensora2", theirs, lambda: None)
    (folder / "config.py").write_text(
        "from tests.weights import test_sampled\n\n\ndef get_config():\n    return test_sampled.config()\n"
    )
    given = ["import", "--source=opensora2", str(theirs), f"--config={folder / 'config.py'}", f"--out={folder / 'w'}"]
    assert cli.run(given) in (None, 0)
    return folder / "w", of, params


def test_imported_weights_can_be_sampled_from(weights):
    folder, of, params = weights
    ensemble = Ensemble.load(folder, encoders=ENCODERS)
    assert ensemble.latent_shape == (3, 2, 2, 4) and ensemble.params.guidance_scale == 2.0
    samples = ensemble.sample(PROMPTS)
    assert samples.videos.shape == (2, 9, 16, 16, 3) and samples.routing.shape == (3, 2, 1)
    x, t, encoded = ensemble.noise(2), jnp.array([0.3, 0.9]), ensemble.encode(PROMPTS)
    expected = functional.apply(of, params, x, t, encoded.tokens, encoded.length, encoded.pooled)
    np.testing.assert_allclose(ensemble.velocity(x, t, encoded), expected, rtol=1e-4, atol=1e-4)


def test_encoders_of_other_sizes_are_refused(weights, tmp_path, monkeypatch):
    folder, *_ = weights
    monkeypatch.setattr(published.T5Clip, "width", 48)
    with pytest.raises(
        UserError, match=r"tokens of width 48 and a pooled width of 32, these experts were trained with 32 and 32"
    ):
        Ensemble.load(folder, encoders=ENCODERS)
    monkeypatch.undo()
    monkeypatch.setattr(codecs.HunyuanVideo, "channels", 16)
    with pytest.raises(UserError, match="latents of 16 channels, these experts were trained with 4"):
        Ensemble.load(folder, encoders=ENCODERS)


def test_float16_is_widened_and_weights_without_a_config_are_refused_with_a_remedy(weights, tmp_path):
    """Sixteen bits as NumPy has them are not a part's; without a config, nobody knows how the network is used."""
    source = weights[0].parent / "Open_Sora_v2.safetensors"
    halves = {name: values.astype(np.float16) for name, values in safetensors.numpy.load_file(source).items()}
    safetensors.numpy.save_file(halves, tmp_path / "half.safetensors")
    given = ["import", "--source=opensora2", str(tmp_path / "half.safetensors")]
    cli.run([*given, f"--config={source.parent / 'config.py'}", f"--out={tmp_path / 'w'}"])
    assert (
        Ensemble.load(tmp_path / "w", encoders=ENCODERS).sample(PROMPTS[0], num_inference_steps=1).videos.shape[0] == 1
    )
    experiment, plain = Experiment.from_config(config()), tmp_path / "plain"
    words = dataclasses.replace(experiment.text, name="words", width=32, pad_to_max_tokens=False)
    other = dataclasses.replace(experiment, text=words)
    import_weights("opensora2", [tmp_path / "half.safetensors"], str(plain), other)
    with pytest.raises(UserError, match=r"holds a network's weights and not how it is used; train with it"):
        Ensemble.load(plain, encoders=ENCODERS)


def test_guidance_leads_away_from_an_empty_text_that_is_encoded(weights):
    """Scale 0 is the other branch alone: the network with the encoding of ""."""
    folder, of, params = weights
    ensemble = Ensemble.load(folder, encoders=ENCODERS)
    x, t, encoded, none = ensemble.noise(2), jnp.array([0.3, 0.9]), ensemble.encode(PROMPTS), ensemble.text.null()
    assert none.tokens.shape == (TOKENS, 32) and np.abs(none.tokens).min(1).max() > 0 and np.abs(none.pooled).max() > 0
    tokens, pooled = (jnp.asarray(np.stack([a, a])) for a in (none.tokens, none.pooled))
    expected = functional.apply(of, params, x, t, tokens, jnp.full(2, TOKENS, jnp.int32), pooled)
    np.testing.assert_allclose(ensemble.velocity(x, t, encoded, guidance_scale=0.0), expected, rtol=1e-4, atol=1e-4)


def test_padded_texts_are_attended_to_as_a_whole():
    encoder = published.T5Clip(t5=FOLDERS["t5"], clip=FOLDERS["clip"], max_tokens=TOKENS, pad_to_max_tokens=True)
    ids = np.zeros((1, TOKENS), np.int32)
    found = tokenizer(FOLDERS["t5"])(PROMPTS[0])
    ids[0, : len(found)] = found
    whole = t5.encode(*published.EncoderStore().load("t5", FOLDERS["t5"]), ids, np.array([TOKENS]))[0]
    made = encoder.encode(PROMPTS[:1])[0].tokens
    np.testing.assert_allclose(made, whole, rtol=0.01, atol=0.01)
    short = published.T5Clip(t5=FOLDERS["t5"], clip=FOLDERS["clip"], max_tokens=TOKENS).encode(PROMPTS[:1])[0].tokens
    assert len(made) == TOKENS > len(short) and np.abs(made[: len(short)] - short).max() > 0.05
    with pytest.raises(UserError, match="is empty"):
        encoder.encode([""])


def test_a_suffix_stands_after_every_text_as_a_sentence_of_its_own():
    folders = {"t5": FOLDERS["t5"], "clip": FOLDERS["clip"], "max_tokens": TOKENS}
    plain, encoder = published.T5Clip(**folders), published.T5Clip(**folders, suffix="4 fps.")
    for given in ("a red ball", " a red ball. "):
        made, expected = (e.encode([t])[0] for e, t in ((encoder, given), (plain, "a red ball. 4 fps.")))
        np.testing.assert_array_equal(made.tokens, expected.tokens)
        np.testing.assert_array_equal(made.pooled, expected.pooled)
    np.testing.assert_array_equal(encoder.null().tokens, plain.null().tokens)
    assert text.from_description(encoder.describe(), folders).suffix == "4 fps." and plain.describe().suffix == ""
    with pytest.raises(UserError, match="is empty"):
        encoder.encode([" "])


def test_the_null_embedding_travels_with_the_clips_to_training(tmp_path, monkeypatch):
    """An expert that always loses its text gets the encoding of "": from another one, it learns something else."""
    made = config()
    made.training.update(drop_tokens=1.0, drop_pooled=1.0)
    experiment, run, role = Experiment.from_config(made), RunFolder(tmp_path / "run"), Role("expert", 0)
    prepare(experiment, run)
    cluster(experiment, run)
    (folder,) = cluster_folders(experiment, run, role)
    none = published.T5Clip(t5=FOLDERS["t5"], clip=FOLDERS["clip"], max_tokens=TOKENS, pad_to_max_tokens=True).null()
    for place in (run.data, run.test, folder):
        found = records.read_null(place)
        assert set(found) == {"tokens", "pooled"}
        for name, values in found.items():
            np.testing.assert_array_equal(np.float32(values), getattr(none, name))

    def learned() -> np.ndarray:
        train(experiment, run, role)
        kernel = exported.read(run.export(role)).params["conditioning"]["pooled"]["inner"]["kernel"]
        run.role(role).rmtree()
        return kernel

    first = learned()
    np.testing.assert_array_equal(learned(), first)
    other = {name: values * 0 + 1 for name, values in found.items()}
    monkeypatch.setattr(stage, "read_null", lambda folder: other)
    assert (learned() != first).any()  # the network starts at nothing, so it is little as yet


def test_only_published_texts_are_padded():
    made = micro_config()
    made.text.pad_to_max_tokens = True
    with pytest.raises(
        UserError, match=r"text\.pad_to_max_tokens=True: text\.name='words' has its texts at their true length"
    ):
        Experiment.from_config(made)
