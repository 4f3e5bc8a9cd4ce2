"""Levenberg and Marquardt's rule: damping follows how well the loss was predicted, and steps that raise it are not taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Scalar

from jaxfisher._once import either
from jaxfisher._operators.operator import Operator
from jaxfisher._transform.places import transformation
from jaxfisher._transform.update_arguments import Shared, check_state, completing, fisher_for, function_for, value_for
from jaxfisher._tree import between, described, dot, param_spec, split
from jaxfisher._values import check_nonnegative, check_number, is_known


class AdaptDampingState(NamedTuple):
    """State of `adapt_damping`.

    Attributes:
        inner: the state of the transformation inside, as of the last step that was taken.
        damping: the damping of the next step.
        ratio: the loss's actual decrease by the last step that was judged over the predicted one; one before the first step.
        accepted: whether the last step was taken.
        rejected: how many steps in a row were not, int32.
        recent: the steps that were taken, summed, each times 0.95 for every step since, in the statistics dtype.
        slope: the sum of the slopes along the recent steps, at the end of each since the damping was last set, in the batch
            after it.
    """

    inner: Any
    damping: Float[Array, ""]
    ratio: Float[Array, ""]
    accepted: Bool[Array, ""]
    rejected: Int[Array, ""]
    recent: Any
    slope: Float[Array, ""]


def adapt_damping(
    inner: optax.GradientTransformation,
    damping: chex.Numeric,
    *,
    factor: chex.Numeric = 2.0,
    lower_ratio: chex.Numeric = 0.25,
    upper_ratio: chex.Numeric = 0.75,
    lower_damping: chex.Numeric = 1e-8,
    upper_damping: chex.Numeric = 1e8,
) -> optax.GradientTransformationExtraArgs:
    r"""Run ``inner`` with a damping that rises where the quadratic model promised too much and falls where it can be trusted.

    .. math:: \rho = \frac{L(\theta) - L(\theta + u)}{-(g^T u + \frac12 u^T F u)}, \qquad
        \lambda \leftarrow \begin{cases} \lambda / c & \rho > \text{upper} \\ c \lambda & \rho < \text{lower} \end{cases}

    with ``c`` the ``factor``. A step after which the loss is not lower, or not finite, is not taken: the updates are zero, the
    inner state stays as it was, and the damping rises by ``c^2``, and by the square of the last rise where the step before was
    not taken either, up to ``c^8``. So with a fixed batch the loss never goes up; with minibatches each batch's own loss does
    not. Where a step makes its own data stale, as in reinforcement learning, that loss says little: chain a `backtrack_kl`
    inside.

    **Minibatches.** The ratio is that of the batch which the step was computed from, and a small batch is fitted by steps that
    are far too long for the others. So the steps are also judged by the gradient of the next batch, which is there anyway,
    along the last twenty or so of them:

    .. math:: r_t = \beta r_{t-1} + u_t, \quad \beta = 0.95, \qquad g_{t+1}^T r_t > 0 \Rightarrow \lambda \leftarrow c \lambda .

    A positive slope says that the parameters went too far: on the whole these steps go back and forth, or around where they
    should end, and shorter ones would do better. Then the damping rises, whatever the ratio. The last step alone would say so
    too early. Where batches are noisy it ends uphill in most of the next ones while a run still goes down fast, and steps so
    short that it does not make a run slow. One slope is noisy. Its noise averages in the sum, and in the logarithm of the
    damping, which takes equal steps up and down; the smaller ``c`` is, the longer the average. With a fixed batch a step of a
    good ratio ends in a slope along itself that is not positive, up to the error of the model. The slope along the recent steps
    seldom is positive then, and the rule is nearly the classic one.

    **Reach.** A damping above ten times the curvature along the step, ``u^T F u / |u|^2``, only shortens it. So it does not
    rise above that unless a step was not taken, and from above that it falls by ``c^4``. A decrease that is promised to be less
    than the rounding of the loss, as after convergence, says nothing: then the damping stays. Wrap the whole chain, learning
    rate included::

        opt = jf.adapt_damping(jf.natural_gradient(learning_rate=1.0), damping=0.1)
        updates, state = opt.update(grads, state, params, fisher=F, value=value, value_fn=lambda new: loss(new, x, y))

    Args:
        inner: a transformation with a `scale_by_fisher` inside, whose own damping is replaced by the state's. It is given the
            operator itself, which the ratio needs at every update: ``update_every`` saves the view, not the Fisher.
        damping: the first lambda, above zero.
        factor: ``c > 1``.
        lower_ratio: below this ratio the damping rises.
        upper_ratio: above this ratio the damping falls.
        lower_damping: the damping does not go below this.
        upper_damping: the damping does not go above this.

    Returns:
        A gradient transformation whose ``update`` takes ``params`` and, by keyword, ``fisher``, ``value_fn`` (parameters to the
        loss) and, if known, ``value``, the loss at ``params``; inside `optax.masked` or `optax.partition` also ``all_params``.
        There the loss is judged as a function of the part, the others as they are. What comes in must be the gradient itself,
        and the chain is given it as ``grad``. An update that is given ``due=``, a flag, judges the step only where that is
        true: else the step is taken if it is finite, and the ratio and the damping stay until the next one is judged, by the
        sum of the slopes since.

    Raises:
        ValueError: numbers that are known to be out of order; where they turn out to be, the damping is NaN, and no step is
            taken; (at update) ``params``, ``fisher`` or ``value_fn`` is missing.
        TypeError: ``inner`` is no gradient transformation.

    Reference: Marquardt (J. SIAM 1963); More, The Levenberg-Marquardt algorithm (1978); Martens (JMLR 2020), section 6.5;
    Nielsen, Damping parameter in Marquardt's method (1999), for rises that grow; Jacobs, Increased rates of convergence through
    learning rate adaptation (1988), for a gradient held against a decaying sum of what came before it; Wu, Ren, Liao and
    Grosse, Understanding short-horizon bias in stochastic meta-optimization (ICLR 2018), for what a single step says too early.

    >>> import jax, jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda mu: jf.Normal(mu, 1.0)
    >>> opt = jf.adapt_damping(jf.natural_gradient(1.0), damping=1.0)
    >>> loss = lambda mu: 0.5 * (mu - 3.0) ** 2
    >>> F = jf.exact_fisher(model)(0.0)
    >>> updates, state = opt.update(jax.grad(loss)(0.0), opt.init(0.0), 0.0, fisher=F, value_fn=loss)
    >>> print(updates.round(5), state.ratio.round(5), state.damping)  # the loss is its quadratic model
    1.5 1.0 0.5
    """
    rule = Rule(factor, lower_ratio, upper_ratio, lower_damping, upper_damping)
    return adapting(inner, damping, by_steps(damping, rule), promised, chosen)


class Rule(NamedTuple):
    """When the damping changes, by how much, and within which bounds: the numbers of `adapt_damping`."""

    factor: chex.Numeric
    lower_ratio: chex.Numeric
    upper_ratio: chex.Numeric
    lower_damping: chex.Numeric
    upper_damping: chex.Numeric


class Evidence(NamedTuple):
    """What is known of a step when the damping is set for the next one.

    Attributes:
        accepted: whether it was taken.
        rejected: how many in a row were not, with this one.
        ratio: the actual decrease over the promised one.
        clear: whether the promised one is above the rounding of the loss.
        beyond: whether the damping is above its reach.
        overshot: whether the recent steps went too far in the eyes of the batches since the damping was last set.
    """

    accepted: Bool[Array, ""]
    rejected: Int[Array, ""]
    ratio: Float[Array, ""]
    clear: Bool[Array, ""]
    beyond: Bool[Array, ""]
    overshot: Bool[Array, ""]


REACH = 10.0
"""The damping's reach, in curvatures along the step."""
MEMORY = 0.95
"""What is left of a step among the recent ones after one more: about twenty of them count, as in the mean of the factors."""


def next_damping(damping: Scalar, seen: Evidence, rule: Rule) -> Scalar:
    """The damping of the next step."""
    c, low, high, floor, ceiling = (jnp.asarray(x, jnp.float32) for x in rule)
    # A step that is not taken after one that was not raises it by the square of the last rise.
    after_rejection = c ** jnp.minimum(jnp.exp2(seen.rejected.astype(jnp.float32)), 8)
    change = jnp.where(seen.ratio > high, jnp.where(seen.beyond, c**-4, 1 / c), 1)
    change = jnp.where(seen.overshot | (seen.ratio < low), jnp.where(seen.beyond, 1, c), change)
    change = jnp.where(seen.clear, jnp.where(seen.accepted, change, after_rejection), 1)
    # What is only known at run time to be out of order adapts nothing.
    ordered = (c > 1) & (low < high) & (floor > 0) & (floor <= ceiling)
    return jnp.where(ordered, jnp.clip(damping * change, floor, ceiling), jnp.nan)


class NextDamping(Protocol):
    """How the damping of the next step follows from that of the last one, what was seen of it, and its curvature."""

    def __call__(self, damping: Scalar, seen: Evidence, operator: Operator, /) -> Scalar: ...


def by_steps(damping: chex.Numeric, rule: Rule) -> NextDamping:
    """`next_damping` by these numbers, after checking them."""
    factor, lower_ratio, upper_ratio, lower_damping, upper_damping = rule
    for name, value in (("damping", damping), ("lower_damping", lower_damping), ("upper_damping", upper_damping)):
        check_nonnegative(name, value)
    for name, value in (("factor", factor), ("lower_ratio", lower_ratio), ("upper_ratio", upper_ratio)):
        check_number(name, value)
    _check_order(damping, factor, lower_ratio, upper_ratio, lower_damping, upper_damping)
    return lambda damping, seen, operator: next_damping(damping, seen, rule)


def promised(operator: Operator, g: Any, u: Any, after: Any) -> Scalar:
    """The decrease that the quadratic model promises for any step."""
    del after
    return -(dot(g, u) + 0.5 * operator.quadratic(u))


def chosen(accepted: Bool[Array, ""], after: Any, before: Any) -> Any:
    """All as it was, where the step is not taken."""
    return either(accepted, lambda: after, lambda: before)


def adapting(
    inner: optax.GradientTransformation,
    damping: chex.Numeric,
    follow: NextDamping,
    decrease: Callable[[Operator, Any, Any, Any], Scalar],
    kept: Callable[[Bool[Array, ""], Any, Any], Any],
) -> optax.GradientTransformationExtraArgs:
    """`adapt_damping`, the damping by ``follow``, by what ``decrease(operator, gradient, step, state after it)`` promised.

    ``kept(accepted, after, before)`` is the inner state after a step that may not be taken.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"adapt_damping: `inner` is {described(inner)}; expected a gradient transformation, such as a chain.")
    chain = optax.with_extra_args_support(inner)

    def init(params: chex.ArrayTree) -> AdaptDampingState:
        dtype = param_spec(params).dtype
        return AdaptDampingState(
            chain.init(params),
            jnp.asarray(damping, jnp.float32),
            ratio=jnp.ones((), jnp.float32),
            accepted=jnp.asarray(True),
            rejected=jnp.zeros((), jnp.int32),
            recent=jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype), split(params)),
            slope=jnp.zeros((), dtype),
        )

    def update(
        updates: Any,
        state: AdaptDampingState,
        params: Any = None,
        *,
        fisher: Operator | Callable[[], Operator] | None = None,
        value: chex.Numeric | None = None,
        value_fn: Callable[[Any], chex.Numeric] | None = None,
        due: bool | Bool[Array, ""] = True,
        **extra_args: Any,
    ) -> tuple[Any, AdaptDampingState]:
        whole = completing(params, extra_args.get("all_params"), "adapt_damping")
        if not jax.tree.leaves(updates):
            return updates, state
        check_state(state, AdaptDampingState, "adapt_damping")
        loss = function_for("value_fn", value_fn, "from parameters to the loss", "adapt_damping", whole)
        start = value_for(value, loss, params, "adapt_damping")
        # The operator is needed here at every update, and need not be made again by each transformation inside.
        shared = Shared(fisher) if callable(fisher) and not isinstance(fisher, Operator) else fisher
        operator = fisher_for(updates, shared, "adapt_damping")
        # The gradient is what comes in: under `optax.MultiSteps` that is a mean, and a gradient given by keyword is not.
        given = extra_args | {
            "grad": updates,
            "fisher": shared,
            "value": start,
            "value_fn": value_fn,
            "damping": state.damping,
            "due": due,
        }
        step, after = chain.update(updates, state.inner, params, **given)
        # The quadratic model is of a step as it was before a `geodesic_acceleration` bent it.
        straight = optax.tree.get(after, "straight")
        g, u = operator.spec.vector(updates), operator.spec.vector(step) if straight is None else straight
        product = between(g, u, state.recent)
        length = product(1, 1)

        def judged() -> tuple[Scalar, Bool[Array, ""], Bool[Array, ""], Bool[Array, ""]]:
            predicted = decrease(operator, g, u, after)
            actual = (start - loss(optax.apply_updates(params, step))).astype(operator.spec.dtype)
            # Where nothing was promised, nothing was broken.
            ratio = jnp.where(predicted > 0, actual / jnp.where(predicted > 0, predicted, 1), 0).astype(jnp.float32)
            beyond = state.damping.astype(predicted.dtype) * length > REACH * -2 * (product(0, 1) + predicted)
            # Losses are in nats, and a small one is a difference of larger numbers.
            rounding = 8 * jnp.finfo(predicted.dtype).eps * jnp.maximum(jnp.abs(start).astype(predicted.dtype), 1)
            # The negation is true of a NaN, which rounding does not explain; and comparisons with one are false.
            return ratio, beyond, ~(jnp.abs(predicted) <= rounding), actual > 0

        def unjudged() -> tuple[Scalar, Bool[Array, ""], Bool[Array, ""], Bool[Array, ""]]:
            # There is nothing to say of it but that a step that is not finite is not taken.
            finite = jnp.isfinite(length)
            return state.ratio, jnp.zeros_like(finite), jnp.ones_like(finite), finite

        ratio, beyond, clear, accepted = either(due, judged, unjudged)
        slope = state.slope + product(0, 2)
        seen = Evidence(
            accepted,
            rejected=jnp.where(accepted, 0, state.rejected + 1),
            ratio=ratio,
            clear=clear,
            beyond=beyond,
            overshot=slope > 0,
        )
        judging = jnp.asarray(due) | ~accepted
        # A choice number by number is part of the sum with the parameters; branches would hand all of them on.
        taken = jax.tree.map(lambda leaf: jnp.where(accepted, leaf, 0), step)
        return taken, AdaptDampingState(
            kept(accepted, after, state.inner),
            # Moved by slopes in between it would rise and not fall: the text of `benchmarks/tasks.py` stalled so.
            jnp.where(judging, follow(state.damping, seen, operator), state.damping),
            ratio,
            accepted,
            seen.rejected,
            jax.tree.map(lambda old, new: MEMORY * old + new, state.recent, operator.spec.vector(taken)),
            jnp.where(judging, 0, slope),
        )

    return transformation(init, update)


def _check_order(
    damping: chex.Numeric,
    factor: chex.Numeric,
    lower_ratio: chex.Numeric,
    upper_ratio: chex.Numeric,
    lower_damping: chex.Numeric,
    upper_damping: chex.Numeric,
) -> None:
    """Raise `ValueError` where numbers that are known are out of order."""
    strictly = (1, factor), (lower_ratio, upper_ratio), (0, lower_damping)
    at_most = (lower_damping, damping), (damping, upper_damping), (lower_damping, upper_damping)
    known = lambda pair: all(map(is_known, pair))  # noqa: E731
    if any(known(pair) and not pair[0] < pair[1] for pair in strictly) or any(
        known(pair) and not pair[0] <= pair[1] for pair in at_most
    ):
        raise ValueError(
            f"adapt_damping: damping {damping}, factor {factor}, lower_ratio {lower_ratio}, upper_ratio {upper_ratio}, "
            f"lower_damping {lower_damping}, upper_damping {upper_damping}; expected factor > 1, lower_ratio < upper_ratio and "
            "0 < lower_damping <= damping <= upper_damping."
        )
