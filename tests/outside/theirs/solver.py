"""A solver: ``(fisher, v, damping) -> (x, info)``."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import jaxfisher as jf


@dataclasses.dataclass(frozen=True)
class Elimination(jf.Solver):
    """Gaussian elimination of the dense matrix."""

    rtol: float = 1e-6

    def __call__(self, fisher: jf.Operator, v: Any, damping: Any) -> tuple[Any, jf.SolveInfo]:
        flat, unravel = ravel_pytree(v)
        matrix = fisher.as_matrix()
        damped = matrix + damping * jnp.eye(len(matrix), dtype=matrix.dtype)
        x = jnp.linalg.solve(damped, flat.astype(matrix.dtype))
        residual = jnp.linalg.norm(flat - damped @ x) / jnp.linalg.norm(flat)
        finite = jnp.all(jnp.isfinite(x))
        info = jf.SolveInfo(
            residual=residual,
            iterations=jnp.zeros((), jnp.int32),
            converged=finite & (residual <= self.rtol),
            finite=finite,
            rank=jnp.asarray(fisher.size, jnp.int32),
            indefinite=jnp.zeros((), bool),
        )
        return jax.tree.map(lambda a, b: a.astype(b.dtype), unravel(x.astype(flat.dtype)), v), info
