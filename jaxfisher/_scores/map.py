r"""`Scores`: the gradients of log-densities, one row for each example, as one linear map ``S : R^p -> R^rows``."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Scalar

from jaxfisher._absent import OF_SCORES, absent
from jaxfisher._engine import Basis, Leaf, Moments, Seal, leaf_of, sealed
from jaxfisher._linalg import matmul, mirrored
from jaxfisher._once import once
from jaxfisher._provenance import Provenance
from jaxfisher._stack import of_one
from jaxfisher._tree import ParamSpec
from jaxfisher._values import check_array, described, dtype_of, is_array, nonnegative


class ClippedSum(NamedTuple):
    r"""A sum of vectors clipped to a norm bound, ``sum_i c_i v_i`` with ``c_i = min(1, max_norm / |v_i|)``.

    Attributes:
        sum: a pytree like the parameters, in the statistics dtype, so that noise is added before anything is rounded.
        sensitivity: the most that one example can change the sum, in Euclidean norm: ``max_norm``, a scalar. This is for adding
            or removing an example; replacing one by another can change the sum by twice that.
        num_clipped: the number of vectors longer than the bound, an int32 scalar. It depends on the data without any noise.
    """

    sum: Any
    sensitivity: Scalar
    num_clipped: Int[Array, ""]


class Scores(abc.ABC):
    r"""Per-example scores as a linear map ``S`` with ``rows`` rows and ``p`` columns.

    Row ``i`` is :math:`s_i = \nabla_\theta \log p_\theta(x_i)`. Columns are ordered as `jax.flatten_util.ravel_pytree`
    orders the parameters; a complex leaf has the columns of its real parts and then those of its imaginary parts. If the
    log-density is complex, an example has two rows, one after the other: for its real and for its imaginary part. ``S @ v`` is
    `mv`, and ``np.asarray(S)`` is `as_matrix`. `jaxfisher.scores` makes scores; they are pytrees that cross ``jit``.
    """

    spec: ParamSpec
    weights: Float[Array, " rows"]
    provenance: Provenance = Provenance("scores")
    """The provenance of a mean with these weights."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Compile each method that a subclass overrides into one program."""
        super().__init_subclass__(**options)
        for name in _PROGRAMS:
            if name in vars(cls):
                setattr(cls, name, once(of_one(name)(vars(cls)[name])))

    if not TYPE_CHECKING:  # to a type checker every name would be there
        __getattr__ = absent("scores", OF_SCORES)

    def __matmul__(self, v: chex.ArrayTree) -> Float[Array, " rows"]:
        return self.mv(v)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.asarray(self.as_matrix(), dtype=dtype)

    def __repr__(self) -> str:
        return f"Scores({self.num_rows:,} rows, params {self.spec.size:,}, {self._way})"

    @property
    @abc.abstractmethod
    def _way(self) -> str:
        """How the rows are held, in the words of `repr`."""

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes that `jax.vmap` or `jax.lax.scan` added before the rows; () for a single matrix of scores."""
        return self.weights.shape[:-1]

    @property
    def num_rows(self) -> int:
        """The number of rows: examples times rows per example."""
        return self.weights.shape[0]

    @property
    @abc.abstractmethod
    def _num_examples(self) -> int:
        """The number of examples, n."""

    def mv(self, v: chex.ArrayTree) -> Float[Array, " rows"]:
        """``S v``: the directional derivative of every log-density along ``v``, shape ``[rows]``."""
        return _product(self, self.spec.tree(self.spec.leaves(v, "v")))

    @abc.abstractmethod
    def product(self, v: chex.ArrayTree, seal: Seal) -> Float[Array, " rows"]:
        """``S v``, for use inside a program.

        ``seal`` is `unsealed` for a vector that was computed in the same program and is no constant of it; this needs less
        memory. For any other vector ``seal`` is `sealed`.
        """

    @abc.abstractmethod
    def rmv(self, w: Float[Array, " rows"]) -> Any:
        """``S^T w``: the weighted sum of the scores, a pytree like the parameters."""

    def _felt(self, e: Float[Array, " rows"]) -> Float[Array, " rows"]:
        """One number per row, with the part removed that does not count in a sum with the scores: padding, which may be NaN."""
        return jnp.where(self.weights == 0, 0, e)

    @once
    def gram(self) -> Float[Array, "rows rows"]:
        """``S S^T``: inner products of all pairs of scores; one triangle is the mirror image of the other."""
        return mirrored(self.gram_upper(jnp.ones((), self.spec.dtype)))

    def cross_gram(self, other: Scores | chex.ArrayTree) -> Float[Array, "rows others"]:
        """``S R^T``: inner products with the rows R of other scores, or with vectors stacked along a leading axis.

        Other scores must be over the same parameters, perhaps at other values of them; the product of their factors costs as
        much as `gram`. With stacked vectors, gradients are formed a few columns at a time, so that no array of rows x p is
        made; for a single vector `mv` is cheaper.
        """
        if not isinstance(other, Scores):
            return _products(self, self.spec.stacked(other, "other"))
        self.spec.check_same(other.spec, f"cross_gram: cannot multiply {self} with {other}")
        return _cross_gram(self, other)

    @abc.abstractmethod
    def _crossed(self, other: Scores) -> Float[Array, "rows others"]:
        """`cross_gram`, for use inside a program."""

    @abc.abstractmethod
    def _beside(self, leaves: Sequence[Leaf]) -> Float[Array, "rows others"]:
        """The inner products with other rows, given as leaves."""

    @abc.abstractmethod
    def gram_upper(self, factor: Scalar) -> Float[Array, "rows rows"]:
        """The upper triangle of ``(factor S) (factor S)^T``; the entries below it are arbitrary.

        The products are arranged so that nothing overflows or underflows unless the result does.
        """

    @abc.abstractmethod
    def squared_norms(self) -> Float[Array, " rows"]:
        """``|s_i|^2`` for each row."""

    def clipped_sum(self, max_norm: chex.Numeric) -> ClippedSum:
        r"""``sum_i s_i min(1, max_norm / |s_i|)``, the sum of the scores with each row clipped to ``max_norm``.

        The norms come from the factors and the sum from one more product with them, so that no per-example gradient is formed.
        Rows of padding are zero; other weights do not count. The result is a gradient of the log-likelihood:
        `jaxfisher.clipped_grad` has that of the loss. Centred scores raise `TypeError`, since the mean that is subtracted from
        every row depends on all examples, and so do scores of a complex log-density, which have two rows per example.

        Reference: Abadi et al., Deep learning with differential privacy (CCS 2016), algorithm 1.
        """
        max_norm = nonnegative("max_norm", max_norm, self.spec.dtype)
        check_one_row_each("clipped_sum", self)
        # A bound that is negative or NaN at run time raises no error; no sum satisfies it, so return NaN.
        whole, count = self._clipped(max_norm)
        return ClippedSum(jax.tree.map(lambda leaf: jnp.where(max_norm >= 0, leaf, jnp.nan), whole), max_norm, count)

    @abc.abstractmethod
    def _clipped(self, max_norm: Scalar) -> tuple[Any, Int[Array, ""]]:
        """The sum of the rows clipped to ``max_norm``, and the number of rows that were longer."""

    @abc.abstractmethod
    def diagonal(self) -> Any:
        """The diagonal of ``S^T S / n`` (with weights, of ``S^T diag(omega) S``), a pytree like the parameters.

        An entry of a complex leaf is ``a + i b``, with the diagonal's numbers for its real and its imaginary part.
        """

    @once
    def second_moment(self) -> Float[Array, "p p"]:
        """``S^T S / n`` (with weights, ``S^T diag(omega) S``) as a dense matrix."""
        return self.scaled_moment(jnp.ones((), self.spec.dtype))

    @abc.abstractmethod
    def scaled_moment(self, factor: Scalar) -> Float[Array, "p p"]:
        """The second moment of ``factor S``; `gram_upper` is its Gram matrix."""

    def _inner_products(self, vectors: Any) -> Float[Array, "k k"]:
        """``(S v_i)^T diag(omega) S v_j`` for vectors stacked along a leading axis."""
        halves = jax.vmap(self.mv)(vectors)
        return matmul(self.weights[None] * halves, halves.T)

    @abc.abstractmethod
    def squares_along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        """The diagonal of ``S^T diag(omega) S`` in the basis of the single layer that S is over: the eigenvalues of EKFAC.

        Reference: George et al., Fast approximate natural gradient descent in a Kronecker-factored eigenbasis (NeurIPS 2018).
        """

    @abc.abstractmethod
    def rescaled(self, factors: tuple[Scalar, ...]) -> Scores:
        """The scores with the columns of each leaf multiplied by that leaf's factor."""

    @abc.abstractmethod
    def as_matrix(self) -> Float[Array, "rows p"]:
        """``S`` as a dense matrix, shape ``[rows, p]``."""

    @abc.abstractmethod
    def bound(self) -> Scalar:
        """An upper bound on the entries of ``diag(sqrt(weights)) S`` in absolute value, of the right order of magnitude."""

    @abc.abstractmethod
    def restrict(self, keep: tuple[bool, ...], spec: ParamSpec) -> Scores:
        """The columns of the kept leaves only."""

    @abc.abstractmethod
    def centered(self, kinds: int = 1) -> Scores:
        """The scores minus their weighted mean.

        If rows of several ``kinds`` alternate, such as those of real and imaginary parts, each kind has its own mean.
        """

    def _row_numbers(self, w: Float[Array, " rows"]) -> Float[Array, " rows"]:
        """``w`` in the statistics dtype, after checking that it has one real number for each row."""
        check_array("`w`", w)
        if not hasattr(w, "dtype") or jnp.shape(w) != (self.num_rows,) or jnp.issubdtype(dtype_of(w), jnp.complexfloating):
            raise ValueError(
                f"`w` is {described(w)}; expected an array with one real number for each row, shape ({self.num_rows},)."
            )
        return jnp.asarray(w).astype(self.spec.dtype)

    def reweighted(self, factor: Any) -> Scores:
        """The same rows with every weight multiplied by ``factor``."""
        return dataclasses.replace(self, weights=self.weights * factor)  # type: ignore[type-var]


_PROGRAMS = (
    *("rmv", "gram_upper", "squared_norms", "_clipped", "diagonal", "scaled_moment", "as_matrix", "bound"),
    *("expanded_moments", "reduced_moments", "squares_along"),
)
"""The methods of `Scores` that are compiled into programs."""


@once
@of_one("mv")
def _product(scores: Scores, v: Any) -> Float[Array, " rows"]:
    return scores.product(v, sealed)


@once
@of_one("cross_gram")
def _cross_gram(scores: Scores, other: Scores) -> Float[Array, "rows others"]:
    return scores._crossed(other)


@once
@of_one("cross_gram")
def _products(scores: Scores, vectors: list[Array]) -> Float[Array, "rows k"]:
    return scores._beside([leaf_of(stack) for stack in vectors])


class Role(NamedTuple):
    """The role of a parameter leaf in a function.

    Attributes:
        layer: for the bias of a layer, the place of the layer's weight among the leaves; None for other leaves.
        touched: whether the function depends on the leaf at all; if not, its scores are zero.
    """

    layer: int | None
    touched: bool


def check_one_row_each(caller: str, scores: Scores) -> None:
    """Raise `TypeError` if an example has several rows, for functions that need one row for each example."""
    if scores.num_rows != examples_of(scores):
        raise TypeError(
            f"{caller}: {scores} have several rows per example, like those of a complex log-density, and {caller} needs one "
            "row for each example. Give a real log-density, such as 2 * log_psi(params, x).real."
        )


def one_a_row(caller: str, scores: Any, e: Any) -> Float[Array, " rows"]:
    """``e`` as one real number per row in the scores' dtype, after checking it and the scores; raises otherwise."""
    if not isinstance(scores, Scores):
        raise TypeError(f"{caller}: `scores` is {described(scores)}; expected what jf.scores(log_prob)(params, *data) returns.")
    check_array(f"{caller}: `e`", e)
    if not is_array(e) or np.shape(e) != (scores.num_rows,) or not jnp.issubdtype(dtype_of(e), jnp.number):
        raise ValueError(f"{caller}: `e` is {described(e)}; expected one real number per row, of shape ({scores.num_rows},).")
    if jnp.issubdtype(dtype_of(e), jnp.complexfloating):
        raise ValueError(
            f"{caller}: `e` is complex ({dtype_of(e)}); expected one real number per row, of shape ({scores.num_rows},)."
        )
    return jnp.asarray(e, scores.spec.dtype)


def examples_of(scores: Scores) -> int:
    """The number of examples behind the scores, padding included."""
    return scores._num_examples


def roles_of(leaves: Sequence[Leaf]) -> tuple[Role, ...]:
    """The roles of leaves that the engine returned."""
    return tuple(Role(leaf.layer, bool(leaf.forms)) for leaf in leaves)


class FactoredScores(Scores):
    """Scores that are the gradients themselves, which may have factors; centred scores are not."""

    @abc.abstractmethod
    def expanded_moments(self) -> tuple[Moments | None, ...]:
        """Second moments of each leaf's factors, with positions treated like examples; None for a leaf without factors.

        Positions that carry no gradient are not counted. A layer's bias goes with its weight. Reference: Eschenhagen et al.
        (NeurIPS 2023), KFAC-expand.
        """

    @abc.abstractmethod
    def reduced_moments(self) -> tuple[Moments | None, ...]:
        """Second moments of each leaf's factors taken together over positions; None for a leaf without factors.

        These are the moments of the mean of ``a_t`` over positions that carry a gradient, and of the sum of ``g_t``. Reference:
        Eschenhagen et al. (NeurIPS 2023), KFAC-reduce.
        """

    @property
    @abc.abstractmethod
    def roles(self) -> tuple[Role, ...]:
        """The role of each leaf in the function."""


def total(parts: Sequence[Any]) -> Any:
    """The sum of arrays or of trees of them."""
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)
