"""Operators that hold a matrix: that of a Fisher, its marginal over some of the parameters, or one that the user gives."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxfisher._operators.dense import Dense
from jaxfisher._operators.operator import Operator, viewed
from jaxfisher._provenance import Provenance
from jaxfisher._tree import param_spec
from jaxfisher._values import check_array, described, is_array


def dense(fisher: Operator) -> Operator:
    r"""The Fisher as a dense matrix: every entry of ``F``, shape ``[p, p]``, formed once.

    Args:
        fisher: any operator. From scores it costs ``n p^2`` flops; nothing is approximated.

    Returns:
        An operator of the same kind, held dense.

    Raises:
        TypeError: ``fisher`` is not an operator.

    Reference: Amari (Neural Computation 1998), equation 2.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> log_prob = jf.log_likelihood(lambda mu: jf.Normal(mu, 1.0))
    >>> jf.dense(jf.empirical_fisher(log_prob)(0.0, jnp.array([1.0, -2.0])))
    Fisher(empirical, mean over 2, params 1, dense)
    """
    fisher = viewed(fisher, "dense")
    return Operator(Dense(fisher.as_matrix(), fisher.spec), fisher.provenance)


def marginal(fisher: Operator, keep: Callable[[str], bool]) -> Operator:
    r"""The information on some of the parameters if the others are unknown: the Schur complement over those dropped.

    .. math:: F_{kk} - F_{kr} F_{rr}^{+} F_{rk}, \qquad \big(F_{kk} - F_{kr} F_{rr}^{-1} F_{rk}\big)^{-1} = (F^{-1})_{kk}.

    Its inverse is the block of the kept parameters in the inverse of F: n times their covariance if the others are fitted as
    well. `jaxfisher.Operator.restrict` gives the information on them if the others are known.

    If F is held as scores, nearly collinear parameters are told apart as well as the rounding of the scores allows. A matrix
    has squares of their differences, and so half as many digits of them: parameters that it cannot tell apart count as one.

    Args:
        fisher: an operator; its matrix is made, which takes ``p^2`` memory. ``F.marginal(keep)`` is the same.
        keep: which parameter leaves stay: a function from the path of a leaf, such as ``"['layer']['w']"``, to a bool.

    Returns:
        A dense operator over the kept leaves. Its vectors are trees like the parameters with None for each dropped leaf.

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
    return viewed(fisher, "marginal").marginal(keep)


def from_matrix(matrix: Float[Array, "p p"], like: Operator | chex.ArrayTree) -> Operator:
    r"""An operator from a known symmetric matrix, such as the precision of a prior or a Fisher from another program.

    The operator holds the symmetric part ``(M + M^T) / 2``, so that rounding errors do not make it asymmetric.

    Args:
        matrix: shape ``[p, p]``, in the order of `jax.flatten_util.ravel_pytree` of the parameters.
        like: an operator over the parameters, or the parameters.

    Returns:
        A dense operator. It is no mean over examples, so its ``n`` is zero. A prior of precision P beside n examples is
        ``F + (1 / n) * jf.from_matrix(P, F)``.

    Raises:
        ValueError: a matrix of another shape.
        TypeError: a matrix that is no real array; a parameter that is not a real floating array.

    Reference: Tegmark, Taylor and Heavens, Karhunen-Loeve eigenvalue problems in cosmology (1997), section 2, for sums of
    Fishers and priors.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> P = jf.from_matrix(jnp.array([[4.0, 1.0], [1.0, 2.0]]), {"amplitude": 1.0, "tilt": 0.0})
    >>> P
    Fisher(matrix, params 2, dense)
    >>> print(P.diagonal()["tilt"])
    2.0
    """
    spec = like.spec if isinstance(like, Operator) else param_spec(like)
    check_array("`matrix`", matrix)
    expected = f"expected real numbers of shape ({spec.size}, {spec.size}), for the {spec.size} parameters of `like`"
    if not is_array(matrix) or not jnp.issubdtype(jnp.result_type(matrix), jnp.floating):
        raise TypeError(f"from_matrix: `matrix` is {described(matrix)}; {expected}.")
    if jnp.shape(matrix) != (spec.size, spec.size):
        raise ValueError(f"from_matrix: `matrix` has shape {jnp.shape(matrix)}; {expected}.")
    held = jnp.asarray(matrix, spec.dtype)
    return Operator(Dense(0.5 * (held + held.T), spec), Provenance("matrix"))
