"""What is seen while videos are drawn, how it is stopped, and which expert is to blame when values are not finite."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paris_jax import Ensemble
from paris_jax.diffusion import solvers
from paris_jax.ensemble import sparse_velocity
from paris_jax.ensemble.progress import Interrupted, Watcher, run_with_progress
from paris_jax.errors import UserError
from paris_jax.training import distributed

PROMPTS = ["a large red circle moving right fast on a white ground", "a small blue digit nine on a black ground"]


@pytest.fixture(scope="module")
def ensemble():
    return Ensemble.load("bundled:shapes")


def test_previews_are_on_schedule_and_do_not_change_the_samples(ensemble):
    seen = {}
    watched = ensemble.sample(
        PROMPTS, num_inference_steps=7, seed=3, preview_every_steps=3, on_preview=seen.__setitem__
    )
    alone = ensemble.sample(PROMPTS, num_inference_steps=7, seed=3)
    np.testing.assert_allclose(watched.videos, alone.videos, atol=1e-4)
    np.testing.assert_allclose(watched.routing, alone.routing, atol=1e-4)
    assert list(seen) == [3, 6]
    assert all(videos.shape == alone.videos.shape for videos in seen.values())
    far = [np.abs(videos - alone.videos).mean() for videos in seen.values()]
    assert 0 < far[1] < far[0] < 0.5  # nearer and nearer to what is drawn in the end


def test_a_callback_gets_the_routing_weights_of_its_step(ensemble):
    seen = []
    samples = ensemble.sample(
        PROMPTS, num_inference_steps=4, top_k=2,
        callback_on_step_end=lambda _, step, t, tensors: seen.append(np.asarray(tensors["routing"])),
    )  # fmt: skip
    np.testing.assert_array_equal(np.stack(seen), samples.routing)


def test_a_bar_does_not_compile_again_for_every_call(ensemble):
    ensemble.sample(PROMPTS, num_inference_steps=3, progress=True)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
    )
    ensemble.sample(PROMPTS, num_inference_steps=3, seed=1, progress=True)
    assert not compiled


def test_a_preview_that_fails_ends_the_call_with_its_own_error(ensemble):
    def fails(step, videos):
        raise OSError(f"no room at step {step}")

    with pytest.raises(OSError, match="no room at step 2"):
        ensemble.sample(PROMPTS, num_inference_steps=6, preview_every_steps=2, on_preview=fails)


def interrupting(at):
    """A preview that presses Ctrl-C at a step."""

    def preview(step, videos):
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    return preview


@pytest.mark.usefixtures("usual_interrupt")
def test_an_interrupted_draw_returns_the_last_prediction(ensemble):
    seen, stop = {}, interrupting(4)
    with pytest.raises(Interrupted, match=r"interrupted after \d of 9 steps") as interrupted:
        ensemble.sample(
            PROMPTS,
            num_inference_steps=9,
            preview_every_steps=1,
            on_preview=lambda *at: (seen.__setitem__(*at), stop(*at)),
        )
    done, samples = interrupted.value.done, interrupted.value.samples
    assert done == 4 and samples.routing.shape == (4, 2, 3)
    np.testing.assert_array_equal(samples.videos, seen[4])
    assert (
        ensemble.sample(PROMPTS, num_inference_steps=2, progress=True).videos.shape == samples.videos.shape
    )  # the next one works


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 75, marks=pytest.mark.exhaustive)]
)
def test_the_command_can_be_stopped(number, code, tmp_path):
    # Where tests run behind a shell, Ctrl-C may be ignored, and would be by the command.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{heard}; from paris_jax.__main__ import main; main()"]
    command += ["sample", "--ensemble=bundled:shapes", "--num_inference_steps=4000"]
    command += [f"--prompt={PROMPTS[0]}", "--preview_every_steps=5", f"--out={tmp_path}/film.gif"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until = time.time() + 120
    while not (tmp_path / "film-preview.png").exists():
        assert time.time() < until and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    left = [path.name for path in tmp_path.iterdir()]
    if number == signal.SIGINT:
        assert "steps; the prediction at this step is kept" in said
        assert len(left) == 1 and left[0].startswith("film-step") and left[0].endswith("of4000.gif")
    else:
        assert left == []
    assert "Traceback" not in said


@pytest.fixture
def broken():
    """An ensemble whose expert 1 is finite, but answers with values that are not."""
    ensemble = Ensemble.load("bundled:shapes")
    (stack,) = ensemble._placed.params.experts
    bias = stack["velocity_out"]["bias"]
    stack["velocity_out"]["bias"] = bias.at[1].set(3e38)
    kernel = stack["velocity_out"]["kernel"]
    stack["velocity_out"]["kernel"] = kernel.at[1].set(3e38)
    return ensemble


def test_an_expert_that_breaks_is_named_and_can_be_dropped(broken, ensemble, caplog):
    how = {"num_inference_steps": 3, "seed": 2, "routing": "full"}
    with pytest.raises(
        UserError, match=r"At step 0, expert 1 predicted .* not finite; leave out with drop_experts=\[1\]"
    ):
        broken.sample(PROMPTS, **how)
    without = broken.sample(PROMPTS, drop_experts=1, **how)
    np.testing.assert_allclose(without.videos, ensemble.sample(PROMPTS, drop_experts=[1], **how).videos, atol=1e-4)
    assert without.routing[..., 1].max() == 0
    for bar in (False, True):
        dropped = broken.sample(PROMPTS, on_nonfinite="drop", progress=bar, **how)
        np.testing.assert_allclose(dropped.videos, without.videos, atol=1e-4)
        assert dropped.routing[..., 1].max() == 0 and dropped.routing.sum(-1).min() > 0.99
    assert "At step 0, expert 1 predicted values that are not finite; dropped" in caplog.text
    both = broken.sample(PROMPTS, num_inference_steps=3, seed=2, top_k=3, on_nonfinite="drop")  # of three, two are left
    assert (both.routing[..., [0, 2]] > 0).all()
    with pytest.raises(UserError, match=r"expert 1 predicted values that are not finite; lower guidance"):
        broken.sample(PROMPTS, num_inference_steps=3, fixed_expert=1, on_nonfinite="drop")
    x, t, text = broken.noise(2), jnp.array([0.3, 0.8]), broken.encode(PROMPTS)
    with pytest.raises(UserError, match=r"^Expert 1 predicted .* not finite; leave out with drop_experts=\[1\]$"):
        broken.velocity(x, t, text, routing="full")
    with pytest.raises(UserError, match=r"^Expert 1 predicted .* not finite; use others$"):
        broken.disagreement(x, t, text)
    assert np.isfinite(broken.disagreement(x, t, text, drop_experts=1)).all()
    fine = broken.sample(PROMPTS, fixed_expert=0, **(how | {"routing": None}))  # whoever is not asked does no harm
    assert np.isfinite(fine.videos).all()


@pytest.mark.usefixtures("usual_interrupt")
def test_an_interrupted_draw_returns_no_non_finite_prediction(broken):
    with pytest.raises(UserError, match="At step 0, expert 1 predicted values that are not finite"):
        broken.sample(PROMPTS, num_inference_steps=9, routing="full", preview_every_steps=1, on_preview=interrupting(2))
    seen, stop = [], interrupting(2)
    with pytest.raises(UserError, match="At step 0, expert 1 predicted") as refusal:  # and does not begin again
        broken.sample(
            PROMPTS,
            **{"num_inference_steps": 9, "routing": "full", "on_nonfinite": "drop", "preview_every_steps": 1},
            on_preview=lambda *at: (seen.append(at[0]), stop(*at)),
        )
    assert seen == [1, 2] and isinstance(refusal.value.__cause__, Interrupted)


def test_a_router_with_non_finite_weights_is_reported(ensemble):
    broken = Ensemble.load("bundled:shapes")
    bias = broken._placed.params.router["logits_out"]["bias"]
    broken._placed.params.router["logits_out"]["bias"] = bias * jnp.nan
    with pytest.raises(UserError, match="The router's weights are not finite; give fixed_expert=K"):
        broken.sample(PROMPTS, num_inference_steps=2)
    assert np.isfinite(broken.sample(PROMPTS, num_inference_steps=2, fixed_expert=1).videos).all()


def test_a_preview_may_draw_and_watch_itself(ensemble):
    drawn = []

    def draw(step, videos):
        drawn.append(ensemble.sample(PROMPTS[:1], num_inference_steps=1, progress=True))

    ensemble.sample(PROMPTS, num_inference_steps=3, preview_every_steps=2, on_preview=draw, progress=True)
    np.testing.assert_array_equal(drawn[0].videos, ensemble.sample(PROMPTS[:1], num_inference_steps=1).videos)


def previews(every, preview):
    return Watcher(bar=True, every=every, preview=preview)


def test_quick_steps_are_taken_several_at_a_time_and_previews_are_never_late(monkeypatch):
    calls, seconds = [], [0.01]

    def advance(state, first, last):
        calls.append(last - first)
        time.sleep((seconds[-1] if first < 40 else 0.06) * (last - first))
        return dataclasses.replace(state, x=state.x + last - first, data=state.x + last)

    seen = {}
    zero = jnp.zeros(())
    state = solvers.begin(zero, (), ())
    end = run_with_progress(advance, state, 40, previews(9, lambda at, data: seen.__setitem__(at, float(data))))
    assert end.x == 40 and sum(calls) == 40 and calls[0] == 1
    assert list(seen) == [9, 18, 27, 36]
    assert max(calls) >= 4 and len(calls) < 25  # of 10 ms each, at least 50 ms together
    calls.clear()
    assert run_with_progress(advance, state, 64, Watcher()).x == 64
    assert max(calls) >= 4 > 3 >= calls[-2]  # from the fortieth on they are slow, and fewer go together again
    for slowness, together in ((0.25, False), (0.0, True)):  # slow ones, or such as other processes take, too
        calls.clear()
        seconds.append(slowness)
        assert run_with_progress(advance, state, 4, Watcher(bar=True), together).x == 4 and calls == [1, 1, 1, 1]
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run_with_progress(advance, state, 4, previews(2, lambda at, data: seen.clear()))  # a draw of its own
    assert not seen
    shown = previews(2, lambda at, data: pytest.fail("the first process shows it"))
    run_with_progress(advance, state, 4, shown, together=True)


def test_a_callback_sees_every_step_and_may_replace_the_latents():
    seen = []

    def advance(state, first, last):
        return dataclasses.replace(state, x=state.x + last - first)

    def step_end(done, state):
        seen.append((done, float(state.x)))
        return state.x + 100 if done == 2 else None

    state = solvers.begin(jnp.zeros(()), (), ())
    assert run_with_progress(advance, state, 3, Watcher(step_end=step_end)).x == 103
    assert seen == [(1, 1.0), (2, 2.0), (3, 103.0)]


def test_an_error_in_one_process_ends_the_draw_in_all(monkeypatch):
    """Before every step each says whether it goes on; whoever hears of another's end is interrupted."""
    state, others = solvers.begin(jnp.zeros(()), (), ()), [1, 1, 0]

    def advance(state, first, last):
        return dataclasses.replace(state, x=state.x + last - first)

    monkeypatch.setattr(distributed, "minimum_over_processes", lambda own: min(int(own), others.pop(0)))
    with pytest.raises(Interrupted, match="after 2 of 9 steps") as interrupted:
        run_with_progress(advance, state, 9, Watcher(), together=True)
    assert interrupted.value.samples.x == 2
    monkeypatch.setattr(distributed, "minimum_over_processes", int)
    failing = previews(3, lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        run_with_progress(advance, state, 9, failing, together=True)


@pytest.mark.parametrize("keeping", [{}, {"offload": True}])
def test_draws_that_are_watched_or_not_or_from_given_noise_are_one_program(keeping):
    ensemble = Ensemble.load("bundled:shapes", **keeping)
    sparse_velocity.take_steps.clear_cache()
    noise = jax.device_put(ensemble.noise(2), jax.devices()[0])
    for progress, steps in ((True, 11), (False, 11), (False, 3)):
        ensemble.sample(PROMPTS, progress=progress, num_inference_steps=steps, top_k=2)
        ensemble.sample(PROMPTS, progress=progress, noise=noise, num_inference_steps=steps, top_k=2)
    assert sparse_velocity.take_steps._cache_size() == 1


def test_an_interrupt_after_the_last_step_keeps_the_videos_themselves(ensemble, monkeypatch):
    whole = ensemble.sample(PROMPTS, num_inference_steps=3, solver="ab2")

    def late(advance, state, steps, *_):
        raise Interrupted(steps, steps, advance(state, 0, steps))

    monkeypatch.setattr("paris_jax.ensemble.progress.run_with_progress", late)
    with pytest.raises(Interrupted) as interrupted:
        ensemble.sample(PROMPTS, num_inference_steps=3, solver="ab2", progress=True)
    np.testing.assert_array_equal(interrupted.value.samples.videos, whole.videos)


def test_an_interrupt_before_the_first_step_returns_no_samples():
    stop = Interrupted(0, 5)
    assert "there is nothing to keep yet" in str(stop) and stop.samples is None


@pytest.mark.parametrize(
    "how", [{"preview_every_steps": 2}, {"on_preview": print}, {"preview_every_steps": -1, "on_preview": print}]
)
def test_a_preview_interval_without_a_callback_is_refused(how, ensemble):
    with pytest.raises(UserError, match="preview_every"):
        ensemble.sample(PROMPTS, num_inference_steps=2, **how)


def test_too_much_guidance_is_not_an_experts_fault(ensemble):
    with pytest.raises(UserError, match=r"not finite, though every expert's prediction is; lower guidance_scale"):
        ensemble.sample(PROMPTS, num_inference_steps=3, guidance_scale=1e38)
    with pytest.raises(UserError, match="noise holds values that are not finite"):
        ensemble.sample(PROMPTS, num_inference_steps=2, noise=ensemble.noise(2) * jnp.nan)
    half = ensemble.sample(PROMPTS, num_inference_steps=2, noise=ensemble.noise(2).astype(jnp.float16))
    assert half.videos.dtype == np.float32


@pytest.mark.parametrize(
    "how, message",
    [
        (
            {"drop_experts": [0, 1, 2]},
            r"drop_experts=\[0, 1, 2\]: this ensemble has the experts 0, 1, 2; at least one must be left",
        ),
        ({"drop_experts": 7}, r"drop_experts=\[7\]: this ensemble has the experts 0, 1, 2; only these can be dropped"),
        ({"drop_experts": 1, "fixed_expert": 1}, r"fixed_expert=\[1\]: this ensemble has the experts 0, 2"),
        ({"drop_experts": 1, "top_k": 3}, "top_k=3: this ensemble has 2 experts"),
        ({"on_nonfinite": "skip"}, "on_nonfinite='skip': must be one of error, drop"),
    ],
)
def test_experts_that_cannot_be_dropped_are_refused(how, message, ensemble):
    with pytest.raises(UserError, match=message):
        ensemble.sample(PROMPTS, num_inference_steps=2, **how)


def test_disagreement_may_leave_experts_out(ensemble):
    encoded, x, t = ensemble.encode(PROMPTS), ensemble.noise(2), jnp.array([0.9, 0.5])
    assert float(ensemble.disagreement(x, t, encoded, drop_experts=[0, 1]).max()) < 1e-5  # one alone agrees with itself


def test_disagreement_is_the_spread_of_the_experts_velocities(ensemble):
    encoded, x = ensemble.encode(["a large red on a ground", PROMPTS[0]]), ensemble.noise(2)
    t = jnp.array([0.9, 0.5])
    found = np.asarray(ensemble.disagreement(x, t, encoded))
    assert found.shape == x.shape[:-1]
    weight = np.asarray(ensemble.route(x, t, encoded))
    data = np.stack(
        [x - t.reshape(-1, 1, 1, 1, 1) * ensemble.velocity(x, t, encoded, fixed_expert=k) for k in range(3)]
    )
    for n in range(2):
        mean = np.tensordot(weight[n], data[:, n], 1)
        expected = np.sqrt(np.tensordot(weight[n], np.square(data[:, n] - mean).mean(-1), 1))
        np.testing.assert_allclose(found[n], expected, atol=1e-4)


def test_experts_are_shown_one_by_one_from_the_same_noise(ensemble):
    shown = ensemble.one_by_one(PROMPTS, num_inference_steps=2, seed=6)
    assert list(shown) == ["expert 0", "expert 1", "expert 2"]
    for k, samples in enumerate(shown.values()):
        np.testing.assert_array_equal(
            samples.videos, ensemble.sample(PROMPTS, num_inference_steps=2, seed=6, fixed_expert=k).videos
        )
