"""The information of each candidate, and the criteria by which a design's information is judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxfisher._examples import make_batch, map_examples, refusing
from jaxfisher._fisher import exact_fisher
from jaxfisher._linalg import unit_diagonal
from jaxfisher._model import MODEL, Model, of_one_example
from jaxfisher._tree import check_function
from jaxfisher._values import described, real_array


def informations(model: Model) -> Callable[..., Float[Array, "m p p"]]:
    r"""The Fisher information of one measurement at each of m candidates.

    The information of a design with weights w, which sum to one, is ``jnp.tensordot(w, M, 1)``. The same holds for many
    designs: weights of shape ``[designs, m]`` give ``[designs, p, p]``.

    **When it is the wrong tool.** The information of a nonlinear model depends on the parameters, so a design is only as good
    as the guess of them. Average the criterion over several guesses.

    Args:
        model: ``(params, *inputs) -> distribution`` of ONE measurement.

    Returns:
        A function ``(params, *candidates)`` that returns matrices of shape ``[m, p, p]``, in the order of
        `jax.flatten_util.ravel_pytree`.

    Raises:
        ValueError: (when called) arrays of different lengths.
        TypeError: (when called) a model that returns no distribution.

    Reference: Atkinson, Donev and Tobias, Optimum Experimental Designs, with SAS (2007), section 9.1.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> from jaxfisher import design
    >>> line = lambda p, x: jf.Normal(p[0] + p[1] * x, 1.0)
    >>> print(design.informations(line)(jnp.zeros(2), jnp.array([0.0, 2.0]))[1])
    [[1. 2.]
     [2. 4.]]
    """
    check_function("model", model, MODEL)

    @refusing(
        "informations",
        weights="none: a design's weights multiply what comes back. Pass them to jnp.tensordot(weights, informations, 1).",
        counts="none: each matrix is of one measurement. Divide it by a number of terms afterwards.",
        batch_size="none: all of the matrices are held. Call it for some candidates at a time, and join what comes back.",
    )
    def informations_of(params: chex.ArrayTree, /, *candidates: Any) -> Float[Array, "m p p"]:
        batch = make_batch(params, candidates, None)

        def one(params: chex.ArrayTree, *inputs: Any) -> Float[Array, "p p"]:
            alone = jax.tree.map(lambda leaf: leaf[None], inputs)
            return exact_fisher(model)(params, *alone).as_matrix()

        with of_one_example(model, "model", params, batch.data):
            found: Array = map_examples(one, params, batch.data)
        return found

    return informations_of


def _matrices(caller: str, information: Any) -> Float[Array, "*designs p p"]:
    """The information of designs, checked to be square matrices."""
    shape = np.shape(information) if isinstance(information, jax.Array | np.ndarray) else ()
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise ValueError(
            f"{caller}: `information` is {described(information)}; expected an array of matrices, shape [..., p, p]. Of a "
            "Fisher pass F.as_matrix(), and of a list jnp.stack(matrices)."
        )
    return real_array(f"{caller}: `information`", information)


def _root(caller: str, information: Float[Array, "*designs p p"]) -> Float[Array, "*designs p p"]:
    """The Cholesky factor of an information matrix; NaN if the matrix is singular to rounding.

    It is singular if an eigenvalue is rounding error in units in which the diagonal is near one. Pivots do not decide this:
    rounding may make a pivot as large as one of a design that determines all parameters.
    """
    information = _matrices(caller, information)
    held = jax.lax.stop_gradient(information)
    unit = jnp.vectorize(unit_diagonal, signature="(p)->(p)")(jnp.diagonal(held, axis1=-2, axis2=-1))
    values = jnp.linalg.eigvalsh(unit[..., :, None] * held * unit[..., None, :])
    there = values[..., 0] > unit.shape[-1] * float(jnp.finfo(values.dtype).eps) * values[..., -1]
    # Multiply by the NaN, so that the gradient is NaN too.
    return jnp.linalg.cholesky(information) * jnp.where(there, 1, jnp.nan)[..., None, None]


def d_criterion(information: Float[Array, "*designs p p"]) -> Float[Array, "*designs"]:
    r"""``log det I``: the larger it is, the smaller is the confidence ellipsoid of the parameters.

    Args:
        information: the information of one design or of many, shape ``[..., p, p]``.

    Returns:
        Shape ``[...]``; minus infinity for a design that does not determine all parameters.

    Raises:
        ValueError: no array of square matrices.

    Reference: Wald (1943); Atkinson, Donev and Tobias (2007), section 10.1.

    >>> import jax.numpy as jnp
    >>> from jaxfisher import design
    >>> print(design.d_criterion(jnp.stack([jnp.eye(2), jnp.ones((2, 2))])))
    [  0. -inf]
    """
    root = _root("d_criterion", information)
    value = 2 * jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)), axis=-1)
    return jnp.where(jnp.isnan(value), -jnp.inf, value)


def a_criterion(information: Float[Array, "*designs p p"]) -> Float[Array, "*designs"]:
    r"""``-tr I^-1``: the larger it is, the smaller is the sum of the parameters' variances. It depends on their units.

    Args:
        information: the information of one design or of many, shape ``[..., p, p]``.

    Returns:
        Shape ``[...]``; minus infinity for a design that does not determine all parameters.

    Raises:
        ValueError: no array of square matrices.

    Reference: Elfving (1952); Atkinson, Donev and Tobias (2007), section 10.1.

    >>> import jax.numpy as jnp
    >>> from jaxfisher import design
    >>> print(design.a_criterion(jnp.diag(jnp.array([1.0, 0.5]))))
    -3.0
    """
    root = _root("a_criterion", information)
    eye = jnp.broadcast_to(jnp.eye(root.shape[-1], dtype=root.dtype), root.shape)
    inverse = jax.scipy.linalg.solve_triangular(root, eye, lower=True)
    value = -jnp.sum(jnp.square(inverse), axis=(-2, -1))
    return jnp.where(jnp.isnan(value), -jnp.inf, value)


def e_criterion(information: Float[Array, "*designs p p"]) -> Float[Array, "*designs"]:
    r"""The smallest eigenvalue of I: the larger it is, the better known is the worst-known combination of parameters.

    If that eigenvalue is a double one, it has no gradient, and a search along the gradient may stop short.

    Args:
        information: the information of one design or of many, shape ``[..., p, p]``.

    Returns:
        Shape ``[...]``.

    Raises:
        ValueError: no array of square matrices.

    Reference: Ehrenfeld (1955); Atkinson, Donev and Tobias (2007), section 10.1.

    >>> import jax.numpy as jnp
    >>> from jaxfisher import design
    >>> print(design.e_criterion(jnp.diag(jnp.array([1.0, 0.5]))))
    0.5
    """
    return jnp.linalg.eigvalsh(_matrices("e_criterion", information))[..., 0]
