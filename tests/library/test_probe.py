"""Settings that find themselves."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zo_jax
from zo_jax import lines, trials
from zo_jax.lines import Line, best_epsilon, look_along, noise_level

KEY = jax.random.key(0)


def rough(sigma):
    """A function of the parameters that looks like independent noise of standard deviation sigma
    at points farther than a float's spacing from each other.
    """
    return lambda w: sigma * math.sqrt(2) * jnp.sin(1e7 * jnp.sum(jnp.sin(jnp.arange(w.size) + w)))


def quadratic(d=64, seed=0):
    """(loss, Hessian, gradient at 0) with eigenvalues 1/i in a random basis."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    hessian, minimum = (basis / np.arange(1, d + 1)) @ basis.T, rng.normal(size=d)
    h, m = jnp.asarray(hessian, jnp.float32), jnp.asarray(minimum, jnp.float32)
    return lambda w: 0.5 * (w - m) @ h @ (w - m), hessian, -hessian @ minimum


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_noise_of_a_table(distribution):
    """Of three tables of seven: within a factor of two for nine of ten draws."""
    rng = np.random.default_rng(1)
    x = 0.01 * np.arange(-3, 4)
    smooth = np.exp(x) + np.array([[1.0], [-2.0], [0.3]]) * x
    for sigma in (1e-9, 1e-5):
        draw = getattr(rng, distribution)
        scale = {"normal": (0, sigma), "uniform": (-sigma * 3**0.5, sigma * 3**0.5)}[distribution]
        # Differences of order two of exp are 1e-4, of order six 1e-12.
        found = [noise_level(smooth + draw(*scale, size=(3, 7))) / sigma for _ in range(300)]
        assert np.isnan(found).mean() < 0.1 and abs(np.nanmedian(found) - 1) < 0.25
        low, high = np.nanquantile(found, [0.05, 0.95])
        assert 0.35 < low and high < 2


@pytest.mark.parametrize("sigma", [1e-5, 1e-3])
def test_noise_and_derivatives_of_a_loss(sigma):
    d = 100
    noise = rough(sigma)
    slopes = jnp.linspace(-1, 1, d)
    loss = lambda w: 1 + slopes @ w + jnp.sum(w**2) + 5 * jnp.sum(w) ** 3 / d + noise(w)
    found = look_along(zo_jax.Estimator(), loss, jnp.zeros(d), KEY)
    assert 0.4 * sigma < found.noise < 2.5 * sigma
    z = np.array(
        [
            zo_jax.rademacher().direction(jnp.zeros(d), k)
            for k in jax.random.split(KEY, lines.DIRECTIONS)
        ]
    )
    rms = lambda x: np.sqrt(np.mean(np.square(x)))
    np.testing.assert_allclose(found.curvature, 2 * d, rtol=0.1)
    np.testing.assert_allclose(found.second, 2 * d, rtol=0.1)
    np.testing.assert_allclose(found.third, rms(30 * z.sum(1) ** 3 / d), rtol=0.3)
    assert found.num_evaluations % (7 * lines.DIRECTIONS) == 0
    assert found.num_evaluations <= 4 * 7 * lines.DIRECTIONS


def test_epsilon_is_that_of_the_least_error():
    """Of the sum of the squares of truncation and noise, found by trying a thousand."""
    tried = np.geomspace(1e-5, 1e2, 4001)
    line = Line(3.0, 1e-6, slope=0, curvature=0, second=7, third=20, spacing=1, num_evaluations=0)
    central = (tried**2 * line.third / 6) ** 2 + line.noise**2 / (2 * tried**2)
    forward = (tried * line.second / 2) ** 2 + 2 * line.noise**2 / tried**2
    for difference, error in (("central", central), ("forward", forward)):
        np.testing.assert_allclose(best_epsilon(line, difference), tried[error.argmin()], rtol=0.01)
    # With a slope a twentieth of it is allowed, as long as the curvature leaves it the upper hand.
    steep = line._replace(slope=1.0)
    np.testing.assert_allclose(best_epsilon(steep) ** 2 * 20 / 6, 0.05, rtol=1e-6)
    np.testing.assert_allclose(best_epsilon(steep, "forward") * 7 / 2, 0.05, rtol=1e-6)
    np.testing.assert_allclose(
        best_epsilon(steep._replace(third=1e-3, noise=1e-12)), 1 / 7, rtol=1e-6
    )


@pytest.mark.parametrize("difference", ["central", "forward"])
def test_epsilon_of_a_noisy_loss(difference):
    """The analytic optimum within a factor of 1.6: the noise is known within one of two or so."""
    d, sigma, noise = 100, 1e-4, rough(1e-4)
    if difference == "central":  # D³L[z, z, z] = 3 for every z of signs
        loss = lambda w: 1 + 3 * w[0] * jnp.sum(w**2) / (6 * d) + noise(w)
        expected = (3 * sigma / 3) ** (1 / 3)
    else:
        loss = lambda w: 1 + jnp.sum(w**2) + noise(w)
        expected = 8**0.25 * (sigma / (2 * d)) ** 0.5
    found = look_along(zo_jax.Estimator(), loss, jnp.zeros(d), jax.random.key(3))
    assert 0.6 < best_epsilon(found, difference) / expected < 1.6


def test_losses_along_directions():
    estimator = zo_jax.Estimator(num_queries=3, batch_per_query=True, parallel_batch_size=2)
    params, x = {"w": jnp.arange(4.0)}, jnp.arange(12.0).reshape(3, 4)
    loss = lambda p, x: jnp.sum(jnp.sin(p["w"]) * x)
    scales = np.array([0.0, -0.5, 2.0])
    got = jax.jit(lambda s: estimator.losses_along(loss, params, KEY, s, x))(scales)
    z = np.array([estimator.family.direction(params, k)["w"] for k in estimator.keys(KEY)])
    at = np.arange(4.0) + scales[None, :, None] * z[:, None]
    np.testing.assert_allclose(got, np.sum(np.sin(at) * np.array(x)[:, None], -1), rtol=1e-5)


@functools.cache
def of_quadratic(scale=1.0, optimizer="sgd", **options):
    loss, *_ = quadratic()
    given = dict(num_steps=400, num_queries=4) | options
    return zo_jax.probe(lambda w: scale * loss(w), jnp.zeros(64), KEY, optimizer=optimizer, **given)


def test_rate_of_a_quadratic():
    """Between half and one and a half of the rate of the largest expected decrease over a step,
    and everything that was measured within 30 %: 4 directions tell it.
    """
    _, hessian, g = quadratic()
    q, squared, trace = 4, g @ g, np.trace(hessian)
    # Of signs: E[ĝ ĝᵀ] = ((1 + 1/q) g gᵀ + (‖g‖² I - 2 diag(g²)) / q), whose last term is small.
    best = squared / ((1 + 1 / q) * g @ hessian @ g + squared * trace / q)
    found = of_quadratic()
    assert 0.5 < found.learning_rate / best < 1.5
    assert found.noise_share == 0 and found.trial_steps == 16
    np.testing.assert_allclose(found.gradient_norm, found.projection_rms, rtol=1e-6)
    assert abs(found.gradient_norm / math.sqrt(squared) - 1) < 0.5
    assert abs(found.curvature / trace - 1) < 0.3
    for part in ("epsilon", "learning_rate", "trace of the Hessian", "cost"):
        assert part in found.reasons


def test_scale_of_the_loss():
    """A hundred times the loss: the same epsilon, a hundredth of SGD's rate, the same of Adam's."""
    for optimizer, factor in (("sgd", 0.01), ("adam", 1.0)):
        one, hundred = (of_quadratic(scale, optimizer) for scale in (1.0, 100.0))
        np.testing.assert_allclose(hundred.epsilon, one.epsilon, rtol=0.1)
        np.testing.assert_allclose(hundred.learning_rate, factor * one.learning_rate, rtol=0.1)
    assert one.noise_share == 1.0


def test_the_same_again_and_longer_and_with_a_schedule():
    adam = of_quadratic(optimizer="adam")
    again = of_quadratic(optimizer=optax.adam)
    assert again == adam
    # As many steps of a trial in a run half as long. A decrease a η Σ f - b η² Σ f² over the course
    # f is largest at (1/2) / (3/8) times the rate of a constant one.
    cosine = optax.cosine_decay_schedule(1.0, 200)
    other = of_quadratic(optimizer="adam", num_steps=200, schedule=cosine, epsilon=0.02)
    np.testing.assert_allclose(other.learning_rate, 4 / 3 * 2**0.5 * adam.learning_rate, rtol=0.3)
    assert other.epsilon == 0.02 and other.trial_steps == adam.trial_steps


def test_search_goes_below_rates_that_are_far_too_large():
    """Above those that were given up there are some that lower the loss a little."""
    found = {4: -1.0, 2: 0.34, 1: 0.45, 1 / 2: 0.43, 1 / 4: -1.0, 1 / 8: 0.58, 1 / 16: 0.55}
    run = lambda rate: trials.Trial(
        found.get(rate, 0.1) if found.get(rate, 1) > 0 else -math.inf, None
    )
    done = trials.search(run, 4.0)
    assert max(done, key=lambda rate: done[rate].decrease) == 1 / 8
    assert sorted(done) == [1 / 32, *sorted(found)]


def test_a_rate_that_an_optimizer_keeps_has_no_schedule():
    kept = optax.inject_hyperparams(optax.sgd)
    with pytest.raises(ValueError, match="inject_hyperparams keeps the first"):
        of_quadratic(optimizer=kept, schedule=optax.cosine_decay_schedule(1.0, 400))
    assert of_quadratic(optimizer=kept).learning_rate == of_quadratic().learning_rate


def test_minibatch_noise_is_told_from_the_gradient():
    """Linear regression: batches of 4 have nine tenths and more of their squares from noise."""
    rng = np.random.default_rng(4)
    d, B = 50, 4
    w = jnp.asarray(0.3 * rng.normal(size=d) / d**0.5, jnp.float32)

    def batches(step):
        own = np.random.default_rng([5, step])
        x = own.normal(size=(B, d)).astype(np.float32)
        return x, (x @ np.array(w) + own.normal(size=B)).astype(np.float32)

    loss = lambda w, x, y: 0.5 * jnp.mean((x @ w - y) ** 2)
    options = dict(num_steps=2000, num_queries=16, batch_fn=batches)
    found = zo_jax.probe(loss, jnp.zeros(d), KEY, **options)
    # E⟨g, z⟩² = ‖w‖² = 0.09, and with the noise of a batch ‖w‖² + d (1 + ‖w‖²) / B or so.
    squared = float(w @ w)
    noisy = squared + d * (1 + squared) / B
    assert abs(found.projection_rms**2 / noisy - 1) < 0.3
    assert found.noise_share > 0.8
    # The noise floor η d (1 + ‖w‖²) / 2B and what is left of the distance, e^(-2ηT) ‖w‖²/2, and
    # for rates that are too large for the curvature of one batch, no model: within a factor of four
    # of the best of their sum.
    rates = np.geomspace(1e-5, 1, 500)
    q, T = 16, 2000
    growth = rates * d * noisy / (4 * q)
    best = rates[
        np.argmin(growth * (1 - np.exp(-2 * rates * T)) + np.exp(-2 * rates * T) * squared / 2)
    ]
    assert 0.25 < found.learning_rate / best < 4


def test_evaluations_are_counted():
    calls = []
    count = lambda x: (calls.append(1), np.float32(x))[1]

    def loss(w, x):
        value = jnp.sum((w - x) ** 2)
        return jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32), value)

    batches = lambda step: (jnp.full((2, 8), 1 + 0.1 * np.sin(step)),)
    options = dict(num_steps=40, num_queries=2, batch_per_query=True, batch_fn=batches)
    told = []
    found = zo_jax.probe(loss, jnp.zeros(8), KEY, report=told.append, **options)
    jax.effects_barrier()
    assert found.num_evaluations == len(calls)
    # One line for epsilon, one for the curvature, and one for each rate that is tried.
    assert len(told) == 2 + len(found.trials)


@pytest.mark.parametrize("difference", ["forward", "jvp"])
def test_other_differences(difference):
    loss, *_ = quadratic(16)
    found = zo_jax.probe(
        lambda w: (loss(w), w),
        jnp.zeros(16),
        KEY,
        num_steps=50,
        num_queries=2,
        has_aux=True,
        difference=difference,
    )
    assert 0 < found.learning_rate < 10
    assert ("epsilon" in found.reasons) == (difference == "forward")


def test_low_and_high_precision():
    """A loss in bfloat16 has its noise found, and a larger epsilon; one in float64 less noise."""
    x = jax.random.normal(jax.random.key(6), (64, 20))
    loss = lambda w, x: jnp.mean(jnp.square(jnp.tanh(x @ w) - 1))
    epsilons = {}
    w = 0.2 * jax.random.normal(jax.random.key(7), (20,))
    low = lambda w: loss(w.astype(jnp.bfloat16), x.astype(jnp.bfloat16)).astype(jnp.float32)
    for name, loss_fn in (("float32", lambda w: loss(w, x)), ("bfloat16", low)):
        line = look_along(zo_jax.Estimator(), loss_fn, w, KEY)
        epsilons[name] = (line.noise, best_epsilon(line._replace(slope=0.0)))
    assert epsilons["float32"][0] < 1e-6 < 1e-4 < epsilons["bfloat16"][0]
    assert epsilons["bfloat16"][1] > 3 * epsilons["float32"][1]
    with jax.enable_x64(True):
        double = look_along(
            zo_jax.Estimator(), lambda w: loss(w.astype(float), x.astype(float)), w, KEY
        )
    assert double.noise < 0.1 * epsilons["float32"][0]


@pytest.mark.parametrize(
    "loss_fn, match",
    [
        (lambda w: jnp.sum(0 * w) + 3.0, "must change with the parameters"),
        (lambda w: jnp.sign(jnp.sum(w) + 1e6), "constant piece by piece"),
        (lambda w: jnp.sum(w) * jnp.nan, "must be finite, got nan"),
        (lambda w: jnp.sum(w), "larger ones only lower it more"),
        (lambda w: jnp.sum(w**2), "where it is least"),
    ],
)
def test_losses_that_tell_nothing(loss_fn, match):
    with pytest.raises(ValueError, match=match):
        zo_jax.probe(loss_fn, jnp.zeros(8), KEY, num_steps=10, num_queries=1)


def test_a_loss_that_ends_nearby():
    """It is nan beyond a distance of 1e-4, and smaller spacings are taken."""
    loss = lambda w: -jnp.sum(jnp.log(1e-4 + w)) * 1e-4
    line = look_along(zo_jax.Estimator(), loss, jnp.zeros(10), KEY)
    np.testing.assert_allclose(line.curvature, 10 * 1e4, rtol=0.1)
    assert best_epsilon(line) < 1e-4


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(num_steps=0), "num_steps must be an integer of at least 1, got 0"),
        (dict(budget=0), "budget must be above 0"),
        (dict(optimizer="lion"), "one of sgd, adam, or a function"),
        (dict(batch_fn=lambda step: (1,)), "got both"),
    ],
)
def test_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        zo_jax.probe(lambda w, x: jnp.sum(w), jnp.zeros(3), KEY, 1.0, **{"num_steps": 5} | options)
    with pytest.raises(ValueError, match=r"outside jax\.jit"):
        jax.jit(lambda w: zo_jax.probe(jnp.sum, w, KEY, num_steps=5))(jnp.zeros(3))


def test_trials_are_looked_for_where_they_lower_the_loss():
    """From guesses far off, down and up, the best rate within a tenth."""
    decrease = lambda rate: rate - 0.5 * rate**2 if rate < 1.9 else -math.inf
    for guess in (1e-3, 0.9, 1e3):
        done = trials.search(lambda rate: trials.Trial(decrease(rate), rate), guess)
        rate, best = trials.peak(done)
        assert abs(rate - 1) < 0.1 and 0.5 <= best.params <= 1.9
    with pytest.raises(ValueError, match=r"between .* and 1, where none lowers the loss"):
        trials.search(lambda rate: trials.Trial(-math.inf, None), 1.0)


def test_responses_of_optimizers():
    """Momentum of 0.9 makes a long run's steps ten times as long, their squares a hundred times;
    Adam's have the size one whatever the gradient's.
    """
    bench = lambda make: trials.Bench(
        jnp.sum, zo_jax.Estimator(), lambda rate: zo_jax.Update(make(rate)), epsilon=1.0
    )
    momentum = bench(lambda rate: optax.sgd(rate, momentum=0.9))
    long = momentum.response(2.0, 1000)
    np.testing.assert_allclose([long.signal, long.noise], [10, 400], rtol=0.05)
    assert not momentum.normalizes(2.0, 8)
    adam = bench(optax.adam)
    long = adam.response(2.0, 1000)
    np.testing.assert_allclose([long.signal, long.noise], [0.5, 1], rtol=0.1)
    assert adam.normalizes(2.0, 8)
