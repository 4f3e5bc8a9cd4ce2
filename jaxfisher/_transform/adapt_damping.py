"""Levenberg and Marquardt's rule: damping follows how well the loss was predicted; steps that raise the loss are rejected."""

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
from jaxfisher._transform.passing import passing
from jaxfisher._transform.places import transformation
from jaxfisher._transform.update_arguments import Shared, check_state, completing, fisher_for, function_for, value_for
from jaxfisher._tree import between, described, dot, param_spec, split
from jaxfisher._values import check_nonnegative, check_number, is_known


class AdaptDampingState(NamedTuple):
    """State of `adapt_damping`.

    Attributes:
        inner: the state of the inner transformation after the last step that was taken.
        damping: the damping of the next step.
        ratio: actual over predicted decrease of the loss, for the last step that was judged; one before the first step.
        accepted: whether the last step was taken.
        rejected: how many steps in a row were not taken, int32.
        recent: a decaying sum of the steps that were taken, each times 0.95 for every step since, in the statistics dtype.
        slope: the slopes of the new batches along ``recent``, summed over the steps since the damping was last set.
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
    r"""Run ``inner`` with a damping that rises when the quadratic model promised too much, and falls when it can be trusted.

    .. math:: \rho = \frac{L(\theta) - L(\theta + u)}{-(g^T u + \frac12 u^T F u)}, \qquad
        \lambda \leftarrow \begin{cases} \lambda / c & \rho > \text{upper} \\ c \lambda & \rho < \text{lower} \end{cases}

    with ``c`` the ``factor``. A step after which the loss is not lower, or not finite, is rejected: the updates are zero, the
    inner state stays as it was, and the damping rises by ``c^2``. If the step before was rejected too, the damping rises by the
    square of the last rise, up to ``c^8``. So with a fixed batch the loss never goes up, and with minibatches the loss of the
    batch in hand never does. Where a step makes its own data stale, as in reinforcement learning, that loss says little: chain
    a `backtrack_kl` inside.

    **Minibatches.** The ratio is measured on the batch from which the step was computed, and a step that fits a small batch can
    be far too long for the others. So the gradient of the next batch, which is computed anyway, also judges the steps, along
    the last twenty or so of them:

    .. math:: r_t = \beta r_{t-1} + u_t, \quad \beta = 0.95, \qquad g_{t+1}^T r_t > 0 \Rightarrow \lambda \leftarrow c \lambda .

    A positive slope says that the parameters went too far: on the whole the recent steps go back and forth, or around their
    goal, and shorter ones would do better. Then the damping rises, whatever the ratio. The slope along the last step alone
    would raise it too early: on noisy batches a single step ends uphill in most of the next batches while the run still goes
    down fast, and steps short enough to avoid that make the run slow. One slope is noisy. The noise averages out in the sum,
    and in the logarithm of the damping, which takes equal steps up and down; the smaller ``c`` is, the longer the average. With
    a fixed batch, a step of a good ratio ends where the slope along it is not positive, up to the error of the model. The slope
    along the recent steps is then seldom positive, and the rule is nearly the classic one.

    **Reach.** A damping above ten times the curvature along the step, ``u^T F u / |u|^2``, only shortens the step. So the
    damping rises above that only after a rejected step, and from above that it falls by ``c^4``. A promised decrease below the
    rounding error of the loss, as after convergence, says nothing, and leaves the damping as it is. Wrap the whole chain,
    learning rate included::

        opt = jf.adapt_damping(jf.natural_gradient(learning_rate=1.0), damping=0.1)
        updates, state = opt.update(grads, state, params, fisher=F, value=value, value_fn=lambda new: loss(new, x, y))

    Args:
        inner: a transformation with a `scale_by_fisher` inside, whose damping is replaced by the one in the state. The ratio
            needs the Fisher at every update, so ``update_every`` saves making the view, not the Fisher.
        damping: the first lambda, above zero.
        factor: ``c > 1``.
        lower_ratio: below this ratio the damping rises.
        upper_ratio: above this ratio the damping falls.
        lower_damping: the damping does not go below this.
        upper_damping: the damping does not go above this.

    Returns:
        A gradient transformation whose ``update`` takes ``params`` and, by keyword, ``fisher``, ``value_fn`` (parameters to the
        loss) and, if known, ``value``, the loss at ``params``; inside `optax.masked` or `optax.partition` also ``all_params``.
        There the loss is judged as a function of the given part, with the other parameters fixed. The incoming updates must be
        the gradient itself, which is passed on to ``inner`` as ``grad``. An update may be given a flag ``due=``. Where it is
        false the step is not judged: it is taken if it is finite, and the ratio and the damping stay until the next step that
        is judged, which uses the sum of the slopes since.

    Raises:
        ValueError: the numbers are out of order (if this is only known at run time, the damping is NaN and no step is taken);
            (at update) ``params``, ``fisher`` or ``value_fn`` is missing.
        TypeError: ``inner`` is no gradient transformation.

    Reference: Marquardt (J. SIAM 1963); More, The Levenberg-Marquardt algorithm (1978); Martens (JMLR 2020), section 6.5;
    Nielsen, Damping parameter in Marquardt's method (1999), for rises that grow; Jacobs, Increased rates of convergence through
    learning rate adaptation (1988), for comparing a gradient with a decaying sum of earlier ones; Wu, Ren, Liao and Grosse,
    Understanding short-horizon bias in stochastic meta-optimization (ICLR 2018), for why a single step misleads.

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
    """The measurements of one step that set the damping of the next one.

    Attributes:
        accepted: whether the step was taken.
        rejected: how many steps in a row were not taken, this one included.
        ratio: the actual decrease over the promised one.
        clear: whether the promised decrease is above the rounding error of the loss.
        beyond: whether the damping is above its reach.
        overshot: whether the batches since the damping was last set slope uphill along the recent steps.
    """

    accepted: Bool[Array, ""]
    rejected: Int[Array, ""]
    ratio: Float[Array, ""]
    clear: Bool[Array, ""]
    beyond: Bool[Array, ""]
    overshot: Bool[Array, ""]


REACH = 10.0
"""The damping's reach, in units of the curvature along the step."""
MEMORY = 0.95
"""The decay per step of the sum of recent steps: about twenty of them count, as in the running mean of the factors."""


def next_damping(damping: Scalar, seen: Evidence, rule: Rule) -> Scalar:
    """The damping of the next step, by the rule of `adapt_damping`."""
    c, low, high, floor, ceiling = (jnp.asarray(x, jnp.float32) for x in rule)
    # Each further rejection in a row squares the rise.
    after_rejection = c ** jnp.minimum(jnp.exp2(seen.rejected.astype(jnp.float32)), 8)
    change = jnp.where(seen.ratio > high, jnp.where(seen.beyond, c**-4, 1 / c), 1)
    change = jnp.where(seen.overshot | (seen.ratio < low), jnp.where(seen.beyond, 1, c), change)
    change = jnp.where(seen.clear, jnp.where(seen.accepted, change, after_rejection), 1)
    # Numbers that turn out at run time to be out of order give NaN.
    ordered = (c > 1) & (low < high) & (floor > 0) & (floor <= ceiling)
    return jnp.where(ordered, jnp.clip(damping * change, floor, ceiling), jnp.nan)


class NextDamping(Protocol):
    """From the damping of a step, the `Evidence` on it and its curvature to the damping of the next step."""

    def __call__(self, damping: Scalar, seen: Evidence, operator: Operator, /) -> Scalar: ...


def by_steps(damping: chex.Numeric, rule: Rule) -> NextDamping:
    """`next_damping` with these numbers, after checking them."""
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
    """The inner state after the step if it was taken, else the one before."""
    return either(accepted, lambda: after, lambda: before)


def adapting(
    inner: optax.GradientTransformation,
    damping: chex.Numeric,
    follow: NextDamping,
    decrease: Callable[[Operator, Any, Any, Any], Scalar],
    kept: Callable[[Bool[Array, ""], Any, Any], Any],
    wide: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The transformation behind `adapt_damping`, `levenberg_marquardt` and `kfac`.

    Args:
        inner: the transformation that makes the step.
        damping: the first damping.
        follow: gives the damping of the next step.
        decrease: ``(operator, gradient, step, inner state after it)`` to the promised decrease of the loss.
        kept: ``(accepted, after, before)`` to the inner state that is kept.
        wide: whether the damping has the dtype of the statistics, as one without bounds needs it; else it is a float32 number.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"adapt_damping: `inner` is {described(inner)}; expected a gradient transformation, such as a chain.")
    chain = optax.with_extra_args_support(inner)

    def init(params: chex.ArrayTree) -> AdaptDampingState:
        dtype = param_spec(params).dtype
        return AdaptDampingState(
            chain.init(params),
            jnp.asarray(damping, dtype if wide else jnp.float32),
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
        # This function needs the operator at every update; share it, so that the inner transformations do not make it again.
        shared = Shared(fisher) if callable(fisher) and not isinstance(fisher, Operator) else fisher
        operator = fisher_for(updates, shared, "adapt_damping")
        # Pass on the incoming updates as the gradient: under `optax.MultiSteps` they are the mean over mini-steps, while a
        # `grad` given by keyword is that of the last mini-step.
        given = extra_args | {
            "grad": updates,
            "fisher": shared,
            "value": start,
            "value_fn": value_fn,
            "damping": state.damping,
            "due": due,
        }
        with passing(given):
            step, after = chain.update(updates, state.inner, params, **given)
        # The quadratic model describes the step before `geodesic_acceleration` bent it.
        straight = optax.tree.get(after, "straight")
        g, u = operator.spec.vector(updates), operator.spec.vector(step) if straight is None else straight
        product = between(g, u, state.recent)
        length = product(1, 1)

        def judged() -> tuple[Scalar, Bool[Array, ""], Bool[Array, ""], Bool[Array, ""]]:
            predicted = decrease(operator, g, u, after)
            actual = (start - loss(optax.apply_updates(params, step))).astype(operator.spec.dtype)
            # Without a promised decrease the ratio is zero; the inner `where` avoids a division by zero.
            ratio = jnp.where(predicted > 0, actual / jnp.where(predicted > 0, predicted, 1), 0).astype(jnp.float32)
            beyond = state.damping.astype(predicted.dtype) * length > REACH * -2 * (product(0, 1) + predicted)
            # Losses are in nats. A small loss is a difference of larger numbers, so the rounding error is at least that of one.
            rounding = 8 * jnp.finfo(predicted.dtype).eps * jnp.maximum(jnp.abs(start).astype(predicted.dtype), 1)
            # A NaN counts as clear (the negation is true), since rounding does not explain it, and is not accepted.
            return ratio, beyond, ~(jnp.abs(predicted) <= rounding), actual > 0

        def unjudged() -> tuple[Scalar, Bool[Array, ""], Bool[Array, ""], Bool[Array, ""]]:
            # A step that is not judged is only checked for being finite.
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
        # An elementwise choice fuses into the sum with the parameters; a branch would copy the whole step.
        taken = jax.tree.map(lambda leaf: jnp.where(accepted, leaf, 0), step)
        return taken, AdaptDampingState(
            kept(accepted, after, state.inner),
            # Set the damping only when a step is judged. Set by the slopes in between, it would only ever rise: that made the
            # text task of `benchmarks/tasks.py` stall.
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
    """Raise `ValueError` if numbers that are known at trace time are out of order."""
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
