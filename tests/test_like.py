"""Ways to give the structure of a state: an operator, one without values, a function, or a training step with a batch."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from problems import classifier, reference

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")


def fisher(params, x):
    """The exact Fisher and a prior."""
    F = jf.exact_fisher(classifier)(params, x)
    return F + jf.scaled_identity(F, 0.1)


def problem():
    return reference()[:3]


WAYS = {
    "an operator without values": lambda params, x: jax.eval_shape(fisher, params, x),
    "one of shapes alone": lambda params, x: jax.eval_shape(fisher, *jax.eval_shape(lambda: (params, x))),
    "a function": lambda params, x: lambda: fisher(params, x),
}
MAKERS = {
    "kronecker, with decay": lambda like: jf.scale_by_fisher(0.1, view=jf.kronecker, decay=0.9, update_every=2, like=like),
    "as it comes": lambda like: jf.scale_by_fisher(0.1, update_every=2, like=like),
    "eigen-kronecker": lambda like: jf.natural_gradient(0.1, 0.1, view=jf.eigen_kronecker, update_every=2, like=like),
    "kfac": lambda like: jf.kfac(like),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("maker", MAKERS)
def test_no_value_of_like_is_looked_at(maker, way):
    params, x, _ = problem()
    expected = MAKERS[maker](fisher(params, x)).init(params)
    chex.assert_trees_all_equal(MAKERS[maker](WAYS[way](params, x)).init(params), expected)


def over_steps(opt):
    """Accumulation over steps, which passes keywords on; `MultiSteps.gradient_transformation()` takes none."""
    steps = optax.MultiSteps(opt, 2)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)


AROUND = {
    "alone": lambda opt: opt,
    "in a chain": lambda opt: optax.chain(optax.clip(1.0), opt),
    "over several steps": over_steps,
    "with a changing damping": lambda opt: jf.adapt_damping(opt, 0.1),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("maker", MAKERS)
def test_a_training_step_finds_the_shapes_by_itself(maker, around):
    params, x, y = problem()
    make = lambda like: AROUND[around](MAKERS[maker](like))  # noqa: E731
    step = jf.training_step(classifier, make(None), fisher)
    expected = make(fisher(params, x)).init(params)
    chex.assert_trees_all_equal(step.init(params, x, y), expected)
    chex.assert_trees_all_equal(step.init(params, *jax.eval_shape(lambda: (x, y))), expected)
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps accumulates in float32.
        jax.eval_shape(step, params, expected, x, y)


def test_a_part_of_the_parameters():
    params, x, y = problem()
    opt = optax.masked(jf.scale_by_fisher(0.1, view=jf.kronecker, decay=0.9), {"hidden": True, "out": False})
    step = jf.training_step(classifier, opt)
    state = step.init(params, x, y, weights=jnp.ones(len(y)))
    # The factors of the one layer, with the row of the bias stored separately, and the counts of the means.
    inputs = {(1, 3, 3), (1, 3, 1), (1, 1, 1)}
    assert {leaf.shape for leaf in jax.tree.leaves(state.inner_state.mean)} == inputs | {(1, 4, 4), (1,)}
    jax.eval_shape(step, params, state, x, y)


def test_nothing_is_known_after_the_state_is_made():
    params, x, y = problem()
    opt = MAKERS["kronecker, with decay"](None)
    jf.training_step(classifier, opt).init(params, x, y)
    with pytest.raises(TypeError) as caught:
        opt.init(params)
    assert "jf.training_step(model, opt).init(params" in "".join(caught.value.__notes__)


def test_no_fisher_is_traced_for_an_optimiser_that_asks_for_none():
    params, x, y = problem()
    refused = lambda params, x: pytest.fail("it was called")  # noqa: E731
    chex.assert_trees_all_equal(
        jf.training_step(classifier, optax.adam(0.1), refused).init(params, x, y), optax.adam(0.1).init(params)
    )


@pytest.mark.parametrize("like", [3.0, lambda: 3.0])
def test_what_is_no_operator_is_refused(like):
    with pytest.raises(TypeError, match=r"scale_by_fisher: `like`: expected a Fisher operator.*got 3\.0"):
        MAKERS["kronecker, with decay"](like).init(problem()[0])
