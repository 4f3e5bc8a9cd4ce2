"""The parts of the demo: the three routes against a dense sum, the split, a small training, the output and the figure."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfisher import __main__ as main
from jaxfisher import _demo as demo


@pytest.fixture(scope="module")
def digits():
    return demo.load_digits()


def run(name="a run", losses=(2.0, 1.0, 0.005), seconds=0.5):
    return demo.Run(name, np.array(losses), np.linspace(0, seconds, len(losses)), 1.25, 0.9876)


def dense_fisher(params, x):
    """Softmax regression's Fisher, entry by entry: mean of (diag(pi) - pi pi^T) (x) (x, 1)(x, 1)^T, biases first."""
    z = x @ params["w"] + params["b"]
    pi = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    metric = np.einsum("nc,cd->ncd", pi, np.eye(10)) - pi[:, :, None] * pi[:, None, :]
    features = np.concatenate([np.ones((len(x), 1)), x], axis=1)
    return np.einsum("ncd,ni,nj->icjd", metric, features, features).reshape(10 * features.shape[1], -1) / len(x)


def test_the_three_routes_are_the_dense_sum(digits, key):
    x = jnp.asarray(digits.train_x[:20, 26:30], jnp.float64)
    params = demo.softmax_params(key, 4, jnp.float64)
    routes = demo.three_routes(params, x)
    expected = dense_fisher(jax.tree.map(np.asarray, params), np.asarray(x))
    for matrix in routes:
        # The routes sum numbers below one over 20 images and 10 outcomes, after some tens of operations.
        np.testing.assert_allclose(matrix, expected, rtol=0, atol=100 * np.finfo(np.float64).eps)
    table = demo.routes_table(routes)
    assert f"{np.trace(expected):.12f}" in table
    gap = np.max(np.abs(routes.kl_hessian - routes.expected_hessian))
    assert f"{gap:.1e}" in table


def test_the_split_is_fixed_and_whole(digits):
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    again = demo.load_digits()
    np.testing.assert_array_equal(digits.train_y, again.train_y)
    assert len(digits.train_x) == 1437 and len(digits.test_x) == 360
    both = np.concatenate([digits.train_x, digits.test_x])
    order = np.random.default_rng(0).permutation(1797)
    np.testing.assert_array_equal(both * 16, pixels[order])
    np.testing.assert_array_equal(np.concatenate([digits.train_y, digits.test_y]), labels[order])


def test_batches_go_through_every_image_once_an_epoch():
    order = np.asarray(demo.batch_order(3, 60)).ravel()
    np.testing.assert_array_equal(np.sort(order[: demo.TRAIN]), np.arange(demo.TRAIN))
    np.testing.assert_array_equal(order, np.asarray(demo.batch_order(3, 60)).ravel())
    assert not np.array_equal(order, np.asarray(demo.batch_order(4, 60)).ravel())


def test_training_takes_the_optimisers_steps(digits):
    shown = []
    result = demo.train(
        demo.Recipe("SGD", optax.sgd(1.0), demo.unasked), digits, 0, lambda *seen: shown.append(seen), demo.CHUNK
    )
    params = demo.mlp_params(jax.random.split(jax.random.key(0))[0])
    x, y = jnp.asarray(digits.train_x), jnp.asarray(digits.train_y)
    expected = [demo.mean_loss(params, x, y)]
    for batch in demo.batch_order(0, demo.CHUNK):
        gradient = jax.grad(demo.mean_loss)(params, x[batch], y[batch])
        params = jax.tree.map(lambda p, g: p - g, params, gradient)
        expected.append(demo.mean_loss(params, x, y))
    # In float32, XLA chooses the order of the sums over a batch, and errors grow over a few steps.
    np.testing.assert_allclose(result.losses, np.asarray(expected), rtol=100 * np.finfo(np.float32).eps)
    params = jax.tree.map(np.asarray, params)
    logits = np.tanh(digits.test_x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
    assert result.accuracy == pytest.approx(np.mean(np.argmax(logits, 1) == digits.test_y), abs=1 / 360)
    assert shown == [(demo.CHUNK, float(result.losses[-1]))]
    assert not result.reached and np.all(np.diff(result.seconds) > 0)


def test_training_stops_at_the_first_step_at_the_target(digits, monkeypatch):
    recipe = demo.Recipe("SGD", optax.sgd(1.0), demo.unasked)
    whole = demo.train(recipe, digits, 0, lambda *_: None, demo.CHUNK)
    monkeypatch.setattr(demo, "TARGET", float(whole.losses[3]))
    first = int(np.flatnonzero(whole.losses <= whole.losses[3])[0])
    stopped = demo.train(recipe, digits, 0, lambda *_: None, demo.CHUNK)
    assert stopped.reached and stopped.steps == first
    np.testing.assert_array_equal(stopped.losses, whole.losses[: first + 1])


def test_the_best_run_is_the_one_of_fewest_steps_then_of_lowest_loss():
    slow, fast = run(losses=(2.0, 1.0, 0.5, 0.001)), run(losses=(2.0, 0.009))
    far, near, lost = run(losses=(2.0, 0.5)), run(losses=(2.0, 1.0, 0.1)), run(losses=(2.0, np.nan))
    assert demo.best([slow, far, fast]) is fast
    assert demo.best([far, lost, near]) is near


def test_the_table_lines_up_and_says_what_was_not_reached():
    table = demo.training_table([run("Adam"), run("longer name", (2.0, 1.0))]).splitlines()
    assert table[0].split() == ["optimiser", "steps", "seconds", "compiling", "training", "loss", "test", "accuracy"]
    assert table[2].split() == ["Adam", "2", "0.50", "1.25", "0.0050", "0.988"]
    assert table[3].split() == ["longer", "name", "not", "in", "1", "0.50", "1.25", "1.0000", "0.988"]
    assert len({len(line) for line in table}) == 1


def test_the_remarks_follow_the_numbers():
    adam = run("Adam", (2.0, 1.0, 0.5, 0.2, 0.009), seconds=1.0)
    quick, slow = run("natural", (2.0, 0.009), seconds=0.25), run("natural", (2.0, 0.009), seconds=4.0)
    stuck = run("stuck", (2.0, 1.0))
    assert "natural takes 1, the best Adam 4: 0.25 of them" in demo.remarks(adam, [quick])
    assert "hard to beat" not in demo.remarks(adam, [quick])
    assert "hard to beat" in demo.remarks(adam, [slow])
    assert "stuck did not reach 0.01 in 1 steps" in demo.remarks(adam, [slow, stuck])
    assert "Adam did not reach" in demo.remarks(stuck, [slow])


def test_a_missing_extra_is_named_with_its_cure(monkeypatch):
    assert demo.missing_extras() == []
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit, match=r"needs scikit-learn, tqdm: pip install 'jaxfisher\[demo\]'"):
        main.main([])


def test_the_figure_is_written(tmp_path):
    path = tmp_path / "figure.png"
    demo.draw_losses([run("Adam"), run("natural", (2.0, 0.5, 0.1))], path)
    assert path.read_bytes().startswith(b"\x89PNG")
