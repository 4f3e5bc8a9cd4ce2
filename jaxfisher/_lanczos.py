"""Lanczos steps with a Fisher, and the Gauss quadrature that they define."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Scalar

from jaxfisher._linalg import norm
from jaxfisher._operators.operator import Operator


class Jacobi(NamedTuple):
    """The tridiagonal matrix of k Lanczos steps from one vector, as its diagonals.

    Attributes:
        diagonal: the main diagonal.
        off: the diagonal next to it. Entries after a zero have no weight.
        largest: the largest entry, as a stand-in for the norm.
        image: the length of the operator's product with the unit start vector.
        exhausted: whether the steps have spanned the whole Krylov space of the vector; quadrature is then exact.
    """

    diagonal: Float[Array, " k"]
    off: Float[Array, " k-1"]
    largest: Float[Array, ""]
    image: Float[Array, ""]
    exhausted: Bool[Array, ""]

    def radau(self) -> Float[Array, " k"]:
        """The main diagonal with its last entry changed so that the smallest node is zero.

        The new entry is the old one minus the last pivot of Gaussian elimination. Pivots of a positive definite matrix lie
        between zero and the diagonal; only rounding takes them out of this range.
        """

        def pivot(last: Array, entries: tuple[Array, Array]) -> tuple[Array, None]:
            diagonal, off = entries
            return jnp.maximum(diagonal - off * (off / jnp.maximum(last, least)), 0), None

        least = jnp.maximum(rounding(self.diagonal.size, self.largest), jnp.finfo(self.largest.dtype).tiny)
        last, _ = jax.lax.scan(pivot, self.diagonal[0], (self.diagonal[1:], self.off))
        return self.diagonal.at[-1].add(-last)


def lanczos(caller: str, fisher: Operator, roots: Float[Array, " p"], num_matvecs: int) -> Callable[[Array], Jacobi]:
    """From a vector z to the Jacobi matrix of ``diag(roots) F diag(roots)`` started at z."""
    spec, linear = fisher.spec, fisher.form.product()
    steps = min(num_matvecs, spec.size)
    # Do not use matfree's tridiagonal matrix, the mean of a Hessenberg matrix and its transpose. Once the Krylov space is
    # exhausted, as it soon is for a Fisher of low rank, later vectors are not orthogonal to earlier ones, and the entries above
    # the diagonal spoil the mean. Below the diagonal the end shows as an entry that is zero to rounding, often followed by NaN.
    decompose = matfree("decomp", caller).hessenberg(steps, reortho="full", custom_vjp=False)

    def product(v: Float[Array, " p"]) -> Float[Array, " p"]:
        return roots * spec.ravel(linear(spec.unravel(roots * v)), "v")

    def jacobi(z: Float[Array, " p"]) -> Jacobi:
        with jax.default_matmul_precision("highest"):
            _, matrix, residual, _ = decompose(product, z)
        diagonal, below = jnp.diagonal(matrix), jnp.append(jnp.diagonal(matrix, -1), norm(residual))
        # Use the largest entry so far: entries after the end may have any size.
        largest = jax.lax.cummax(jnp.maximum(jnp.abs(diagonal), below))
        on = jnp.cumprod(below > rounding(steps, largest)).astype(bool)
        # The first entry always stays, so that a NaN shows.
        reached = jnp.append(jnp.ones(1, bool), on[:-1])
        image = jnp.hypot(diagonal[0], below[0])
        diagonal, off = jnp.where(reached, diagonal, 0), jnp.where(on, below, 0)[:-1]
        return Jacobi(diagonal, off, largest[jnp.sum(on[:-1])], image, ~on[-1])

    return jacobi


def rounding(steps: int, largest: Array) -> Array:
    """The rounding error of an eigenvalue of a Jacobi matrix with entries up to ``largest``."""
    return 10 * steps * jnp.finfo(largest.dtype).eps * largest


def gauss(diagonal: Float[Array, " k"], off: Float[Array, " k-1"]) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """The nodes and weights of the quadrature that a Jacobi matrix defines; the weights sum to one."""
    matrix = jnp.diag(diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1)
    nodes, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    return nodes, jnp.square(vectors[0])


def log_sums(jacobi: Jacobi) -> tuple[Scalar, Scalar]:
    """The quadratures of ``log(1 + x)`` and of its square."""
    nodes, weights = gauss(jacobi.diagonal, jacobi.off)
    # Rounding may take a node below zero. If a node is lower than that, F has a negative direction, and the sum may be NaN.
    nodes = jnp.where((nodes < 0) & (nodes >= -rounding(nodes.size, jacobi.largest)), 0, nodes)
    logs = jnp.log1p(nodes)
    return jnp.sum(weights * logs), jnp.sum(weights * jnp.square(logs))


def matfree(module: str, caller: str) -> Any:
    """A module of matfree, which is an extra."""
    try:
        return importlib.import_module(f"matfree.{module}")
    except ImportError as error:
        raise ImportError(f"{caller} needs matfree, an optional extra: pip install 'jaxfisher[estimate]'.") from error
