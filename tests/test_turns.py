"""What a step of `kfac` recomputes: the inverses of one layer at a time, at a period that the counted costs decide."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import classifier, flat, reference
from problems import mean_loss as loss
from programs.evaluate import traced

import jaxfisher as jf
from jaxfisher._bordered import Bordered, bordered
from jaxfisher._draws import draw_keys
from jaxfisher._operators import factored
from jaxfisher._operators.kronecker import Kronecker
from jaxfisher._transform.turns import Turns, counted_period, forward_cost

LAYERS = ("hidden", "out")


def is_due(t, phase=0, every=4):
    """Whether step ``t`` refreshes: gaps are 1 step, 2 from step 4 on, 4 from 8 on, 8 from 16 on, and at most ``every``."""
    gap = min(2 ** sum(t >= start for start in (4, 8, 16)), every)
    return t % gap == phase * gap // every


@pytest.mark.parametrize("every", [1, 2, 3, 4, 8])
def test_each_doubling_of_the_count_has_two_turns_until_the_gap_is_the_period(every):
    for phase in range(every):
        made = [bool(Turns(jnp.asarray(t, jnp.int32), every).due(phase)) for t in range(32)]
        assert made == [is_due(t, phase, every) for t in range(32)]


@pytest.mark.parametrize("every", [1, 3, 8, 13, 16])
def test_the_turns_before_a_step_are_those_that_were_due(every):
    count = jnp.arange(200, dtype=jnp.int32)
    made = np.asarray([bool(Turns(t, every).due()) for t in count], int)
    np.testing.assert_array_equal(jax.vmap(lambda t: Turns(t, every).before())(count), np.cumsum(made) - made)


def test_a_step_damps_each_factor_once(monkeypatch):
    """The period needs the number of layers, which must not cost another trace of their factors."""
    params, x, y, *_ = reference()
    step, damped, shifted = jf.training_step(classifier, jf.kfac()), [], Kronecker.shifted_factors
    state = step.init(params, x, y)
    monkeypatch.setattr(Kronecker, "shifted_factors", lambda self, at: damped.append(self) or shifted(self, at))
    jax.eval_shape(step, params, state, x, y)
    assert len(damped) == len(LAYERS)


def test_the_first_step_takes_the_program_of_the_factors_from_init():
    """Else the largest part of a step would be traced twice: for the shapes of the state, and to run it."""
    traces = []

    def model(params, x):
        traces.append(x)
        return classifier(params, x)

    params, x, y, *_ = reference()
    step = jf.training_step(model, jf.kfac())
    state = step.init(params, x, y)
    del traces[:]
    jax.eval_shape(step, params, state, x, y)
    # The loss and its gradient, the cost of the model, the quadratic model of the loss twice, which fields move and how many
    # there are, and the loss of the new parameters.
    assert len(traces) <= 7


def test_each_inverse_is_the_one_of_its_own_last_refresh():
    """Thirteen steps against a computation by hand, at a period of four: the layers have the first and the third turn of it.

    One program runs all steps, since the state from `init` has exactly the types of the state that a step returns. The factors
    are debiased running means over drawn targets. A step without a new quadratic model is at most as long as the last one.
    """
    params, x, y, *_ = reference()
    step = jf.training_step(classifier, jf.kfac(update_every=4, seed=5))
    run, state = jax.jit(step), step.init(params, x, y)
    empirical = jf.empirical_fisher(jf.log_likelihood(classifier))
    drawn = jax.jit(lambda p, targets: jf.kronecker(empirical(p, x, targets)))
    draw = jax.jit(lambda p, keys: jax.vmap(lambda x, key: classifier(p, x).sample(key))(x, keys))
    gradient = jax.jit(jax.grad(loss))
    solve = jax.jit(lambda K, g, gamma: jf.solve(K, g, gamma, solver=jf.factored_solve)[0])
    held, seen, mean, last, length, clipped = {}, 0, None, np.zeros(31), 0.0, 0
    for t in range(13):
        if is_due(t):
            # At targets drawn with each example's own key, the empirical Fisher is the sampled one.
            keys = draw_keys(5, jnp.asarray(t), 7, hashed=True)
            K, seen = drawn(params, draw(params, keys)), seen + 1
            share = 0.05 / (1 - 0.95**seen)
            mean = K if mean is None else jax.tree.map(lambda a, b, share=share: a + share * (b - a), mean, K)
        gamma = float(state.inner.direction_damping) / len(x) * float(mean.trace()) / 31
        held |= {layer: (mean, gamma) for phase, layer in zip((0, 2), LAYERS, strict=True) if is_due(t, phase)}
        g = gradient(params, x, y)
        d = flat({layer: solve(held[layer][0], g, held[layer][1])[layer] for layer in LAYERS})
        new, state, _ = run(params, state, x, y)
        assert state.accepted
        judged = is_due(t, every=3)
        alpha, mu = (float(optax.tree.get(state, name)) for name in ("learning_rate", "momentum"))
        u = -alpha * d + (mu if judged else np.clip(mu, 0, 1)) * last
        clipped += not judged and np.linalg.norm(u) > length
        u = u if judged else u * min(1, length / np.linalg.norm(u))
        length = np.linalg.norm(u) if judged else length
        np.testing.assert_allclose(flat(new), flat(params) + u, rtol=1e-6, atol=1e-9, err_msg=str(t))
        params, last = new, u
    assert clipped, "one of the steps must have been too long for this to say anything"
    assert run._cache_size() == 1, "programs compiled for one step"


def test_of_a_part_of_the_parameters_it_takes_the_steps_of_that_part_alone():
    """Under `optax.masked` the steps are those of a model in which the other parameters are constants.

    At a step without a new quadratic model, the damping of the direction stays as it is.
    """
    params, x, y, *_ = reference()
    opt, mask = jf.kfac(update_every=4, seed=7), {"hidden": True, "out": False}
    others = optax.masked(optax.set_to_zero(), jax.tree.map(lambda flag: not flag, mask))
    steps = [
        jf.training_step(classifier, optax.chain(optax.masked(opt, mask), others)),
        jf.training_step(lambda hidden, x: classifier(params | {"hidden": hidden}, x), opt),
    ]
    runs, at = list(map(traced, steps)), [params, params["hidden"]]
    states, fell = [step.init(part, x, y) for step, part in zip(steps, at, strict=True)], []
    for t in range(13):
        at, states, _ = zip(*(run(*now, x, y) for run, *now in zip(runs, at, states, strict=True)), strict=True)
        one, other = states[0][0].inner_state, states[1]
        np.testing.assert_allclose(flat(at[0]["hidden"]), flat(at[1]), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(one.inner.direction_damping, other.inner.direction_damping, rtol=1e-6)
        fell.append(bool(one.inner.fell))
        assert fell[-1] == other.inner.fell
        assert is_due(t, every=3) or fell[-1] == fell[-2]
    assert flat(at[0]["out"]).tolist() == flat(params["out"]).tolist()
    assert fell[7] and fell[8] and not fell[12], "for this to say anything"


@pytest.mark.parametrize(("size", "halved"), [(300, 256), (21, 4)])
def test_inverses_of_large_factors_are_made_in_halves(size, halved, monkeypatch):
    """Inverses of even and odd sizes, halved once or repeatedly, with and without a border, against NumPy in float64."""
    monkeypatch.setattr(factored, "HALVED", halved)
    x = np.random.default_rng(size).normal(size=(2, size, size))
    matrices = x @ x.swapaxes(1, 2) / size + 0.1 * np.eye(size)
    made = factored.inverses(Bordered(jnp.asarray(matrices, jnp.float32)))
    apart = factored.inverses(bordered(jnp.asarray(matrices, jnp.float32)))
    true, condition = np.linalg.inv(matrices), np.linalg.cond(matrices).max()
    for found in (made.core, apart.whole()):
        assert np.abs(np.asarray(found, np.float64) - true).max() <= condition * np.finfo(np.float32).eps * np.abs(true).max()
    assert (size > halved) == ("concatenate" in str(jax.make_jaxpr(factored.inverses)(Bordered(made.core))))


@pytest.mark.parametrize("every", [None, 4])
def test_what_is_not_due_is_not_run(every):
    """Factors, draws, inverses, the quadratic model and the loss after a step are computed only inside conditional branches.

    Outside the branches there is one forward pass, that of the gradient: no random number, no Cholesky factor, and one tanh.
    The factors have one branch, and so have the inverses of each of the two layers.
    """
    params, x, y, *_ = reference()
    step = jf.training_step(classifier, jf.kfac(update_every=every))
    jaxpr = jax.make_jaxpr(step)(params, step.init(params, x, y), x, y).jaxpr
    dead, _ = jax.interpreters.partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    outside = list(outside_branches(dead))
    assert not {"random_bits", "random_wrap", "cholesky", "triangular_solve"} & set(outside), outside
    assert outside.count("tanh") == 1 and outside.count("while") == 3, outside


def outside_branches(jaxpr):
    """The primitives of a program that are not inside a `cond` or a `while`."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        if eqn.primitive.name in ("cond", "while"):
            continue
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from outside_branches(inner)


def network(width):
    """A network 64-width-width-10: the shapes of its parameters, its model, and the sizes of its Kronecker factors."""
    sizes = [(64, width), (width, width), (width, 10)]
    params = [{"w": jax.ShapeDtypeStruct(s, jnp.float32), "b": jax.ShapeDtypeStruct(s[1:], jnp.float32)} for s in sizes]

    def model(params, x):
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return jf.Categorical(x @ params[-1]["w"] + params[-1]["b"])

    return params, model, [(i + 1, o) for i, o in sizes]


@pytest.mark.parametrize(("width", "period"), [(16, 4), (128, 4), (512, 16), (1024, 16)])
def test_the_period_is_the_least_power_of_two_that_keeps_the_average_step_at_three_adam_steps(width, period):
    """The limit is four and a half Adam steps if the widest layer has more units than the batch of 512 has examples."""
    params, model, sizes = network(width)
    x, n = jax.ShapeDtypeStruct((512, 64), jnp.float32), 512
    forward = forward_cost(lambda p, x: jax.vmap(lambda x: model(p, x))(x), params, x)
    assert forward == 2 * n * sum((i - 1) * o for i, o in sizes)
    view = jax.eval_shape(lambda p, x: jf.kronecker(jf.sampled_fisher(model)(p, jax.random.key(0), x)), params, x)

    def cost(every):
        """The average cost of a step in forward passes: gradient, moments, inverses, their use, model, and loss after it."""
        moments = 2 + 2 * n * sum(i * i + o * o for i, o in sizes) / forward
        inverses = 7 * sum(i**3 + o**3 for i, o in sizes) / forward
        applied = 2 * sum(i * o * (i + o) for i, o in sizes) / forward
        return 3 + (moments + inverses) / every + applied + (7 + applied) / 3

    assert counted_period(forward, view.form) == period
    most = 13.5 if width == 1024 else 9 * 1.01  # biases are counted as positions
    assert cost(period) <= most
    assert cost(period / 2) > most or period == 4
    assert counted_period(None, view.form) == 8


def test_the_operations_of_loops_and_convolutions_are_counted():
    x, w = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    numbers = ("NHWC", "HWIO", "NHWC")
    assert forward_cost(lambda x: jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=numbers), x) == (
        2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)
    )
    a = jnp.ones((4, 4))
    loop = lambda a: jax.lax.scan(lambda c, _: (jax.jit(jnp.matmul)(c, a), None), a, length=7)  # noqa: E731
    assert forward_cost(loop, a) == 7 * 2 * 4**3


def test_a_step_that_is_not_judged_is_taken_where_it_is_finite():
    params, x, y, *_ = reference()
    opt = jf.adapt_damping(jf.natural_gradient(50.0, 0.0), damping=1e-3)
    worse, state = lambda new: jnp.sum(jnp.square(flat(new))), opt.init(params)
    worse = lambda new: 1.0 + optax.tree.norm(jax.tree.map(jnp.subtract, new, params))  # noqa: E731
    F, g = jf.exact_fisher(classifier)(params, x), jax.grad(loss)(params, x, y)
    for gradient, due, taken in ((g, True, False), (g, False, True), (jax.tree.map(lambda v: v * jnp.nan, g), False, False)):
        step, after = opt.update(gradient, state, params, fisher=F, value_fn=worse, due=jnp.asarray(due))
        assert after.accepted == taken and np.any(flat(step) != 0) == taken
        assert due or after.ratio == state.ratio
        assert (after.damping == state.damping) == (taken and not due)
