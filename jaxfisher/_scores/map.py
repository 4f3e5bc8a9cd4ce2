r"""What scores are: the gradients of log-densities, one row for each example, as one linear map ``S : R^p -> R^rows``."""

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
from jaxfisher._linalg import mirrored
from jaxfisher._once import once
from jaxfisher._provenance import Provenance
from jaxfisher._stack import of_one
from jaxfisher._tree import ParamSpec
from jaxfisher._values import check_array, described, dtype_of, is_array, nonnegative


class ClippedSum(NamedTuple):
    r"""A sum of vectors none of which is longer than a bound, ``sum_i c_i v_i`` with ``c_i = min(1, max_norm / |v_i|)``.

    Attributes:
        sum: a pytree like the parameters, in the statistics dtype, so that noise is added before anything is rounded.
        sensitivity: how much one example can change the sum by, in Euclidean norm: ``max_norm``, a scalar. It holds where one
            example is added or taken away; where one is replaced by another, it is twice that.
        num_clipped: how many vectors were longer than the bound, an int32 scalar. It depends on the data without any noise.
    """

    sum: Any
    sensitivity: Scalar
    num_clipped: Int[Array, ""]


class Scores(abc.ABC):
    r"""Per-example scores as a linear map ``S`` with ``rows`` rows and ``p`` columns.

    Row ``i`` is :math:`s_i = \nabla_\theta \log p_\theta(x_i)`. Columns are ordered as `jax.flatten_util.ravel_pytree`
    orders the parameters; a complex leaf has the columns of its real parts and then those of its imaginary parts. Where the
    log-density is complex an example has two rows, one after the other: of its real and of its imaginary part. ``S @ v`` is
    `mv`, and ``np.asarray(S)`` is `as_matrix`. Made by `jaxfisher.scores`; a pytree that crosses ``jit``.
    """

    spec: ParamSpec
    weights: Float[Array, " rows"]
    provenance: Provenance = Provenance("scores")
    """What a mean with their weights is over, of scores that `jaxfisher.scores` has made."""

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
        """How the rows are held, as `repr` says it."""

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes that `jax.vmap` or `jax.lax.scan` has put before the rows; () of one matrix of scores."""
        return self.weights.shape[:-1]

    @property
    def num_rows(self) -> int:
        """Number of rows: the examples, times the rows each contributes."""
        return self.weights.shape[0]

    @property
    @abc.abstractmethod
    def _num_examples(self) -> int:
        """Number of examples, n."""

    def mv(self, v: chex.ArrayTree) -> Float[Array, " rows"]:
        """``S v``: the directional derivative of every log-density along ``v``, shape ``[rows]``."""
        return _product(self, self.spec.tree(self.spec.leaves(v, "v")))

    @abc.abstractmethod
    def product(self, v: chex.ArrayTree, seal: Seal) -> Float[Array, " rows"]:
        """``S v``, for use inside a program.

        ``seal`` is `unsealed` for a vector that was computed in the same program and is no constant of it: this needs less
        memory, and `jax.linear_transpose` accepts it. For any other vector it is `sealed`.
        """

    @abc.abstractmethod
    def rmv(self, w: Float[Array, " rows"]) -> Any:
        """``S^T w``: the weighted sum of the scores, a pytree like the parameters."""

    def _felt(self, e: Float[Array, " rows"]) -> Float[Array, " rows"]:
        """What of one number a row its weighted sum with the scores feels: nothing of padding, which may be anything."""
        return jnp.where(self.weights == 0, 0, e)

    @once
    def gram(self) -> Float[Array, "rows rows"]:
        """``S S^T``: inner products of all pairs of scores; one triangle is the mirror image of the other."""
        return mirrored(self.gram_upper(jnp.ones((), self.spec.dtype)))

    def cross_gram(self, other: Scores | chex.ArrayTree) -> Float[Array, "rows others"]:
        """``S R^T``: inner products with the rows R of other scores, or with vectors stacked along a leading axis.

        Other scores are over the same parameters, perhaps at other values of them; from the factors of both it costs what
        `gram` does. Beside vectors, gradients are formed some of their columns at a time, so that no array of rows x p is made;
        of one vector, `mv` is cheaper.
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
        """The inner products with the rows of leaves."""

    @abc.abstractmethod
    def gram_upper(self, factor: Scalar) -> Float[Array, "rows rows"]:
        """The upper triangle of ``(factor S) (factor S)^T``; the entries below it mean nothing.

        The products are taken in such a way that no number overflows or underflows which the result can hold.
        """

    @abc.abstractmethod
    def squared_norms(self) -> Float[Array, " rows"]:
        """``|s_i|^2`` for each row."""

    def clipped_sum(self, max_norm: chex.Numeric) -> ClippedSum:
        r"""``sum_i s_i min(1, max_norm / |s_i|)``, the sum of the scores with each row made no longer than ``max_norm``.

        The norms come from the factors and the sum from one more product with these, so that no per-example gradient is formed.
        Rows of padding are zero; other weights do not count. It is the gradient of the log-likelihood:
        `jaxfisher.clipped_grad` has that of the loss. Centred scores raise `TypeError`, since the mean that is taken from every
        row depends on all examples, and so do scores of a complex log-density, of which an example has two rows.

        Reference: Abadi et al., Deep learning with differential privacy (CCS 2016), algorithm 1.
        """
        max_norm = nonnegative("max_norm", max_norm, self.spec.dtype)
        check_one_row_each("clipped_sum", self)
        # A bound that is none, negative or NaN, is no error at run time, and no sum is as short as it says.
        whole, count = self._clipped(max_norm)
        return ClippedSum(jax.tree.map(lambda leaf: jnp.where(max_norm >= 0, leaf, jnp.nan), whole), max_norm, count)

    @abc.abstractmethod
    def _clipped(self, max_norm: Scalar) -> tuple[Any, Int[Array, ""]]:
        """The sum of the rows made no longer than ``max_norm``, and how many were longer."""

    @abc.abstractmethod
    def diagonal(self) -> Any:
        """The diagonal of ``S^T S / n`` (with weights, of ``S^T diag(omega) S``), a pytree like the parameters.

        The entry of a complex leaf is ``a + i b`` with the diagonal's two numbers for its real and its imaginary part.
        """

    @once
    def second_moment(self) -> Float[Array, "p p"]:
        """``S^T S / n`` (with weights, ``S^T diag(omega) S``) as a dense matrix."""
        return self.scaled_moment(jnp.ones((), self.spec.dtype))

    @abc.abstractmethod
    def scaled_moment(self, factor: Scalar) -> Float[Array, "p p"]:
        """The second moment of ``factor S``, of which `gram_upper` is the Gram matrix."""

    @abc.abstractmethod
    def squares_along(self, basis: Basis) -> Float[Array, "groups inputs outputs"]:
        """The diagonal of ``S^T diag(omega) S`` in the basis of the one layer that it is over: the eigenvalues of EKFAC.

        Reference: George et al., Fast approximate natural gradient descent in a Kronecker-factored eigenbasis (NeurIPS 2018).
        """

    @abc.abstractmethod
    def rescaled(self, factors: tuple[Scalar, ...]) -> Scores:
        """The columns of each leaf multiplied by a number."""

    @abc.abstractmethod
    def as_matrix(self) -> Float[Array, "rows p"]:
        """``S`` as a dense matrix, shape ``[rows, p]``."""

    @abc.abstractmethod
    def bound(self) -> Scalar:
        """A bound on the entries of ``S`` in absolute value, of their order of magnitude."""

    @abc.abstractmethod
    def restrict(self, keep: tuple[bool, ...], spec: ParamSpec) -> Scores:
        """The columns of the kept leaves only."""

    @abc.abstractmethod
    def centered(self, kinds: int = 1) -> Scores:
        """The scores less their weighted mean.

        Rows of several ``kinds`` that take turns, such as those of real and imaginary parts, have a mean for each kind.
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
"""Methods of `Scores` that compute."""


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
    """What a leaf is to a function.

    Attributes:
        layer: for the bias of a layer, the place of the layer's weight among the leaves; None for other leaves.
        touched: whether the function depends on it at all; where it does not, its scores are zero.
    """

    layer: int | None
    touched: bool


def check_one_row_each(caller: str, scores: Scores) -> None:
    """Raise `TypeError` where an example has several rows, and what is asked is of examples."""
    if scores.num_rows != examples_of(scores):
        raise TypeError(
            f"{caller}: {scores} have several rows an example, as those of a complex log-density have, and what {caller} says "
            "of an example takes one. Give a real log-density, such as 2 * log_psi(params, x).real."
        )


def one_a_row(caller: str, scores: Any, e: Any) -> Float[Array, " rows"]:
    """One real number a row, in the scores' dtype, or the error of a least-squares fit that is asked for anything else."""
    if not isinstance(scores, Scores):
        raise TypeError(f"{caller}: `scores` is {described(scores)}; expected what jf.scores(log_prob)(params, *data) returns.")
    check_array(f"{caller}: `e`", e)
    if not is_array(e) or np.shape(e) != (scores.num_rows,) or not jnp.issubdtype(dtype_of(e), jnp.number):
        raise ValueError(f"{caller}: `e` is {described(e)}; expected one real number a row, of shape ({scores.num_rows},).")
    if jnp.issubdtype(dtype_of(e), jnp.complexfloating):
        raise ValueError(
            f"{caller}: `e` is complex ({dtype_of(e)}); expected one real number a row, of shape ({scores.num_rows},)."
        )
    return jnp.asarray(e, scores.spec.dtype)


def examples_of(scores: Scores) -> int:
    """The number of examples that scores are of, with padding."""
    return scores._num_examples


def roles_of(leaves: Sequence[Leaf]) -> tuple[Role, ...]:
    """The roles of leaves as the engine gives them."""
    return tuple(Role(leaf.layer, bool(leaf.forms)) for leaf in leaves)


class FactoredScores(Scores):
    """Scores that are the gradients themselves, which may have factors; a covariance of them is no sum of products."""

    @abc.abstractmethod
    def expanded_moments(self) -> tuple[Moments | None, ...]:
        """Second moments of each leaf's factors with positions as if they were examples; None for a leaf without factors.

        Positions that carry no gradient are not counted. A layer's bias goes with its weight. Reference: Eschenhagen et al.
        (NeurIPS 2023), KFAC-expand.
        """

    @abc.abstractmethod
    def reduced_moments(self) -> tuple[Moments | None, ...]:
        """Second moments of each leaf's factors taken together over positions; None for a leaf without factors.

        They are the moments of the mean of ``a_t`` over positions that carry a gradient, and of the sum of ``g_t``. Reference:
        Eschenhagen et al. (NeurIPS 2023), KFAC-reduce.
        """

    @property
    @abc.abstractmethod
    def roles(self) -> tuple[Role, ...]:
        """What each leaf is to the function."""


def total(parts: Sequence[Any]) -> Any:
    """The sum of arrays or of trees of them."""
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)
