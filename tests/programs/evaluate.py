"""A jaxpr run in NumPy, so that a program which runs once is never compiled.

Compiling the quantities of one random program takes seconds; NumPy takes some 50 ms for their thousands of small operations.
JAX runs the operations that few programs use (a decomposition, a pooling), one at a time.
"""

import contextlib
import functools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax._src import pjit
from jax.extend.core import Literal

from programs import bits, matrices, places


def evaluate(closed, *arguments):
    """The outputs of a closed jaxpr at flat arguments, as NumPy arrays."""
    with np.errstate(all="ignore"):
        return _run(closed.jaxpr, closed.consts, [_array(value) for value in arguments])


def evaluated(function, *arguments):
    """The result of a function of pytrees, which is traced as by `jax.jit` and then run in NumPy."""
    return traced(function)(*arguments)


def traced(function):
    """A function of pytrees that is traced once for each structure, shape and dtype, as by `jax.jit`, and runs in NumPy."""
    programs = {}

    def call(*arguments):
        leaves, structure = jax.tree.flatten(arguments)
        kind = structure, tuple(map(jax.typeof, leaves))
        if kind not in programs:
            programs[kind] = jax.make_jaxpr(function, return_shape=True)(*arguments)
        closed, shapes = programs[kind]
        return jax.tree.unflatten(jax.tree.structure(shapes), evaluate(closed, *leaves))

    return call


_HANDS_OVER = "_pjit_call_impl_python"
"""JAX's internal function that compiles a traced program and runs it. No public function does that."""


@contextlib.contextmanager
def in_numpy(evaluate=evaluate):
    """A context in which NumPy runs the programs that JAX would compile: `jax.jit`, the library's own, and eager operations.

    Programs over several devices are compiled as usual, and so is everything if this version of JAX lacks its function.
    ``evaluate`` is called with each program and its arguments.
    """
    compiled = getattr(pjit, _HANDS_OVER, None)

    def run(*arguments, jaxpr, **params):
        spread = any(isinstance(x, jax.Array) and len(x.sharding.device_set) > 1 for x in arguments)
        if spread or _is_left_to_jax(jaxpr):
            return compiled(*arguments, jaxpr=jaxpr, **params)
        # Operations that are left to JAX inside the program are compiled, one at a time.
        setattr(pjit, _HANDS_OVER, compiled)
        try:
            made = evaluate(jaxpr, *(_as_traced(x, aval) for x, aval in zip(arguments, jaxpr.in_avals, strict=True)))
            return [_as_jax(x, aval) for x, aval in zip(made, jaxpr.out_avals, strict=True)], None, None, []
        finally:
            setattr(pjit, _HANDS_OVER, run)

    if compiled is None:
        yield
        return
    setattr(pjit, _HANDS_OVER, run)
    try:
        yield
    finally:
        setattr(pjit, _HANDS_OVER, compiled)


def _is_left_to_jax(jaxpr):
    """Whether a program is a single operation that NumPy cannot run: an unknown one, or one on random keys."""
    operations = [equation.primitive.name for equation in jaxpr.eqns]
    return len(operations) == 1 and (operations[0] not in _KNOWN or any(map(_is_key, (*jaxpr.in_avals, *jaxpr.out_avals))))


def _is_key(value):
    return jnp.issubdtype(getattr(value, "dtype", float), jax.dtypes.extended)


def _as_traced(value, aval):
    return value if isinstance(value, jax.Array) else np.asarray(value, aval.dtype)


def _as_jax(value, aval):
    """The value as a JAX array, weakly typed if the program says so."""
    if isinstance(value, jax.Array):
        return value
    made = jax.device_put(value)
    return type(made)(aval, made.sharding, [made], committed=False) if aval.weak_type else made


def _array(value):
    """The value as a NumPy array; a random key stays as it is."""
    return value if _is_key(value) else np.asarray(value)


def _run(jaxpr, consts, arguments):
    plan = _PLANS.get(jaxpr)
    if plan is None:
        plan = _PLANS[jaxpr] = _Plan(jaxpr)
    return plan(map(_array, consts), arguments)


_PLANS = weakref.WeakKeyDictionary()


class _Plan:
    """A jaxpr prepared for NumPy, with its values in numbered places. It is prepared once, since a loop runs its body often."""

    def __init__(self, jaxpr):
        self.start, places = [], {}  # the literals in their places

        def place(atom):
            known = None if isinstance(atom, Literal) else places.setdefault(atom, len(self.start))
            if known is not None and known < len(self.start):
                return known
            self.start.append(np.asarray(atom.val, atom.aval.dtype) if known is None else None)
            return len(self.start) - 1

        self.consts, self.given = (list(map(place, variables)) for variables in (jaxpr.constvars, jaxpr.invars))
        self.steps = [(_step(e), list(map(place, e.invars)), list(map(place, e.outvars))) for e in jaxpr.eqns]
        self.made = list(map(place, jaxpr.outvars))

    def __call__(self, consts, arguments):
        values = self.start.copy()
        for at, value in zip(self.consts, consts, strict=True):
            values[at] = value
        for at, value in zip(self.given, arguments, strict=True):
            values[at] = value
        for step, operands, outputs in self.steps:
            for at, value in zip(outputs, step([values[at] for at in operands]), strict=True):
                values[at] = value
        return [values[at] for at in self.made]


def _step(equation):
    """A function from the operands of an equation to its results, with the shapes and dtypes that the equation states."""
    name, params = equation.primitive.name, equation.params
    shapes = [variable.aval.shape for variable in equation.outvars]
    if name in _OPERATIONS and not any(_is_key(variable.aval) for variable in (*equation.invars, *equation.outvars)):
        (out,) = equation.outvars
        return _operation(_OPERATIONS[name], params, out.aval.shape, out.aval.dtype)
    apply = _applied(equation)

    def step(operands):
        made = apply(operands)
        assert [value.shape for value in made] == shapes, f"{name} made {[value.shape for value in made]}, not {shapes}"
        return made

    return step


def _operation(function, params, shape, dtype):
    function = getattr(function, "plain", None) or functools.partial(function, **params)

    def step(operands):
        made = np.asarray(function(*operands), dtype, order="C")
        assert made.shape == shape, f"{function} made {made.shape}, not {shape}"
        return (made,)

    return step


def _applied(equation):
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return functools.partial(_scan, equation, **params)
    if name in _CALLS:
        return functools.partial(_CALLS[name], **params)
    if name == "random_bits":
        return functools.partial(_random_bits, equation)
    return functools.partial(_traced_again if name in _TRACED_AGAIN else _by_jax, equation)


def _traced_again(equation, operands):
    primitive, params = equation.primitive, equation.params
    return evaluate(jax.make_jaxpr(lambda *given: primitive.impl(*given, **params))(*operands), *operands)


def _random_bits(equation, operands):
    (keys,) = operands
    if str(jax.random.key_impl(keys)) != "threefry2x32" or not jax.config.jax_threefry_partitionable:
        return _by_jax(equation, operands)
    return [bits.random(np.asarray(jax.random.key_data(keys)), **equation.params)]


def _by_jax(equation, operands):
    primitive, params = equation.primitive, equation.params
    operands = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in operands]
    made = _once(primitive, **params)(*operands) if primitive.name in _LOOPS else primitive.bind(*operands, **params)
    return [_array(value) for value in (made if primitive.multiple_results else [made])]


_LOOPS = {"random_gamma"}
"""Operations that JAX recompiles at each call outside `jit`."""


@functools.cache
def _once(primitive, **params):
    return jax.jit(functools.partial(primitive.bind, **params))


# Calls of other programs.


def _call(operands, *, jaxpr=None, call_jaxpr=None, **_):
    inner = call_jaxpr if jaxpr is None else jaxpr
    return _run(inner.jaxpr, inner.consts, operands) if hasattr(inner, "consts") else _run(inner, (), operands)


def _custom_vjp(operands, *, fun_jaxpr=None, call_jaxpr=None, **_):
    return _call(operands, jaxpr=call_jaxpr if fun_jaxpr is None else fun_jaxpr)


def _cond(operands, *, branches, **_):
    index, *rest = operands
    return _call(rest, jaxpr=branches[int(np.clip(index, 0, len(branches) - 1))])


def _while(operands, *, cond_jaxpr, cond_nconsts, body_jaxpr, body_nconsts):
    cond, body = operands[:cond_nconsts], operands[cond_nconsts : cond_nconsts + body_nconsts]
    carry = operands[cond_nconsts + body_nconsts :]
    (going,) = _call([*cond, *carry], jaxpr=cond_jaxpr)
    while np.any(going):
        made = _call([*body, *carry], jaxpr=body_jaxpr)
        # Under `vmap`, examples that are done wait for the others.
        carry = [_chosen(going, new, old) for new, old in zip(made, carry, strict=True)] if going.ndim else made
        (going,) = _call([*cond, *carry], jaxpr=cond_jaxpr)
    return carry


def _chosen(going, new, old):
    where = jnp.where if _is_key(new) else np.where
    return where(going.reshape(going.shape + (1,) * (new.ndim - going.ndim)), new, old)


def _scan(equation, operands, *, jaxpr, length, reverse, **_):
    # Arrays that are scanned over or stacked have one axis more outside. Ranks tell them apart on every version of JAX.
    num_xs = sum(operand.ndim > aval.ndim for operand, aval in zip(operands, jaxpr.in_avals, strict=True))
    num_carry = sum(out.aval.ndim == aval.ndim for out, aval in zip(equation.outvars, jaxpr.out_avals, strict=True))
    before, stacked = operands[: len(operands) - num_xs], operands[len(operands) - num_xs :]
    consts, carry = before[: len(before) - num_carry], before[len(before) - num_carry :]
    steps = []
    for i in reversed(range(length)) if reverse else range(length):
        made = _call([*consts, *carry, *(array[i] for array in stacked)], jaxpr=jaxpr)
        carry = made[:num_carry]
        steps.append(made[num_carry:])
    if reverse:
        steps.reverse()
    avals = jaxpr.out_avals[num_carry:]
    outputs = [
        np.stack([step[k] for step in steps]) if steps else np.zeros((0, *aval.shape), aval.dtype)
        for k, aval in enumerate(avals)
    ]
    return [*carry, *outputs]


def _linear_solve(operands, *, const_lengths, jaxprs):
    of_matvec, of_vecmat, of_solve = const_lengths.matvec, const_lengths.vecmat, const_lengths.solve
    start = of_matvec + of_vecmat
    consts = operands[start : start + of_solve]
    return _call([*consts, *operands[sum(const_lengths) :]], jaxpr=jaxprs.solve)


_CALLS = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "remat2", "remat", "checkpoint", "custom_jvp_call"), _call),
    **dict.fromkeys(("custom_vjp_call", "custom_vjp_call_jaxpr"), _custom_vjp),
    "cond": _cond,
    "while": _while,
    "custom_linear_solve": _linear_solve,
    "optimization_barrier": lambda operands, **_: operands,
    "sort": places.sort,
    "split": lambda operands, *, sizes, axis: np.split(operands[0], np.cumsum(sizes)[:-1], axis),
}


_TRACED_AGAIN = {"linear_solve"}
"""Primitives of other libraries that are programs of JAX."""


# Operations.


def _dot_general(a, b, *, dimension_numbers, preferred_element_type=None, **_):
    (a_contract, b_contract), (a_batch, b_batch) = dimension_numbers
    wide = np.result_type(_wide(a.dtype), _wide(b.dtype))
    a, b = a.astype(wide, copy=False), b.astype(wide, copy=False)
    a_free = [i for i in range(a.ndim) if i not in (*a_contract, *a_batch)]
    b_free = [i for i in range(b.ndim) if i not in (*b_contract, *b_batch)]
    batch = [a.shape[i] for i in a_batch]
    count, rows, columns = (int(np.prod([x.shape[i] for i in axes])) for x, axes in ((a, a_contract), (a, a_free), (b, b_free)))
    left = a.transpose(*a_batch, *a_free, *a_contract).reshape(*batch, rows, count)
    right = b.transpose(*b_batch, *b_contract, *b_free).reshape(*batch, count, columns)
    shape = (*batch, *(a.shape[i] for i in a_free), *(b.shape[i] for i in b_free))
    return np.matmul(left, right).reshape(shape)


def _wide(dtype):
    """The dtype in which a sum of this dtype is accumulated: XLA does not round a narrow sum between its terms."""
    return np.float32 if dtype.itemsize < 4 and jnp.issubdtype(dtype, jnp.floating) else dtype


def _reduced(function):
    return lambda x, *, axes, **_: function.reduce(x.astype(_wide(x.dtype), copy=False), axis=tuple(axes))


def _arg_reduced(function):
    def reduce(x, *, axes, index_dtype):
        (axis,) = axes
        return function(x, axis=axis)

    return reduce


def _cumulative(function):
    def accumulate(x, *, axis, reverse):
        order = (slice(None),) * axis + (slice(None, None, -1 if reverse else 1),)
        return function.accumulate(x[order], axis=axis)[order]

    return accumulate


def _broadcast_in_dim(x, *_, shape, broadcast_dimensions, sharding=None):
    own = [1] * len(shape)
    for size, axis in zip(x.shape, broadcast_dimensions, strict=True):
        own[axis] = size
    made = np.empty(shape, x.dtype)  # `np.broadcast_to` takes five times as long
    made[...] = x.reshape(own)
    return made


def _reshape(x, *_, new_sizes, dimensions, sharding=None):
    return (x if dimensions is None else x.transpose(dimensions)).reshape(new_sizes)


def _slice(x, *, start_indices, limit_indices, strides):
    strides = strides or (1,) * x.ndim
    return x[tuple(map(slice, start_indices, limit_indices, strides))]


def _starts(indices, shape, sizes):
    return [int(np.clip(int(i), 0, n - size)) for i, n, size in zip(indices, shape, sizes, strict=True)]


def _dynamic_slice(x, *indices, slice_sizes):
    starts = _starts(indices, x.shape, slice_sizes)
    return x[tuple(slice(start, start + size) for start, size in zip(starts, slice_sizes, strict=True))]


def _dynamic_update_slice(x, update, *indices):
    starts = _starts(indices, x.shape, update.shape)
    made = x.copy()
    made[tuple(slice(start, start + size) for start, size in zip(starts, update.shape, strict=True))] = update
    return made


def _pad(x, value, *, padding_config):
    sizes = [low + high + n + max(n - 1, 0) * inner for n, (low, high, inner) in zip(x.shape, padding_config, strict=True)]
    made = np.full(sizes, value, x.dtype)
    to, of = [], []
    for n, size, (low, _, inner) in zip(x.shape, sizes, padding_config, strict=True):
        places = low + np.arange(n) * (inner + 1)
        kept = (places >= 0) & (places < size)
        to.append(places[kept])
        of.append(np.flatnonzero(kept))
    made[np.ix_(*to)] = x[np.ix_(*of)]
    return made


def _select(which, *cases):
    if which.dtype == bool:
        return np.where(which, cases[1], cases[0])
    return np.choose(np.broadcast_to(which, cases[0].shape), cases)


def _iota(*_, dtype, shape, dimension, sharding=None):
    own = [1] * len(shape)
    own[dimension] = shape[dimension]
    return np.broadcast_to(np.arange(shape[dimension], dtype=dtype).reshape(own), shape)


def _convert(x, *, new_dtype, **_):
    if jnp.issubdtype(new_dtype, jnp.integer) and jnp.issubdtype(x.dtype, jnp.floating):
        # Out of range, NumPy wraps around, and XLA takes the nearest number.
        info = jnp.iinfo(new_dtype)
        return np.clip(np.nan_to_num(x.astype(np.float64)), info.min, info.max)
    if jnp.issubdtype(x.dtype, jnp.complexfloating) and not jnp.issubdtype(new_dtype, jnp.complexfloating):
        return x.real
    return x


def _divide(a, b):
    return np.trunc(np.divide(a, b)) if np.issubdtype(a.dtype, np.integer) else np.divide(a, b)


def _round(x, *, rounding_method):
    return np.rint(x) if int(rounding_method) == 1 else np.trunc(x + np.copysign(0.5, x))


def _logistic(x, **_):
    return 1 / (1 + np.exp(-x))


def _plain(function):
    """The operation without the flags that NumPy does not know, such as an accuracy."""

    def apply(*operands, **_):
        return function(*operands)

    apply.plain = function
    return apply


def _special(function):
    """The function in a wider dtype, since SciPy's has no narrow ones."""
    return lambda x, **_: function(x.astype(np.float64))


_OPERATIONS = {
    **{
        name: _plain(getattr(np, name if function is None else function))
        for name, function in (
            *((name, None) for name in ("abs", "sign", "exp", "exp2", "log", "log1p", "expm1", "tanh", "sin", "cos", "tan")),
            *((name, None) for name in ("sinh", "cosh", "sqrt", "cbrt", "square", "real", "imag", "floor", "ceil")),
            *(("asin", "arcsin"), ("acos", "arccos"), ("atan", "arctan"), ("asinh", "arcsinh"), ("acosh", "arccosh")),
            *(("atanh", "arctanh"), ("pow", "power"), ("rem", "fmod"), ("conj", "conjugate")),
            *(("add", None), ("sub", "subtract"), ("mul", "multiply"), ("neg", "negative"), ("max", "maximum")),
            *(("min", "minimum"), ("eq", "equal"), ("ne", "not_equal"), ("lt", "less"), ("le", "less_equal")),
            *(("gt", "greater"), ("ge", "greater_equal"), ("and", "bitwise_and"), ("or", "bitwise_or")),
            *(("xor", "bitwise_xor"), ("not", "bitwise_not"), ("is_finite", "isfinite"), ("add_any", "add")),
        )
    },
    **dict.fromkeys(("copy", "copy_p", "stop_gradient", "device_put"), lambda x, *_, **__: x),
    "div": _divide,
    "rsqrt": lambda x, **_: 1 / np.sqrt(x),
    "logistic": _logistic,
    "integer_pow": lambda x, *, y: x ** np.asarray(y, x.dtype) if y >= 0 else 1 / x ** np.asarray(-y, x.dtype),
    "erf": _special(scipy.special.erf),
    "erfc": _special(scipy.special.erfc),
    "erf_inv": _special(scipy.special.erfinv),
    "reduce_precision": bits.reduce_precision,
    "bitcast_convert_type": bits.bitcast,
    "shift_right_logical": bits.shift_right_logical,
    "lgamma": _special(scipy.special.gammaln),
    "digamma": _special(scipy.special.digamma),
    "complex": lambda a, b: a + 1j * b,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "round": _round,
    "select_n": _select,
    "convert_element_type": _convert,
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "squeeze": lambda x, *, dimensions: np.squeeze(x, tuple(dimensions)),
    "expand_dims": lambda x, *, dimensions: np.expand_dims(x, tuple(dimensions)),
    "transpose": lambda x, *, permutation: x.transpose(permutation),
    "concatenate": lambda *operands, dimension: np.concatenate(operands, dimension),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "pad": _pad,
    "rev": lambda x, *, dimensions: np.flip(x, tuple(dimensions)),
    "iota": _iota,
    "dot_general": _dot_general,
    "reduce_sum": _reduced(np.add),
    "reduce_max": lambda x, *, axes, **_: np.maximum.reduce(x, axis=tuple(axes), initial=bits.ends(x.dtype)[0]),
    "reduce_min": lambda x, *, axes, **_: np.minimum.reduce(x, axis=tuple(axes), initial=bits.ends(x.dtype)[1]),
    "reduce_prod": _reduced(np.multiply),
    "reduce_and": _reduced(np.bitwise_and),
    "reduce_or": _reduced(np.bitwise_or),
    "argmax": _arg_reduced(np.argmax),
    "argmin": _arg_reduced(np.argmin),
    "tile": lambda x, *, reps: np.tile(x, reps),
    "cholesky": matrices.cholesky,
    "triangular_solve": matrices.triangular_solve,
    "gather": places.gather,
    "scatter": places.scatter_with(lambda old, new: new),
    "scatter-add": places.scatter_with(np.add),
    "scatter-mul": places.scatter_with(np.multiply),
    "scatter-min": places.scatter_with(np.minimum),
    "scatter-max": places.scatter_with(np.maximum),
    "fft": places.fourier,
    "conv_general_dilated": places.convolution,
    "cumsum": _cumulative(np.add),
    "cumprod": _cumulative(np.multiply),
    "cummax": _cumulative(np.maximum),
    "cummin": _cumulative(np.minimum),
    "cumlogsumexp": _cumulative(np.logaddexp),
}
"""The operations that NumPy runs. JAX runs any other, which is only slower."""
_KNOWN = frozenset({"scan", *_CALLS, *_TRACED_AGAIN, *_OPERATIONS})
