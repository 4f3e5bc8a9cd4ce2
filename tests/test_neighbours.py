"""Fishers and views against other libraries: JAX libraries run here, results of PyTorch libraries are stored.

Libraries differ in scale without saying so. No scale is fitted here: each is a constant whose docstring says where it comes
from. The stored matrices were written by `tests/references/make.py`, whose header names the versions.
"""

import functools
import importlib.metadata
import itertools
import pathlib
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from models import compiled
from others import from_a_process
from problems import assert_close, classifier, flat, reference

import jaxfisher as jf

REFERENCES = pathlib.Path(__file__).parent / "references"

RTOL = 1000 * np.finfo(np.float64).eps
"""The tolerance relative to the largest entry. EKFAC needs the most, tens of eps: its eigenvectors lose eps over the gaps."""

# Scales: theirs = SCALE * ours, where ours is a mean over examples.

EXAMPLES = 6
"""`reduction="sum"` sums over the examples, and we average: a factor of n."""

SQUARE = 2.0
"""`MSELoss` and laplax's MSE are r^2, whose second derivative is 2; that of r^2 / 2, the unit Normal's -log p, is 1."""

SQUARED_GRADIENT = SQUARE**2
"""The gradient of r^2 is 2 r and the score of a unit Normal is r; an empirical Fisher squares the factor."""

PER_TARGET = 1 / 2
"""`MSELoss(reduction="mean")` divides by n times the 2 targets of an example. We divide by n: the targets of one example are
one draw of a multivariate Normal, whose log-density is a sum over them."""


# ---------------------------------------------------------------------------------------------------------- PyTorch, stored


def mlp(params, x):
    hidden = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"])
    return hidden @ params["second"]["w"] + params["second"]["b"]


def shared(params, x):
    """The first layer applied to every position of ``x [positions, inputs]``, and the second to their mean."""
    hidden = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"][None])
    return jnp.mean(hidden, 0) @ params["second"]["w"] + params["second"]["b"]


def softmax(params, x):
    return jf.Categorical(mlp(params, x))


def shared_softmax(params, x):
    return jf.Categorical(shared(params, x))


def unit_normal(params, x):
    """The Normal of nngeometry's "regression", "with identity covariance"; `MSELoss` is twice its -log p."""
    mean = mlp(params, x)
    return jf.Normal(mean, jnp.ones_like(mean))


MODELS = {"softmax": softmax, "gaussian": unit_normal, "shared": shared_softmax}
PARAMETERS = ("weight_1", "bias_1", "weight_2", "bias_2")


@functools.cache
def stored(problem):
    """The stored arrays of a problem."""
    with np.load(REFERENCES / f"{problem}.npz") as arrays:
        return dict(arrays)


def to_ours(weight_1, bias_1, weight_2, bias_2):
    """Our parameters from arrays in the layout of torch, where weights are ``[out, in]``."""
    return {"first": {"w": weight_1.T, "b": bias_1}, "second": {"w": weight_2.T, "b": bias_2}}


def layer_places(problem):
    """For each layer, the slice of our flat parameters with its bias and its weight."""
    sizes = [stored(problem)[f"weight_{k}"].size + stored(problem)[f"bias_{k}"].size for k in (1, 2)]
    return slice(0, sizes[0]), slice(sizes[0], sum(sizes))


@functools.cache
def order(problem):
    """For each entry of our flat parameters, its index in torch's ``weight_1, bias_1, weight_2, bias_2``, raveled."""
    shapes = [stored(problem)[name].shape for name in PARAMETERS]
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    places = np.split(np.arange(ends[-1]), ends[:-1])
    return flat(to_ours(*(part.reshape(shape) for part, shape in zip(places, shapes, strict=True))))


def theirs(problem, name):
    """A stored matrix in the order of our parameters; a stored diagonal as a diagonal matrix."""
    matrix, places = stored(problem)[name], order(problem)
    return (np.diag(matrix) if matrix.ndim == 1 else matrix)[places][:, places]


def exact(problem):
    return jf.exact_fisher(MODELS[problem])


def empirical(problem):
    return jf.empirical_fisher(jf.log_likelihood(MODELS[problem]))


@functools.cache
def ours(problem, fisher, view):
    """A view of our Fisher of a stored problem."""
    arrays = stored(problem)
    params = jax.tree.map(jnp.asarray, to_ours(*(arrays[name] for name in PARAMETERS)))
    data = jnp.asarray(arrays["x"]), jnp.asarray(arrays["y"])
    data = data[:1] if fisher is exact else data  # the exact Fisher takes no targets
    return np.asarray(compiled(lambda params, *data: view(fisher(problem)(params, *data)).as_matrix())(params, *data))


def blocks(fisher):
    return jf.block_diagonal(fisher, jf.layers(fisher))


CURVLINOPS = {
    "ggn": (exact, jf.dense),
    "empirical": (empirical, jf.dense),
    "kfac_expand": (exact, jf.kronecker),
    "kfac_reduce": (exact, jf.kronecker_reduce),
    "kfac_empirical": (empirical, jf.kronecker),
    "ekfac": (exact, jf.eigen_kronecker),
}
NNGEOMETRY = {
    "fim": (exact, jf.dense),
    "diagonal": (exact, jf.diagonal),
    "block_diagonal": (exact, blocks),
    "kfac": (exact, jf.kronecker),
    "ekfac": (exact, jf.eigen_kronecker),
}
NO_SCALE = {exact: 1.0, empirical: 1.0}
SOURCES = [
    # `CrossEntropyLoss` is -log p, and its default reduction is the mean over examples.
    ("softmax", "curvlinops", CURVLINOPS, NO_SCALE),
    ("shared", "curvlinops", CURVLINOPS, NO_SCALE),
    ("gaussian", "curvlinops_mean", CURVLINOPS, {exact: SQUARE * PER_TARGET, empirical: SQUARED_GRADIENT * PER_TARGET}),
    ("gaussian", "curvlinops_sum", CURVLINOPS, {exact: SQUARE * EXAMPLES, empirical: SQUARED_GRADIENT * EXAMPLES}),
    # nngeometry takes distributions, where "regression" is the unit Normal, and always averages over examples.
    ("softmax", "nngeometry", NNGEOMETRY, NO_SCALE),
    ("gaussian", "nngeometry", NNGEOMETRY, NO_SCALE),
]
"""The problem, the source, our Fisher and view for each of its matrices, and the scale of each Fisher."""

EXACT = {"kfac_expand": "ggn", "kfac_reduce": "ggn", "kfac_empirical": "empirical", "kfac": "fim"}
"""For each of their Kronecker views, their exact matrix of the same Fisher."""


def with_the_trace_of(problem, exact, view):
    """A Kronecker view with each layer's block scaled to the trace of the layer in the exact matrix.

    Theirs has the trace ``E|a|^2 E|g|^2``, which equals that of the block, ``E |a|^2 |g|^2``, only if the two are independent.
    Ours always have the trace of the block.
    """
    made = view.copy()
    for part in layer_places(problem):
        made[part, part] *= np.trace(exact[part, part]) / np.trace(view[part, part])
    return made


CASES = [
    pytest.param(problem, f"{source}_{name}", fisher, view, scales[fisher], id=f"{problem}-{source}_{name}")
    for problem, source, table, scales in SOURCES
    for name, (fisher, view) in table.items()
]


def distance(a, b):
    """The largest difference of entries, relative to the largest entry of the second matrix."""
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


@pytest.mark.parametrize(("problem", "name", "fisher", "view", "scale"), CASES)
def test_stored_matrix(problem, name, fisher, view, scale):
    assert len(stored(problem)["x"]) == EXAMPLES
    expected = theirs(problem, name)
    source, found, kind = name.partition("_kfac")
    if found:
        exact_matrix = theirs(problem, f"{source}_{EXACT['kfac' + kind]}")
        assert distance(expected, with_the_trace_of(problem, exact_matrix, expected)) > 1e-3, (
            "the control: their trace is another"
        )
        expected = with_the_trace_of(problem, exact_matrix, expected)
    assert distance(scale * ours(problem, fisher, view), expected) < RTOL


def test_stored_matrices_are_all_compared():
    used = {(case.values[0], case.values[1]) for case in CASES}
    assert used == {(problem, name) for problem in MODELS for name in stored(problem).keys() - {"x", "y", *PARAMETERS}}


@pytest.mark.parametrize(
    ("problem", "source", "table", "scales"), SOURCES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_stored_matrices_differ(problem, source, table, scales):
    """The comparison can fail: another view, or torch's own order of the parameters, is far outside the tolerance."""
    for first, second in itertools.combinations(table, 2):
        # With one position per example, expand and reduce are equal.
        if (first, second) != ("kfac_expand", "kfac_reduce") or problem == "shared":
            assert distance(theirs(problem, f"{source}_{first}"), theirs(problem, f"{source}_{second}")) > 1e-2, (first, second)
    for name, (fisher, view) in table.items():
        matrix = stored(problem)[f"{source}_{name}"]
        matrix = np.diag(matrix) if matrix.ndim == 1 else matrix
        assert distance(scales[fisher] * ours(problem, fisher, view), matrix) > 1e-2, name


# ------------------------------------------------------------------------------------------------------------- JAX, run here


def neighbour(name, module=None):
    """Import a library. Skip the test if it is not installed, or cannot be imported with this JAX."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they use what JAX has deprecated
        try:
            return pytest.importorskip(module or name)
        except (ImportError, AttributeError) as error:
            pytest.skip(f"{versions(name)} does not import: {error}")


def versions(name):
    return f"{name} {importlib.metadata.version(name)} on jax {jax.__version__}"


def logits(params, x):
    return classifier(params, x).logits


def one_vector(params):
    """A pytree like the parameters, with numbers that any wrong order would change."""
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(5)
    return treedef.unflatten([jnp.asarray(rng.normal(size=leaf.shape)) for leaf in leaves])


KFAC_JAX = pytest.mark.filterwarnings("ignore::DeprecationWarning:kfac_jax")  # names that JAX has moved


@pytest.mark.relaxed
@KFAC_JAX
def test_kfac_jax_output_products():
    """The Fishers of output distributions in kfac_jax, between our Jacobians: ``F v = 1/n J^T M J v``."""
    kfac_jax = neighbour("kfac_jax")
    params, x, *_ = reference()
    v = one_vector(params)
    # The Normal needs the variance of our model: its default is 1/2, for a squared error without the factor 1/2.
    families = [
        (kfac_jax.CategoricalLogitsNegativeLogProbLoss, classifier),
        (kfac_jax.MultiBernoulliNegativeLogProbLoss, lambda params, x: jf.Bernoulli(logits(params, x))),
        (partial(kfac_jax.NormalMeanNegativeLogProbLoss, variance=4.0), lambda params, x: jf.Normal(logits(params, x), 2.0)),
    ]

    def theirs(loss, params):
        outputs, pushed = jax.jvp(lambda params: jax.vmap(logits, (None, 0))(params, x), (params,), (v,))
        _, pull = jax.vjp(lambda params: jax.vmap(logits, (None, 0))(params, x), params)
        (inner,) = loss(outputs).multiply_fisher((pushed,))
        return pull(inner / len(x))[0]

    for loss, model in families:
        ours = compiled(lambda params, model=model: jf.exact_fisher(model)(params, x).mv(v))(params)
        assert_close(flat(ours), flat(compiled(partial(theirs, loss))(params)))


@pytest.mark.relaxed
@KFAC_JAX
def test_kfac_jax_implicit_curvature():
    """Products with the exact Fisher and the GGN in kfac_jax, from a loss that registers its distribution."""
    kfac_jax = neighbour("kfac_jax")
    params, x, y, *_ = reference()
    v = one_vector(params)

    def loss(params, batch):
        x, y = batch
        outputs = jax.vmap(logits, (None, 0))(params, x)
        kfac_jax.register_softmax_cross_entropy_loss(outputs, y)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], 1))

    curvature = kfac_jax.ImplicitExactCurvature(loss)
    arguments = (params, (x, y))
    try:
        theirs = curvature.multiply_fisher(arguments, v)
    except ValueError as error:
        if "too many values to unpack" not in str(error):
            raise
        pytest.skip(f"{versions('kfac_jax')} cannot trace a loss: Primitive.get_bind_params no longer returns what it expects")
    exact = jf.exact_fisher(classifier)(params, x)
    assert_close(flat(exact.mv(v)), flat(theirs))
    assert_close(flat(exact.mv(v)), flat(curvature.multiply_ggn(arguments, v)))


AMPLITUDE = 4
"""NetKet's S is of log psi, and the score of p = |psi|^2 is d log p = 2 d log psi (psi real): F = 4 S."""


def log_psi(params, spins):
    """The log-amplitude of a restricted Boltzmann machine with real weights, psi > 0, for one configuration or many."""
    bias = jnp.expand_dims(params["hidden"], tuple(range(spins.ndim - 1)))
    return spins @ params["visible"] + jnp.sum(jnp.log(jnp.cosh(spins @ params["w"] + bias)), -1)


def log_density(params, spins):
    """``log |psi|^2`` without its normalisation, which does not depend on the spins: centring removes its derivative."""
    return 2 * log_psi(params, spins)


SPINS, SHIFT = 3, 0.01


def ansatz():
    """The parameters."""
    rng = np.random.default_rng(6)
    shapes = {"w": (SPINS, 2), "hidden": (2,), "visible": (SPINS,)}
    return {name: jnp.asarray(0.5 * rng.normal(size=shape)) for name, shape in shapes.items()}


def netket_results():
    """NetKet's S and a step over all configurations, samples and S at these; a string if NetKet cannot be imported."""
    jax.config.update("jax_enable_x64", True)
    try:
        import netket as nk
    except (ImportError, AttributeError) as error:
        return f"{versions('netket')} does not import: {error}"
    params, tensor = ansatz(), nk.optimizer.qgt.QGTJacobianDense
    apply = lambda variables, spins, mutable=False: log_psi(variables["params"], spins)  # noqa: E731
    model = {"apply_fun": apply, "variables": {"params": params}}
    hilbert = nk.hilbert.Spin(0.5, SPINS)
    whole = nk.vqs.FullSumState(hilbert, **model)
    shifted = whole.quantum_geometric_tensor(tensor(mode="real", diag_shift=SHIFT))
    sampled = nk.vqs.MCState(nk.sampler.ExactSampler(hilbert), n_samples=32, seed=1, sampler_seed=2, **model)
    results = {
        "spins": hilbert.all_states(),
        "whole": whole.quantum_geometric_tensor(tensor(mode="real")).to_dense(),
        "step": flat(shifted.solve(nk.optimizer.solver.cholesky, one_vector(params))[0]),
        "samples": sampled.samples.reshape(-1, SPINS),
        "sampled": sampled.quantum_geometric_tensor(tensor(mode="real")).to_dense(),
    } | reconfigured(nk, nk.vqs.FullSumState(hilbert, **model), hilbert)
    return {name: np.asarray(value, np.float64) for name, value in results.items()}


RATE, STEPS = 0.05, 10


def reconfigured(nk, state, hilbert):
    """The Hamiltonian of an Ising chain, and the parameters after each of ten steps of NetKet on it."""
    chain = nk.operator.Ising(hilbert, nk.graph.Chain(SPINS), h=1.0)
    sr = nk.optimizer.SR(nk.optimizer.qgt.QGTJacobianDense(mode="real"), nk.optimizer.solver.cholesky, diag_shift=SHIFT)
    driver = nk.driver.VMC(chain, nk.optimizer.Sgd(RATE), variational_state=state, preconditioner=sr)
    path = []
    for _ in range(STEPS):
        driver.run(1, out=nk.logging.RuntimeLog(), show_progress=False)
        path.append(flat(state.parameters))
    return {"hamiltonian": chain.to_dense(), "path": np.stack(path)}


@pytest.fixture(scope="module")
def netket():
    return from_a_process("netket", netket_results)


def covariance(params, spins, weights=None):
    return compiled(lambda params: jf.scores(log_density, center=True)(params, spins, weights=weights).second_moment())(params)


def test_netket_all_configurations(netket):
    """Over all configurations, the weighted covariance of scores and the Fisher of the normalised density are both 4 S."""
    params, spins, theirs = ansatz(), jnp.asarray(netket["spins"]), AMPLITUDE * netket["whole"]
    assert_close(covariance(params, spins, jnp.exp(log_density(params, spins))), theirs)

    def normalised(params):
        fisher = jf.exact_fisher(lambda params: jf.Categorical(log_density(params, spins)))(params)
        # In the units of NetKet: (S + shift)^-1 v = 4 (F + 4 shift)^-1 v.
        return fisher.as_matrix(), fisher.solve(one_vector(params), AMPLITUDE * SHIFT)

    density, step = compiled(normalised)(params)
    assert_close(density, theirs)
    condition = np.linalg.cond(theirs + AMPLITUDE * SHIFT * np.eye(len(theirs)))  # what a solve loses
    assert_close(AMPLITUDE * flat(step), netket["step"], factor=10 * condition)


def test_netket_samples(netket):
    """At samples, S is the covariance of the derivatives, and that of our centred scores is 4 S."""
    assert_close(covariance(ansatz(), jnp.asarray(netket["samples"])), AMPLITUDE * netket["sampled"])


def test_netket_ten_steps_of_stochastic_reconfiguration(netket):
    """Preconditioned with our covariance of the score, ten steps reproduce NetKet's with its geometric tensor."""
    spins, hamiltonian = jnp.asarray(netket["spins"]), jnp.asarray(netket["hamiltonian"])
    opt = optax.chain(jf.scale_by_fisher(SHIFT), optax.scale_by_learning_rate(RATE))

    def step(carry, _):
        params, state = carry
        psi = jnp.exp(log_psi(params, spins))
        weights = jnp.square(psi) / jnp.sum(jnp.square(psi))
        energies = hamiltonian @ psi / psi
        scores = jf.scores(log_psi, center=True)(params, spins, weights=weights)
        gradient = scores.rmv(2 * weights * (energies - jnp.sum(weights * energies)))
        updates, state = opt.update(gradient, state, params, fisher=jf.fisher_from_scores(scores))
        params = optax.apply_updates(params, updates)
        return (params, state), ravel_pytree(params)[0]

    start = ansatz()
    _, path = compiled(lambda start: jax.lax.scan(step, (start, opt.init(start)), length=STEPS))(start)
    # A solve amplifies rounding by a condition number of about 1e3, and the errors of steps add up.
    assert_close(path, netket["path"], factor=1e5)


@pytest.mark.relaxed
def test_laplax_ggn():
    """The GGN products of laplax, which are sums over the data."""
    ggn = neighbour("laplax", "laplax.curv.ggn")
    params, x, y, *_ = reference()
    v = one_vector(params)
    data = {"input": x, "target": y}
    families = [
        ("mse", lambda params, x: jf.Normal(logits(params, x), 1.0), SQUARE * len(x)),
        ("cross_entropy", classifier, len(x)),
    ]
    for loss, model, scale in families:

        def products(params, loss=loss, model=model):
            theirs = ggn.create_ggn_mv(lambda input, params: logits(params, input), params, data, loss)
            return jf.exact_fisher(model)(params, x).mv(v), theirs(v)

        ours, theirs = compiled(products)(params)
        assert_close(scale * flat(ours), flat(theirs))
