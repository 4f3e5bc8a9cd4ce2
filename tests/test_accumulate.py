"""Means over streams: merged views of batches are the view of all examples, whatever the sizes and weights of the batches."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfisher as jf

pytestmark = pytest.mark.usefixtures("in_numpy")

SIZES = (7, 3, 7, 1)
"""Four batches of three sizes; each size is a compilation for each view."""
BOUNDS = np.cumsum((0, *SIZES))
EPS = np.finfo(np.float64).eps


def model(params, x, length):
    """Sequences of different lengths, whose positions share a weight: views count those that carry a gradient."""
    hidden = jnp.tanh(x @ params["a"] + params["b"][None])
    inside = (jnp.arange(x.shape[0]) < length)[:, None]
    return jf.Categorical(logits=jnp.sum(jnp.where(inside, hidden, 0), 0) @ params["c"])


def log_prob(params, x, length, y):
    return model(params, x, length).log_prob(y)


def problem():
    rng = np.random.default_rng(0)
    n = BOUNDS[-1]
    params = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=4), "c": rng.normal(size=(4, 3))}
    data = rng.normal(size=(n, 5, 3)), rng.integers(1, 6, n), rng.integers(0, 3, n)
    return jax.tree.map(jnp.asarray, params), data, rng.uniform(0, 2, n) * (rng.uniform(size=n) > 0.3)


def batches(*data):
    """NumPy arrays, one batch at a time."""
    return (tuple(array[a:b] for array in data) for a, b in itertools.pairwise(BOUNDS))


VIEWS = {
    "dense": jf.dense,
    "diagonal": jf.diagonal,
    "block-diagonal": lambda F: jf.block_diagonal(jf.dense(F)),
    "Kronecker": jf.kronecker,
    "Kronecker, reduced": jf.kronecker_reduce,
}


def weighted(params, x, length, y, weights):
    return jf.empirical_fisher(log_prob)(params, x, length, y, weights=weights)


def assert_same(found, expected):
    for name, a, b in (
        ("matrix", found.as_matrix(), expected.as_matrix()),
        ("trace", found.trace(), expected.trace()),
        ("count", found.n, expected.n),
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=64 * EPS * float(jnp.max(jnp.abs(b))), err_msg=name)
    assert repr(found) == repr(expected)


@pytest.mark.parametrize("name", VIEWS)
def test_a_stream_gives_the_view_of_all_examples(name):
    params, data, w = problem()
    view, exact = VIEWS[name], jf.exact_fisher(model)
    assert_same(jf.accumulate(exact, view)(params, batches(*data[:2])), view(exact(params, *data[:2])))
    # The weights of no batch sum to one, and the last batch is padding only.
    w[-1] = 0
    streamed = jf.accumulate(weighted, view)(params, batches(*data, w))
    assert_same(streamed, view(weighted(params, *data, w)))


@pytest.mark.parametrize("padded", [(3,), (0, 2)], ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_a_batch_with_weights_joins_batches_without(name, padded):
    """Only the last batch may be padded. In batches without weights each example has weight one."""
    params, data, w = problem()
    for b in range(len(SIZES)):
        if b not in padded:
            w[BOUNDS[b] : BOUNDS[b + 1]] = 1
    streamed = (batch if b in padded else batch[:-1] for b, batch in enumerate(batches(*data, w)))
    fisher = lambda params, *batch: (  # noqa: E731
        weighted(params, *batch) if len(batch) == 4 else jf.empirical_fisher(log_prob)(params, *batch)
    )
    assert_same(jf.accumulate(fisher, VIEWS[name])(params, streamed), VIEWS[name](weighted(params, *data, w)))


def test_the_eigenvectors_of_a_first_pass_serve_a_second():
    params, data, _ = problem()
    fisher = jf.exact_fisher(model)
    basis = jf.accumulate(fisher, jf.kronecker)(params, batches(*data[:2]))
    view = lambda F: jf.eigen_kronecker(F, basis)  # noqa: E731
    assert_same(jf.accumulate(fisher, view)(params, batches(*data[:2])), view(fisher(params, *data[:2])))
    # Each batch in its own basis has no mean, and says so.
    own = jf.accumulate(fisher, jf.eigen_kronecker)(params, batches(*data[:2]))
    assert np.isnan(own.trace())


def test_a_stream_that_goes_on_has_the_same_bits():
    params, data, _ = problem()
    accumulated = jf.accumulate(jf.exact_fisher(model), jf.kronecker)
    whole = accumulated(params, batches(*data[:2]))
    first = accumulated(params, itertools.islice(batches(*data[:2]), 2))
    # As in a checkpoint: arrays are saved and restored.
    arrays, structure = jax.tree.flatten(first)
    kept = jax.tree.unflatten(structure, [jnp.asarray(np.array(array)) for array in arrays])
    again = accumulated(params, itertools.islice(batches(*data[:2]), 2, None), start=kept)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.compiled
def test_a_stream_of_a_hundred_batches_takes_the_memory_of_one_and_survives_a_kill(tmp_path):
    """A mean that was saved after fifty batches goes on, after the process died at the seventieth."""
    size, count, lives, saved = 32, 100, [], tmp_path / "saved.npz"
    rng = np.random.default_rng(1)
    params = {"a": jnp.asarray(rng.normal(size=(6, 5))), "b": jnp.zeros(5)}
    x, y = rng.normal(size=(size * count, 6)), rng.normal(size=(size * count, 5))
    log_prob = jf.log_likelihood(lambda params, x: jf.Normal(jnp.tanh(x @ params["a"] + params["b"]), jnp.ones(5)))
    run = jf.accumulate(jf.empirical_fisher(log_prob), jf.kronecker)

    def stream(first, last, dies=count):
        for k in range(first, last):
            if k == dies:
                raise KeyboardInterrupt
            lives.append(sum(array.nbytes for array in jax.live_arrays()))
            yield x[k * size : (k + 1) * size], y[k * size : (k + 1) * size]

    half = run(params, stream(0, 50))
    leaves, treedef = jax.tree.flatten(half)
    np.savez(saved, *map(np.asarray, leaves))
    with pytest.raises(KeyboardInterrupt):
        run(params, stream(50, count, dies=70), start=half)
    del half, leaves
    with np.load(saved) as archive:
        restored = jax.tree.unflatten(treedef, [jnp.asarray(archive[name]) for name in archive.files])
    found = run(params, stream(50, count), start=restored)
    assert len(lives) == 50 + 20 + 50
    # At most a batch, the mean so far and the next mean are alive.
    assert max(lives) < lives[0] + 3 * (x[:size].nbytes + y[:size].nbytes), (lives[0], max(lives))
    assert_same(found, jf.kronecker(jf.empirical_fisher(log_prob)(params, x, y)))


def test_a_loop_carries_a_mean():
    params, data, _ = problem()
    x, length = (array[:16].reshape(4, 4, *array.shape[1:]) for array in data[:2])
    view = lambda x, length: jf.kronecker(jf.exact_fisher(model)(params, x, length))  # noqa: E731

    @jax.jit
    def run(x, length):
        step = lambda mean, batch: (jf.merge(mean, view(*batch)), None)  # noqa: E731
        return jax.lax.scan(step, view(x[0], length[0]), (x[1:], length[1:]))[0]

    assert_same(run(x, length), view(data[0][:16], data[1][:16]))


@pytest.mark.parametrize("rank", [3, 12])
def test_a_sketch_of_a_stream_is_below_the_mean_by_no_more_than_it_says(rank):
    """Against the dense mean, of uneven and weighted batches: one of padding only, and some of fewer rows than the rank.

    The stated bound is itself within the one of Ghashami et al. (SIAM J. Comput. 2016), theorem 1.1.
    """
    params, data, w = problem()
    w[BOUNDS[1] : BOUNDS[2]] = 0
    found = jf.accumulate(weighted, functools.partial(jf.sketch, rank=rank))(params, batches(*data, w))
    scores = jax.vmap(jax.grad(log_prob), (None, 0, 0, 0))(params, *data)
    rows = np.concatenate([np.asarray(leaf).reshape(len(w), -1) for leaf in jax.tree.leaves(scores)], 1)
    mean = rows.T @ (w[:, None] * rows) / w.sum()
    values = np.linalg.eigvalsh(mean)[::-1]
    below = np.linalg.eigvalsh(mean - np.asarray(found.as_matrix()))
    error, rounding = float(found.form.error), 64 * EPS * values[0]
    assert below[0] >= -rounding and below[-1] <= error + rounding
    assert error <= min(values[j:].sum() / (rank + 1 - j) for j in range(rank + 1)) + rounding
    assert found.form.vectors.shape == (len(mean), rank)
    # The sketch must have left out some of 17 rows; a sketch of rank 17 would leave out nothing.
    assert error > 0 if rank == 3 else error < values[rank - 1]


def test_what_has_no_mean_is_refused():
    params, data, _ = problem()
    fisher = jf.exact_fisher(model)(params, *data[:2])
    dense = jf.dense(fisher)
    counted = jf.dense(jf.exact_fisher(model)(params, *data[:2], counts=np.ones(len(data[0]))))
    for ask, kind, words in [
        # The error says how the two differ.
        (lambda: jf.merge(2 * dense, dense), ValueError, "one is a scaled mean over its examples, the other a mean over them"),
        (lambda: jf.merge(counted, dense), ValueError, "only one is a mean over the terms that `counts` says; give `counts`"),
        (
            lambda: jf.merge(dense, jf.dense(jf.empirical_fisher(log_prob)(params, *data))),
            ValueError,
            "one is exact, the other empirical; expected two Fishers of one kind",
        ),
        (lambda: jf.merge(fisher, fisher), TypeError, "exact as scores has no mean in the same form.*jf.diagonal"),
        (lambda: jf.merge(*2 * [jf.block_diagonal(fisher)]), TypeError, "exact as scores has no mean in the same form"),
        (lambda: jf.merge(jf.low_rank(fisher, 2), jf.low_rank(fisher, 2)), TypeError, "has no mean in the same form"),
        (lambda: jf.merge(jf.sketch(fisher, 2), jf.sketch(fisher, 3)), ValueError, "sketches of ranks 2 and 3"),
        (lambda: jf.merge(jf.diagonal(fisher), jf.dense(fisher)), ValueError, "different structures.*the same view"),
        (
            lambda: jf.merge(jf.scaled_identity(params, 1.0), jf.scaled_identity(params, 1.0)),
            TypeError,
            "no mean over examples",
        ),
        (lambda: jf.merge(jf.dense(fisher) + jf.dense(fisher), jf.dense(fisher)), TypeError, "no mean over examples"),
        (lambda: jf.accumulate(jf.exact_fisher(model), jf.diagonal)(params, []), ValueError, "`batches` has no batch"),
        (lambda: jf.accumulate(jf.exact_fisher(model), jf.diagonal)(params, 3), TypeError, "`batches` is 3"),
        # Iterating over a dict would give its keys, which are no batches.
        (lambda: jf.accumulate(jf.exact_fisher(model), jf.diagonal)(params, {"x": data[0]}), TypeError, "`batches` is"),
        (lambda: jf.accumulate(fisher, jf.diagonal), TypeError, "`fisher`"),
    ]:
        with pytest.raises(kind, match=words):
            ask()


def test_weights_that_are_no_weights_are_not_lost_in_a_mean():
    params, data, w = problem()
    w[0] = -np.sum(w[1 : SIZES[0]])
    assert np.isnan(jf.accumulate(weighted, jf.diagonal)(params, batches(*data, w)).trace())


def test_what_is_of_all_examples_together_is_not_merged():
    """The mean of two covariances lacks the distance of the batches' means; that of two marginals, the other's nuisance."""
    params, data, _ = problem()
    whole = lambda params, x, length, y: jf.exact_fisher(model)(params, x, length)  # noqa: E731
    scores = jf.scores(log_prob, center=True)
    y = np.zeros(len(data[0]), int)
    makers = {
        "covariance": lambda *batch: jf.dense(jf.empirical_fisher(log_prob, center=True)(params, *batch)),
        "centred scores": lambda *batch: jf.diagonal(jf.fisher_from_scores(scores(params, *batch))),
        "marginal": lambda *batch: whole(params, *batch).marginal(lambda path: "a" in path),
        "part of a marginal": lambda *batch: jf.diagonal(2 * whole(params, *batch).marginal(lambda path: "a" in path)),
        "covariance and another term": lambda *batch: makers["covariance"](*batch) + jf.dense(whole(params, *batch)),
    }
    batch = data[0][:2], data[1][:2], y[:2]
    as_it_is = lambda F: F  # noqa: E731

    def updated(made):
        opt, v = jf.scale_by_fisher(0.1, view=as_it_is, decay=0.5, like=made), made.diagonal()
        # The state is that of a Fisher which can be averaged.
        return opt.update(v, jf.scale_by_fisher(0.1).init(v), v, fisher=made)

    def state(made):
        return jf.scale_by_fisher(0.1, view=as_it_is, decay=0.5, like=made).init(made.diagonal())

    means = {
        "merge": lambda made: jf.merge(made, made),
        "accumulate": lambda made: jf.accumulate(lambda _, *batch: made, as_it_is)(params, 2 * [batch]),
        "state of a running mean": state,
        "running mean": updated,
        "state of kfac": lambda made: jf.kfac(made, view=as_it_is).init(made.diagonal()),
    }
    for name, make in makers.items():
        made = make(*batch)
        for kind, mean in means.items():
            with pytest.raises(TypeError, match=r"from all its examples together|is no mean over examples"):
                mean(made)
                pytest.fail(f"{kind} of a {name}")
