"""The mathematics: the path, the times, the objectives, guidance, and the order of the solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paris_jax.diffusion import guidance, path, randomness, solvers, timesteps
from paris_jax.diffusion.losses import by_time_bin, cross_entropy, flow_matching


def gaussian_velocity(x, t, mean, std):
    """Exact velocity of the flow to N(mean, std^2), and it is linear in x."""
    variance = (1 - t) ** 2 * std**2 + t**2
    return -mean + (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)


def test_the_path_starts_at_data_ends_at_noise_and_its_slope_is_the_velocity():
    x_0, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    for t, end in ((0.0, x_0), (1.0, noise)):
        np.testing.assert_array_equal(path.interpolate(x_0, noise, jnp.full(3, t)), end)
    slope = jax.jvp(lambda t: path.interpolate(x_0, noise, t), (jnp.full(3, 0.3),), (jnp.ones(3),))[1]
    np.testing.assert_allclose(slope, path.velocity(x_0, noise), rtol=1e-6)
    t = jnp.array([0.2, 0.5, 0.9])
    recovered = path.data_from_velocity(path.interpolate(x_0, noise, t), path.velocity(x_0, noise), t)
    np.testing.assert_allclose(recovered, x_0, atol=1e-6)


def test_each_sample_has_its_own_time():
    x_0, noise = jnp.zeros((2, 3)), jnp.ones((2, 3))
    np.testing.assert_allclose(path.interpolate(x_0, noise, jnp.array([0.25, 0.75])), [[0.25] * 3, [0.75] * 3])


def test_shift_keeps_the_ends_and_is_the_signal_to_noise_rule():
    t = jnp.linspace(0, 1, 11)
    moved = timesteps.shift(t, 3.0)
    assert moved[0] == 0 and moved[-1] == 1 and bool((moved[1:-1] > t[1:-1]).all())
    # Odds of noise against data are multiplied by the factor (Esser et al. 2024).
    np.testing.assert_allclose(moved[1:-1] / (1 - moved[1:-1]), 3 * t[1:-1] / (1 - t[1:-1]), rtol=1e-5)
    np.testing.assert_allclose(timesteps.shift(t, 1.0), t)


def test_open_sora_shift_at_its_published_ends():
    assert timesteps.open_sora_shift(256, 1) == 1.0
    assert timesteps.open_sora_shift(4096, 1) == 3.0
    assert timesteps.open_sora_shift(256, 9) == 3.0
    assert timesteps.open_sora_shift(25, 4) == 2.0


def test_the_grid_goes_from_noise_to_data():
    grid = timesteps.timestep_schedule(10, 2.0)
    assert grid.shape == (11,) and grid[0] == 1 and grid[-1] == 0 and bool((jnp.diff(grid) < 0).all())


def test_logit_normal_times_have_the_stated_law():
    drawn = timesteps.logit_normal(jax.random.normal(jax.random.key(1), (200_000,)), 0.5, 0.8, 1.0)
    logits = jnp.log(drawn / (1 - drawn))
    assert abs(float(logits.mean()) - 0.5) < 0.01 and abs(float(logits.std()) - 0.8) < 0.01


def test_draws_belong_to_a_sample_whatever_stands_beside_it():
    alone = randomness.normal(randomness.sample_keys(7, 3, jnp.array([5])), (4, 2))
    among = randomness.normal(randomness.sample_keys(7, 3, jnp.array([9, 5, 0])), (4, 2))
    np.testing.assert_array_equal(alone[0], among[1])
    others = [randomness.normal(randomness.sample_keys(s, n, jnp.array([5])), (4, 2)) for s, n in ((8, 3), (7, 4))]
    assert all(bool((o[0] != alone[0]).all()) for o in others)


def test_flow_matching_loss_of_the_exact_velocity_is_the_posterior_variance():
    """For Gaussian data the least loss is known: Var[e - x_0 | x_t] = s^2 / ((1 - t)^2 s^2 + t^2)."""
    n, std, t = 400_000, 0.5, 0.6
    keys = jax.random.split(jax.random.key(2))
    x_0, noise = std * jax.random.normal(keys[0], (n, 1)), jax.random.normal(keys[1], (n, 1))
    losses = flow_matching(lambda x, t_B: gaussian_velocity(x, t_B[:, None], 0.0, std), x_0, noise, jnp.full(n, t))
    assert losses.shape == (n,)
    np.testing.assert_allclose(losses.mean(), std**2 / ((1 - t) ** 2 * std**2 + t**2), rtol=0.01)


def test_a_loss_does_not_see_its_neighbours():
    x_0, noise = jax.random.normal(jax.random.key(3), (2, 4, 6))
    field = lambda x, t: jnp.sin(x) * t[:, None]  # noqa: E731
    t = jnp.array([0.1, 0.4, 0.6, 0.9])
    together = flow_matching(field, x_0, noise, t)
    alone = flow_matching(field, x_0[2:3], noise[2:3], t[2:3])
    np.testing.assert_array_equal(together[2], alone[0])


def test_cross_entropy_of_known_logits():
    np.testing.assert_allclose(
        cross_entropy(jnp.log(jnp.array([[0.2, 0.3, 0.5]])), jnp.array([1])), [-np.log(0.3)], rtol=1e-6
    )


def test_time_bins_hold_every_sample_once():
    sums, counts = by_time_bin(jnp.array([1.0, 2.0, 4.0, 8.0]), jnp.array([0.0, 0.49, 0.5, 1.0]), 2)
    np.testing.assert_allclose(sums, [3, 12])
    np.testing.assert_allclose(counts, [2, 2])


@pytest.mark.parametrize("scale, expected", [(0.0, 5.0), (1.0, 2.0), (3.0, -4.0)])
def test_guidance_extrapolates_from_the_unconditional(scale, expected):
    assert guidance.classifier_free(jnp.array(2.0), jnp.array(5.0), scale) == expected


X = np.linspace(-2.0, 2.0, 9).reshape(3, 3)
ORDERS = {"euler": 1, "heun": 2, "ab2": 2, "dpm++2m": 2}


def guided_flow(scale, method="classifier_free"):
    """A flow that is curved and not linear in x, and known without a network: two Gaussians, guided."""

    def field(x, t, step, memory):
        conditional, unconditional = gaussian_velocity(x, t, 1.5, 0.4), gaussian_velocity(x, t, 0.2, 0.9)
        conditional = conditional + 0.3 * jnp.sin(3 * x)
        if method == "projected":
            strength = guidance.Strength(scale, momentum=0.0, norm_threshold=1e9)  # a flow, and a smooth one
            v, _ = guidance.projected(conditional, unconditional, x, jnp.full(len(x), t), strength, jnp.zeros_like(x))
        else:
            v = guidance.classifier_free(conditional, unconditional, scale)
        return v, memory, t

    return field


GRIDS = {
    "even": lambda n: jnp.linspace(1.0, 0.0, n + 1),
    "shifted": lambda n: timesteps.shift(jnp.linspace(1.0, 0.0, n + 1), 3.0),
    "inside": lambda n: jax.nn.sigmoid(jnp.linspace(3.0, -3.0, n + 1)),  # even in the logarithm of noise over data
}


def no_noise(step):
    raise ValueError("a stochastic solver needs noise")


def solve(field, x, times, solver, memory=(), noise=no_noise):
    """The end of all steps at once, and the trace of every evaluation."""
    trace = jax.eval_shape(lambda x, t, step, memory: field(x, t, step, memory)[2], x, times[0], jnp.int32(0), memory)
    lead = len(times) - 1, solvers.EVALUATIONS[solver]
    state = solvers.begin(x, memory, jax.tree.map(lambda a: jnp.zeros((*lead, *a.shape), a.dtype), trace))
    state = solvers.integrate(field, state, times, 0, lead[0], solver, noise)
    return state.x, state.traces


@pytest.mark.parametrize("solver, order", ORDERS.items())
@pytest.mark.parametrize("scale, method", [(1.0, "classifier_free"), (4.0, "classifier_free"), (3.0, "projected")])
@pytest.mark.parametrize("grid", GRIDS)
def test_solvers_converge_at_their_order(solver, order, scale, method, grid):
    """Errors against a far finer reference fall by 2^order when the steps double."""
    with jax.enable_x64(True):
        field, x = guided_flow(scale, method), jnp.asarray(X)
        end = lambda n, solver: solve(field, x, GRIDS[grid](n), solver)[0]  # noqa: E731
        reference = end(16384, "heun")
        errors = [float(jnp.abs(end(n, solver) - reference).max()) for n in (512, 1024, 2048)]
        rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    # At the ends of time the logarithm that DPM-Solver++ walks along is infinite, which costs it a factor log(steps).
    allowed = 0.4 if solver == "dpm++2m" and grid != "inside" else 0.15
    assert np.all(np.abs(rates - order) < allowed), (errors, rates)


@pytest.mark.parametrize("solver", ORDERS)
def test_the_unguided_flow_ends_at_the_exact_solution(solver):
    def field(x, t, step, memory):
        return gaussian_velocity(x, t, 1.5, 0.4), memory, None

    with jax.enable_x64(True):
        ends = [solve(field, jnp.asarray(X), jnp.linspace(1.0, 0.0, n + 1), solver)[0] for n in (512, 1024)]
        errors = [float(jnp.abs(end - (1.5 + 0.4 * X)).max()) for end in ends]
    assert errors[1] < 2e-3 and errors[0] / errors[1] > 1.8


def two_points(x, t):
    """The velocity of data that is -1 or 1, undefined at t = 0."""
    return (x - jnp.tanh((1 - t) * x / t**2)) / t


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("velocity", ["nearly a point", "two points"])
def test_no_noise_is_left_in_samples_of_concentrated_data(solver, velocity):
    """Networks are trained on such data: images without noise lie on a thin surface."""

    def field(x, t, step, memory):
        return two_points(x, t) if velocity == "two points" else gaussian_velocity(x, t, 0.0, 1e-3), memory, None

    start = jnp.asarray(np.random.default_rng(0).standard_normal((500, 1)), jnp.float32)
    start = jnp.where(jnp.abs(start) < 0.2, 0.2, start)  # away from the boundary between the two points
    fresh = lambda step: jax.random.normal(jax.random.key(step), start.shape)  # noqa: E731
    end, _ = solve(field, start, jnp.linspace(1.0, 0.0, 19), solver, noise=fresh)
    data = np.sign(end) if velocity == "two points" else 0.0
    assert np.isfinite(end).all() and float(np.std(end - data)) < 2e-3


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_one_step_of_any_solver_lands_on_the_mean_that_the_noise_predicts(solver):
    """From t = 1 to 0 at once: x - v, where v is the velocity at pure noise."""
    field = lambda x, t, step, memory: (2.0 * x + t, memory, None)  # noqa: E731
    x = jnp.asarray(X, jnp.float32)
    end, _ = solve(field, x, jnp.array([1.0, 0.0]), solver, noise=jnp.ones_like)
    np.testing.assert_allclose(end, x - (2 * x + 1), rtol=1e-6)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_solvers_evaluate_as_often_as_documented_and_state_moves_once_a_step(solver):
    looked = []

    def field(x, t, step, memory):
        looked.append(t)
        return x, memory + 1, (step, memory)

    x, times = jnp.ones((3, 1)), jnp.linspace(1, 0, 5)
    _, (steps, memories) = solve(field, x, times, solver, jnp.int32(0), lambda n: 0.0)
    looks = solvers.EVALUATIONS[solver]
    assert len(looked) == 1 + looks  # for the trace's shape, and traced once
    np.testing.assert_array_equal(steps, jnp.arange(4)[:, None] * jnp.ones(looks, int))  # of every look
    np.testing.assert_array_equal(memories, jnp.arange(4)[:, None] + jnp.arange(looks))


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_steps_taken_a_few_at_a_time_are_those_taken_at_once(solver):
    def field(x, t, step, memory):
        return jnp.sin(3 * x) + t * memory, memory + x, (step, x)

    x, times, noise = jnp.array([[0.3], [-1.0]]), jnp.linspace(1, 0, 8), lambda n: jnp.cos(n + x)
    end, traces = solve(field, x, times, solver, jnp.zeros_like(x), noise)
    state = solvers.begin(x, jnp.zeros_like(x), jax.tree.map(jnp.zeros_like, traces))
    for first, last in ((0, 1), (1, 4), (4, 4), (4, 7)):
        state = solvers.integrate(field, state, times, first, last, solver, noise)
    np.testing.assert_allclose(state.x, end, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.traces, traces)


def test_heun_evaluates_guidance_afresh_at_both_ends():
    seen = []
    at = solvers.Interval(*(jnp.array(n) for n in (0, 1.0, 0.5, 1.0)))
    look = lambda x, t, step, memory: (seen.append(float(t)) or x, memory)  # noqa: E731
    solvers.heun(look, jnp.array(1.0), at, jnp.array(0.0), (), no_noise)
    assert seen == [1.0, 0.5]


def test_the_ancestral_sampler_keeps_the_law_of_every_time_and_forgets_the_noise_it_came_from():
    """On exact Gaussian flow, at order one: the law of the end does not depend on how much noise was replaced."""
    count, mean, std = 200_000, 1.5, 0.4

    def field(x, t, step, memory):
        return gaussian_velocity(x, t, mean, std), memory, None

    start = jax.random.normal(jax.random.key(0), (count, 1))
    fresh = lambda step: jax.random.normal(jax.random.fold_in(jax.random.key(1), step), start.shape)  # noqa: E731
    spreads = []
    for steps in (50, 100, 200):
        end, _ = solve(field, start, jnp.linspace(1, 0, steps + 1), "ancestral", noise=fresh)
        assert abs(float(end.mean()) - mean) < 5e-3
        assert abs(np.corrcoef(np.ravel(start), np.ravel(end))[0, 1]) < 0.02  # the flow would keep it at 1
        spreads.append(abs(float(end.std()) - std))
    ratios = np.array(spreads[:-1]) / np.array(spreads[1:])
    assert spreads[-1] < 1e-2 and np.all(np.abs(ratios - 2) < 0.4), (spreads, ratios)


def pair(seed=0, shape=(3, 2, 4)):
    return jax.random.normal(jax.random.key(seed), (3, *shape))


def test_rescaling_gives_the_spread_without_guidance_back():
    conditional, unconditional, _ = pair()
    plain = guidance.classifier_free(conditional, unconditional, 6.0)
    whole, half = (guidance.rescaled(plain, conditional, share) for share in (1.0, 0.5))
    spread = lambda v: np.std(np.asarray(v), axis=(1, 2))  # noqa: E731
    np.testing.assert_allclose(spread(whole), spread(conditional), rtol=1e-5)
    np.testing.assert_allclose(half, 0.5 * (plain + whole), rtol=1e-4, atol=1e-5)
    zeros = jnp.zeros_like(plain)
    np.testing.assert_array_equal(guidance.rescaled(zeros, zeros, 1.0), zeros)


def test_projected_guidance_without_its_three_parts_is_classifier_free():
    conditional, unconditional, x = pair()
    strength, t = guidance.Strength(4.0, momentum=0.0, norm_threshold=1e9, eta=1.0), jnp.array([0.3, 0.7, 1.0])
    v, _ = guidance.projected(conditional, unconditional, x, t, strength, jnp.zeros_like(x))
    np.testing.assert_allclose(v, guidance.classifier_free(conditional, unconditional, 4.0), rtol=1e-4, atol=1e-4)
    at_data, _ = guidance.projected(conditional, unconditional, x, 0 * t, strength, jnp.zeros_like(x))
    np.testing.assert_allclose(at_data, v, rtol=1e-4, atol=1e-4)  # where a solver may look once more


def test_projected_guidance_is_short_and_across_the_prediction():
    """Written again in NumPy, sample by sample, as the paper's algorithm 1 has it."""
    conditional, unconditional, x = pair(1)
    strength, t = guidance.Strength(4.0, momentum=-0.5, norm_threshold=0.7, eta=0.25), np.array([0.3, 0.7, 1.0])
    before = 0.2 * pair(2)[0]
    v, running = guidance.projected(conditional, unconditional, x, jnp.asarray(t), strength, before)
    for n in range(3):
        data, null = (np.asarray(x[n] - t[n] * b[n]) for b in (conditional, unconditional))
        total = data - null - 0.5 * np.asarray(before[n])
        np.testing.assert_allclose(running[n], total, atol=1e-5)
        short = total * min(1.0, 0.7 / np.linalg.norm(total))
        unit = data / np.linalg.norm(data)
        along = (short * unit).sum() * unit
        guided = data + 3.0 * (short - along + 0.25 * along)
        np.testing.assert_allclose(x[n] - t[n] * v[n], guided, atol=1e-4)


def test_the_trace_of_a_second_evaluation_is_kept():
    field = lambda x, t, step, memory: (x, memory, t)  # noqa: E731
    _, trace = solve(field, jnp.ones((1, 1)), jnp.array([1.0, 0.4, 0.0]), "heun")
    np.testing.assert_allclose(trace, [[1.0, 0.4], [0.4, 0.4]])  # the last step is Euler's and discards the second


def test_a_padded_schedule_keeps_its_number_of_steps():
    for steps in (1, 5, timesteps.CAPACITY_STEPS, timesteps.CAPACITY_STEPS + 1):
        schedule = timesteps.timestep_schedule(steps, 2.0)
        padded = timesteps.padded(schedule, timesteps.capacity(steps) + 1)
        assert timesteps.capacity(steps) % timesteps.CAPACITY_STEPS == 0
        np.testing.assert_array_equal(padded[: steps + 1], schedule)
        assert int(timesteps.num_steps(schedule)) == int(timesteps.num_steps(padded)) == steps
