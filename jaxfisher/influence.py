"""Influence of training examples on predictions, from the factors of scores and any Fisher."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxfisher._automatic import automatic
from jaxfisher._examples import BATCH_SIZE, Refusing, batches_of, checked_batch_size, num_examples, refusing
from jaxfisher._model import LOG_PROB, LogProb
from jaxfisher._operators.damping import Damping
from jaxfisher._operators.observations import observations
from jaxfisher._operators.operator import Operator, Solver, as_operator
from jaxfisher._scores import Scores, check_one_row_each, scores
from jaxfisher._solve import check_solver, solve
from jaxfisher._system import SolveInfo
from jaxfisher._tree import check_function, dot, param_spec
from jaxfisher._values import check_number, described, is_array, is_number

Answers = tuple[Float[Array, "..."], SolveInfo]
"""Influences, and a report on the solves."""


def _of_examples(function: str) -> Refusing:
    """A decorator for functions of single examples: ``weights``, ``counts`` and ``batch_size`` raise with advice."""
    weights = (
        "none: an influence is that of counting an example once more. Weights belong to the Fisher, as in "
        "jf.exact_fisher(model)(params, x, weights=w); leave out what is padding."
    )
    counts = "none: an influence is that of an example, not of one of its terms. Leave it out, and divide afterwards."
    batch_size = BATCH_SIZE.format(f"jaxfisher.{function}(log_prob, ..., batch_size=...)")
    return refusing(function, weights=weights, counts=counts, batch_size=batch_size)


def influence(
    log_prob: LogProb,
    fisher: Operator,
    n: chex.Numeric | None = None,
    *,
    solver: Solver | None = None,
    batch_size: int | None = None,
) -> Callable[..., Answers]:
    r"""The influence of training examples on predictions: a number for each pair of a test and a training example.

    .. math:: I_{ti} = \frac1n\, s_t^T (F + \lambda I)^{-1} s_i, \qquad s = \nabla_\theta \log p_\theta.

    For parameters at a minimum of ``-1/n sum_i log p(x_i) + lambda/2 |theta|^2`` it is the first-order change of the test
    example's log-density if training example i is counted once more, and minus the change if it is left out. A positive number
    means that i helps t. The loss of t changes by the same number with the opposite sign.

    The solves are for the test examples, whose gradients are formed: m test examples take m p numbers. No gradient of a
    training example is held; each is formed a few columns at a time, to be multiplied with the solved vectors. The matrix is
    symmetric in the two data sets, so pass the smaller set as ``test``. If m p numbers are too many, take a few test examples
    at a time.

    **When it is the wrong one.** It is a derivative. Leaving out half of the data, or an example of leverage near one, is no
    small change. Networks are seldom at a minimum, and F only approximates a Hessian: then the numbers rank examples, but do
    not predict retraining. At a damping near zero, directions that the data do not determine dominate.

    Args:
        log_prob: ``(params, *example) -> scalar`` of ONE example, in nats.
        fisher: the curvature at ``params``, a mean over examples: `jaxfisher.exact_fisher` or any view of it, such as
            `jaxfisher.eigen_kronecker` for a network.
        n: the number of examples that the parameters were fitted to; None for those in the mean of F (with weights, their sum).
            A sum of several means needs it.
        solver: as in `jaxfisher.solve`, such as ``jf.CG(preconditioner=jf.eigen_kronecker)`` for an implicit Fisher.
        batch_size: compute the scores of training examples in chunks of at most this many, which bounds memory.

    Returns:
        A function ``(params, train, test, damping)``. ``test`` is a tuple of arrays with a leading axis of m examples. So is
        ``train``, or it is another iterable of such tuples, which are in memory one at a time: ``tqdm(batches)`` shows
        progress. ``damping`` is that of `jaxfisher.solve`. The function returns the matrix, shape ``[m, train examples]``, and
        a `SolveInfo` with an entry for each test example.

    Raises:
        TypeError: ``log_prob`` is no function, ``fisher`` no operator, or ``n`` no number; (when called) ``train`` or ``test``
            is no data, or ``log_prob`` is complex.
        ValueError: ``n`` is not given, and ``fisher`` is no mean, or a sum of several; (when called) ``params`` of another
            structure than those of ``fisher``; no batch; as in `jaxfisher.scores` and `jaxfisher.solve`.

    Reference: Koh and Liang, Understanding black-box predictions via influence functions (ICML 2017), equation 2; Grosse et
    al., Studying large language model generalization with influence functions (2023), section 2, for EKFAC in the place of F.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda w, x: jf.Normal(w * x, 1.0)
    >>> x, y = jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])
    >>> F, w = jf.exact_fisher(model)(9 / 5, x), 9 / 5  # least squares
    >>> influence, info = jf.influence(jf.log_likelihood(model), F)(w, (x, y), (x, y), damping=0.0)
    >>> print(influence.round(3))  # of the residuals -0.8 and 0.4: both examples pull the slope, each to its own side
    [[ 0.128 -0.128]
     [-0.128  0.128]]
    """
    fisher, count = _checked("influence", log_prob, fisher, n, solver)
    train_scores, test_scores = _one_row_each("influence", log_prob, batch_size), _one_row_each("influence", log_prob)

    @_of_examples("influence")
    def influence_of(params: chex.ArrayTree, train: Any, test: Any, damping: Damping) -> Answers:
        solved, info = _solutions(fisher, _vectors(test_scores, params, _data(test, "test"), fisher), damping, solver)
        columns = [train_scores(params, *batch).cross_gram(solved) for batch in _batches(train, "influence")]
        return jnp.concatenate(columns).T / count, info

    return influence_of


def self_influence(
    log_prob: LogProb,
    fisher: Operator,
    n: chex.Numeric | None = None,
    *,
    solver: Solver | None = None,
    batch_size: int | None = None,
) -> Callable[..., Answers]:
    r"""The influence of every training example on its own prediction: large for outliers and for wrong labels.

    .. math:: I_{ii} = \frac1n\, s_i^T (F + \lambda I)^{-1} s_i \ge 0.

    For a linear regression it is the squared residual times the leverage. Examples that the model could only learn from
    themselves stand out. To find wrong labels, sort the examples, and read from the top.

    Gradients of ``batch_size`` examples are formed and solved at a time, so that memory holds a few times ``batch_size p``
    numbers. A solve that needs a factorisation repeats it for every batch; a view held by eigenvectors
    (`jaxfisher.eigen_kronecker`, `jaxfisher.diagonal`) has nothing to factor.

    **When it is the wrong one.** A rare example is as conspicuous as a wrong one, so a reader must judge the list. If the model
    fits every label, wrong ones included, scores vanish: use earlier parameters.

    Args:
        log_prob: as in `influence`.
        fisher: as in `influence`.
        n: as in `influence`.
        solver: as in `influence`.
        batch_size: the number of examples to solve for at a time; None for all of a batch.

    Returns:
        A function ``(params, train, damping)`` of the data or of batches, as in `influence`. It returns an array with a number
        for each example, and a `SolveInfo` with an entry for each.

    Raises:
        TypeError: as in `influence`.
        ValueError: as in `influence`.

    Reference: Koh and Liang (ICML 2017), section 5.4.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda w, x: jf.Normal(w * x, 1.0)
    >>> x, y = jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])
    >>> F, w = jf.exact_fisher(model)(9 / 5, x), 9 / 5  # least squares
    >>> print(jf.self_influence(jf.log_likelihood(model), F)(w, (x, y), damping=0.0)[0].round(3))  # e^2 x^2 / sum x^2
    [0.128 0.128]
    """
    fisher, count = _checked("self_influence", log_prob, fisher, n, solver)
    scores_of, size = _one_row_each("self_influence", log_prob), checked_batch_size(batch_size)

    @_of_examples("self_influence")
    def self_influence_of(params: chex.ArrayTree, train: Any, damping: Damping) -> Answers:
        values, infos = [], []
        for batch in _batches(train, "self_influence"):
            for piece in _cut(batch, size):
                vectors = _vectors(scores_of, params, piece, fisher)
                solved, info = _solutions(fisher, vectors, damping, solver)
                values.append(jax.vmap(dot)(vectors, solved) / count)
                infos.append(info)
        return jnp.concatenate(values), jax.tree.map(lambda *parts: jnp.concatenate(parts), *infos)

    return self_influence_of


def tracin(log_prob: LogProb, *, batch_size: int | None = None) -> Callable[..., Float[Array, "test train"]]:
    r"""TracIn: the influence that training examples had during training, summed over checkpoints, without any Fisher.

    .. math:: I_{ti} = \sum_c \eta_c\, s_t(\theta_c)^T s_i(\theta_c).

    It is the change of the test log-density by plain gradient steps on example i alone, one at each checkpoint. It is computed
    from the factors of both data sets: for a weight of ``d_in x d_out`` each pair costs ``d_in + d_out`` multiplications, and
    no gradient is formed.

    **When it is the wrong one.** It describes the steps of plain gradient descent. It does not know the steps of Adam or of
    natural gradients, and gives large gradients much weight.

    Args:
        log_prob: ``(params, *example) -> scalar`` of ONE example.
        batch_size: compute scores in chunks of at most this many examples, which bounds memory.

    Returns:
        A function ``(checkpoints, train, test, rates=1.0)``. ``checkpoints`` is an iterable of parameters, which are in memory
        one at a time (``tqdm(checkpoints)`` shows progress). ``train`` and ``test`` are tuples of arrays. ``rates`` are the
        learning rates ``eta_c``: one number, or one for each checkpoint. The function returns an array ``[test examples,
        training examples]``.

    Raises:
        TypeError: ``log_prob`` is no function; (when called) ``checkpoints`` cannot be iterated over, ``rates`` no numbers,
            ``log_prob`` is complex.
        ValueError: (when called) no checkpoint, or another number of rates.

    Reference: Pruthi, Liu, Kale and Sundararajan, Estimating training data influence by tracing gradient descent (NeurIPS
    2020), equation 3 (TracInCP).

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> log_prob = jf.log_likelihood(lambda mu: jf.Normal(mu, 1.0))
    >>> train, test = (jnp.array([1.0, -2.0]),), (jnp.array([3.0]),)
    >>> print(jf.tracin(log_prob)([0.0, 1.0], train, test, rates=0.5))  # 0.5 (3 - mu) (x - mu), at mu of 0 and 1
    [[ 1.5 -6. ]]
    """
    check_function("log_prob", log_prob, LOG_PROB)
    scores_of = _one_row_each("tracin", log_prob, batch_size)

    @_of_examples("tracin")
    def tracin_of(
        checkpoints: Iterable[chex.ArrayTree], train: Any, test: Any, rates: chex.Numeric | Sequence[chex.Numeric] = 1.0
    ) -> Float[Array, "test train"]:
        if not isinstance(checkpoints, Iterable) or isinstance(checkpoints, dict):
            raise TypeError(
                f"tracin: `checkpoints` is {described(checkpoints)}; expected an iterable of parameters. Put one checkpoint in "
                "a list."
            )
        data = _data(train, "train"), _data(test, "test")
        total: Any = None
        used = 0
        for params in checkpoints:
            made = [scores_of(params, *each) for each in data]
            part = made[1].cross_gram(made[0]) * _rate(rates, used).astype(made[0].spec.dtype)
            total, used = (part if total is None else total + part), used + 1
        if total is None:
            raise ValueError("tracin: `checkpoints` has no checkpoint; expected at least one.")
        if not is_number(rates) and len(rates) != used:
            raise ValueError(f"tracin: there are {len(rates)} `rates` for {used} checkpoints; give one for each.")
        return jnp.asarray(total)

    return tracin_of


def _one_row_each(caller: str, log_prob: LogProb, batch_size: int | None = None) -> Callable[..., Scores]:
    """The scores of a real log-density. A complex one has two rows per example, and no single number for its influence."""
    scores_of = scores(log_prob, batch_size=batch_size)

    def checked(params: chex.ArrayTree, /, *data: Any) -> Scores:
        made = scores_of(params, *data)
        check_one_row_each(caller, made)
        return made

    return checked


def _rate(rates: Any, place: int) -> Array:
    """The learning rate of a checkpoint."""
    if is_number(rates):
        return jnp.asarray(rates)
    if not isinstance(rates, list | tuple) and not (is_array(rates) and jnp.ndim(rates) == 1):
        raise TypeError(f"tracin: `rates` is {described(rates)}; expected one number, or a sequence with one each.")
    if place >= len(rates):
        raise ValueError(f"tracin: there are {len(rates)} `rates`, but more checkpoints; give one for each.")
    check_number(f"rates[{place}]", rates[place])
    return jnp.asarray(rates[place])


def _checked(caller: str, log_prob: Any, fisher: Any, n: Any, solver: Any) -> tuple[Operator, chex.Numeric]:
    """The operator, and the number of examples that the parameters were fitted to."""
    check_function("log_prob", log_prob, LOG_PROB)
    fisher = as_operator(fisher, f"{caller}: `fisher`")
    check_solver(solver)
    return fisher, observations(fisher, n, caller)


def _vectors(scores_of: Callable[..., Scores], params: Any, data: tuple[Any, ...], fisher: Operator) -> Any:
    """The scores of some examples as vectors like the parameters, stacked."""
    fisher.spec.check_same(param_spec(params), f"influence: `fisher`, {fisher}, does not go with `params`")
    made = scores_of(params, *data)
    return jax.vmap(made.spec.unravel)(made.as_matrix())


def _solutions(fisher: Operator, vectors: Any, damping: Damping, solver: Solver | None) -> tuple[Any, SolveInfo]:
    solved: tuple[Any, SolveInfo] = jax.vmap(lambda v: solve(fisher, v, damping, solver))(vectors)
    return solved


def _data(data: Any, name: str) -> tuple[Any, ...]:
    """The arrays of one data set, as a tuple; a single array is a data set of one."""
    if isinstance(data, tuple):
        return data
    if is_array(data):
        return (data,)
    raise TypeError(f"`{name}` is {described(data)}; expected the arrays that `log_prob` takes, in a tuple such as (x, y).")


def _batches(train: Any, caller: str) -> Iterable[tuple[Any, ...]]:
    """The batches of an iterable; a tuple of data is one batch."""
    if isinstance(train, tuple) or is_array(train):
        return [_data(train, "train")]
    return _at_least_one(batches_of(train, f"{caller}: `train`"), caller)


def _at_least_one(batches: Iterable[tuple[Any, ...]], caller: str) -> Iterable[tuple[Any, ...]]:
    count = 0
    for batch in batches:
        count += 1
        yield batch
    if not count:
        raise ValueError(f"{caller}: `train` has no batch; expected at least one.")


def _cut(data: tuple[Any, ...], size: int | None) -> Iterable[tuple[Any, ...]]:
    """The data in chunks of at most ``size`` examples."""
    n = num_examples(data, "train")
    step = n if size is None else size
    for start in range(0, n, step):
        cut = automatic(partial(jax.tree.map, operator.itemgetter(slice(start, start + step))))
        yield cut(data)
