"""`metric_ellipses`: small KL balls of a family with two parameters, drawn in the plane of its parameters."""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import numpy as np
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse

from jaxfisher._fisher import exact_fisher
from jaxfisher._model import MODEL, Model
from jaxfisher._tree import ParamSpec, check_function, param_spec
from jaxfisher._values import check_number
from jaxfisher.plot._look import BLACK, SKY, axes_or_new, ellipse, light_grid


def metric_ellipses(
    model: Model,
    points: chex.ArrayTree,
    radius: float,
    *inputs: Any,
    weights: Float[Array, " n"] | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""The KL balls of a family with two parameters, to second order: an ellipse at each of the given points of its plane.

    .. math:: \{\theta + d : \tfrac12 d^T F(\theta)\, d = c\}, \qquad KL(\theta \,\|\, \theta + d) = \tfrac12 d^T F(\theta)\, d
        + O(|d|^3),

    where F is the exact Fisher, a mean over the inputs. The semi-axes are ``sqrt(2 c / lambda_k)`` along the eigenvectors of F:
    in a direction in which an ellipse is long, the predictions change little with the parameters.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE example.
        points: parameters with a leading axis of m points and two numbers for each point, such as an array ``[m, 2]`` or
            ``{"loc": [m], "log_scale": [m]}``. The first number, in the order of `jax.flatten_util.ravel_pytree`, is on the
            horizontal axis. Of a family with more parameters, close over all but two in the model.
        radius: c, in nats.
        *inputs: the arguments of the model after the parameters, with a leading axis of n examples; none if it takes none.
        weights: one weight for each example, shape ``[n]``.
        ax: the axes to draw on; None makes a figure.

    Returns:
        The axes, with m `matplotlib.patches.Ellipse` in the order of the points.

    Raises:
        ValueError: there are other than two numbers for each point, the leaves have different lengths, the radius is not
            positive, or the Fisher is singular or not finite at a point.
        TypeError: the model returns no distribution, the points are not real floating arrays, or ``ax`` is not an Axes.

    Reference: Amari, Information Geometry and Its Applications (2016), section 1.3.

    >>> import jax.numpy as jnp, matplotlib, jaxfisher as jf
    >>> matplotlib.use("Agg")
    >>> from jaxfisher import plot
    >>> model = lambda p: jf.Normal(p["loc"], jnp.exp(p["log_scale"]))  # F = diag(exp(-2 log_scale), 2)
    >>> points = {"loc": jnp.array([0.0, 3.0]), "log_scale": jnp.array([0.0, jnp.log(2.0)])}
    >>> ax = plot.metric_ellipses(model, points, 0.5)
    >>> [round(ellipse.get_width(), 3) for ellipse in ax.patches]  # along loc: twice the scale, as 2 c is one
    [2.0, 4.0]
    """
    check_function("model", model, MODEL)
    _check_radius(radius)
    spec = _plane(points)
    centres = np.concatenate([np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in jax.tree.leaves(points)], axis=1)

    @jax.jit
    def fishers(points: chex.ArrayTree, inputs: Any, weights: Array | None) -> Array:
        return jax.vmap(lambda params: exact_fisher(model)(params, *inputs, weights=weights).as_matrix())(points)

    matrices = np.asarray(fishers(points, inputs, weights))
    ellipses = [_ellipse(centre, matrix, float(radius)) for centre, matrix in zip(centres, matrices, strict=True)]
    ax = axes_or_new(ax)
    for patch in ellipses:
        ax.add_patch(patch)
    ax.plot(*centres.T, linestyle="none", marker=".", markersize=3, color=BLACK)
    ax.autoscale_view()
    light_grid(ax)
    across, up = _labels(spec)
    ax.set(xlabel=across, ylabel=up)
    ax.set_title(rf"$\frac{{1}}{{2}}\, d^T F(\theta)\, d$ = {float(radius):g} nats", fontsize="medium")
    return ax


def _check_radius(radius: Any) -> None:
    check_number("radius", radius, "one positive number of nats")
    if not 0 < float(radius) < math.inf:
        raise ValueError(f"`radius` is {radius}; expected one positive number of nats, such as 0.05.")


def _plane(points: chex.ArrayTree) -> ParamSpec:
    """The spec of the points, checked to have a common leading axis and two numbers for each point."""
    spec = param_spec(points)
    for path, shape in zip(spec.paths, spec.shapes, strict=True):
        if not shape or shape[0] != (spec.shapes[0] or (0,))[0] or not shape[0]:
            raise ValueError(
                f"`points` at {path} has shape {shape}, and at {spec.paths[0]} {spec.shapes[0]}; expected parameters with a "
                "leading axis of points, of the same length in every leaf."
            )
    numbers = sum(math.prod(shape[1:]) for shape in spec.shapes)
    if numbers != 2:
        raise ValueError(
            f"`points` has {numbers} numbers per point (shapes {dict(zip(spec.paths, spec.shapes, strict=True))}, points "
            "first); expected two. Close over the other parameters in the model, and pass points of the remaining two."
        )
    return spec


def _labels(spec: ParamSpec) -> list[str]:
    """A label for each of the two numbers: the path of its leaf, with an index if one leaf holds both."""
    if len(spec.paths) == 2:
        return list(spec.paths)
    both = [path for path, shape in zip(spec.paths, spec.shapes, strict=True) if math.prod(shape[1:]) == 2]
    return [f"{both[0]}[{index}]" for index in range(2)]


def _ellipse(centre: Float[np.ndarray, "2"], matrix: Float[np.ndarray, "2 2"], radius: float) -> Ellipse:
    where = f"at the point ({centre[0]:g}, {centre[1]:g})"
    if not np.all(np.isfinite(matrix)):
        raise ValueError(
            f"the Fisher {where} is not finite: {matrix.tolist()}. Leave points outside the family's parameter space out of "
            "`points`, or choose parameters for which every number is allowed, such as the log of a scale."
        )
    eps, matrix = np.finfo(matrix.dtype).eps, matrix.astype(np.float64)
    scale = matrix[0, 0] * matrix[1, 1]
    # The determinant relative to the product of the diagonal does not depend on the units of the parameters.
    if scale - matrix[0, 1] ** 2 <= 8 * eps * scale:
        raise ValueError(
            f"the Fisher {where} is singular: {matrix.tolist()}. Its ellipse is infinitely long. Leave the point out of "
            "`points`, or pass inputs that tell the two parameters apart."
        )
    (a, b), (_, c) = matrix
    covariance = np.array([[c, -b], [-b, a]]) / (a * c - b**2)
    return ellipse(centre, covariance, 2 * radius, facecolor=f"{SKY}59", edgecolor=BLACK, linewidth=0.9)
