"""The generalised Gauss-Newton matrix, for any convex loss of a model's outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Shaped

from jaxfisher._distributions.base import Distribution
from jaxfisher._distributions.root import Root
from jaxfisher._examples import make_batch, needs_data
from jaxfisher._fisher import FisherFunction, fisher_of_kind
from jaxfisher._linalg import matmul, unit_root
from jaxfisher._model import of_one_example, scalar
from jaxfisher._operators.operator import Operator
from jaxfisher._pytree import array_fields
from jaxfisher._readings import Around
from jaxfisher._row_functions import ExactRows, prediction
from jaxfisher._scores import make_scores
from jaxfisher._targets import OfData
from jaxfisher._tree import check_function
from jaxfisher._values import described, dtype_of, is_array


@array_fields("outputs", "target", eq=False, repr=False)
class _Output(Distribution):
    """A model's outputs, dressed as the fields of a distribution whose Fisher is the Hessian of the loss.

    The targets are carried along as fields that do not move with the parameters.
    """

    outputs: Any
    target: Any
    loss: Callable[[Any, Any], Array]

    def __post_init__(self) -> None:
        """Nothing to check or broadcast: the fields are whatever the model and the data are made of."""

    def fisher_root(self, moving: tuple[bool, ...]) -> tuple[Any, Root]:
        """A root of the Hessian in all outputs."""
        del moving
        flat, unravel = ravel_pytree(self.outputs)
        value = lambda z: scalar(self.loss(unravel(z), self.target), "loss")  # noqa: E731
        # A Hessian that is negative beyond rounding means that the loss is not convex: show it as NaN.
        half = unit_root(jax.hessian(value)(flat), jnp.nan)
        still = [jnp.zeros_like(leaf) for leaf in jax.tree.leaves(self.target) if jnp.issubdtype(leaf.dtype, jnp.floating)]

        def root(u: Array) -> list[Array]:
            return [*jax.tree.leaves(unravel(matmul(half, u))), *still]

        return jnp.zeros_like(flat), root


@dataclasses.dataclass(frozen=True)
class _Outputs(Around):
    """The model and the loss as a model that predicts an `_Output`; equal if made of the same functions."""

    model: Callable[..., Any]
    loss: Callable[[Any, Any], Array]

    def __call__(self, params: chex.ArrayTree, /, *data: Any) -> _Output:
        *inputs, target = data
        outputs = self.model(params, *inputs)
        leaves = jax.tree.leaves(outputs, is_leaf=_is_distribution)
        for leaf in leaves or [outputs]:
            if _is_distribution(leaf):
                raise TypeError(
                    f"gauss_newton: the model returned a {type(leaf).__name__}; expected outputs: an array or a tree of them. "
                    "For its negative log-likelihood use jf.exact_fisher(model); for another loss return its fields."
                )
            if not leaves or not is_array(leaf) or not jnp.issubdtype(dtype_of(leaf), jnp.floating):
                seen = f"dtype {leaf.dtype}" if hasattr(leaf, "dtype") else described(leaf)
                raise TypeError(
                    f"gauss_newton: the model returned {seen}; expected real floating outputs, of which the loss is a convex "
                    "function: an array or a pytree of them."
                )
        outputs = jax.tree.map(jnp.asarray, outputs)
        return _Output(outputs, jax.tree.map(jnp.asarray, target), self.loss)


def _is_distribution(value: Any) -> bool:
    return isinstance(value, Distribution)


def gauss_newton(
    model: Callable[..., Any],
    loss: Callable[[Any, Any], Array],
    *,
    batch_size: int | None = None,
    max_bytes: int | None = None,
) -> FisherFunction:
    r"""The generalised Gauss-Newton matrix: the Hessian of the loss in the model's outputs, between their Jacobians.

    .. math:: G = \frac1n \sum_i J_i^T H_i J_i, \qquad J_i = \frac{\partial z_i}{\partial\theta}, \quad
        H_i = \frac{\partial^2 \ell(z_i, y_i)}{\partial z_i^2}, \quad z_i = \mathrm{model}(\theta, x_i).

    Use it for a convex loss that is no likelihood, such as Huber's, a margin, or a weighted sum. It is the Hessian of the mean
    loss without the curvature of the model, and positive semi-definite. If the loss is the negative log-likelihood of a family
    in its natural parameters, it is the exact Fisher. It has one row for each output of an example.

    Args:
        model: ``(params, *inputs) -> outputs`` of ONE example, a floating array or a pytree of them.
        loss: ``(outputs, target) -> scalar`` of ONE example, twice differentiable and convex in the outputs.
        batch_size: recompute the rows in chunks of at most this many examples at each use, instead of holding their factors.
        max_bytes: as in `jaxfisher.scores`, instead of a ``batch_size``.

    Returns:
        A function ``(params, *inputs, target, weights=None, counts=None)`` that returns an operator, exact as scores: views,
        solves and transformations take it as they take a Fisher; ``counts`` as in `exact_fisher`. If the loss has negative
        curvature in the outputs, its entries are NaN.

    Raises:
        TypeError: ``model`` or ``loss`` is no function; (when called) outputs that are not floating or are a distribution, a
            missing target.
        ValueError: (when called) arrays of different lengths, a loss that is no scalar.

    Reference: Schraudolph, Fast curvature matrix-vector products (Neural Computation 2002), section 3; Martens (JMLR 2020),
    section 8.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model, loss = lambda w, x: w * x, lambda z, y: jnp.sqrt(1 + (z - y) ** 2)  # a smooth absolute value
    >>> G = jf.gauss_newton(model, loss)(1.0, jnp.array([1.0, 2.0]), jnp.array([1.0, 2.0]))
    >>> print(G.as_matrix())  # the mean of x^2, where the residuals are zero
    [[2.5]]
    """
    check_function("model", model, "(params, *inputs) -> outputs of ONE example")
    check_function("loss", loss, "(outputs, target) -> the scalar loss of ONE example")
    of_outputs = _Outputs(model, loss)

    def fisher_of(
        params: chex.ArrayTree,
        /,
        *data: Any,
        weights: Float[Array, " n"] | None = None,
        counts: Shaped[Array, " n"] | None = None,
    ) -> Operator:
        needs_data(data, "gauss_newton")
        batch = make_batch(params, data, weights, batch_size, max_bytes, counts)
        with of_one_example(of_outputs, "model", params, batch.data):
            known = prediction(of_outputs, params, batch.data)
        return fisher_of_kind("Gauss-Newton", make_scores(ExactRows(of_outputs, known.moving), params, batch))

    return OfData(fisher_of, takes_target=True)
