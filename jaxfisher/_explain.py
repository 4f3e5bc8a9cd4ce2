"""Explaining what the engine does with a model: how the scores of each parameter leaf are held, at what cost, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import chex
import jax

from jaxfisher._automatic import automatic
from jaxfisher._engine import Leaf, by_factors, gram_flops, has_moments, inner_cost, leaf_forms, trace
from jaxfisher._examples import make_batch, shape_of_one
from jaxfisher._model import of_one_example
from jaxfisher._row_functions import ExactRows, Rows, ScoreRows, prediction
from jaxfisher._tree import check_function, joined, split


@dataclasses.dataclass(frozen=True)
class LeafExplanation:
    """The explanation of one parameter leaf.

    Attributes:
        path: the path of the leaf, as a user would index the parameters.
        shape: its shape.
        form: ``outer product``, ``sum of T outer products``, ``convolution``, ``embedding``, ``elementwise`` (the gradient is
            no larger than its factors), ``zero``, ``plain`` (the gradient had to be formed), or a sum of several of these.
        positions: T, the number of outer products that an example contributes; 0 if there are none.
        bytes: the memory of its scores, for all rows.
        bytes_per_device: the memory on one device, which holds the rows of its own examples.
        flops: the operations of its part of the Gram matrix; a multiplication and an addition count as two.
        why: what decided the form, or how its inner products are computed.
        kronecker: ``yes`` if the leaf has its own block in `jaxfisher.kronecker`; for a bias, the weight whose block it shares;
            else why it has none and is part of the view's ``rest``.
    """

    path: str
    shape: tuple[int, ...]
    form: str
    positions: int
    bytes: int
    bytes_per_device: int
    flops: int
    why: str
    kronecker: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How scores are held, leaf by leaf; ``print`` it for a table.

    Attributes:
        leaves: one entry for each parameter leaf, in pytree order.
        examples: the number of examples, n.
        rows: the rows of one example: one for a score, one for each column of the output metric for an exact Fisher.
        devices: the number of devices that the examples are sharded over; each holds the rows of its own examples.
        bytes: the memory of the scores.
        bytes_per_device: the part of it on one device.
        flops: the operations of the Gram matrix from these scores.
        plain_bytes: the memory that the gradients of all rows would take.
        plain_flops: the operations of the Gram matrix from such gradients.
    """

    leaves: tuple[LeafExplanation, ...]
    examples: int
    rows: int
    devices: int
    bytes: int
    bytes_per_device: int
    flops: int
    plain_bytes: int
    plain_flops: int

    @property
    def factored(self) -> tuple[str, ...]:
        """The paths of leaves held as factors."""
        return tuple(leaf.path for leaf in self.leaves if leaf.positions and "plain" not in leaf.form)

    @property
    def plain(self) -> tuple[str, ...]:
        """The paths of leaves whose gradients had to be formed; their ``why`` says for what reason."""
        return tuple(leaf.path for leaf in self.leaves if "plain" in leaf.form)

    def __str__(self) -> str:
        head: tuple[str, ...] = ("leaf", "shape", "held as", "T", "memory", "a device", "Gram flops", "Kronecker", "why")
        body: list[tuple[str, ...]] = [
            (
                leaf.path,
                str(leaf.shape),
                leaf.form,
                str(leaf.positions or ""),
                _bytes(leaf.bytes),
                _bytes(leaf.bytes_per_device),
                _count(leaf.flops),
                leaf.kronecker,
                leaf.why,
            )
            for leaf in self.leaves
        ]
        memory = _bytes(self.bytes), _bytes(self.bytes_per_device)
        total: tuple[str, ...] = ("total", f"{self.examples} x {self.rows} rows", "", "", *memory, _count(self.flops), "", "")
        memory = _bytes(self.plain_bytes), _bytes(self.plain_bytes // self.devices)
        plain: tuple[str, ...] = ("plain gradients", "", "", "", *memory, _count(self.plain_flops), "", "")
        table = [head, *body, total, plain]
        if self.devices == 1:
            table = [(*row[:5], *row[6:]) for row in table]
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        right = range(3, len(table[0]) - 2)
        lines = [
            "  ".join(
                cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        return "\n".join(line.rstrip() for line in (lines[0], "-" * max(map(len, lines)), *lines[1:]))


class ExplainFunction(Protocol):
    """``explain(params, *data) -> Explanation``."""

    def __call__(self, params: chex.ArrayTree, /, *data: Any) -> Explanation: ...


def explain(function: Callable[..., Any]) -> ExplainFunction:
    r"""Explain how the scores of a log-density, or the rows of a model's exact Fisher, are held; nothing is computed.

    The gradient of a weight used in T places is a sum of outer products, :math:`D_i = \sum_t a_{it} g_{it}^T`. Scores hold
    ``a`` and ``g``, which are n T (d_in + d_out) numbers instead of n d_in d_out. The table says which leaves are held like
    this, which are not, and why.

    Args:
        function: ``log_prob(params, *example) -> scalar`` or ``model(params, *inputs) -> distribution``, of ONE example.

    Returns:
        A function ``(params, *data)``, with data as for `jaxfisher.scores` or `jaxfisher.exact_fisher`: arrays with a leading
        axis of n examples. Any of these arrays may be a `jax.ShapeDtypeStruct`, also one with a sharding. If the examples are
        sharded over devices, the table also shows what each device holds. The function returns an `Explanation`: a table when
        printed, and a value for assertions such as ``assert not explanation.plain``.

    Raises:
        TypeError: ``function`` is neither of the two; (when called) a parameter that is not a floating array.
        ValueError: (when called) arrays of different lengths, a log-density that is no scalar.

    Reference: Rochette, Manoel and Tramel, Efficient per-example gradient computations in convolutional neural networks
    (arXiv 1912.06015), section 3, for the outer products; Bu, Mao and Xu, Scalable and efficient training of large
    convolutional neural networks with differential privacy (NeurIPS 2022), section 4, for the rule of cost.

    >>> import jax.numpy as jnp, jaxfisher as jf
    >>> model = lambda w, x: jf.Categorical(logits=x @ w)
    >>> explanation = jf.explain(jf.log_likelihood(model))(jnp.ones((784, 10)), jnp.ones((32, 784)), jnp.zeros(32, int))
    >>> explanation.leaves[0].form, explanation.bytes, explanation.plain_bytes
    ('outer product', 101632, 1003520)
    """
    check_function("function", function, "log_prob(params, *example) -> scalar or model(params, *inputs) -> distribution")

    def explained(params: chex.ArrayTree, /, *data: Any) -> Explanation:
        leaves, treedef = jax.tree.flatten((params, data))
        shapes = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))}
        found = []

        def run(arrays: dict[int, Any]) -> tuple[()]:
            params, data = jax.tree.unflatten(treedef, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
            found.append(_explanation(function, params, data, devices))
            return ()

        devices = max([_shares(leaf) for leaf in jax.tree.leaves(data)], default=1)
        jax.eval_shape(automatic(run), shapes)
        return found[-1]

    return explained


def _shares(leaf: Any) -> int:
    """The number of devices over which the examples of an array are sharded; one if unknown."""
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    if sharding is None or not leaf.ndim:
        return 1
    share = sharding.shard_shape(leaf.shape)[0]
    return leaf.shape[0] // share if share else 1


def _explanation(function: Callable[..., Any], params: chex.ArrayTree, data: tuple[Any, ...], devices: int) -> Explanation:
    batch = make_batch(params, data, None)
    rows, params = _row_function(function, params, batch.data), split(params)
    with of_one_example(rows.function, rows.name, joined(params), batch.data[rows.own :]):
        traced = trace(rows, params, batch.data)
    shapes = jax.eval_shape(lambda params, data: leaf_forms(traced, params, data, batch.spec)[1], params, batch.data)
    leaves = tuple(
        _explained(path, leaf, _kronecker(leaf, shapes, batch.spec.paths), devices)
        for path, leaf in zip(batch.spec.paths, shapes, strict=True)
    )
    count = batch.size * traced.rows
    return Explanation(
        leaves,
        batch.size,
        traced.rows,
        devices,
        sum(leaf.bytes for leaf in leaves),
        sum(leaf.bytes_per_device for leaf in leaves),
        sum(leaf.flops for leaf in leaves),
        count * batch.spec.size * batch.spec.dtype.itemsize,
        2 * count**2 * batch.spec.size,
    )


def _row_function(function: Callable[..., Any], params: chex.ArrayTree, data: tuple[Any, ...]) -> Rows:
    """The row function of a log-density, or of a model if ``function`` returns no number."""
    numbers = []

    def call(*args: Any) -> tuple[()]:
        numbers.append(isinstance(function(*args), (jax.Array, float, int, complex)))
        return ()

    with of_one_example(function, "function", params, data):
        jax.eval_shape(call, params, *shape_of_one(data))
    return ScoreRows(function) if numbers[-1] else ExactRows(function, prediction(function, params, data).moving)


def _explained(path: str, leaf: Leaf, kronecker: str, devices: int) -> LeafExplanation:
    # "plain" marks gradients that the engine had to form: the form has no factors, and the leaf says why.
    names = ["plain" if leaf.why is not None and not form.positions else form.name for form in leaf.forms] or ["zero"]
    form, memory = " + ".join(names), (leaf.bytes, leaf.bytes // devices)
    return LeafExplanation(path, leaf.shape, form, leaf.positions, *memory, gram_flops(leaf), _why(leaf), kronecker)


def _kronecker(leaf: Leaf, leaves: tuple[Leaf, ...], paths: tuple[str, ...]) -> str:
    if has_moments(leaf):
        return "yes"
    if leaf.layer is not None and has_moments(leaves[leaf.layer]):
        return f"with {paths[leaf.layer]}"
    reasons = [form.unfactored for form in leaf.forms if form.unfactored]
    if leaf.forms and not reasons:
        return "no: factors in several layouts"
    return f"no: {' and '.join(dict.fromkeys(reasons)) or 'no factors'}"


def _why(leaf: Leaf) -> str:
    if leaf.why is not None:
        return leaf.why
    if not leaf.forms:
        return "the function does not depend on it"
    if not leaf.positions:
        return "no larger than what it is made of"
    how = "inner products of factors" if by_factors(leaf) else "gradients formed tile by tile"
    size = leaf.layout.inputs * leaf.layout.outputs
    return f"{how}: T^2 (I + O) = {_count(inner_cost(leaf))}, I O = {_count(size)}"


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"


def _count(number: float) -> str:
    return f"{number:,}" if number < 10**6 else f"{number:.2e}"
