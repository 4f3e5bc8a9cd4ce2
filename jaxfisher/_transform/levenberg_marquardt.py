"""Nielsen's rule for the damping of a deterministic problem, whose loss is of the same data at every step."""

from __future__ import annotations

import chex
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Scalar

from jaxfisher._operators.operator import Operator
from jaxfisher._transform.adapt_damping import Evidence, adapting, chosen, promised
from jaxfisher._transform.geodesic_acceleration import geodesic_acceleration
from jaxfisher._transform.scale_by_fisher import scale_by_fisher
from jaxfisher._values import check_nonnegative, is_known_zero


def levenberg_marquardt(
    inner: optax.GradientTransformation | None = None, damping: chex.Numeric = 1e-2
) -> optax.GradientTransformationExtraArgs:
    r"""Run ``inner`` with a damping that follows the quality of each step closely, for a loss that is the same at every step.

    .. math:: \rho = \frac{L(\theta) - L(\theta + u)}{-(g^T u + \frac12 u^T F u)}, \qquad
        \lambda \leftarrow \begin{cases} \lambda \max\left(\frac13,\, 1 - (2\rho - 1)^3\right) & \text{the loss is lower} \\
        2^k \lambda & \text{else, the } k\text{th time in a row} \end{cases}

    A step after which the loss is not lower, or not finite, is rejected: the updates are zero and the inner state stays as it
    was. The damping is a smooth function of the ratio, so it settles where steps are just good enough. It falls by a factor of
    up to 3 a step where residuals go to zero: near such a solution the damping must go to zero too, or convergence is slow. Its
    floor is the rounding error of F, ``eps tr F``, below which a damping has no effect; its ceiling is ``tr F / eps``.

    Use this rule for least squares, physics-informed residuals, and fits to all of the data. With minibatches the loss of one
    batch says little about the others: use `jaxfisher.adapt_damping`.

    Args:
        inner: a transformation with a `scale_by_fisher` inside, whose damping is replaced by the one in the state. None stands
            for a full step that is bent, which suits long curved valleys: ``optax.chain(jf.scale_by_fisher(),
            optax.scale_by_learning_rate(1.0), jf.geodesic_acceleration())``. Its ``update`` also takes ``acceleration_fn=``,
            which `jaxfisher.training_step` passes.
        damping: the first lambda, above zero, in the units of F.

    Returns:
        A gradient transformation with an `AdaptDampingState`, whose ``update`` takes what `adapt_damping`'s takes.

    Raises:
        ValueError: a damping that is zero or below; (at update) ``params``, ``fisher`` or ``value_fn`` is missing.
        TypeError: ``inner`` is no gradient transformation.

    Reference: Nielsen, Damping parameter in Marquardt's method (1999), equation 2.4; Madsen, Nielsen and Tingleff, Methods for
    non-linear least squares problems (2004), section 3.2.

    >>> import jax, jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda mu: jf.Normal(mu, 1.0)
    >>> opt = jf.levenberg_marquardt(jf.natural_gradient(1.0), damping=1.0)
    >>> loss = lambda mu: 0.5 * (mu - 3.0) ** 2
    >>> F = jf.exact_fisher(model)(0.0)
    >>> updates, state = opt.update(jax.grad(loss)(0.0), opt.init(0.0), 0.0, fisher=F, value_fn=loss)
    >>> print(updates.round(5), state.damping.round(5))  # the loss is its quadratic model
    1.5 0.33333
    >>> circle = jf.residuals({"radius": lambda p: p["x"] ** 2 + p["y"] ** 2 - 2, "diagonal": lambda p: p["x"] - p["y"]})
    >>> points, params = {"radius": (), "diagonal": ()}, {"x": 2.0, "y": 0.0}
    >>> step = jf.training_step(circle, jf.levenberg_marquardt())
    >>> state = step.init(params, points)
    >>> for _ in range(10):
    ...     params, state, loss = step(params, state, points)
    >>> print({name: leaf.round(3) for name, leaf in params.items()})
    {'x': Array(1., dtype=float32), 'y': Array(1., dtype=float32)}
    """
    check_nonnegative("damping", damping)
    if is_known_zero(damping, np.float64):
        raise ValueError(f"levenberg_marquardt: `damping` is {damping}; expected a number above zero, which it multiplies.")
    return adapting(_bent() if inner is None else inner, damping, nielsen, promised, chosen, wide=True)


def _bent() -> optax.GradientTransformationExtraArgs:
    return optax.chain(scale_by_fisher(), optax.scale_by_learning_rate(1.0), geodesic_acceleration())


def nielsen(damping: Scalar, seen: Evidence, operator: Operator) -> Scalar:
    """The damping of the next step, by the rule of `levenberg_marquardt`."""
    smooth = jnp.maximum(1 / 3, 1 - (2 * seen.ratio.astype(damping.dtype) - 1) ** 3)
    change = jnp.where(seen.accepted, smooth, jnp.exp2(seen.rejected.astype(damping.dtype)))
    trace = operator.trace()
    # Below the floor the damping is lost in the rounding error of F; above the ceiling F is lost in that of the damping.
    eps, size = float(jnp.finfo(trace.dtype).eps), trace.astype(damping.dtype)
    return jnp.clip(damping * change, eps * size, size / eps)
