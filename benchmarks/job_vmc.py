"""Variational Monte Carlo: a minimum-norm step of stochastic reconfiguration, from samples and their local energies."""

from __future__ import annotations

from engine import Case, Row, Sizes, compiled, dense_layers, saves

# isort: split

import importlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from peers import Unsuited, netket

import jaxfisher as jf

DAMPING = 1e-3

Step = Callable[[Any, Array, Array], Array]


def log_amplitude(params: Any, spins: Float[Array, " d"]) -> Array:
    """A real log-amplitude: an MLP whose last layer is summed."""
    hidden = spins
    for weight, bias in params:
        hidden = jnp.log(jnp.cosh(hidden @ weight + bias))
    return hidden.sum()


def plain_step(params: Any, spins: Array, energies: Array) -> Array:
    """Minimum-norm stochastic reconfiguration in plain JAX, from the centred n x p matrix of derivatives."""
    n = len(spins)
    _, unravel = ravel_pytree(params)
    flat = ravel_pytree(params)[0]
    derivatives = jax.vmap(jax.grad(lambda flat, spin: log_amplitude(unravel(flat), spin)), (None, 0))(flat, spins)
    centred = (derivatives - derivatives.mean(0)) / jnp.sqrt(n)
    centred_energies = (energies - energies.mean()) / jnp.sqrt(n)
    gram = jnp.matmul(centred, centred.T, precision="highest") + DAMPING * jnp.eye(n)
    return centred.T @ jax.scipy.linalg.solve(gram, centred_energies, assume_a="pos")


def our_step(params: Any, spins: Array, energies: Array) -> Array:
    """The same step by the library, from the centred scores, which are never formed."""
    scores = jf.scores(log_amplitude, center=True)(params, spins)
    return ravel_pytree(jf.least_squares(scores, energies, DAMPING)[0])[0]


def netket_steps() -> dict[str, Step]:
    """The same step by NetKet, with the n x p matrix and without; its vector is twice ours."""
    try:
        nk = netket()
        lazy = importlib.import_module("netket._src.ngd.srt_onthefly").srt_onthefly
        parts = importlib.import_module("netket._src.ngd.sr_srt_common")
    except (Unsuited, ImportError):
        return {}
    given = {"diag_shift": DAMPING, "solver_fn": nk.optimizer.solver.cholesky, "mode": "real"}

    def log_psi(variables: Any, spins: Array) -> Array:
        return jax.vmap(log_amplitude, (None, 0))(variables["params"], spins)

    def dense(params: Any, spins: Array, energies: Array) -> Array:
        """The parts of NetKet's `srt`, which cannot run as a whole inside `jax.jit`."""
        made = nk.jax.jacobian(log_psi, params, spins, {}, mode="real", dense=True, center=True)
        rows, shifts = parts._prepare_input(made, energies, mode="real", scaling_factor=1 / len(spins))
        return parts._compute_srt_update(rows, shifts, params_structure=params, **given)[0] / 2

    def on_the_fly(params: Any, spins: Array, energies: Array) -> Array:
        return ravel_pytree(lazy(log_psi, energies, params, {}, spins, **given)[0])[0] / 2

    return {"NetKet, dense": dense, "NetKet, on the fly": on_the_fly}


def clocked(case: Case) -> tuple[Array, float]:
    """The result of a program, and its seconds of processor time of all threads."""
    begin = time.process_time()
    result = case()
    return result, time.process_time() - begin


def rows(sizes: Sizes) -> list[Row]:
    """A minimum-norm step of stochastic reconfiguration in processor time, against the n x p matrix and against NetKet."""
    lines = []
    for widths, n in [((64, 256, 256), 512), ((64, 960, 960), 1024)]:
        small, count = sizes.widths(*widths), sizes.examples(n)
        key, other = jax.random.split(jax.random.key(0))
        spins = jax.random.rademacher(key, (count, widths[0]), jnp.float32)
        arguments = dense_layers(small), spins, jax.random.normal(other, (count,))
        p = sum(leaf.size for leaf in jax.tree.leaves(arguments[0]))
        ours = compiled(our_step, *arguments)
        ours()
        step, mine = clocked(ours)
        for name, other_step in {"plain JAX": plain_step, **netket_steps()}.items():
            plain, case = compiled(other_step, *arguments), f"{name}, p = {p:,}, n = {count}"
            theirs, seconds = clocked(plain)
            note = f"relative difference {jnp.linalg.norm(step - theirs) / jnp.linalg.norm(theirs):.0e}"
            reached = "yes" if seconds >= 30 * mine else "NO"
            lines.append(Row(case, f"{seconds:.3g} s", f"{mine:.3g} s", f"{seconds / mine:.0f}", "at least 30", reached, note))
            lines.append(saves(f"{case}, temporary memory", plain, ours, goal=10))
    return lines
