"""The gradient of a variational energy from local energies at samples, with one backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxfisher._examples import BATCH_SIZE, Batch, make_batch, map_examples, needs_data, refusing
from jaxfisher._model import LogProb, of_one_example, scalar
from jaxfisher._once import once_for
from jaxfisher._pieces import sum_batches
from jaxfisher._tree import cast_like, check_function, joined, split
from jaxfisher._values import described

LOG_PSI = "(params, *sample) -> the scalar log-amplitude of ONE sample"
"""The signature, as messages show it."""


def energy_gradient(log_psi: LogProb, *, batch_size: int | None = None) -> Callable[..., Any]:
    r"""The gradient of the energy of a wave function, from samples of its square and their local energies.

    .. math:: g_k = 2\, \mathrm{Re} \sum_i \omega_i\, (E_i - \bar E)^* \,\partial_{\theta_k} \log\psi_\theta(x_i), \qquad
        E_i = \frac{(H \psi)(x_i)}{\psi(x_i)}, \quad \bar E = \sum_i \omega_i E_i,

    with weights :math:`\omega_i = w_i / \sum w`, or 1/n each. For samples drawn from :math:`|\psi|^2` it estimates the gradient
    of :math:`\langle\psi|H|\psi\rangle / \langle\psi|\psi\rangle`; with all configurations and :math:`w_i = |\psi(x_i)|^2`
    it is that gradient. The amplitude needs no normalisation, and the local energies are not differentiated. It takes one
    backward pass, without gradients of single samples.

    A complex parameter counts as two real numbers: the entry of :math:`a + i b` is :math:`\partial_a E + i\, \partial_b E`, the
    direction of steepest ascent, so that ``theta - rate * g`` goes downhill. (`jax.grad` gives the conjugate of that.) This is
    right whether or not the amplitude is holomorphic. Pass the result to `jaxfisher.scale_by_fisher`, with
    ``fisher=jf.empirical_fisher(log_psi, center=True)(params, samples)``, for stochastic reconfiguration.

    Args:
        log_psi: ``(params, *sample) -> scalar``, the log-amplitude of ONE sample, real or complex.
        batch_size: run the model on at most this many samples at a time, which bounds its activations.

    Returns:
        A function ``(params, *samples, local_energies, weights=None)``: ``local_energies`` has shape ``[n]``, real or complex,
        and so has ``weights``; every array of the samples has a leading axis of n. The result is a pytree like the parameters,
        in their dtypes.

    Raises:
        ValueError: (when called) arrays of different lengths, local energies of another shape, a ``log_psi`` that returns no
            scalar.
        TypeError: ``log_psi`` is no function; (when called) samples or energies are missing, a parameter has no derivative.

    Reference: Becca and Sorella, Quantum Monte Carlo Approaches for Correlated Systems (2017), section 6.3.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> log_psi = lambda theta, x: 1j * theta * x
    >>> print(jf.energy_gradient(log_psi)(0.0, jnp.array([1.0, -1.0]), jnp.array([3.0 + 2.0j, 1.0 - 2.0j])))  # 2 <Im E x>
    4.0
    """
    check_function("log_psi", log_psi, LOG_PSI)

    @refusing(
        "energy_gradient",
        counts="none: the energy is a mean over samples. How often a sample occurs, pass as weights=.",
        batch_size=BATCH_SIZE.format("jaxfisher.energy_gradient(log_psi, batch_size=...)"),
    )
    def gradient_of(params: chex.ArrayTree, /, *data: Any, weights: Float[Array, " n"] | None = None) -> Any:
        needs_data(data[:-1], "energy_gradient", "(params, *samples, local_energies)")
        batch = make_batch(params, data, weights, batch_size)
        if jnp.shape(batch.data[-1]) != (batch.size,):
            raise ValueError(
                f"energy_gradient: `local_energies` is {described(batch.data[-1])}; expected one number for each of the "
                f"{batch.size} samples, shape ({batch.size},), after the samples: (params, *samples, local_energies)."
            )
        return cast_like(_gradient(log_psi, split(params), batch), params)

    return gradient_of


@once_for
def _gradient(log_psi: LogProb, params: Any, batch: Batch) -> Any:
    *samples, energies = batch.data
    dtype = batch.spec.dtype

    def parts(z: Array) -> tuple[Array, Array]:
        return jnp.real(z).astype(dtype), jnp.imag(z).astype(dtype)

    def deviations(x: Array) -> Array:
        """The energies minus their mean. One subtraction leaves the rounding of a mean that may be far larger."""
        nearly = x - jnp.sum(batch.weights * x)
        return nearly - jnp.sum(batch.weights * nearly)

    coefficients = tuple(2 * batch.weights * deviations(x) for x in parts(energies))  # weights are real

    def piece(coefficients: tuple[Array, Array], *samples: Any) -> Any:
        def overlap(params: Any) -> Scalar:
            amplitude = lambda p, *sample: scalar(log_psi(joined(p), *sample), "log_psi", may_be_complex=True)  # noqa: E731
            values = parts(map_examples(amplitude, params, samples))
            return sum((jnp.sum(c * z) for c, z in zip(coefficients, values, strict=True)), start=jnp.zeros((), dtype))

        gradient = jax.grad(overlap)(params)
        return batch.spec.vector(gradient, "gradient")

    with of_one_example(log_psi, "log_psi", joined(params), tuple(samples)):
        return sum_batches(piece, (coefficients, *samples), batch.batch_size)
