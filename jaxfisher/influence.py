"""Influence: which training examples a prediction rests on, from the factors of scores and any Fisher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
    """A function of this room: what it says of an example does not depend on how often others count."""
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
    example's log-density when training example i is counted once more, and minus the change when it is left out. A positive
    number says that i helps t. The loss of t changes by the same number with the other sign.

    The solves are of the test examples, whose vectors are formed: m test examples take m p numbers. No gradient of a training
    example is held; each is formed some columns at a time, beside the solved vectors. The matrix is symmetric in its two data
    sets, so give the smaller set as ``test``. Where m p is too much, take some test examples at a time.

    **When it is the wrong one.** It is a derivative. Leaving out half of the data, or an example of a leverage near one, is no
    small change. Networks are seldom at a minimum, and F stands for a Hessian: there the numbers rank examples, and do not
    predict retraining. At a damping near zero the directions that the data do not determine decide.

    Args:
        log_prob: ``(params, *example) -> scalar`` of ONE example, in nats.
        fisher: the curvature at ``params``, a mean over examples: `jaxfisher.exact_fisher` or any view of it, such as
            `jaxfisher.eigen_kronecker` for a network.
        n: how many examples the parameters were fitted to; None for those that F is a mean over, with weights their sum. A sum
            of several means needs it.
        solver: as in `jaxfisher.solve`: such as ``jf.CG(preconditioner=jf.eigen_kronecker)`` for an implicit Fisher.
        batch_size: make the scores of training examples in pieces of at most so many, which bounds memory.

    Returns:
        A function ``(params, train, test, damping)``. ``test`` is a tuple of arrays with a leading axis of m examples, and so
        is ``train``; or ``train`` is any other iterable of such tuples, which are in memory one at a time: ``tqdm(batches)``
        shows progress. ``damping`` is that of `jaxfisher.solve`. It returns the matrix, shape ``[m, train examples]``, and a
        `SolveInfo` with an entry for each test example.

    Raises:
        TypeError: ``log_prob`` is no function, ``fisher`` no operator, ``n`` no number; (when called) ``train`` or ``test`` is
            no data, ``log_prob`` is complex.
        ValueError: ``n`` is not given, and ``fisher`` is no mean, or a sum of several; (when called) ``params`` of another
            structure than those of ``fisher``, no batch; as in `jaxfisher.scores` and `jaxfisher.solve`.

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

    Of a linear regression it is the squared residual times the leverage. What the model could only learn from the example
    itself stands out. That is how wrong labels are looked for: sort, and read from the top.

    Gradients of ``batch_size`` examples are formed and solved at a time, so that memory holds a few times ``batch_size p``
    numbers. What a solve factors is factored for every batch; a view held by eigenvectors (`jaxfisher.eigen_kronecker`,
    `jaxfisher.diagonal`) has nothing to factor.

    **When it is the wrong one.** A rare example is as conspicuous as a wrong one: the list is for a reader to judge. Where the
    model fits every label, wrong ones included, scores vanish: take parameters from before that.

    Args:
        log_prob: as in `influence`, and so are ``fisher``, ``n`` and ``solver``.
        fisher: see ``log_prob``.
        n: see ``log_prob``.
        solver: see ``log_prob``.
        batch_size: how many examples to solve for at a time; None for all of a batch.

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
    r"""TracIn: the influence that training examples had on the way, summed over checkpoints, without any Fisher.

    .. math:: I_{ti} = \sum_c \eta_c\, s_t(\theta_c)^T s_i(\theta_c).

    It is the change of the test log-density by plain gradient steps on example i alone, one at each checkpoint. It comes from
    the factors of both data sets: of a weight of ``d_in x d_out`` each pair costs ``d_in + d_out`` products, and no gradient
    is formed.

    **When it is the wrong one.** It asks what the steps of plain gradient descent did. Of Adam's or natural gradients' steps
    it knows nothing, and large gradients count for much.

    Args:
        log_prob: ``(params, *example) -> scalar`` of ONE example.
        batch_size: make scores in pieces of at most so many examples, which bounds memory.

    Returns:
        A function ``(checkpoints, train, test, rates=1.0)``. ``checkpoints`` is an iterable of parameters, which are in memory
        one at a time (``tqdm(checkpoints)`` shows progress), ``train`` and ``test`` are tuples of arrays, ``rates`` the
        learning rates ``eta_c``: one number, or one for each checkpoint. It returns an array ``[test examples, training
        examples]``.

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
    """The scores of a real log-density: of a complex one an example has two rows, and no one number says what it changes."""
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
    """The operator, and how many examples the parameters were fitted to."""
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
    """The arrays of one data set; a lone array is a data set of one."""
    if isinstance(data, tuple):
        return data
    if is_array(data):
        return (data,)
    raise TypeError(f"`{name}` is {described(data)}; expected the arrays that `log_prob` takes, in a tuple such as (x, y).")


def _batches(train: Any, caller: str) -> Iterable[tuple[Any, ...]]:
    """The batches of an iterable; data in a tuple are one batch."""
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
    """Some examples at a time."""
    n = num_examples(data, "train")
    step = n if size is None else size
    for start in range(0, n, step):
        piece = slice(start, start + step)
        yield jax.tree.map(lambda leaf, piece=piece: leaf[piece], data)
