"""Video to latent and back, exactly."""

import numpy as np
import pytest

from paris_jax.artifacts.schemas import Latent
from paris_jax.data.sources.shapes import ShapesSource
from paris_jax.encoders import codecs
from paris_jax.errors import UserError

VIDEO = ShapesSource(0, 4, 8, 20, 20, 8.0)[1].video


@pytest.mark.parametrize("blocks", [(2, 2, 2), (1, 1, 1), (4, 5, 2), (8, 20, 20)])
def test_pixels_are_packed_and_unpacked_exactly(blocks):
    codec = codecs.Pixels(*blocks)
    latent = codec.encode(VIDEO)
    assert latent.shape == codec.latent_shape(*VIDEO.shape[:3])
    assert latent.dtype == np.float32
    assert latent.min() >= -1
    assert latent.max() <= 1
    np.testing.assert_array_equal(codec.decode(latent), codecs.to_float(VIDEO))
    # Half precision, in which latents are stored, still gives every level back.
    np.testing.assert_array_equal(codecs.to_uint8(codec.decode(latent.astype(np.float16))), VIDEO)


def test_a_channel_block_is_one_block_of_pixels():
    latent = codecs.Pixels(2, 2, 2).encode(VIDEO)
    block = codecs.to_float(VIDEO[2:4, 6:8, 10:12])
    np.testing.assert_array_equal(latent[1, 3, 5], block.ravel())


def test_batches_and_jax_arrays_are_treated_alike():
    import jax.numpy as jnp

    codec = codecs.Pixels()
    batch = np.stack([VIDEO, VIDEO[::-1]])
    latents = codec.encode(batch)
    np.testing.assert_array_equal(latents[1], codec.encode(VIDEO[::-1]))
    np.testing.assert_array_equal(codec.decode(jnp.asarray(latents)), codec.decode(latents))


def test_a_single_frame_is_an_image_that_fills_one_block_of_time():
    pixels, image = codecs.Pixels(4, 2, 2), np.random.default_rng(0).integers(0, 256, (1, 4, 6, 3), np.uint8)
    latent = pixels.encode(image)
    assert latent.shape == pixels.latent_shape(1, 4, 6) == (1, 2, 3, 48)
    np.testing.assert_array_equal(latent[0], codecs.encode_images(pixels, image)[0])
    np.testing.assert_array_equal(codecs.to_uint8(pixels.decode(latent)), image.repeat(4, axis=0))


def test_sizes_that_the_blocks_do_not_divide_are_refused():
    with pytest.raises(UserError, match="width=21: must be a multiple of the codec's 2"):
        codecs.Pixels().latent_shape(8, 20, 21)


def test_a_codec_is_rebuilt_from_its_description():
    codec = codecs.codec("pixels", time=1, height=4, width=2)
    assert codecs.from_description(codec.describe()) == codec
    with pytest.raises(UserError, match=r"'pixel'.*did you mean 'pixels'"):
        codecs.codec("pixel")


@pytest.mark.parametrize(("mean", "spread"), [((0.25,), (0.5,)), ((0.0, 0.5, -1.0), (1.0, 2.0, 0.25))])
def test_latents_are_normalised_and_back(mean, spread):
    latent = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float16)
    scale = codecs.LatentScale.from_manifest(Latent((2, 4, 4, 3), tuple(mean), tuple(spread)))
    normal = scale.normalise(latent)
    np.testing.assert_allclose(normal, (latent.astype(np.float64) - mean) / spread, rtol=1e-5, atol=1e-6)
    assert normal.dtype == np.float32
    np.testing.assert_allclose(scale.denormalise(normal), latent, rtol=1e-5, atol=1e-6)


def test_the_published_codec_is_known_by_its_sizes_and_needs_its_weights():
    hunyuan = codecs.sizes("hunyuan", time=4, height=8, width=8)
    assert hunyuan.latent_shape(33, 256, 256) == (9, 32, 32, 16)
    assert hunyuan.latent_shape(1, 64, 96) == (1, 8, 12, 16)
    with pytest.raises(UserError, match="frames=32: must be 1 more than a multiple of the codec's 4"):
        hunyuan.latent_shape(32, 256, 256)
    with pytest.raises(UserError, match=r"codec\.weights is empty; name the folder"):
        codecs.codec("hunyuan", time=4, height=8, width=8)
