"""Natural-gradient descent as a ready-made chain of transformations."""

from __future__ import annotations

import chex
import optax

from jaxfisher._operators.operator import Solver, View
from jaxfisher._transform.like import Like
from jaxfisher._transform.scale_by_fisher import scale_by_fisher
from jaxfisher._transform.scale_to_kl import scale_to_kl
from jaxfisher._transform.update_arguments import ScalarOrSchedule, scheduled
from jaxfisher._values import check_number


def natural_gradient(
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule | None = None,
    *,
    view: View | None = None,
    solver: Solver | None = None,
    decay: chex.Numeric | None = None,
    update_every: chex.Numeric | None = None,
    like: Like | None = None,
    radius: chex.Numeric | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural-gradient descent: precondition, take the learning rate, and stay inside a KL ball if asked.

    .. math:: \theta \leftarrow \theta - \alpha\, (F + \lambda I)^{-1} \nabla L.

    It is ``chain(scale_by_fisher(damping, view=view, ...), scale_by_learning_rate(learning_rate), scale_to_kl(radius))``, the
    last only with a ``radius``. Give ``update`` the gradient of the *mean* negative log-likelihood, and the Fisher, which is a
    mean as well.

    Args:
        learning_rate: alpha, a number or a schedule. A rate of one is Fisher scoring.
        damping: lambda ``>= 0``, absolute, a number or a schedule; None inside `adapt_damping`, which gives one to each update.
        view: as in `scale_by_fisher`.
        solver: as in `scale_by_fisher`.
        decay: as in `scale_by_fisher`.
        update_every: as in `scale_by_fisher`.
        like: as in `scale_by_fisher`.
        radius: as in `scale_to_kl`, in nats per example; None for no trust region.

    Returns:
        A gradient transformation whose ``update`` takes ``fisher=``; its updates are negated, ready for `optax.apply_updates`.

    Raises:
        ValueError: a negative damping or radius, a decay without a view; (at update) ``fisher=`` is missing.

    Reference: Amari (Neural Computation 1998), section 2.

    >>> import jax.numpy as jnp, jaxfisher as jf, optax
    >>> model = lambda theta: jf.Normal(theta, 2.0)
    >>> opt = jf.natural_gradient(learning_rate=1.0, damping=0.0)
    >>> gradient = (0.0 - 2.0) / 4  # of the loss at theta = 0, for data of mean 2
    >>> updates, _ = opt.update(gradient, opt.init(0.0), fisher=jf.exact_fisher(model)(0.0))
    >>> print(optax.apply_updates(0.0, updates))
    2.0
    """
    if callable(learning_rate):
        learning_rate = scheduled("learning_rate", learning_rate, "one real number", "natural_gradient")
    else:
        check_number("learning_rate", learning_rate, "one real number, or a schedule")
    given = {"solver": solver, "decay": decay, "update_every": update_every, "like": like}
    steps = [scale_by_fisher(damping, view=view, **given), optax.scale_by_learning_rate(learning_rate)]  # type: ignore[arg-type]
    if radius is not None:
        steps.append(scale_to_kl(radius))
    return optax.chain(*steps)
