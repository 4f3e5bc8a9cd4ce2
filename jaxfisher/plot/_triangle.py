"""`triangle`: the confidence ellipses of every pair of parameters, and the density of each parameter on the diagonal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import chex
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from jaxfisher._operators.operator import Operator
from jaxfisher._tree import ParamSpec
from jaxfisher._values import described
from jaxfisher.plot._look import ellipse, light_grid, look, named
from jaxfisher.statistics._covariance import as_covariance

WIDTHS = 3.5
"""How many standard deviations of the widest covariance the axes show on each side of the centre."""
MOST = 8
"""The largest number of parameters that is drawn."""
CURVE = np.linspace(-4, 4, 161)
"""The points at which a density is drawn, in standard deviations from the centre."""


def triangle(params: chex.ArrayTree, covariances: Mapping[str, Operator], axes: np.ndarray | None = None) -> np.ndarray:
    r"""The Gaussian density of each parameter, and the ellipses that hold 68 and 95 per cent of each pair of parameters.

    .. math:: (\theta - \hat\theta)^T C_{ij}^{-1} (\theta - \hat\theta) \le -2 \log(1 - P), \qquad P = 0.683,\; 0.954,

    where ``C_ij`` is the 2 x 2 block of the covariance for both parameters. The ellipses are therefore marginal: the other
    parameters are unknown as well. Densities are scaled to a maximum of one.

    Args:
        params: the centre, parameters with at most eight numbers in total.
        covariances: from a name to a covariance over these parameters, such as `jaxfisher.covariance` returns.
        axes: a square array of Axes to draw on, with one row and one column for each number; None makes a figure.

    Returns:
        The array of Axes, shape ``[p, p]``. Those above the diagonal are switched off.

    Raises:
        ValueError: there is no covariance, one is not finite or has a variance that is not positive, there are more than eight
            numbers, or ``axes`` has another shape.
        TypeError: ``covariances`` is not a mapping to operators, or one of them is a Fisher.

    Reference: Coe, Fisher matrices and confidence ellipses: a quick-start guide and software (2009), section 2.

    >>> import jax.numpy as jnp, matplotlib, jaxfisher as jf
    >>> matplotlib.use("Agg")
    >>> from jaxfisher import plot
    >>> F = jf.from_matrix(jnp.array([[4.0, 0.0], [0.0, 1.0]]), {"a": 0.0, "b": 0.0})
    >>> axes = plot.triangle({"a": 1.0, "b": 2.0}, {"data": jf.covariance(F, n=1)})
    >>> [round(ellipse.get_height() / ellipse.get_width(), 3) for ellipse in axes[1, 0].patches]  # errors 1/2 and 1
    [2.0, 2.0]
    """
    operators = {name: as_covariance(value, f"plot.triangle: `covariances[{name!r}]`") for name, value in _checked(covariances)}
    spec = next(iter(operators.values())).spec
    centre = np.asarray(spec.ravel(params, "params"), np.float64)
    labels = _labels(spec)
    if len(labels) > MOST:
        raise ValueError(f"`params` has {len(labels)} numbers; expected at most {MOST}. Take some of them with jf.marginal.")
    matrices = {name: _matrix(name, operator, spec) for name, operator in operators.items()}
    grid = _grid(axes, len(labels))
    wide = WIDTHS * np.sqrt(np.max([np.diag(matrix) for matrix in matrices.values()], axis=0))
    for row, column in np.ndindex(grid.shape):
        ax = grid[row, column]
        if column > row:
            ax.axis("off")
            continue
        for k, (name, matrix) in enumerate(matrices.items()):
            draw = _density if row == column else _ellipses
            draw(
                ax, centre, matrix, (row, column), {"color": look(k + 1)["color"], "linestyle": look(k + 1)["linestyle"]}, name
            )
        ax.set_xlim(centre[column] - wide[column], centre[column] + wide[column])
        if row != column:
            ax.set_ylim(centre[row] - wide[row], centre[row] + wide[row])
            light_grid(ax)
        _label(ax, labels, row, column)
    # The upper right axes are empty. The layout ignores the legend there, so that the other axes keep their size.
    grid[0, -1].legend(handles=grid[0, 0].lines, loc="upper right").set_in_layout(False)
    return grid


def _checked(covariances: Any) -> Any:
    return named("covariances", covariances, "a covariance, such as jf.covariance(F)").items()


def _labels(spec: ParamSpec) -> list[str]:
    names = []
    for path, shape in zip(spec.paths, spec.shapes, strict=True):
        plain = path[2:-2] if path.startswith("['") and path.endswith("']") and path.count("[") == 1 else path
        names += [plain] if not shape else [f"{plain}{list(index)}" for index in np.ndindex(shape)]
    return names


def _matrix(name: str, operator: Operator, spec: ParamSpec) -> Float[np.ndarray, "p p"]:
    spec.check_same(operator.spec, f"plot.triangle: `covariances[{name!r}]` is {operator}, and the first is over {spec.paths}")
    matrix = np.asarray(operator, np.float64)
    if not np.all(np.isfinite(matrix)) or not np.all(np.diag(matrix) > 0):
        raise ValueError(
            f"plot.triangle: `covariances[{name!r}]` has the variances {np.diag(matrix).tolist()}; expected finite numbers "
            "above zero. Leave out what the data do not determine, or add a prior."
        )
    return matrix


def _grid(axes: Any, size: int) -> Any:
    if axes is None:
        return plt.subplots(size, size, figsize=(2.2 * size, 2.2 * size), layout="constrained", squeeze=False)[1]
    grid = np.asarray(axes, object)
    if grid.shape != (size, size) or not all(isinstance(ax, Axes) for ax in grid.flat):
        raise ValueError(f"`axes` is {described(axes)}; expected an array of Axes of shape ({size}, {size}), or None.")
    return grid


def _density(ax: Axes, centre: Any, matrix: Any, place: tuple[int, int], style: dict[str, Any], name: str) -> None:
    ax.plot(centre[place[0]] + math.sqrt(matrix[place[0], place[0]]) * CURVE, np.exp(-0.5 * CURVE**2), label=name, **style)


def _ellipses(ax: Axes, centre: Any, matrix: Any, place: tuple[int, int], style: dict[str, Any], name: str) -> None:
    row, column = place
    block = matrix[np.ix_([column, row], [column, row])]
    for deviations, alpha in ((2, 0.25), (1, 0.5)):
        inside = math.erf(deviations / math.sqrt(2))
        patch = ellipse(centre[[column, row]], block, -2 * math.log(1 - inside), fill=False, linewidth=1.4)
        patch.set(edgecolor=style["color"], linestyle=style["linestyle"], alpha=0.5 + alpha)
        ax.add_patch(patch)


def _label(ax: Axes, labels: list[str], row: int, column: int) -> None:
    last = row == len(labels) - 1
    ax.set_xlabel(labels[column] if last else "")
    ax.tick_params(labelbottom=last, labelleft=column == 0 and row > 0)
    ax.set_ylabel(labels[row] if column == 0 and row > 0 else "")
    if row == column:
        ax.set_yticks([])
