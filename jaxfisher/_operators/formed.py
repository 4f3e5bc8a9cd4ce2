"""Views that form the matrix of a Fisher: the whole matrix, and what is left of it where some parameters are unknown."""

from __future__ import annotations

from collections.abc import Callable

from jaxfisher._operators.dense import Dense
from jaxfisher._operators.operator import Operator, viewed


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
    r"""The information on some of the parameters, with the others unknown: the Schur complement over those that go.

    .. math:: F_{kk} - F_{kr} F_{rr}^{+} F_{rk}, \qquad \big(F_{kk} - F_{kr} F_{rr}^{-1} F_{rk}\big)^{-1} = (F^{-1})_{kk}.

    Its inverse is the block of the kept parameters in the inverse of F: n times their covariance where the others are fitted as
    well. `jaxfisher.Operator.restrict` gives the information on them where the others are known.

    Args:
        fisher: an operator; it is made dense, and costs ``p^2`` memory. ``F.marginal(keep)`` says the same.
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
    return viewed(fisher, "marginal").marginal(keep)
