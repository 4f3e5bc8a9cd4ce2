"""An Optax transformation that takes the curvature."""

import jax
import optax

import jaxfisher as jf


def scale_by_sharpness() -> optax.GradientTransformationExtraArgs:
    """Divide the updates by the mean eigenvalue of the Fisher over their parameters."""

    def update(updates, state, params=None, *, fisher=None, **extra_args):
        F = jf.fisher_for(updates, fisher, "scale_by_sharpness")
        return jax.tree.map(lambda leaf: leaf / (F.trace() / F.size), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
