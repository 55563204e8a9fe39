"""`Ensemble` as people use it: prompts to videos, seed-exact, with every routing rule, and refusals by name."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paris_jax import Ensemble
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.commands.assemble import assemble
from paris_jax.commands.sample import Output, sample
from paris_jax.commands.status import status
from paris_jax.diffusion import timesteps
from paris_jax.ensemble import sparse_velocity
from paris_jax.errors import UserError

PROMPTS = [
    "a large red circle moving right fast on a white ground",
    "a small blue digit nine drifting up left slowly on a black ground",
]


@pytest.fixture(scope="module")
def ensemble(trained):
    return Ensemble.load(trained.ensemble)


def test_samples_are_videos_of_the_trained_size_with_their_routing(ensemble):
    samples = ensemble.sample(PROMPTS, num_inference_steps=3, seed=5)
    assert samples.videos.shape == (2, 4, 8, 8, 3) and samples.videos.dtype == np.float32
    assert np.abs(samples.videos).max() <= 1
    assert samples.routing.shape == (3, 2, 3)
    np.testing.assert_allclose(samples.routing.sum(-1), 1, rtol=1e-6)
    assert samples.clusters == [0, 1, 2] and samples.prompts == PROMPTS and samples.fps == 8.0


def test_a_seed_gives_the_same_video_every_time_whatever_stands_beside_it(ensemble):
    both = ensemble.sample(PROMPTS, num_inference_steps=3, seed=5)
    again = ensemble.sample(PROMPTS, num_inference_steps=3, seed=5)
    np.testing.assert_array_equal(both.videos, again.videos)
    alone = ensemble.sample(PROMPTS[:1], num_inference_steps=3, seed=5)
    np.testing.assert_allclose(alone.videos[0], both.videos[0], atol=1e-4)
    other = ensemble.sample(PROMPTS, num_inference_steps=3, seed=6)
    assert np.abs(other.videos - both.videos).max() > 0.1


def test_other_prompts_seeds_strengths_and_schedules_do_not_compile_again(ensemble):
    """The first call compiles; afterwards only another program does, as that of another number of prompts."""
    sparse_velocity.take_steps.clear_cache()  # other tests may have compiled the same
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
    )
    how = {"num_inference_steps": 3, "guidance_scale": 2.5}
    longer = "a large striped blue square circling clockwise fast on a noisy dark ground"
    ensemble.sample(PROMPTS, seed=1, **how)
    ensemble.sample(PROMPTS, fixed_expert=[0, 1, 1], **how)
    assert compiled  # it is counted at all
    compiled.clear()
    ensemble.sample([longer, PROMPTS[0]], seed=2, **how)
    ensemble.sample(PROMPTS, seed=1, num_inference_steps=3, guidance_scale=4.0)
    ensemble.sample(PROMPTS, fixed_expert=[2, 0, 1], **how)
    ensemble.sample(PROMPTS, noise=ensemble.noise(2, 3), **how)
    assert not compiled
    programs = sparse_velocity.take_steps._cache_size()
    ensemble.sample(PROMPTS, seed=1, num_inference_steps=4, guidance_scale=2.5)
    assert sparse_velocity.take_steps._cache_size() == programs
    compiled.clear()
    ensemble.sample(PROMPTS[:1], seed=1, **how)
    assert compiled


@pytest.mark.parametrize(
    "how",
    [
        {"routing": "full", "top_k": 1},
        {"routing": "threshold", "top_k": 99},
        {"routing": "top_k", "threshold": 0.5},
        {"top_k": 1, "threshold": 1.0},
        {"fixed_expert": 1, "top_k": 3},
        {"fixed_expert": 1, "routing": "full"},
    ],
)
def test_two_rules_at_once_are_refused_by_name(how, ensemble):
    with pytest.raises(UserError, match=r"different routing rules; give one of them") as refusal:
        ensemble.sample(PROMPTS, num_inference_steps=2, **how)
    assert all(f"{name}=" in str(refusal.value) for name in how)


@pytest.mark.parametrize("seed", [-1, 2**64, 99999999999999999999])
def test_a_seed_that_no_key_can_be_made_of_is_refused(seed, ensemble):
    with pytest.raises(UserError, match=rf"seed={seed}: must be from 0 to 18446744073709551615"):
        ensemble.sample(PROMPTS, num_inference_steps=2, seed=seed)


def test_numbers_of_numpy_are_numbers(ensemble):
    same = [
        ensemble.sample(PROMPTS, num_inference_steps=2, fixed_expert=k).videos
        for k in (1, np.int64(1), np.array([1, 1]))
    ]
    np.testing.assert_array_equal(same[0], same[1])
    np.testing.assert_array_equal(same[0], same[2])


def test_given_noise_replaces_the_seed(ensemble):
    noise = ensemble.noise(2, seed=5)
    np.testing.assert_array_equal(
        ensemble.sample(PROMPTS, num_inference_steps=2, noise=noise).videos,
        ensemble.sample(PROMPTS, num_inference_steps=2, seed=5).videos,
    )


@pytest.mark.parametrize(
    "how, used",
    [({"top_k": 1}, 1), ({"top_k": 2}, 2), ({"routing": "full"}, 3), ({"threshold": 0.0}, 1), ({"threshold": 1.0}, 3)],
)
def test_routing_rules_use_as_many_experts_as_they_say(how, used, ensemble):
    routing = ensemble.sample(PROMPTS, num_inference_steps=2, **how).routing
    assert ((routing > 0).sum(-1) == used).all()


def test_experts_can_be_forced_step_by_step(ensemble):
    routing = ensemble.sample(PROMPTS, num_inference_steps=3, fixed_expert=[2, 0, 2]).routing
    np.testing.assert_array_equal(routing.argmax(-1), [[2, 2], [0, 0], [2, 2]])
    np.testing.assert_array_equal(ensemble.sample(PROMPTS, num_inference_steps=2, fixed_expert=1).routing[..., 1], 1)


def test_a_single_part_is_sampled_like_an_ensemble_forced_to_it(trained, ensemble):
    single = Ensemble.single(trained.export(Role("expert", 1)), guidance_scale=2.0)
    noise = ensemble.noise(2)
    fixed_expert = ensemble.sample(PROMPTS, num_inference_steps=3, guidance_scale=2.0, fixed_expert=1, noise=noise)
    np.testing.assert_allclose(
        single.sample(PROMPTS, num_inference_steps=3, noise=noise).videos, fixed_expert.videos, atol=1e-4
    )


def test_velocity_and_route_are_open_to_measurement(ensemble):
    text = ensemble.encode(PROMPTS)
    x, t = ensemble.noise(2), jnp.array([0.3, 0.9])
    assert ensemble.velocity(x, t, text).shape == x.shape
    probabilities = ensemble.route(x, t, text)
    assert probabilities.shape == (2, 3)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "how, named",
    [
        ({"top_k": 4}, "top_k=4: this ensemble has 3 experts"),
        ({"top_k": 0}, "top_k=0"),
        ({"threshold": 2.0}, "threshold=2.0"),
        ({"routing": "fulll"}, "did you mean 'full'"),
        ({"solver": "eular"}, "did you mean 'euler'"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"fixed_expert": 7}, "fixed_expert="),
        ({"fixed_expert": [0, 1]}, "fixed_expert names 2 steps"),
        ({"noise": np.zeros((1, 2, 2, 2, 2))}, "noise has shape"),
        ({"seed": [1, 2, 3]}, "seed names 3 for 2 prompts; give one seed for all, or one for each"),
        ({"seed": [1, -2]}, "seed=-2: must be from 0"),
        ({"seed": 1.5}, "seed=1.5: must be a whole number"),
        ({"fixed_expert": 0.5}, "fixed_expert=0.5: must be a whole number"),
        ({"drop_experts": [1.5]}, "drop_experts=1.5: must be a whole number"),
        ({"expert_batch_size": 1.5}, "expert_batch_size=1.5: must be a whole number"),
        ({"top_k": 1.5}, "top_k=1.5: must be a whole number"),
        ({"expert_batch_size": -1}, "expert_batch_size=-1: must be at least 0"),
        ({"num_inference_steps": None, "timesteps": [1, 0.5]}, "timesteps=1, 0.5: must fall from 1"),
        ({"num_inference_steps": None, "timesteps": [1, 0.5, 0.5, 0]}, "timesteps=1, 0.5, 0.5, 0: must fall"),
        ({"timesteps": [1, 0]}, "timesteps has 1 steps where num_inference_steps=3; leave num_inference_steps out"),
        ({"negative_prompt": ["a", "b", "c"], "guidance_scale": 2.0}, "negative_prompt names 3 for 2 prompts"),
        ({"negative_prompt": "a red", "guidance_scale": 1.0}, "negative_prompt needs guidance"),
        ({"height": 10}, "height=10: must be a multiple of 4; the nearest is 8 or 12"),
        ({"width": 1}, "width=1: must be a multiple of 4; the nearest is 4"),
        ({"num_frames": 3}, "num_frames=3: must be a multiple of 2; the nearest is 2 or 4"),
        ({"guidance_method": "apg"}, "guidance_method='apg': must be one of classifier_free, projected"),
        (
            {"guidance_interval": (0.7, 0.3)},
            r"guidance_interval=\(0.7, 0.3\): its first timestep must not be above the second",
        ),
        ({"guidance_rescale": 1.5}, "guidance_rescale=1.5: must be between 0.0 and 1.0"),
        ({"guidance_momentum": -1.0}, "guidance_momentum=-1.0: must be above -1 and below 1"),
        ({"router_temperature": 0.0}, "router_temperature=0.0: must be at least 0.0001"),
        ({"router_conditioning": "text"}, "router_conditioning='text': must be one of prompt, branch, null"),
    ],
)
def test_invalid_sampling_parameters_are_refused_by_name(how, named, ensemble):
    with pytest.raises(UserError, match=named):
        ensemble.sample(PROMPTS, **({"num_inference_steps": 3} | how))


def test_the_velocity_may_stand_in_a_callers_own_program(ensemble):
    x, t, text = ensemble.noise(2), jnp.array([0.3, 0.8]), ensemble.encode(PROMPTS)
    inside = jax.jit(lambda x: ensemble.velocity(x, t, text))(x)
    np.testing.assert_allclose(inside, ensemble.velocity(x, t, text), atol=1e-5)


def test_an_ensemble_may_be_used_first_inside_a_callers_own_program():
    ensemble = Ensemble.load("bundled:shapes", drop_encoders=True)
    words, x = ensemble.encode(["a ball"]), ensemble.noise(1)
    inside = jax.jit(lambda x: ensemble.velocity(x, jnp.array([0.5]), words))(x)
    np.testing.assert_allclose(ensemble.velocity(x, jnp.array([0.5]), words), inside, atol=1e-4)


def test_expert_batch_size_does_not_change_the_samples(ensemble):
    how = {"num_inference_steps": 2, "seed": 5, "guidance_scale": 3.0, "top_k": 2}
    one, *others = (ensemble.sample(PROMPTS, expert_batch_size=rows, **how).videos for rows in (0, 1, 2, 99))
    for other in others:
        np.testing.assert_allclose(other, one, atol=1e-4)
    params = [dataclasses.replace(ensemble.params, expert_batch_size=n) for n in (0, 1)]
    passes = [ensemble._prepare(p, ensemble.encode(PROMPTS), [], 1, None, False) for p in params]
    assert [config.rows_per_pass((4, 4, 10, 10, 24)) for config, *_ in passes] == [2, 1]  # both branches, or one


@pytest.mark.parametrize(
    "prompt, named", [("", "empty"), ("  ", "empty"), ("word " * 100, "100 words; the maximum is 24")]
)
def test_an_empty_or_too_long_prompt_is_refused(prompt, named, ensemble):
    with pytest.raises(UserError, match=named):
        ensemble.sample([prompt])
    with pytest.raises(UserError):
        ensemble.sample([])


@pytest.mark.parametrize("name, near", [("steps", ""), ("solvers", "did you mean 'solver'")])
def test_a_keyword_that_no_one_takes_is_an_error(name, near, ensemble):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'.*{near}"):
        ensemble.sample(PROMPTS, **{name: 3})


def test_prompts_may_have_seeds_of_their_own(ensemble):
    """Each is then what it would be alone, also where noise is added on the way."""
    for solver in ("euler", "ancestral"):
        both = ensemble.sample(PROMPTS, num_inference_steps=3, seed=[11, 4], solver=solver)
        for i, seed in enumerate((11, 4)):
            alone = ensemble.sample(PROMPTS[i], num_inference_steps=3, seed=seed, solver=solver)
            np.testing.assert_allclose(alone.videos[0], both.videos[i], atol=1e-4)
    other = ensemble.sample(PROMPTS, num_inference_steps=3, seed=[11, 5], solver="ancestral")
    assert np.abs(other.videos[1] - both.videos[1]).max() > 0.1


def test_the_steps_may_be_given_one_by_one(ensemble):
    grid = np.asarray(timesteps.timestep_schedule(3, ensemble.timestep_shift))
    np.testing.assert_array_equal(
        ensemble.sample(PROMPTS, timesteps=grid).videos, ensemble.sample(PROMPTS, num_inference_steps=3).videos
    )
    assert ensemble.sample(PROMPTS, timesteps=[1, 0.7, 0]).routing.shape == (2, 2, 3)


def test_the_timestep_shift_is_that_of_the_sampled_size_or_the_one_given(ensemble, monkeypatch):
    """Open-Sora 2.0's rule depends on frames and pixels; a constant does not."""
    steps = {"num_inference_steps": 2}

    def schedule(**how):
        seen = []
        monkeypatch.setattr(ensemble._placed, "draw", lambda *given: seen.append(given[2][1]) or draw(*given))
        ensemble.sample(PROMPTS, **(steps | how))
        return np.asarray(seen[0])

    draw = ensemble._placed.draw
    constant = timesteps.timestep_schedule(2, ensemble.timestep_shift)
    np.testing.assert_array_equal(schedule(), constant)
    frames = 2 * ensemble.latent_shape[0] * ensemble.codec.time
    np.testing.assert_array_equal(schedule(num_frames=frames), constant)
    np.testing.assert_array_equal(schedule(timestep_shift=2.5), timesteps.timestep_schedule(2, 2.5))
    monkeypatch.setattr(ensemble, "timestep_shift", 0.0)  # the rule, in a manifest
    T = ensemble.latent_shape[0]
    np.testing.assert_array_equal(schedule(), timesteps.timestep_schedule(2, T**0.5))
    np.testing.assert_array_equal(schedule(num_frames=frames), timesteps.timestep_schedule(2, (2 * T) ** 0.5))
    with pytest.raises(UserError, match="leave timestep_shift out"):
        ensemble.sample(PROMPTS, timesteps=[1, 0], timestep_shift=2.0)


def test_a_negative_prompt_and_projected_guidance_change_the_samples(ensemble):
    how = {"num_inference_steps": 3, "seed": 5, "guidance_scale": 3.0}
    drawn = [
        ensemble.sample(PROMPTS, **how),
        ensemble.sample(PROMPTS, negative_prompt=PROMPTS[1], **how),
        ensemble.sample(PROMPTS, negative_prompt=PROMPTS[::-1], **how),
        ensemble.sample(PROMPTS, guidance_method="projected", **how),
        ensemble.sample(PROMPTS, guidance_interval=(0.0, 0.5), **how),
    ]
    for i, one in enumerate(drawn):
        assert all(np.abs(one.videos - other.videos).max() > 1e-4 for other in drawn[:i])
    away_from_itself = ensemble.sample(PROMPTS, negative_prompt=PROMPTS, **how)
    plain = ensemble.sample(PROMPTS, **(how | {"guidance_scale": 1.0}))
    np.testing.assert_allclose(away_from_itself.videos, plain.videos, atol=1e-3)


@pytest.mark.parametrize("size", [{"num_frames": 6}, {"height": 12, "width": 4}, {"num_frames": 2, "width": 16}])
def test_videos_of_other_sizes_than_trained(size, ensemble):
    full = {"num_frames": 4, "height": 8, "width": 8} | size
    samples = ensemble.sample(PROMPTS, num_inference_steps=2, **size)
    assert samples.videos.shape == (2, full["num_frames"], full["height"], full["width"], 3)
    noise = ensemble.noise(2, **size)
    np.testing.assert_array_equal(ensemble.sample(PROMPTS, num_inference_steps=2, noise=noise).videos, samples.videos)


def test_an_ensemble_works_without_one_of_its_experts(trained, micro, tmp_path):
    shutil.copytree(trained.path, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "data"))
    run = RunFolder(tmp_path / "run")
    shutil.rmtree(run.role(Role("expert", 1)))
    assemble(micro, run, allow_missing=True)
    remaining = Ensemble.load(run.ensemble)
    assert remaining.clusters == [0, 2]
    samples = remaining.sample(PROMPTS, num_inference_steps=2, routing="full")
    assert samples.routing.shape == (2, 2, 2)
    dropped = Ensemble.load(trained.ensemble).sample(PROMPTS, num_inference_steps=2, routing="full", drop_experts=1)
    np.testing.assert_allclose(samples.videos, dropped.videos, atol=1e-5)
    np.testing.assert_allclose(samples.routing, dropped.routing[..., [0, 2]], atol=1e-6)
    with pytest.raises(UserError, match="fixed_expert=\\[1\\]: this ensemble has the experts 0, 2"):
        remaining.sample(PROMPTS, fixed_expert=1)
    states = {stage: state for stage, state, _ in status(run)}
    assert states["train expert 1"] == "missing" and states["train expert 0"] == "done"


def test_the_sample_command_writes_files_and_shows_expert_use(trained, tmp_path, capsys):
    paths = sample(str(trained.ensemble), PROMPTS, num_inference_steps=2, seed=3)
    assert [p.suffix for p in paths] == [".mp4"] * len(PROMPTS) and all(p.stat().length > 500 for p in paths)
    assert "expert 0" in capsys.readouterr().out
    for path in paths:
        path.unlink()
    for ending in (".gif", ".png"):
        (path,) = sample(
            str(trained.ensemble), PROMPTS, Output(f"{tmp_path}/x{ending}", grid=True), num_inference_steps=2
        )
        assert path.stat().length > 500
    with pytest.raises(UserError, match=r"ending '.avi'"):
        sample(str(trained.ensemble), PROMPTS[:1], Output(str(tmp_path / "x.avi")))
    with pytest.raises(UserError, match="--prompt is missing"):
        sample(str(trained.ensemble), [])


def test_an_unknown_word_is_warned_about(trained, tmp_path, caplog):
    sample(str(trained.ensemble), ["a red zebra"], Output(str(tmp_path / "z.gif")), num_inference_steps=1)
    assert "'zebra'" in caplog.text
