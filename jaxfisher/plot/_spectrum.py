"""`spectrum`: the eigenvalues of a Fisher."""

from __future__ import annotations

import math

import chex
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from jaxfisher._operators.operator import Operator, as_operator
from jaxfisher._values import check_number
from jaxfisher.plot._look import BLACK, BLUE, ORANGE, VERMILION, axes_or_new, legend, light_grid


def spectrum(fisher: Operator, damping: chex.Numeric | None = None, ax: Axes | None = None) -> Axes:
    r"""The eigenvalues of F, largest first, on a log axis.

    .. math:: \lambda_1 \ge \lambda_2 \ge \dots \ge \lambda_p.

    `Operator.eigvalsh` makes eigenvalues within rounding error exactly zero. A log axis has no zero, so they are drawn as
    triangles on its lower edge. Negative eigenvalues, which a Fisher cannot have but an observed information can, are drawn as
    crosses at their absolute values. The legend counts both. Along an eigenvector whose eigenvalue is far below the damping,
    ``(F + damping I)^-1`` is about ``1 / damping``, whatever F is.

    Args:
        fisher: an operator over p parameters. The axis gives its eigenvalues in nats per squared parameter.
        damping: one positive number in the units of F, drawn as a line; None draws no line.
        ax: the axes to draw on; None makes a figure.

    Returns:
        The axes, with the index of the eigenvalues, 1 to p, on the horizontal axis.

    Raises:
        ValueError: the damping is not positive, F is not finite, or F is too large for `Operator.eigvalsh`.
        TypeError: ``fisher`` is not an operator, the damping is not one number, or ``ax`` is not an Axes.

    Reference: Sagun, Bottou and LeCun, Eigenvalues of the Hessian in deep learning: singularity and beyond (2016).

    >>> import jax.numpy as jnp, matplotlib, jaxfisher as jf
    >>> matplotlib.use("Agg")
    >>> from jaxfisher import plot
    >>> F = jf.exact_fisher(lambda w, x: jf.Normal(x @ w, 1.0))(jnp.zeros(3), jnp.diag(jnp.array([3.0, 6.0, 0.0])))
    >>> ax = plot.spectrum(F, damping=0.1)
    >>> print(ax.lines[0].get_ydata().round(3))
    [12.  3.]
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['2 of 3 positive', '1 of 3 zero to rounding', 'damping 0.1']
    """
    operator = as_operator(fisher, "plot.spectrum")
    level = None if damping is None else _checked(damping)
    values = np.asarray(operator.eigvalsh(), np.float64)[::-1]
    if not np.all(np.isfinite(values)):
        raise ValueError(
            f"the eigenvalues of {operator} are not finite. Look for NaN or infinity in the parameters and the data."
        )
    ax = axes_or_new(ax)
    index, p = np.arange(1, len(values) + 1), len(values)

    def mark(kept: np.ndarray, sizes: np.ndarray, word: str, **how: object) -> None:
        if np.any(kept):
            label = f"{np.sum(kept)} of {p} {word}"
            ax.plot(index[kept], sizes[kept], linestyle="none", label=label, **how)  # type: ignore[arg-type]

    edge = ax.get_xaxis_transform()
    mark(values > 0, values, "positive", marker="o", markersize=4, color=BLUE)
    mark(values < 0, -values, "negative: their size", marker="x", markersize=5, color=VERMILION)
    low = np.zeros(p)
    mark(values == 0, low, "zero to rounding", marker="v", markersize=5, color=ORANGE, transform=edge, clip_on=False, zorder=3)
    if level is not None:
        ax.axhline(level, color=BLACK, linestyle="--", linewidth=1.2, label=f"damping {level:.3g}")
    ax.set(yscale="log", xlabel="index of the eigenvalue, largest first", ylabel="eigenvalue of F (nats per squared parameter)")
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    light_grid(ax)
    legend(ax)
    return ax


def _checked(damping: chex.Numeric) -> float:
    check_number("damping", damping, "one positive number in the units of F, or None for no line")
    if not 0 < float(damping) < math.inf:
        raise ValueError(
            f"`damping` is {damping}; expected one positive number in the units of F, since a log axis has no zero. "
            "None draws no line."
        )
    return float(damping)
