"""What is known of some of the parameters where the others are unknown too."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from jaxfisher._linalg import matmul
from jaxfisher._operators.dense import Dense
from jaxfisher._operators.operator import Operator, viewed
from jaxfisher._tree import check_function


def marginal(fisher: Operator, keep: Callable[[str], bool]) -> Operator:
    r"""The information on some of the parameters, with the others unknown: the Schur complement over those that go.

    .. math:: F_{kk} - F_{kr} F_{rr}^{+} F_{rk}, \qquad \big(F_{kk} - F_{kr} F_{rr}^{-1} F_{rk}\big)^{-1} = (F^{-1})_{kk}.

    Its inverse is the block of the kept parameters in the inverse of F: n times their covariance where the others are fitted as
    well. The block of F itself is their information where the others are known.

    Args:
        fisher: an operator; it is made dense, and costs ``p^2`` memory.
        keep: which parameter leaves stay, a function from the path of a leaf, such as ``"['layer']['w']"``, to a bool.

    Returns:
        A dense operator over the kept leaves. Its vectors are trees like the parameters with None for each leaf that is gone.

    Raises:
        TypeError: ``fisher`` is not an operator; ``keep`` is not a function.
        ValueError: ``keep`` keeps no leaf, or every leaf.

    Reference: Amari and Nagaoka, Methods of Information Geometry (2000), section 8.1, on nuisance parameters.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> x = jnp.array([0.0, 1.0, 2.0])
    >>> F = jf.exact_fisher(lambda p, x: jf.Normal(p["slope"] * x + p["level"], 1.0))({"level": 0.0, "slope": 0.0}, x)
    >>> slope = jf.marginal(F, lambda path: path == "['slope']")
    >>> print(slope.as_matrix().round(4))  # the variance of x, where its second moment is 5/3
    [[0.6667]]
    """
    fisher = viewed(fisher, "marginal")
    check_function("keep", keep, "path -> bool, of the path of a parameter leaf")
    spec = fisher.spec
    flags = tuple(bool(keep(path)) for path in spec.paths)
    if all(flags) or not any(flags):
        what = "every leaf" if all(flags) else "no leaf"
        raise ValueError(f"marginal: `keep` keeps {what} of {list(spec.paths)}. Keep some of them, and not all.")
    whole = Dense(fisher.as_matrix(), spec)
    gone = tuple(not flag for flag in flags)
    stays, goes = (whole.restrict(flagged, _structure(spec.treedef, flagged)) for flagged in (flags, gone))
    cross, rest = _cross_block(whole, flags), Operator(goes, fisher.provenance)
    explained = jax.vmap(lambda column: goes.spec.ravel(rest.solve(goes.spec.unravel(column), 0.0), "x"))(cross)
    matrix = stays.matrix - matmul(cross, explained.T)
    return Operator(Dense(0.5 * (matrix + matrix.T), stays.spec), fisher.provenance)


def _structure(treedef: jax.tree_util.PyTreeDef, flags: tuple[bool, ...]) -> jax.tree_util.PyTreeDef:
    """The structure of a tree with None for each leaf that is not flagged."""
    return jax.tree.structure(jax.tree.unflatten(treedef, [0 if flag else None for flag in flags]))


def _cross_block(whole: Dense, flags: tuple[bool, ...]) -> jax.Array:
    """The rows of the flagged leaves and the columns of the others."""
    stays = np.repeat(flags, whole.spec.sizes)
    return whole.matrix[np.ix_(np.flatnonzero(stays), np.flatnonzero(~stays))]
