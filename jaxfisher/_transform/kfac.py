"""The optimiser that needs no tuning: Kronecker factors, rates from the quadratic model, damping by how well it predicts."""

from __future__ import annotations

from collections.abc import Callable

import chex
import optax

from jaxfisher._operators.base import Operator, View
from jaxfisher._operators.kronecker import kronecker
from jaxfisher._transform.adapt_damping import adapt_damping
from jaxfisher._transform.quadratic_model import quadratic_model
from jaxfisher._transform.scale_by_fisher import scale_by_fisher


def kfac(
    like: Operator | Callable[[], Operator],
    *,
    damping: chex.Numeric = 1e-2,
    view: View = kronecker,
    decay: chex.Numeric | None = 0.95,
    update_every: chex.Numeric | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradients with Kronecker factors, and nothing to tune: learning rate, momentum and damping find themselves.

    .. math:: d = (\overline{A \otimes G} + \lambda I)^{-1} g, \qquad u = -\alpha d + \mu u_{-1}, \qquad
        \alpha, \mu = \arg\min\; g^T u + \tfrac12 u^T (F + \lambda I) u.

    It is ``chain(scale_by_fisher(damping, view=view, decay=decay, like=like), quadratic_model(damping))`` inside an
    `adapt_damping`: the direction from a running mean of the factors, the length from the Fisher of the batch itself, the
    damping from the ratio of the loss's actual decrease to the predicted one; a step that raises the batch's loss is not taken.
    Give it the exact or a sampled
    Fisher, never the empirical one::

        opt = jf.kfac(like=lambda: jf.exact_fisher(model)(params, x))
        step = jax.jit(jf.training_step(model, opt))
        params, state, loss = step(params, opt.init(params), x, y)

    Args:
        like: an operator such as ``fisher=`` will be, or a function that makes one, never run: as in `scale_by_fisher`.
        damping: the first lambda, in the units of F.
        view: what is averaged and inverted; `jaxfisher.kronecker_reduce`, or with ``decay=None`` `jaxfisher.eigen_kronecker`.
        decay: of the running mean, None for the batch's own view.
        update_every: as in `scale_by_fisher`.

    Returns:
        A gradient transformation whose ``update`` takes ``params`` and, by keyword, ``fisher``, ``grad``, ``value_fn`` and
        ``value``: what `jaxfisher.training_step` gives. Its updates are negated. Read `optax.tree.get` of its state:
        ``learning_rate``, ``momentum``, ``ratio``, ``accepted``.

    Raises:
        ValueError: as in `adapt_damping` and `scale_by_fisher`.

    Reference: Martens and Grosse (ICML 2015), sections 6 and 7.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda w, x: jf.Normal(x @ w, jnp.ones(2))
    >>> x, y = jnp.eye(3), jnp.arange(6.0).reshape(3, 2)
    >>> w = jnp.zeros((3, 2))
    >>> opt = jf.kfac(like=lambda: jf.exact_fisher(model)(w, x))
    >>> w, state, loss = jf.training_step(model, opt)(w, opt.init(w), x, y)
    >>> print(jnp.max(jnp.abs(w - y)) < 0.2, state.accepted)  # the first of a few steps
    True True
    """
    direction = scale_by_fisher(damping, view=view, decay=decay, update_every=update_every, like=like)
    return adapt_damping(optax.chain(direction, quadratic_model(damping)), damping)
