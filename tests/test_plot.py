"""The plots: what is drawn is read back and compared with closed forms and NumPy, and no global state changes."""

import inspect
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

import jaxfisher as jf
from jaxfisher import plot
from jaxfisher.plot._look import look

EPS = float(np.finfo(float).eps)
# A 32-bit constant anywhere in the computation of a Fisher would show in its digits.
CLOSE = {"rtol": 100 * EPS, "atol": 100 * EPS}


@pytest.fixture(autouse=True)
def closed_and_unchanged():
    """Close all figures after each test, and check that no setting of matplotlib has changed."""
    before = dict(matplotlib.rcParams)
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == before


@pytest.fixture
def ax():
    return plt.subplots()[1]


def normal(theta):
    """The normal family over (mu, log sigma): F = diag(1/sigma^2, 2)."""
    return jf.Normal(theta[0], jnp.exp(theta[1]))


def logistic(params, x):
    return jf.Bernoulli(logits=params["slope"] * x + params["bias"])


def line(w, x):
    """A linear mean of unit variance: F is the second moment of the inputs."""
    return jf.Normal(x @ w, 1.0)


def second_moment(*rows):
    """The Fisher of `line` at these inputs."""
    x = jnp.asarray(rows, jnp.float64)
    return jf.exact_fisher(line)(jnp.zeros(x.shape[1]), x)


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def drawn(figure_axes):
    """Lay out and render the figure, with warnings as errors."""
    figure_axes.figure.canvas.draw()


# --- what importing costs ----------------------------------------------------------------------------------------------------


def test_only_the_plots_import_matplotlib():
    # In one process: each room is loaded when it is first named, and matplotlib is there after the last one only.
    there = "print('matplotlib' in sys.modules)"
    code = f"import sys, jaxfisher as jf; jf.design, jf.forecasts, jf.geometry; {there}; jf.plot; {there}"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert seen == ["False", "True"]


PUBLIC = ["blocks", "kl_along", "metric_ellipses", "paths", "spectrum", "training", "triangle"]


def test_the_names_are_these_and_each_explains_itself():
    assert [name for name in vars(plot) if not name.startswith("_")] == PUBLIC
    for name in PUBLIC:
        text = inspect.getdoc(getattr(plot, name))
        assert all(part in text for part in ("Args:", "Returns:", "Raises:", "Reference:", ">>>", ".. math::")), name


# --- the metric --------------------------------------------------------------------------------------------------------------


def test_ellipses_of_the_normal_family(ax):
    """In (mu, log sigma), the ellipse 1/2 d^T F d = c has the semi-axes sigma sqrt(2 c) and sqrt(c), along the axes."""
    points, radius = np.array([[0.0, 0.0], [1.0, 1.0], [-2.0, -1.0]]), 0.03
    assert plot.metric_ellipses(normal, jnp.asarray(points), radius, ax=ax) is ax
    assert len(ax.patches) == 3
    for (mu, log_sigma), ellipse in zip(points, ax.patches, strict=True):
        np.testing.assert_allclose(ellipse.get_center(), (mu, log_sigma), **CLOSE)
        # The points of the unit circle that lie on the axes, where the patch puts them.
        corners = ellipse.get_patch_transform().transform([[1, 0], [0, 1], [-1, 0], [0, -1]]) - (mu, log_sigma)
        found = np.max(np.abs(corners), axis=0)
        np.testing.assert_allclose(found, (math.exp(log_sigma) * math.sqrt(2 * radius), math.sqrt(radius)), **CLOSE)
    assert ax.get_xlabel() == "params[0]" and ax.get_ylabel() == "params[1]" and "0.03 nats" in ax.get_title()
    (low, high), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert low < -2 - math.exp(-1) * 0.24 and high > 1 + math.e * 0.24 and bottom < -1 - 0.17 and top > 1 + 0.17, "all in view"
    drawn(ax)


def logistic_fisher(slope, bias, x, w):
    """The Fisher over (bias, slope): the mean of s (1 - s) (1, x)(1, x)^T."""
    s = 1 / (1 + np.exp(-(slope * x + bias)))
    features = np.stack([np.ones_like(x), x])
    return (features * (w / w.sum() * s * (1 - s))) @ features.T


@pytest.mark.parametrize("weights", [None, np.array([1.0, 3.0, 0.0, 0.5])], ids=["mean", "weighted"])
def test_every_point_of_a_tilted_ellipse_has_the_same_quadratic(weights):
    x = np.array([-0.5, 1.0, 2.0, 4.0])
    points = {"slope": np.array([0.3, -1.0]), "bias": np.array([0.0, 1.5])}
    given = None if weights is None else jnp.asarray(weights)
    ax = plot.metric_ellipses(logistic, jax.tree.map(jnp.asarray, points), 0.2, jnp.asarray(x), weights=given)
    # JAX sorts dictionaries by key, so the bias is on the horizontal axis.
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("['bias']", "['slope']")
    circle = np.stack([np.cos(np.arange(12)), np.sin(np.arange(12))], axis=1)
    for slope, bias, ellipse in zip(points["slope"], points["bias"], ax.patches, strict=True):
        matrix = logistic_fisher(slope, bias, x, np.ones(4) if weights is None else weights)
        d = ellipse.get_patch_transform().transform(circle) - (bias, slope)
        np.testing.assert_allclose(0.5 * np.einsum("ki,ij,kj->k", d, matrix, d), 0.2, rtol=1000 * EPS)
        values, vectors = np.linalg.eigh(matrix)
        size = np.array([ellipse.get_width(), ellipse.get_height()])
        np.testing.assert_allclose(np.sort(size), np.sort(2 * np.sqrt(0.4 / values)), rtol=1000 * EPS)
        turned = math.radians(ellipse.get_angle())
        along, beside = (math.cos(turned), math.sin(turned)), (-math.sin(turned), math.cos(turned))
        longest = vectors[:, 0] @ (along if size[0] > size[1] else beside)
        np.testing.assert_allclose(abs(longest), 1, rtol=1000 * EPS)


def test_units_do_not_make_an_ellipse_singular(ax):
    """F = [[1, u/2], [u/2, u^2/2]] with u = 1e8: eigenvalues 1/2 and u^2/2."""
    inputs = jnp.array([[1.0, 1e8], [1.0, 0.0]])
    plot.metric_ellipses(line, jnp.zeros((1, 2)), 0.25, inputs, ax=ax)
    np.testing.assert_allclose((ax.patches[0].get_width(), ax.patches[0].get_height()), (2, 2e-8), rtol=1e-12)


# --- the spectrum ------------------------------------------------------------------------------------------------------------


def test_spectrum_is_that_of_numpy_and_zeros_stay(ax):
    rows = [[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 1.0, 0.0], [3.0, 0.0, 1.0, 0.0]]  # rank two: the first is the sum of the others
    fisher = second_moment(*rows)
    expected = np.linalg.eigvalsh(np.transpose(rows) @ rows / 3)[::-1]
    assert plot.spectrum(fisher, damping=0.25, ax=ax) is ax
    positive, zero, level = ax.lines
    np.testing.assert_array_equal(positive.get_xdata(), [1, 2])
    np.testing.assert_allclose(positive.get_ydata(), expected[:2], rtol=100 * EPS)
    np.testing.assert_array_equal(zero.get_xdata(), [3, 4])
    # In units of the axes' height: the triangles are on the lower edge for any scale.
    np.testing.assert_array_equal(zero.get_ydata(), [0, 0])
    assert zero.get_transform() == ax.get_xaxis_transform() and not zero.get_clip_on()
    np.testing.assert_array_equal(level.get_ydata(), [0.25, 0.25])
    assert level.get_linestyle() == "--"
    assert texts(ax.get_legend()) == ["2 of 4 positive", "2 of 4 zero to rounding", "damping 0.25"]
    assert ax.get_yscale() == "log" and "nats" in ax.get_ylabel()
    drawn(ax)


def test_spectrum_says_what_is_negative():
    """Minus the Hessian of cos(a) - b^2 / 2 at (pi, 0) is diag(-1, 1)."""
    information = jf.observed_information(lambda p, x: x * jnp.cos(p[0]) - 0.5 * p[1] ** 2)
    ax = plot.spectrum(information(jnp.array([jnp.pi, 0.0]), jnp.ones(1)))
    positive, negative = ax.lines
    assert positive.get_xdata() == [1] and negative.get_xdata() == [2]
    np.testing.assert_allclose([positive.get_ydata()[0], negative.get_ydata()[0]], [1, 1], rtol=10 * EPS)
    assert texts(ax.get_legend()) == ["1 of 2 positive", "1 of 2 negative: their size"]
    assert positive.get_marker() != negative.get_marker()


def test_spectrum_of_nothing_but_zeros():
    ax = plot.spectrum(second_moment([0.0, 0.0]))
    assert texts(ax.get_legend()) == ["2 of 2 zero to rounding"]
    drawn(ax)


# --- the divergence ----------------------------------------------------------------------------------------------------------


def test_kl_along_a_direction_of_the_normal_family(ax):
    """KL(N(m, s) || N(m + t a, s e^(t b))) = t b + (e^(-2 t b) (1 + (t a / s)^2) - 1) / 2, and (t^2 / 2)(a^2 / s^2 + 2 b^2)."""
    t, a, b, s = np.linspace(-1.5, 1.0, 11), 0.7, 0.4, math.exp(0.3)
    theta, d = jnp.array([0.5, 0.3]), jnp.array([a, b])
    assert plot.kl_along(normal, theta, d, jnp.asarray(t), ax=ax) is ax
    actual, quadratic = ax.lines
    np.testing.assert_array_equal(actual.get_xdata(), t)
    expected = t * b + (np.exp(-2 * t * b) * (1 + (t * a / s) ** 2) - 1) / 2
    np.testing.assert_allclose(actual.get_ydata(), expected, rtol=0, atol=100 * EPS)
    np.testing.assert_allclose(quadratic.get_ydata(), t**2 / 2 * (a**2 / s**2 + 2 * b**2), **CLOSE)
    assert actual.get_linestyle() != quadratic.get_linestyle() and "nats" in ax.get_ylabel()
    drawn(ax)


def test_kl_along_is_a_mean_over_weighted_inputs_of_any_pytree():
    x, w, t = np.array([-1.0, 0.5, 2.0]), np.array([1.0, 0.0, 3.0]), np.array([0.0, 0.5, 2.0])
    params, d = {"slope": 0.4, "bias": -0.1}, {"slope": 1.0, "bias": 0.3}
    ax = plot.kl_along(logistic, params, d, t, jnp.asarray(x), weights=jnp.asarray(w))

    def probability(step):
        return 1 / (1 + np.exp(-((0.4 + step * 1.0) * x + (-0.1 + step * 0.3))))

    p = probability(0.0)
    expected = [
        np.average(p * np.log(p / probability(step)) + (1 - p) * np.log((1 - p) / (1 - probability(step))), weights=w)
        for step in t
    ]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), expected, rtol=0, atol=100 * EPS)
    v = np.array([0.3, 1.0])
    quadratic = 0.5 * t**2 * (v @ logistic_fisher(0.4, -0.1, x, w) @ v)
    np.testing.assert_allclose(ax.lines[1].get_ydata(), quadratic, **CLOSE)


def test_kl_along_counts_what_is_outside_the_family():
    """At t = -2 the scale 1 + t is negative, so the divergence there is NaN and is counted in the legend."""
    ax = plot.kl_along(lambda scale: jf.Normal(0.0, scale), 1.0, 1.0, np.array([-2.0, 0.0, 1.0]))
    assert "(1 of 3 not drawn:\nnot finite)" in texts(ax.get_legend())[0]
    expected = [np.nan, 0.0, math.log(2) + 1 / 8 - 1 / 2]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), expected, rtol=0, atol=10 * EPS)


# --- paths -------------------------------------------------------------------------------------------------------------------


def bowl(theta):
    return theta[0] ** 2 + 4 * theta[1] ** 2


def contours_of(ax):
    (contours,) = [collection for collection in ax.collections if not isinstance(collection, PathCollection)]
    return contours


def test_paths_are_drawn_over_contours_of_the_loss(ax):
    routes = {
        "Euclidean": np.array([[2.0, 1.0], [1.0, 0.2], [0.5, 0.0]]),
        "natural": np.array([[2.0, 1.0], [0.0, 0.0]]),
        "diverges": np.array([[-1.0, 1.0], [np.inf, 0.0]]),
    }
    assert plot.paths(bowl, routes, ax=ax) is ax
    for curve, path in zip(ax.lines, routes.values(), strict=True):
        np.testing.assert_array_equal(np.transpose(curve.get_data()), path)
    labels = ["Euclidean: 2 steps", "natural: 1 step", "diverges: 1 step (1 of 2 not drawn:\nnot finite)"]
    assert texts(ax.get_legend()) == labels
    contours = contours_of(ax)
    assert all(contours.get_zorder() < curve.get_zorder() for curve in ax.lines), "contours are behind"
    assert len(contours.levels) == 13
    for level, path in zip(contours.levels, contours.get_paths(), strict=True):
        # Contours are linear between grid points, with an error of the loss's second difference over eight.
        assert len(path.vertices) and np.all(
            np.abs(bowl(path.vertices.T) - level) < (2 * (3.72 / 119) ** 2 + 8 * (1.24 / 119) ** 2)
        )
    np.testing.assert_allclose((*ax.get_xlim(), *ax.get_ylim()), (-1.36, 2.36, -0.12, 1.12), rtol=0, atol=10 * EPS)
    looks = {(c.get_color(), c.get_linestyle(), c.get_marker()) for c in ax.lines}
    assert all(len(set(part)) == 3 for part in zip(*looks, strict=True)), "apart in colour, in dash and in marker"
    ends = [c.get_offsets()[0] for c in ax.collections if isinstance(c, PathCollection)]
    np.testing.assert_array_equal(ends, [[0.5, 0], [2, 1], [0, 0], [2, 1], [-1, 1], [-1, 1]])
    drawn(ax)


def test_a_flat_loss_and_a_path_that_stays():
    ax = plot.paths(lambda theta: jnp.zeros(()), {"still": np.array([[1.0, 2.0]])})
    assert (*ax.get_xlim(), *ax.get_ylim()) == (0.5, 1.5, 1.5, 2.5)
    assert texts(ax.get_legend()) == ["still: 0 steps"]
    drawn(ax)


def test_a_loss_that_is_finite_in_places():
    ax = plot.paths(lambda theta: jnp.log(theta[0]), {"a": np.array([[-1.0, 0.0], [1.0, 1.0]])})
    contours = contours_of(ax)
    assert contours.levels.size and all(np.min(path.vertices[:, 0]) > 0 for path in contours.get_paths())


# --- blocks ------------------------------------------------------------------------------------------------------------------


def layered(params, x):
    return jf.Normal(x @ params["w"] + params["b"], 1.0)


def test_blocks_are_the_matrix_with_small_leaves_widened(ax):
    """A bias beside 29 weights has 1 of 30 rows. As 6 % of 30 is 1.8, its row and column are drawn twice."""
    x = np.random.default_rng(0).standard_normal((4, 29))
    x[:, 3] = 0
    fisher = jf.exact_fisher(layered)({"b": 0.0, "w": jnp.zeros(29)}, jnp.asarray(x))
    assert plot.blocks(fisher, ax=ax) is ax
    features = np.concatenate([np.ones((4, 1)), x], axis=1)
    expected = np.abs(features.T @ features) / 4
    rows = [0, 0, *range(1, 30)]
    (image,) = ax.images
    np.testing.assert_allclose(image.get_array().filled(0.0), expected[np.ix_(rows, rows)], **CLOSE)
    np.testing.assert_array_equal(image.get_array().mask, expected[np.ix_(rows, rows)] == 0)
    assert (image.norm.vmax, image.norm.vmin) == pytest.approx((expected.max(), 1e-6 * expected.max()), rel=100 * EPS)
    for axis in (ax.xaxis, ax.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == ["['b']", "['w']"]
        np.testing.assert_array_equal(axis.get_ticklocs(), [0.5, 16])
    assert [curve.get_ydata() for curve in ax.lines] == [[1.5, 1.5], [0, 1]]
    assert [curve.get_xdata() for curve in ax.lines] == [[0, 1], [1.5, 1.5]]
    assert "nats" in ax.figure.axes[1].get_ylabel(), "the colour bar has a unit"
    drawn(ax)


def test_blocks_of_a_vector_of_parameters_and_of_zeros():
    ax = plot.blocks(second_moment([0.0, 0.0]))
    assert ax.images[0].get_array().mask.all() and not ax.lines
    assert [label.get_text() for label in ax.get_xticklabels()] == ["params"]
    drawn(ax)


# --- curves ------------------------------------------------------------------------------------------------------------------


def test_training_curves(ax):
    seconds, losses = np.array([0.0, 2.5, 3.0]), np.array([2.0, 0.0, 0.5])
    curves = {"steps": [3.0, 1.0], "seconds": (seconds, losses), "bf16": jnp.array([1.0, jnp.nan], jnp.bfloat16)}
    assert plot.training(curves, xlabel="seconds", ylabel="test loss (nats)", ax=ax) is ax
    expected = [([0, 1], [3, 1]), (seconds, [2, np.nan, 0.5]), ([0, 1], [1, np.nan])]
    for curve, (x, y) in zip(ax.lines, expected, strict=True):
        np.testing.assert_array_equal(curve.get_xdata(), x)
        np.testing.assert_array_equal(curve.get_ydata(), y)
    lost = "(1 of {} not drawn:\nnot positive and finite)"
    assert texts(ax.get_legend()) == ["steps", f"seconds {lost.format(3)}", f"bf16 {lost.format(2)}"]
    assert (ax.get_yscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "seconds", "test loss (nats)")
    drawn(ax)


def test_forty_nine_curves_are_told_apart_and_their_legend_is_beside_them():
    assert len({(look(k)["color"], str(look(k)["linestyle"])) for k in range(49)}) == 49
    ax = plot.training({str(k): np.linspace(1.0, 2.0, 30) for k in range(49)})
    assert [curve.get_color() for curve in ax.lines] == [look(k)["color"] for k in range(49)]
    assert len({curve.get_marker() for curve in ax.lines[:7]}) == len({curve.get_color() for curve in ax.lines[:7]}) == 7
    drawn(ax)
    assert ax.get_legend().get_window_extent().x0 > ax.get_window_extent().x1


# --- every pair of parameters ------------------------------------------------------------------------------------------------


def test_a_triangle_holds_what_it_says():
    """Points on the ellipses have the Mahalanobis distances of 68 and 95 per cent, and densities have the right widths."""
    covariance = np.array([[1.0, 0.6, 0.0], [0.6, 2.0, -0.3], [0.0, -0.3, 0.5]])
    params = {"a": jnp.array(1.0), "b": jnp.array([2.0, 3.0])}
    made = jf.from_matrix(covariance, params)
    axes = plot.triangle(params, {"all": made, "less": 0.25 * made})
    assert axes.shape == (3, 3) and not axes[0, 1].axison and axes[2, 0].get_ylabel() == "b[1]"
    for row, column in ((1, 0), (2, 0), (2, 1)):
        block = covariance[np.ix_([column, row], [column, row])]
        centre = np.array([1.0, 2.0, 3.0])[[column, row]]
        patches = axes[row, column].patches
        assert len(patches) == 4
        for patch, probability in zip(patches[:2], (0.9544997361036416, 0.6826894921370859), strict=True):
            points = patch.get_transform().transform(np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
            apart = axes[row, column].transData.inverted().transform(points) - centre
            levels = np.einsum("ki,ij,kj->k", apart, np.linalg.inv(block), apart)
            np.testing.assert_allclose(levels, -2 * np.log(1 - probability), rtol=1e-9)
    curve = axes[2, 2].lines[0]
    inside = np.exp(-0.5)
    np.testing.assert_allclose(np.interp(3.0 + np.sqrt(0.5), curve.get_xdata(), curve.get_ydata()), inside, rtol=1e-3)
    drawn(axes[0, 0])


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("correlation", [-0.9, 0.0, 0.6])
def test_ellipses_are_the_same_in_any_units(unit, correlation):
    """An ellipse is as wide as its parameter's error says, times the root of its squared radius, on both axes."""
    errors = np.array([2.0, unit])
    covariance = np.outer(errors, errors) * np.array([[1.0, correlation], [correlation, 1.0]])
    given = jf.from_matrix(covariance, jnp.zeros(2))
    drawn = plot.triangle(jnp.zeros(2), {"a": given})[1, 0].patches[1]
    whiten = np.linalg.inv(np.linalg.cholesky(covariance / np.outer(errors, errors)))
    scaled = lambda t, x: jf.Normal(whiten @ (t / errors), 1.0)  # noqa: E731
    metric = plot.metric_ellipses(scaled, jnp.zeros((1, 2)), 0.5, jnp.zeros((1, 1))).patches[0]
    for ellipse, squared in ((drawn, -2 * math.log(1 - math.erf(0.5**0.5))), (metric, 1.0)):
        turn = math.radians(ellipse.get_angle())
        half = 0.5 * np.array([ellipse.get_width(), ellipse.get_height()])
        axes = half * np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        np.testing.assert_allclose(np.linalg.norm(axes, axis=1) / errors, squared**0.5, rtol=1e-9)
        np.testing.assert_allclose(np.prod(half), squared * np.prod(errors) * (1 - correlation**2) ** 0.5, rtol=1e-9)


# --- an axes of its own ------------------------------------------------------------------------------------------------------

X = jnp.array([[1.0, 2.0], [0.0, 1.0]])
DRAWS = {
    "metric_ellipses": lambda **kw: plot.metric_ellipses(normal, jnp.zeros((1, 2)), 0.1, **kw),
    "spectrum": lambda **kw: plot.spectrum(second_moment([1.0, 2.0]), **kw),
    "kl_along": lambda **kw: plot.kl_along(line, jnp.zeros(2), jnp.ones(2), np.array([0.0, 1.0]), X, **kw),
    "paths": lambda **kw: plot.paths(bowl, {"a": np.array([[1.0, 1.0]])}, **kw),
    "blocks": lambda **kw: plot.blocks(second_moment([1.0, 2.0]), **kw),
    "training": lambda **kw: plot.training({"a": [1.0]}, **kw),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_figure_is_made_only_where_no_axes_is_given(name):
    first = DRAWS[name]()
    assert plt.get_fignums() == [first.figure.number]
    mine = plt.subplots()[1]
    DRAWS[name](ax=mine)
    assert plt.get_fignums() == [first.figure.number, mine.figure.number]
    with pytest.raises(TypeError, match=r"`ax` is an array of shape \(2,\).*Give one of its entries"):
        DRAWS[name](ax=plt.subplots(1, 2)[1])


# --- bad input ---------------------------------------------------------------------------------------------------------------

SMALL = jnp.zeros((1, 2))
BAD = {
    "radius zero": (lambda: plot.metric_ellipses(normal, SMALL, 0.0), ValueError, "`radius` is 0.0.*positive"),
    "radius text": (lambda: plot.metric_ellipses(normal, SMALL, "big"), TypeError, "`radius` is 'big'"),
    "three parameters": (
        lambda: plot.metric_ellipses(normal, jnp.zeros((4, 3)), 0.1),
        ValueError,
        r"`points` has 3 numbers per point.*\(4, 3\).*expected two.*Close over",
    ),
    "uneven points": (
        lambda: plot.metric_ellipses(logistic, {"bias": jnp.zeros(3), "slope": jnp.zeros(2)}, 0.1, jnp.ones(1)),
        ValueError,
        r"`points` at \['slope'\] has shape \(2,\), and at \['bias'\] \(3,\)",
    ),
    "one point without its axis": (
        lambda: plot.metric_ellipses(logistic, {"bias": 0.0, "slope": 0.0}, 0.1, jnp.ones(1)),
        ValueError,
        r"`points` at \['bias'\] has shape \(\).*leading axis",
    ),
    "whole points": (lambda: plot.metric_ellipses(normal, jnp.zeros((1, 2), int), 0.1), TypeError, "dtype int64"),
    "singular": (
        lambda: plot.metric_ellipses(logistic, {"bias": jnp.zeros(1), "slope": jnp.ones(1)}, 0.1, jnp.array([2.0])),
        ValueError,
        r"at the point \(0, 1\) is singular.*Leave the point out",
    ),
    "outside the family": (
        lambda: plot.metric_ellipses(lambda t: jf.Normal(t[0], t[1]), SMALL, 0.1),
        ValueError,
        r"at the point \(0, 0\) is not finite.*choose parameters",
    ),
    "no distribution": (lambda: plot.metric_ellipses(lambda t: t[0], SMALL, 0.1), TypeError, "Expected a distribution"),
    "no model": (lambda: plot.metric_ellipses(3.0, SMALL, 0.1), TypeError, "`model` is 3.0"),
    "no operator": (lambda: plot.spectrum(np.eye(2)), TypeError, "plot.spectrum: expected a Fisher operator"),
    "damping zero": (
        lambda: plot.spectrum(second_moment([1.0]), damping=0.0),
        ValueError,
        "`damping` is 0.0.*a log axis has no zero",
    ),
    "damping a leaf": (lambda: plot.spectrum(second_moment([1.0]), damping={"w": 1.0}), TypeError, "`damping` is a dict"),
    "eigenvalues of NaN": (lambda: plot.spectrum(second_moment([jnp.nan])), ValueError, "eigenvalues of .* are not finite"),
    "steps a number": (lambda: plot.kl_along(line, jnp.ones(2), jnp.ones(2), 1.0, X), ValueError, r"`steps` has shape \(\)"),
    "steps not finite": (
        lambda: plot.kl_along(line, jnp.ones(2), jnp.ones(2), [0.0, jnp.inf], X),
        ValueError,
        "`steps` holds inf",
    ),
    "steps of text": (lambda: plot.kl_along(line, jnp.ones(2), jnp.ones(2), ["a"], X), TypeError, "`steps` is a list"),
    "direction of another shape": (
        lambda: plot.kl_along(line, jnp.ones(2), jnp.ones(3), [0.0], X),
        ValueError,
        r"`direction` is not shaped like the parameters.*\(3,\)",
    ),
    "no covariances": (lambda: plot.triangle(jnp.zeros(2), {}), ValueError, "`covariances` has no entries"),
    "a covariance of NaN": (
        lambda: plot.triangle(jnp.zeros(1), {"a": jf.from_matrix(jnp.full((1, 1), jnp.nan), jnp.zeros(1))}),
        ValueError,
        r"`covariances\['a'\]` has the variances \[nan\]",
    ),
    "a Fisher for a covariance": (
        lambda: plot.triangle(jnp.zeros(2), {"a": jf.exact_fisher(line)(jnp.zeros(2), X)}),
        TypeError,
        r"`covariances\['a'\]` is Fisher\(exact.*expected a covariance. Pass jf.covariance\(fisher\)",
    ),
    "a triangle of nine": (
        lambda: plot.triangle(jnp.zeros(9), {"a": jf.scaled_identity(jnp.zeros(9), 1.0)}),
        ValueError,
        "has 9 numbers; expected at most 8",
    ),
    "axes of another shape": (
        lambda: plot.triangle(jnp.zeros(2), {"a": jf.scaled_identity(jnp.zeros(2), 1.0)}, Figure().subplots(1, 2)),
        ValueError,
        r"expected an array of Axes of shape \(2, 2\)",
    ),
    "no paths": (lambda: plot.paths(bowl, {}), ValueError, "`paths` has no entries"),
    "a list of paths": (lambda: plot.paths(bowl, [np.zeros((2, 2))]), TypeError, "`paths` is a list; expected a mapping"),
    "a path in space": (
        lambda: plot.paths(bowl, {"a": np.zeros((5, 3))}),
        ValueError,
        r"`paths\['a'\]` has shape \(5, 3\); expected \[steps \+ 1, 2\]",
    ),
    "a path nowhere": (lambda: plot.paths(bowl, {"a": np.full((1, 2), np.nan)}), ValueError, r"paths\['a'\].*no finite point"),
    "a loss of a vector": (
        lambda: plot.paths(lambda t: t, {"a": np.zeros((1, 2))}),
        ValueError,
        r"`loss` returned shape \(2,\)",
    ),
    "a loss of nothing": (
        lambda: plot.paths(lambda t: jnp.nan * t[0], {"a": np.zeros((1, 2))}),
        ValueError,
        "`loss` is nowhere finite",
    ),
    "a loss that is a number": (lambda: plot.paths(1.0, {"a": np.zeros((1, 2))}), TypeError, "`loss` is 1.0"),
    "too many to see": (
        lambda: plot.blocks(jf.scaled_identity(jnp.zeros(2049), 1.0)),
        ValueError,
        "2,049 parameters; expected at most 2,048",
    ),
    "blocks of NaN": (lambda: plot.blocks(second_moment([jnp.nan])), ValueError, "entries that are not finite"),
    "blocks of a function": (lambda: plot.blocks(jf.exact_fisher(line)), TypeError, "plot.blocks: expected a Fisher.*Call"),
    "no curves": (lambda: plot.training({}), ValueError, "`curves` has no entries"),
    "curves alone": (lambda: plot.training([1.0]), TypeError, "`curves` is a list; expected a mapping"),
    "x and y apart": (
        lambda: plot.training({"a": ([0.0, 1.0], [1.0])}),
        ValueError,
        r"`curves\['a'\]` has 2 values of x and 1 of y",
    ),
    "three arrays": (lambda: plot.training({"a": ([0.0],) * 3}), ValueError, r"`curves\['a'\]` is a tuple of 3"),
    "x not finite": (lambda: plot.training({"a": ([np.nan], [1.0])}), ValueError, r"`curves\['a'\]\[0\]`, its x, holds nan"),
    "an empty curve": (lambda: plot.training({"a": []}), ValueError, r"`curves\['a'\]` has shape \(0,\)"),
    "a complex curve": (lambda: plot.training({"a": np.array([1j])}), TypeError, "complex128.*real numbers"),
}


@pytest.mark.parametrize(("draw", "error", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_named_and_leaves_no_figure(draw, error, says):
    with pytest.raises(error, match=says):
        draw()
    assert not plt.get_fignums(), "what is checked is checked before a figure is made"
