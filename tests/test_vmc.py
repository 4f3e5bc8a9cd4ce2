"""Stochastic reconfiguration against NetKet: complex wave functions of a transverse-field Ising chain of ten spins."""

import functools
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import compiled
from others import from_a_process
from problems import assert_close

import jaxfisher as jf

SITES, HIDDEN, SHIFT, RATE, STEPS = 10, 4, 0.01, 0.05, 10
TOLERANCE = 1e-6 / np.finfo(np.float64).eps
"""The difference allowed after ten steps, in eps: each step amplifies rounding by a condition number of about 1e4."""


def ansatz(whole):
    rng = np.random.default_rng(6)
    shapes = {"bias": (HIDDEN,), "visible": (SITES,), "w": (SITES, HIDDEN)}
    draw = lambda shape: 0.2 * rng.normal(size=shape)  # noqa: E731
    return {name: jnp.asarray(draw(s) + 1j * draw(s) if whole else draw(s)) for name, s in shapes.items()}


def boltzmann(params, spins):
    """The log-amplitude of a restricted Boltzmann machine, for one configuration or many."""
    spins = spins.astype(params["w"].dtype)
    bias = jnp.expand_dims(params["bias"], tuple(range(spins.ndim - 1)))
    return spins @ params["visible"] + jnp.sum(jnp.log(jnp.cosh(spins @ params["w"] + bias)), -1)


def phases(params, spins):
    """A complex log-amplitude with real parameters."""
    spins = spins.astype(params["w"].dtype)
    bias = jnp.expand_dims(params["bias"], tuple(range(spins.ndim - 1)))
    angles = jnp.tanh(spins @ params["w"] + bias)
    return jax.lax.complex(spins @ params["visible"], jnp.sum(jnp.square(angles), -1))


CASES = {
    "holomorphic": (boltzmann, True, {"holomorphic": True}),
    "complex mode": (boltzmann, True, {"mode": "complex"}),
    "real parameters": (phases, False, {"mode": "complex"}),
    "real mode": (boltzmann, False, {"mode": "real"}),
}


def netket_results():
    """NetKet's geometric tensor and its parameters after each of ten steps, or a string if NetKet cannot be imported."""
    jax.config.update("jax_enable_x64", True)
    try:
        import netket as nk
    except (ImportError, AttributeError) as error:
        return f"netket {importlib.metadata.version('netket')} does not import: {error}"
    hilbert = nk.hilbert.Spin(0.5, SITES)
    chain = nk.operator.Ising(hilbert, nk.graph.Chain(SITES), h=1.0)
    results = {"spins": hilbert.all_states(), "hamiltonian": chain.to_dense()}
    for name, (log_psi, whole, mode) in CASES.items():
        apply = lambda variables, spins, mutable=False, log_psi=log_psi: log_psi(variables["params"], spins)  # noqa: E731
        tensor = nk.optimizer.qgt.QGTJacobianDense(**mode)
        state = nk.vqs.FullSumState(hilbert, apply_fun=apply, variables={"params": ansatz(whole)})
        results[name, "tensor"] = state.quantum_geometric_tensor(tensor).to_dense()
        sr = nk.optimizer.SR(tensor, nk.optimizer.solver.cholesky, diag_shift=SHIFT)
        driver = nk.driver.VMC(chain, nk.optimizer.Sgd(RATE), variational_state=state, preconditioner=sr)
        path = []
        for _ in range(STEPS):
            driver.run(1, out=nk.logging.RuntimeLog(), show_progress=False)
            path.append(np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(state.parameters)]))
        results[name, "path"] = np.stack(path)
    return {key: np.asarray(value) for key, value in results.items()}


@pytest.fixture(scope="module")
def netket():
    return from_a_process("netket", netket_results)


def columns(like):
    """The indices of real and of imaginary parts among our columns. Ours alternate by leaf; NetKet's are real first."""
    real, imaginary, start = [], [], 0
    for leaf in jax.tree.leaves(like):
        real.extend(range(start, start + leaf.size))
        start += leaf.size
        if jnp.iscomplexobj(leaf):
            imaginary.extend(range(start, start + leaf.size))
            start += leaf.size
    return real, imaginary


@functools.cache
def optimiser():
    return optax.chain(jf.scale_by_fisher(SHIFT, solver=jf.Cholesky(rtol=1e-10)), optax.scale_by_learning_rate(RATE))


def steps(log_psi, spins, hamiltonian, start):
    """The first geometric tensor, and the parameters after each step of stochastic reconfiguration over all states."""

    def density(params):
        psi = jnp.exp(log_psi(params, spins))
        return psi, jnp.square(jnp.abs(psi))

    def step(carry, _):
        params, state = carry
        psi, weights = density(params)
        energies = (hamiltonian.astype(psi.dtype) @ psi) / psi
        gradient = jf.energy_gradient(log_psi)(params, spins, energies, weights=weights)
        S = jf.empirical_fisher(log_psi, center=True)(params, spins, weights=weights)
        updates, state = optimiser().update(gradient, state, params, fisher=S)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(params)])

    first = jf.empirical_fisher(log_psi, center=True)(start, spins, weights=density(start)[1])
    return first.as_matrix(), jax.lax.scan(step, (start, optimiser().init(start)), length=STEPS)[1]


@pytest.mark.parametrize("name", CASES)
def test_netket_geometric_tensor_and_ten_steps(netket, name):
    """Our two rows for each example, of the real and the imaginary part, reproduce NetKet's complex and holomorphic modes."""
    log_psi, whole, mode = CASES[name]
    start = ansatz(whole)
    hamiltonian = jnp.asarray(np.real(netket["hamiltonian"]))
    found, path = compiled(functools.partial(steps, log_psi))(jnp.asarray(netket["spins"]), hamiltonian, start)
    theirs, (real, imaginary) = netket[name, "tensor"], columns(start)
    if mode.get("holomorphic"):
        # S = <O^* O>: the derivative by the imaginary part of a parameter is i times that by its real part.
        theirs = np.block([[theirs.real, -theirs.imag], [theirs.imag, theirs.real]])
    assert_close(np.asarray(found)[np.ix_(real + imaginary, real + imaginary)], theirs, factor=1e4)
    for part in (np.real, np.imag) if whole else (np.real,):
        assert_close(part(path), part(netket[name, "path"]), factor=TOLERANCE)


@pytest.mark.parametrize("log_psi, whole", [(boltzmann, True), (phases, False)], ids=["complex", "real"])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_a_constant_in_the_energy_costs_no_digits_in_float32(log_psi, whole, batch_size):
    """As for a molecule near its ground state: energies far from zero that are nearly equal. They are exact in float32."""
    rng = np.random.default_rng(8)
    spins = rng.choice([-1.0, 1.0], size=(40, SITES)).astype(np.float32)
    params = jax.tree.map(lambda leaf: leaf.astype(np.complex64 if whole else np.float32), ansatz(whole))
    energies = (rng.integers(-300, 300, (2, 40)) / 1024).astype(np.float32)
    energies = energies[0] + np.complex64(1j) * energies[1]
    weights = rng.integers(0, 4, 40).astype(np.float32)
    gradient = jf.energy_gradient(log_psi, batch_size=batch_size)
    near, far = compiled(lambda *e: [gradient(params, spins, e, weights=weights) for e in e])(
        energies, energies - np.float32(1024)
    )
    size = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(near))
    for one, other in zip(jax.tree.leaves(near), jax.tree.leaves(far), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=50 * np.finfo(np.float32).eps * size)
