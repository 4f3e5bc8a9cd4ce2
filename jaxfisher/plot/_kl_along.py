"""`kl_along`: the KL divergence along a direction, and its quadratic approximation with the Fisher."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Scalar
from matplotlib.axes import Axes

from jaxfisher._divergence import kl
from jaxfisher._fisher import implicit_fisher
from jaxfisher._model import MODEL, Model
from jaxfisher._tree import cast_like, check_function, param_spec
from jaxfisher.plot._look import BLUE, VERMILION, axes_or_new, counted, legend, light_grid, numbers


def kl_along(
    model: Model,
    params: chex.ArrayTree,
    direction: chex.ArrayTree,
    steps: Float[Array, " m"],
    *inputs: Any,
    weights: Float[Array, " n"] | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""The KL divergence of steps along a direction, and the quadratic that trust regions and natural gradients use for it.

    .. math:: KL(\theta \,\|\, \theta + t d) \quad\text{and}\quad \tfrac12 t^2\, d^T F(\theta)\, d,

    where F is the exact Fisher. Both are means over the examples, in nats. Where the curves separate, the step is too long for
    the metric at its start.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        params: the parameters at t = 0.
        direction: d, a pytree like the parameters.
        steps: the values of t, shape ``[m]``, positive or negative, in the order in which the curves connect them.
        *inputs: the arguments of the model after the parameters, with a leading axis of n examples; none if it takes none.
        weights: one weight for each example, shape ``[n]``.
        ax: the axes to draw on; None makes a figure.

    Returns:
        The axes. Its first line is the divergence, its second the quadratic.

    Raises:
        ValueError: the direction is not shaped like the parameters, the steps are not finite or not an array with one axis, or
            the inputs have different lengths.
        TypeError: the model returns no distribution, the direction or the steps are not real, or ``ax`` is not an Axes.

    Reference: Schulman et al., Trust region policy optimization (2015), appendix C, which checks the divergence after a step.

    >>> import jax.numpy as jnp, matplotlib, jaxfisher as jf
    >>> matplotlib.use("Agg")
    >>> from jaxfisher import plot
    >>> ax = plot.kl_along(lambda r: jf.Poisson(log_rate=r), 0.0, 1.0, jnp.array([-1.0, 0.0, 1.0]))
    >>> for line in ax.lines:  # exp(t) - 1 - t, and t^2 / 2
    ...     print(line.get_ydata().round(3))
    [0.368 0.    0.718]
    [0.5 0.  0.5]
    """
    check_function("model", model, MODEL)
    t = numbers("steps", steps, 1)
    if not np.all(np.isfinite(t)):
        raise ValueError(f"`steps` holds {t[~np.isfinite(t)][0]}; expected finite multiples of the direction.")
    spec = param_spec(params)
    spec.check(direction, "direction")

    @jax.jit
    def along(steps: Array, params: Any, direction: Any, inputs: Any, weights: Array | None) -> tuple[Array, Scalar]:
        start, d = (spec.tree(spec.leaves(tree, "params")) for tree in (params, direction))

        def divergence_at(step: Scalar) -> Scalar:
            moved = jax.tree.map(lambda x, v: x + step * v, start, d)
            return kl(model)(params, cast_like(moved, params), *inputs, weights=weights)

        # One step after another, since a vmap would hold the model's activations once for every step.
        divergences = jax.lax.map(divergence_at, steps)
        return divergences, implicit_fisher(model)(params, *inputs, weights=weights).quadratic(d)

    values, curvature = along(jnp.asarray(t, spec.dtype), params, direction, inputs, weights)
    divergences, quadratic = np.asarray(values, np.float64), 0.5 * t**2 * float(curvature)
    ax = axes_or_new(ax)
    label = counted(r"KL$(\theta \,\|\, \theta + t d)$", np.isfinite(divergences), "not finite")
    ax.plot(t, divergences, color=BLUE, linewidth=2, label=label)
    ax.plot(t, quadratic, color=VERMILION, linestyle="--", linewidth=1.6, label=r"$\frac{1}{2}\, t^2\, d^T F d$")
    ax.set(xlabel="t, in multiples of the direction d", ylabel="KL divergence (nats)")
    light_grid(ax)
    legend(ax)
    return ax
