"""Image to video and continuation: the conditioning input, guidance by the image, and refusals by name."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paris_jax import Ensemble
from paris_jax.data import video as video_io
from paris_jax.data.decoding import footage
from paris_jax.diffusion import cond_masks
from paris_jax.diffusion.guidance import STEADY, Strength
from paris_jax.encoders import codecs
from paris_jax.encoders.codecs import LatentScale, Pixels, to_float
from paris_jax.ensemble import sparse_velocity
from paris_jax.ensemble.conditioning import CondFrames, Condition
from paris_jax.ensemble.routing import Routing, router_logits
from paris_jax.errors import UserError
from paris_jax.models import functional
from tests.conftest import no_text
from tests.ensemble.test_mixture import NETWORK, ROUTER, condition_of, inputs, plan_of, random_params, together

TELLING = dataclasses.replace(NETWORK, cond_frames=True)
LISTENING = dataclasses.replace(ROUTER, cond_frames=True)
FULL = Routing("full")
PROMPTS = ["a large red circle moving right fast on a white ground", "a small blue digit nine on a black ground"]


def arrays():
    return together([random_params(TELLING, k) for k in range(3)], random_params(LISTENING, 7))


def kept_of(x, first=True):
    x_0 = 0.5 * x[::-1]
    return cond_masks.cond_input(x_0, jnp.broadcast_to(jnp.arange(x.shape[1]) < 1, x.shape[:2]) & first)


def plan(guidance="", image_guidance=False, routing=FULL, **how):
    return plan_of(routing, network=TELLING, router=LISTENING, guidance=guidance, image_guidance=image_guidance, **how)


def velocity(plan, condition, x, t):
    return sparse_velocity.ensemble_velocity(plan, arrays(), x, t, condition, jnp.int32(0))[0]


def field(plan, condition, x, t, step, steps=20):
    return sparse_velocity._guided_velocity(plan, arrays(), x, t, condition, jnp.int32(0), (), step, steps)[0]


# The conditioning input.


@pytest.mark.parametrize("config", [TELLING, LISTENING])
def test_the_conditioning_input_is_zero_initialised_and_absent_frames_are_zeros(config):
    x, t, text = inputs()
    words = (text.tokens, text.length, text.pooled) if config is TELLING else (text.pooled,)
    fresh = random_params(config, 3)
    fresh["cond_in"] = jax.tree.map(jnp.zeros_like, fresh["cond_in"])
    plain = {k: v for k, v in fresh.items() if k != "cond_in"}
    without = functional.apply(dataclasses.replace(config, cond_frames=False), plain, x, t, *words)
    np.testing.assert_array_equal(functional.apply(config, fresh, x, t, *words, kept_of(x)), without)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(functional.init(config, jax.random.key(0))["cond_in"]))
    params = random_params(config, 3)
    nothing = functional.apply(config, params, x, t, *words)
    np.testing.assert_array_equal(functional.apply(config, params, x, t, *words, jnp.zeros_like(kept_of(x))), nothing)
    assert np.abs(functional.apply(config, params, x, t, *words, kept_of(x)) - nothing).max() > 1e-3


def test_the_conditioning_input_is_one_matrix_of_mask_and_latent():
    more = functional.count(TELLING) - functional.count(NETWORK)
    assert more == (NETWORK.channels + 1) * 4 * NETWORK.hidden + NETWORK.hidden


# Guidance by the image.


@pytest.mark.parametrize("conditioning", ["prompt", "branch"])
def test_three_branches_are_open_soras_formula(conditioning):
    """v_00 + g_img (v_i0 - v_00) + g_txt (v_it - v_i0), each branch asked for on its own."""
    x, t, text = inputs()
    kept, one = kept_of(x), plan(router_conditioning=conditioning)
    both = condition_of(text, 4.0, image_scale=jnp.float32(2.5))
    guided = velocity(
        plan("classifier_free", True, router_conditioning=conditioning), dataclasses.replace(both, cond=kept), x, t
    )
    alone = [(text, kept), (no_text(text), kept), (no_text(text), None)]
    if conditioning == "prompt":  # one router's answer for all branches, which a single branch cannot be asked for
        return _check_with_the_prompts_weights(guided, alone, x, t, text, kept)
    v_it, v_i0, v_00 = (velocity(one, Condition(words, words, Strength(1.0), k), x, t) for words, k in alone)
    np.testing.assert_allclose(guided, v_00 + 2.5 * (v_i0 - v_00) + 4.0 * (v_it - v_i0), rtol=2e-4, atol=2e-4)


def _check_with_the_prompts_weights(guided, alone, x, t, text, kept):
    logits = router_logits(plan().router, arrays().router, arrays().clusters, x, t, text.pooled, kept)
    merged = [
        sparse_velocity.merge_experts(plan(), arrays(), jax.nn.softmax(logits), x, t, words, k)[0] for words, k in alone
    ]
    v_it, v_i0, v_00 = merged
    np.testing.assert_allclose(guided, v_00 + 2.5 * (v_i0 - v_00) + 4.0 * (v_it - v_i0), rtol=2e-4, atol=2e-4)


def test_an_image_scale_of_one_is_two_branches_and_projection_stands_beside_it():
    x, t, text = inputs()

    def condition(image):
        return dataclasses.replace(condition_of(text, 4.0, image_scale=jnp.float32(image)), cond=kept_of(x))

    two = velocity(plan("classifier_free"), condition(9.0), x, t)
    three = velocity(plan("classifier_free", True), condition(1.0), x, t)
    np.testing.assert_allclose(three, two, rtol=2e-5, atol=2e-5)
    by_image = [velocity(plan(m, True), condition(3.0), x, t) for m in ("classifier_free", "projected")]
    text_only = [velocity(plan(m), condition(3.0), x, t) for m in ("classifier_free", "projected")]
    np.testing.assert_allclose(by_image[1] - text_only[1], by_image[0] - text_only[0], rtol=1e-3, atol=1e-3)


def test_oscillation_leaves_out_every_other_step_from_the_tenth_on_and_its_cost(monkeypatch):
    x, t, text = inputs()
    passes, run = [], sparse_velocity.expert_velocity

    def counted(*given):
        jax.debug.callback(lambda: passes.append(1))
        return run(*given)

    monkeypatch.setattr(sparse_velocity, "expert_velocity", counted)
    whole = plan("classifier_free", True, Routing("top_k", 1), expert_batch_size=1)
    at_step = jax.jit(lambda condition, step: field(whole, condition, x, t, step))

    def velocity_at(step, text_low=False, image_low=False, scale=4.0, image=2.5):
        """The velocity, and how many times an expert was asked."""
        lows = {"text_oscillates": jnp.array(text_low), "image_oscillates": jnp.array(image_low)}
        condition = condition_of(text, scale, image_scale=jnp.float32(image), **lows)
        passes.clear()
        v = at_step(dataclasses.replace(condition, cond=kept_of(x)), jnp.int32(step))
        jax.effects_barrier()
        return np.asarray(jax.block_until_ready(v)), len(passes)

    steady, cost = velocity_at(STEADY + 1)
    assert cost == 3 * len(x)
    for text_low, image_low, branches in ((True, False, 3), (False, True, 2), (True, True, 1)):
        for step in (3, STEADY):
            np.testing.assert_allclose(velocity_at(step, text_low, image_low)[0], steady, rtol=1e-5)
        low, cost = velocity_at(STEADY + 1, text_low, image_low)
        lowered, _ = velocity_at(0, scale=1.0 if text_low else 4.0, image=1.0 if image_low else 2.5)
        np.testing.assert_allclose(low, lowered, rtol=2e-4, atol=2e-4)
        assert cost == branches * len(x)


def test_the_ramp_grows_along_the_frames_and_falls_over_the_steps():
    strength = Strength(4.0, image_scale=3.0, ramp=True)
    np.testing.assert_allclose(strength.image_scales(0, 10, 5), [1, 1.5, 2, 2.5, 3])
    np.testing.assert_allclose(strength.image_scales(5, 10, 5), [1, 1.25, 1.5, 1.75, 2])
    np.testing.assert_allclose(Strength(4.0, image_scale=3.0).image_scales(5, 10, 5), 3)


# What a caller gives.


CODEC, SCALE, SHAPE = Pixels(1, 2, 2), LatentScale((0.1,), (0.5,)), (5, 4, 6, 12)
PICTURE = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)


def encoded(count=1, codec=CODEC, shape=SHAPE, fps=8.0, **given):
    frames = CondFrames(**given)
    frames.check(False)
    return np.asarray(frames.encode(codec, SCALE, shape, count, fps))


def frames_of(cond, codec=CODEC):
    """Which latent frames are given, and the video that they are."""
    return cond[..., 0].any((2, 3)).astype(int).tolist(), codec.decode(SCALE.denormalise(cond[..., 1:]))


def test_pictures_become_the_first_and_the_last_frame():
    other = PICTURE[::-1]
    given, shown = frames_of(encoded(2, image=PICTURE, last_image=[PICTURE, other]))
    assert given == [[1, 0, 0, 0, 1]] * 2
    for row, last in enumerate((PICTURE, other)):
        np.testing.assert_allclose(shown[row, 0], to_float(PICTURE), atol=1e-6)
        np.testing.assert_allclose(shown[row, -1], to_float(last), atol=1e-6)
    np.testing.assert_allclose(encoded(image=to_float(PICTURE)), encoded(image=PICTURE), atol=1e-6)


def test_an_image_is_repeated_where_the_codec_packs_frames_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        given, shown = frames_of(encoded(codec=Pixels(2, 2, 2), shape=(3, 4, 6, 24), image=PICTURE), Pixels(2, 2, 2))
    assert given == [[1, 0, 0]] and "repeated for all" in caplog.text
    np.testing.assert_allclose(shown[0, :2], np.stack([to_float(PICTURE)] * 2), atol=1e-6)


def test_files_are_read_and_a_video_is_continued_from_its_last_frames(tmp_path):
    moving = np.random.default_rng(1).integers(0, 256, (6, 8, 12, 3), np.uint8)
    video_io.write_png(tmp_path / "one.png", PICTURE)
    np.testing.assert_array_equal(encoded(image=str(tmp_path / "one.png")), encoded(image=PICTURE))
    video_io.write_video(tmp_path / "clip.gif", np.repeat(moving, 1, 0), 8.0, scale=1)
    given, shown = frames_of(encoded(video=tmp_path / "clip.gif", num_cond_frames=3))
    assert given == [[1, 1, 1, 0, 0]]
    read = np.stack(list(footage.at_rate(tmp_path / "clip.gif", 8.0)))
    assert read.shape == moving.shape
    np.testing.assert_allclose(shown[0, :3], to_float(read[3:]), atol=1e-6)
    _, shown = frames_of(encoded(video=moving, num_cond_frames=2))
    np.testing.assert_allclose(shown[0, :2], to_float(moving[4:]), atol=1e-6)


def test_a_video_at_another_rate_is_read_at_the_ensembles(tmp_path):
    gray = np.stack([np.full((8, 12, 3), 10 * k, np.uint8) for k in range(8)])
    video_io.write_video(tmp_path / "clip.gif", gray, 20.0, scale=1)
    read = np.stack(list(footage.at_rate(tmp_path / "clip.gif", 10.0)))
    np.testing.assert_array_equal(read[:, 0, 0, 0], [0, 20, 40, 60])
    assert len(list(footage.at_rate(tmp_path / "clip.gif", 40.0))) == 16


def test_another_size_is_scaled_and_another_aspect_cropped_or_boxed():
    smooth = np.add.outer(np.arange(24), np.arange(36))[..., None].repeat(3, -1).astype(np.uint8) * 4
    _, smaller = frames_of(encoded(image=smooth))
    expected = smooth.reshape(8, 3, 12, 3, 3).mean((1, 3)) / 127.5 - 1
    np.testing.assert_allclose(smaller[0, 0], expected, atol=2 / 127.5)
    square = np.full((12, 12, 3), 200, np.uint8)
    with pytest.raises(UserError, match=r"image is 12 x 12 and the video 12 x 8 .*fit='crop'.*'letterbox'"):
        encoded(image=square)
    _, cropped = frames_of(encoded(image=square, fit="crop"))
    np.testing.assert_allclose(cropped[0, 0], 200 / 127.5 - 1, atol=1e-6)
    _, boxed = frames_of(encoded(image=square, fit="letterbox"))
    np.testing.assert_allclose(boxed[0, 0, :, 2:10], 200 / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(boxed[0, 0, :, [0, 1, 10, 11]], -1, atol=1e-6)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"image": PICTURE, "video": PICTURE[None]}, "both set the first frame"),
        ({"image": PICTURE, "fit": "stretch"}, "fit='stretch': must be one of crop, letterbox"),
        ({"num_cond_frames": 2, "image": PICTURE}, "num_cond_frames=2: there is no video to condition on"),
        ({"fit": "crop"}, "fit=crop: there is no conditioning frame to fit"),
        ({"image": [PICTURE] * 3}, "image names 3 for 2 prompts"),
        ({"image": PICTURE[..., :2]}, r"image has shape \(8, 12, 2\); must be \(height, width, 3\), or a file"),
        ({"image": PICTURE.astype(np.float32)}, "image must be uint8, or floats from -1 to 1"),
        ({"image": PICTURE.astype(np.int64)}, "image must be uint8, or floats from -1 to 1"),
        ({"video": np.stack([PICTURE] * 5)}, "video has 5 frames: the number .* one of 1, 2, 3, 4"),
        (
            {"video": np.stack([PICTURE] * 2), "num_cond_frames": 3},
            "num_cond_frames=3 where the video has 2 .*one of 1, 2;",
        ),
        ({"image": "no-such.png"}, "no-such.png"),
    ],
)
def test_invalid_conditioning_frames_are_refused_in_a_sentence(given, said):
    with pytest.raises(UserError, match=said):
        encoded(2, **given)


# An ensemble that was trained for it.


@pytest.fixture(scope="module")
def ensemble(trained):
    return Ensemble.load(trained.ensemble)


def test_training_makes_use_of_the_input(ensemble):
    (stack,) = ensemble._placed.params.experts
    assert float(jnp.abs(stack["cond_in"]["kernel"]).max()) > 0
    assert float(jnp.abs(ensemble._placed.params.router["cond_in"]["kernel"]).max()) > 0


def test_image_to_video_samples_differ_from_those_without_an_image(ensemble):
    picture = np.full((8, 8, 3), 90, np.uint8)
    how = {"num_inference_steps": 3, "seed": 2}
    plain = ensemble.sample(PROMPTS, **how).videos
    given = ensemble.sample(PROMPTS, image=picture, **how).videos
    assert np.isfinite(given).all() and np.abs(given - plain).max() > 0
    frames = ensemble.codec.time  # conditioning latents are decoded as they were given
    np.testing.assert_allclose(given[:, :frames], codecs.to_float(picture)[0, 0, 0], atol=1e-5)
    assert np.abs(given[:, frames:] - codecs.to_float(picture)[0, 0, 0]).max() > 0.01
    beside = ensemble.sample(PROMPTS[:1], image=[picture], **how).videos
    np.testing.assert_allclose(beside[0], given[0], atol=1e-4)
    continued = ensemble.sample(
        PROMPTS, video=np.stack([picture] * 2), guidance_scale=1.0, image_guidance_scale=1.0, **how
    )
    assert continued.videos.shape == plain.shape
    x, text = ensemble.noise(2), ensemble.encode(PROMPTS)
    given = cond_masks.cond_input(x, jnp.array([[True, False]] * 2))
    routes = [ensemble.route(x, jnp.array([0.4, 0.9]), text, cond=k) for k in (None, given)]
    assert np.abs(routes[0] - routes[1]).max() > 0
    with pytest.raises(UserError, match="cond and images or videos both set"):
        ensemble.sample(PROMPTS, image=picture, cond=given)
    with pytest.raises(UserError, match=r"cond has shape .*; must be \(2, 2, 4, 4, 25\)"):
        ensemble.sample(PROMPTS, cond=given[..., 1:])
    with pytest.raises(UserError, match="cond holds values that are not finite"):
        ensemble.sample(PROMPTS, cond=given.at[0, 0].set(jnp.nan))
    with pytest.raises(UserError, match="All 1 latent frames are conditioning frames"):
        ensemble.sample(PROMPTS, image=picture, num_frames=2)


def test_a_velocity_is_guided_only_on_request(ensemble):
    x, text = ensemble.noise(2), ensemble.encode(PROMPTS)
    given, t = cond_masks.cond_input(x, jnp.array([[True, False]] * 2)), jnp.array([0.4, 0.9])
    plain = ensemble.velocity(x, t, text, cond=given)
    np.testing.assert_array_equal(ensemble.velocity(x, t, text, cond=given, image_guidance_scale=1.0), plain)
    assert np.abs(ensemble.velocity(x, t, text, cond=given, image_guidance_scale=4.0) - plain).max() > 1e-5
    apart = [ensemble.disagreement(x, t, text, cond=k) for k in (None, given)]
    assert np.abs(apart[0] - apart[1]).max() > 0


def test_an_ensemble_without_the_conditioning_input_is_refused():
    with pytest.raises(UserError, match=r"Experts 0, 1, 2 cannot take conditioning frames; train with config\.masks"):
        Ensemble.load("bundled:shapes").sample(PROMPTS, image=np.zeros((20, 20, 3), np.uint8))
