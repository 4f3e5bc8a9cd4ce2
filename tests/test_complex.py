"""Complex amplitudes and complex parameters, against dense sums over real numbers, and dense complex algebra, in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from models import compiled
from problems import assert_close
from programs.evaluate import traced

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

SITES, HIDDEN, N, DAMPING = 4, 3, 7, 0.05
RNG = np.random.default_rng(20261129)


def numbers(*shape, whole=True):
    real, imaginary = 0.4 * RNG.normal(size=(2, *shape))
    return jnp.asarray(real + 1j * imaginary if whole else real)


SPINS = jnp.asarray(np.random.default_rng(1).choice([-1.0, 1.0], (N, SITES)))
WEIGHTS = jnp.asarray([0.5, 1.0, 2.0, 0.0, 1.5, 0.3, 1.0])
ENERGIES = numbers(N)
WAVE = {"bias": numbers(HIDDEN), "visible": numbers(SITES), "w": numbers(SITES, HIDDEN)}
MIXED = {"bias": numbers(HIDDEN), "visible": numbers(SITES, whole=False), "w": numbers(SITES, HIDDEN)}
REAL = {"bias": numbers(HIDDEN, whole=False), "visible": numbers(SITES, whole=False), "w": numbers(SITES, HIDDEN, whole=False)}


def holomorphic(params, spins):
    """A restricted Boltzmann machine with complex weights."""
    spins = spins.astype(params["w"].dtype)
    return spins @ params["visible"] + jnp.sum(jnp.log(jnp.cosh(spins @ params["w"] + params["bias"])))


def mixed(params, spins):
    """An amplitude that also depends on the conjugates of its parameters, one of which is real."""
    angles = spins.astype(params["w"].dtype) @ params["w"] + params["bias"]
    rest = jax.lax.complex(jnp.sum(jnp.square(jnp.abs(angles))), spins @ params["visible"])
    return jnp.sum(jnp.log(jnp.cosh(angles))) + rest


def phases(params, spins):
    """A complex amplitude of real parameters."""
    angles = jnp.tanh(spins @ params["w"] + params["bias"])
    return jax.lax.complex(spins @ params["visible"] + jnp.sum(angles), jnp.sum(jnp.square(angles)))


def modulus(params, spins):
    """A real log-amplitude of complex parameters."""
    return jnp.real(holomorphic(params, spins))


CASES = {"holomorphic": (holomorphic, WAVE), "mixed": (mixed, MIXED), "phases": (phases, REAL), "modulus": (modulus, WAVE)}


def parts(tree):
    """The real numbers of a tree as a flat vector, in the order of the library's columns."""
    pieces = [(leaf.real, leaf.imag) if np.iscomplexobj(leaf) else (leaf,) for leaf in map(np.asarray, jax.tree.leaves(tree))]
    return np.concatenate([part.reshape(-1) for pair in pieces for part in pair])


def whole(flat, like):
    """The tree with these real numbers."""
    leaves, treedef = jax.tree.flatten(like)
    made, start = [], 0
    for leaf in leaves:
        count = leaf.size * (2 if jnp.iscomplexobj(leaf) else 1)
        own = flat[start : start + count]
        made.append((jax.lax.complex(own[: leaf.size], own[leaf.size :]) if count > leaf.size else own).reshape(leaf.shape))
        start += count
    return jax.tree.unflatten(treedef, made)


@functools.cache
def derivatives(name):
    """The complex derivatives of every log-amplitude by the real numbers of the parameters, [n, p]."""
    log_psi, params = CASES[name]

    def both(flat, spins):
        value = log_psi(whole(flat, params), spins)
        return jnp.stack([jnp.real(value), jnp.imag(value)])

    made = np.asarray(traced(jax.vmap(jax.jacfwd(both), (None, 0)))(jnp.asarray(parts(params)), SPINS))
    return made[:, 0] + 1j * made[:, 1]


def centred(name, omega):
    return derivatives(name) - omega @ derivatives(name)


OMEGA = np.asarray(WEIGHTS / jnp.sum(WEIGHTS))


def tensor(name, omega=OMEGA):
    """``Re <(O - <O>)^* (O - <O>)>``."""
    rows = centred(name, omega)
    return np.real(np.conj(rows).T @ (omega[:, None] * rows))


def interleaved(rows):
    """Real and imaginary parts of complex rows, one after the other."""
    return np.stack([rows.real, rows.imag], 1).reshape(-1, rows.shape[-1])


def vector_like(params, seed=3):
    rng = np.random.default_rng(seed)
    return whole(jnp.asarray(rng.normal(size=len(parts(params)))), params)


@pytest.mark.parametrize(("name", "batch_size"), [("mixed", None), ("mixed", 3), ("phases", None), ("modulus", None)])
def test_scores_are_those_of_real_and_imaginary_parts(name, batch_size):
    """Every quantity of scores: centred, with weights and padding, in memory and in pieces."""
    log_psi, params = CASES[name]
    count = 2 if name != "modulus" else 1
    e, v = jnp.asarray(np.random.default_rng(2).normal(size=count * N)), vector_like(params)

    def found():
        made = jf.scores(log_psi, center=True, batch_size=batch_size)(params, SPINS, weights=WEIGHTS)
        return {
            "matrix": made.as_matrix(),
            "gram": made.gram(),
            "norms": made.squared_norms(),
            "mv": made.mv(v),
            "rmv": made.rmv(e),
            "diagonal": made.diagonal(),
            "moment": made.second_moment(),
        }

    S = np.where(OMEGA[:, None] > 0, centred(name, OMEGA), 0)
    S = interleaved(S) if count == 2 else S.real
    expected = {
        "matrix": S,
        "gram": S @ S.T,
        "norms": np.sum(S**2, 1),
        "mv": S @ parts(v),
        "rmv": S.T @ np.asarray(e),
        "diagonal": np.diag(tensor(name)),
        "moment": tensor(name),
    }
    held = set(expected) if batch_size is None else {"gram", "rmv", "diagonal"}
    for key, value in traced(lambda: {name: x for name, x in found().items() if name in held})().items():
        value = parts(value) if key in ("rmv", "diagonal") else value
        assert_close(value, expected[key], factor=100)


def test_an_operator_solves_for_complex_vectors():
    """Products, solves by either matrix, and views; results have the dtypes of the parameters."""
    log_psi, params = CASES["mixed"]
    v, S, e = vector_like(params), tensor("mixed"), jnp.asarray(np.random.default_rng(5).normal(size=2 * N))
    flat, damped = parts(v), S + DAMPING * np.eye(len(S))

    def found(params, v):
        F = jf.empirical_fisher(log_psi, center=True)(params, SPINS, weights=WEIGHTS)
        return {
            "mv": F.mv(v),
            "solve": F.solve(v, DAMPING),
            "by leaf": jf.dense(F).solve(v, {name: DAMPING for name in params}),
            "dense": jf.dense(F).solve(v, DAMPING),
            "diagonal": jf.diagonal(F).solve(v, DAMPING),
            "LSMR": jf.LSMR().least_squares(F.form.scores, e, DAMPING)[0],
        }, F.quadratic(v)

    made, quadratic = traced(found)(params, v)
    solution = np.linalg.solve(damped, flat)
    rows = interleaved(centred("mixed", OMEGA))
    expected = {"mv": S @ flat, "diagonal": flat / np.diag(damped)} | dict.fromkeys(("solve", "by leaf", "dense"), solution)
    expected["LSMR"] = np.linalg.solve(damped, rows.T @ (np.repeat(OMEGA, 2) * np.asarray(e)))
    for key, value in made.items():
        assert jax.tree.map(jnp.result_type, value) == jax.tree.map(jnp.result_type, params), key
        assert_close(parts(value), expected[key], factor=1e10 if key == "LSMR" else 1e3)
    assert_close(quadratic, flat @ S @ flat, factor=100)


def energies_of(omega, name):
    """The gradient ``2 Re <(E - <E>)^* O>`` as a dense sum."""
    energies = np.asarray(ENERGIES)
    return 2 * np.real(derivatives(name).T @ np.conj(omega * (energies - omega @ energies)))


@pytest.mark.parametrize("batch_size", [None, 3])
def test_the_gradient_of_the_energy_is_the_dense_sum(batch_size):
    """The gradient is right with and without weights, in memory and in pieces, and has the dtypes of the parameters."""

    def found():
        gradient = {name: jf.energy_gradient(f, batch_size=batch_size)(p, SPINS, ENERGIES) for name, (f, p) in CASES.items()}
        log_psi, params = CASES["mixed"]
        return gradient, jf.energy_gradient(log_psi, batch_size=batch_size)(params, SPINS, ENERGIES, weights=WEIGHTS)

    plain, weighted = traced(found)()
    for name, (_, params) in CASES.items():
        assert jax.tree.map(jnp.result_type, plain[name]) == jax.tree.map(jnp.result_type, params)
        assert_close(parts(plain[name]), energies_of(np.full(N, 1 / N), name))
    assert_close(parts(weighted), energies_of(OMEGA, "mixed"))


STATES = jnp.asarray([[1.0 - 2 * (i >> k & 1) for k in range(SITES)] for i in range(2**SITES)])


def hamiltonian():
    """A Hermitian matrix over all configurations."""
    matrix = np.random.default_rng(8).normal(size=(2, 2**SITES, 2**SITES))
    return jnp.asarray((matrix[0] + 1j * matrix[1]) + np.conj(matrix[0] + 1j * matrix[1]).T)


def test_over_all_configurations_it_is_the_gradient_of_the_energy_itself():
    """The gradient of ``<psi|H|psi> / <psi|psi>``, by `jax.grad` in the real numbers of the parameters."""
    H = hamiltonian()

    def energy(flat):
        psi = jnp.exp(jax.vmap(mixed, (None, 0))(whole(flat, MIXED), STATES))
        return jnp.real(jnp.vdot(psi, H @ psi)) / jnp.sum(jnp.square(jnp.abs(psi)))

    def found(params):
        psi = jnp.exp(jax.vmap(mixed, (None, 0))(params, STATES))
        return jf.energy_gradient(mixed)(params, STATES, (H @ psi) / psi, weights=jnp.square(jnp.abs(psi)))

    expected = traced(jax.grad(energy))(jnp.asarray(parts(MIXED)))
    assert_close(parts(traced(found)(MIXED)), expected, factor=1e4)


def test_for_a_holomorphic_amplitude_it_is_the_complex_solve():
    """``(S + damping I)^-1 f`` with the complex matrix ``<(O - <O>)^* (O - <O>)>`` of half the size, only if holomorphic."""

    def solved(log_psi, params):
        F = jf.empirical_fisher(log_psi, center=True)(params, SPINS, weights=WEIGHTS)
        return F.solve(jf.energy_gradient(log_psi)(params, SPINS, ENERGIES, weights=WEIGHTS), DAMPING)

    def by_half(log_psi, params):
        """The complex solve, which takes the derivative by the real part of each parameter for the complex derivative."""
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        tangents = jax.vmap(ravel_pytree(params)[1])(jnp.eye(count, dtype=complex))
        along = lambda t: jax.jvp(lambda p: jax.vmap(log_psi, (None, 0))(p, SPINS), (params,), (t,))[1]  # noqa: E731
        rows = np.asarray(traced(jax.vmap(along))(tangents)).T
        rows, energies = rows - OMEGA @ rows, np.asarray(ENERGIES)
        force = 2 * np.conj(rows).T @ (OMEGA * (energies - OMEGA @ energies))
        return np.linalg.solve(np.conj(rows).T @ (OMEGA[:, None] * rows) + DAMPING * np.eye(count), force)

    def conjugated(params, spins):
        return holomorphic(params, spins) + jnp.conj(jnp.sum(params["w"] * params["w"] * spins.astype(complex)[:, None]))

    ours, other = traced(lambda params: (solved(holomorphic, params), solved(conjugated, params)))(WAVE)
    apart = [np.asarray(ravel_pytree(x)[0]) - by_half(f, WAVE) for x, f in ((ours, holomorphic), (other, conjugated))]
    size = np.max(np.abs(by_half(holomorphic, WAVE)))
    assert np.max(np.abs(apart[0])) < 1e4 * np.finfo(float).eps * size
    assert np.max(np.abs(apart[1])) > 1e-3 * size


def test_optimisers_take_complex_gradients():
    """SPRING, a trust region and a part of the parameters, against dense matrices; updates come back complex."""
    log_psi, params = CASES["mixed"]
    mu, rate, radius = 0.8, 0.1, 1e-3
    spring = optax.chain(jf.scale_by_fisher(DAMPING, momentum=mu), optax.scale_by_learning_rate(rate), jf.scale_to_kl(radius))
    part = optax.masked(jf.scale_by_fisher(DAMPING), {"bias": False, "visible": True, "w": True})
    gradients = [vector_like(params, seed) for seed in (1, 2)]

    def run(params):
        F = jf.empirical_fisher(log_psi, center=True)(params, SPINS, weights=WEIGHTS)
        state, made = spring.init(params), []
        for gradient in gradients:
            updates, state = spring.update(gradient, state, params, fisher=F)
            made.append(updates)
        return made, part.update(gradients[0], part.init(params), params, fisher=F)[0]

    made, masked = traced(run)(params)
    assert jax.tree.map(jnp.result_type, made[1]) == jax.tree.map(jnp.result_type, params)
    S, last = tensor("mixed"), np.zeros(len(parts(params)))
    damped = S + DAMPING * np.eye(len(S))
    factor = 50 * np.linalg.cond(damped)  # the solves of the optimisers are not refined
    for gradient, updates in zip(gradients, made, strict=True):
        last = mu * last + np.linalg.solve(damped, parts(gradient) - mu * S @ last)
        step = -rate * last
        assert_close(parts(updates), step * min(1, (2 * radius / (step @ S @ step)) ** 0.5), factor=factor)
    keep = slice(2 * HIDDEN, None)  # all but the bias
    assert_close(parts(masked)[keep], np.linalg.solve(damped[keep, keep], parts(gradients[0])[keep]), factor=factor)
    np.testing.assert_array_equal(masked["bias"], gradients[0]["bias"])


def test_models_of_complex_parameters():
    """The exact Fisher, its forms and views, streams, natural gradients and training, against the model in real numbers."""
    inputs, targets = SPINS, jnp.asarray(np.random.default_rng(4).normal(size=N))

    def model(params, x):
        return jf.Normal(jnp.sum(jnp.square(jnp.abs(x.astype(complex) @ params["w"]))) + jnp.real(params["bias"][0]), 2.0)

    params = {"bias": WAVE["bias"], "w": WAVE["w"]}
    real = {name: {"imag": leaf.imag, "real": leaf.real} for name, leaf in params.items()}

    def of_real(real, x):
        return model({name: jax.lax.complex(leaf["real"], leaf["imag"]) for name, leaf in real.items()}, x)

    def found(model, params):
        F, log_prob = jf.exact_fisher(model)(params, inputs), jf.log_likelihood(model)
        gradient = jf.natural_grad(log_prob, damping=DAMPING)(params, inputs, targets)
        step = jf.training_step(model, jf.adapt_damping(jf.natural_gradient(0.1), DAMPING))
        moved, _, _ = step(params, step.init(params, inputs, targets), inputs, targets)
        made = [jf.implicit_fisher(model)(params, inputs).mv(params), jf.kronecker(F).mv(params), gradient, moved]
        traces = (
            jf.kl_hessian(model)(params, inputs).trace(),
            jf.observed_information(log_prob)(params, inputs, targets).trace(),
        )
        return made, (F.trace(), jf.block_diagonal(F).logdet(DAMPING), jf.kl(model)(params, params, inputs), *traces)

    (ours, traces), (theirs, others) = traced(lambda: (found(model, params), found(of_real, real)))()
    for mine, other in zip(ours, theirs, strict=True):
        for name in params:
            assert_close(mine[name].real, other[name]["real"], factor=1e5)
            assert_close(mine[name].imag, other[name]["imag"], factor=1e5)
    assert_close(jnp.stack(traces), np.stack(others), factor=1e3)


def test_streams_of_samples_have_one_mean():
    """Accumulated over batches: the second moment of scores of all of them."""
    log_psi, params = CASES["phases"]
    batches = [(SPINS[:4],), (SPINS[4:],)]
    F = jf.accumulate(jf.empirical_fisher(log_psi), jf.dense)(params, batches)
    rows = derivatives("phases")
    assert_close(F.as_matrix(), np.real(np.conj(rows).T @ rows) / N)
    assert float(F.n) == N


def test_what_the_engine_makes_of_it():
    """Weights of a complex layer stay factors, with two rows per example and two real leaves."""
    table = jf.explain(holomorphic)(WAVE, SPINS)
    assert table.rows == 2 and not table.plain
    assert {"['w'].real", "['w'].imag"} <= set(table.factored)
    F = jf.empirical_fisher(holomorphic, center=True)(WAVE, SPINS)
    assert f"{F.n:g}" == "7" and "params 38" in repr(F)
    assert f"{jf.fisher_from_scores(F.form.scores).n:g}" == "7"


@pytest.mark.compiled
def test_clipped_sums_are_those_of_the_real_numbers():
    """A sum of steepest ascents of one example, each no longer than the bound, as complex numbers."""
    log_prob = lambda params, spins: 2 * holomorphic(params, spins).real  # noqa: E731
    bound = 8.0
    ascents = jax.tree.map(jnp.conj, traced(lambda: jax.vmap(jax.grad(log_prob), (None, 0))(WAVE, SPINS))())
    lengths = np.sqrt(sum(np.sum(np.abs(np.asarray(leaf)).reshape(N, -1) ** 2, 1) for leaf in jax.tree.leaves(ascents)))
    assert np.min(lengths) < bound < np.max(lengths)
    found = compiled(lambda: jf.clipped_grad(log_prob, bound)(WAVE, SPINS))().sum
    for name, leaf in ascents.items():
        expected = np.tensordot(np.minimum(1, bound / lengths), np.asarray(leaf), 1)
        assert found[name].dtype == WAVE[name].dtype
        assert_close(found[name].real, -expected.real, factor=1e3)
        assert_close(found[name].imag, -expected.imag, factor=1e3)


def test_lineax_is_refused_where_its_vectors_would_mean_something_else():
    F = jf.empirical_fisher(holomorphic, center=True)(WAVE, SPINS)
    with pytest.raises(TypeError, match=r"over complex parameters, each two real numbers.*jf\.CG\(\)"):
        jf.as_lineax(F)
