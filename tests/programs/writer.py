"""Writing a random program: statements that JAX accepts, one after the other.

The writer works inside one abstract trace. Each statement runs as soon as it is written, on shapes alone, so that the next one
knows the shape of its value; a statement that JAX refuses is left out. Functions inside the program are written in the same
way, each with its own writer inside its own trace.
"""

import dataclasses
import math
import random
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from programs import prelude

EXAMPLES = 5
SIZES = ((1, 1, 2, 2, 2, 3, 3, 4), (1, 1, 1, 2, 3))
"""A program draws the lengths of axes from one of these; with the second, axes of length one often meet each other."""
LARGEST = 48
"""The most entries of a value."""
MOST_PARAMETERS = 56
"""The most entries of all leaves together."""
MOST_LEAVES = 6
HIGH = 4
"""The integers of the data are below this."""


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of the program: its expression, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    bare: bool = False
    """Whether it is made of parameters and constants alone, as a weight before it meets an example."""

    @property
    def rank(self):
        return len(self.shape)

    @property
    def size(self):
        return math.prod(self.shape)

    @property
    def complex(self):
        return jnp.issubdtype(self.dtype, jnp.complexfloating)


@dataclasses.dataclass
class Book:
    """The state that all writers of one program share: random numbers, leaves, and counts of accepted and refused pieces."""

    rng: random.Random
    dtype: str | None
    """The dtype beside float64 in this program, if there is one."""
    sizes: tuple[int, ...] = SIZES[0]
    leaves: dict = dataclasses.field(default_factory=dict)
    counter: int = 0
    shapes: dict = dataclasses.field(default_factory=dict)
    accepted: dict = dataclasses.field(default_factory=dict)
    refused: dict = dataclasses.field(default_factory=dict)


class Leaves:
    """The parameters inside the trace. They are made when read, since the program that is being written adds to them."""

    def __init__(self, leaves):
        self.leaves = leaves

    def __getitem__(self, name):
        return jnp.zeros(*self.leaves[name])


class Writer:
    """The statements of one function, and the values they may use."""

    def __init__(self, book, scope, values=(), depth=0):
        self.book, self.rng, self.depth = book, book.rng, depth
        self.scope, self.values, self.lines = scope, list(values), []
        self.own, self.used = [], set()
        self.of_data = {"x", "z", "k"}
        self.before_data = False
        """Whether operands may only be values that are made of parameters alone."""

    # Names and numbers.

    def name(self, letter):
        self.book.counter += 1
        return f"{letter}{self.book.counter}"

    def seed(self):
        return self.rng.randrange(1000)

    def chance(self, probability):
        return self.rng.random() < probability

    def one_of(self, *choices):
        return self.rng.choice(choices)

    def size(self):
        return self.rng.choice(self.book.sizes)

    def shape(self, low, high):
        return tuple(self.size() for _ in range(self.rng.randint(low, high)))

    def axis(self, value, signed=True):
        axis = self.rng.randrange(value.rank)
        return axis - value.rank if signed and self.chance(0.5) else axis

    def order(self, count):
        return tuple(self.rng.sample(range(count), count))

    # Statements.

    def say(self, expression, count=None):
        """Write ``v = expression``, or an assignment to ``count`` values. Returns the values; None if JAX or we refuse."""
        names = [self.name("v") for _ in range(count or 1)]
        line = f"{', '.join(names)} = {expression}"
        try:
            exec(line, self.scope)
            made = [self.scope[name] for name in names]
        except Exception:
            # The statement does not fit its operands. tests/test_random_programs.py checks that every kind fits some.
            return None
        if not all(_fits(value) for value in made):
            return None
        self.lines.append(line)
        self._use(expression)
        bare = not self._of_data(line, names)
        values = [Value(name, jnp.shape(value), value.dtype, bare) for name, value in zip(names, made, strict=True)]
        self.values += values
        self.own += values
        self.book.shapes.update((value.name, (value.shape, str(value.dtype))) for value in values)
        return values if count else values[0]

    def _use(self, expression):
        self.used |= _words(expression)

    def _of_data(self, text, names):
        """Record that these names depend on an example, if the text that defines them does."""
        if depends := bool(_words(text) & self.of_data):
            self.of_data |= set(names)
        return depends

    def write(self, text):
        """Write a function that is given as lines of text."""
        exec("\n".join(text), self.scope)
        self.lines += text
        self._use("\n".join(text))
        self._of_data("\n".join(text), re.findall(r"^def (\w+)", "\n".join(text), re.MULTILINE))

    def define(self, arguments, body, decorator="", like=None):
        """Write a function of arguments with these shapes, ``[(shape, dtype), ...]``, whose body is made of ``body`` pieces.

        Returns its name. Its result is real, and with ``like=(shape, dtype)`` of that shape and dtype.
        """
        name, names = self.name("f"), [self.name("a") for _ in arguments]
        inner = Writer(self.book, dict(self.scope), self.values, self.depth + 1)
        inner.before_data, inner.of_data = self.before_data, self.of_data | set(() if self.before_data else names)
        result = []

        def build(*arrays):
            inner.scope.update(zip(names, arrays, strict=True))
            given = [Value(n, a.shape, a.dtype, self.before_data) for n, a in zip(names, arrays, strict=True) if _fits(a)]
            inner.values += given
            inner.own += given  # so that the function uses its arguments first
            body(inner)
            result.append(inner.result(like))
            return eval(result[0], inner.scope)

        jax.eval_shape(build, *(jax.ShapeDtypeStruct(*argument) for argument in arguments))
        lines = [f"{decorator}def {name}({', '.join(names)}):".splitlines(), inner.lines, [f"return {result[0]}"]]
        text = [*lines[0], *("    " + line for line in (*lines[1], *lines[2]))]
        self.write(text)
        return name

    # Operands.

    def leaf(self, shape):
        """A new parameter of this shape, or None if the program has enough."""
        leaves = self.book.leaves
        total = sum(math.prod(shape) for shape, _ in leaves.values())
        if len(leaves) >= MOST_LEAVES or total + math.prod(shape) > MOST_PARAMETERS:
            return None
        name = f"w{len(leaves) + 1}"
        dtype = self.book.dtype if self.book.dtype and self.chance(0.7) else "float64"
        leaves[name] = (tuple(shape), dtype)
        return self._known(name)

    def _known(self, name):
        shape, dtype = self.book.leaves[name]
        return Value(f"p['{name}']", shape, jnp.dtype(dtype), bare=True)

    def leaves(self):
        return [self._known(name) for name in self.book.leaves]

    def _pool(self, bare):
        """The values from which an operand may be chosen."""
        return [*self.leaves(), *(value for value in self.values if value.bare or not (bare or self.before_data))]

    def value(self, low=0, high=4, real=True):
        """Some value with a rank in this range: often one that nothing uses yet, so that pieces form chains."""
        pool = self._pool(False)
        loose = [value for value in self.unused()[-4:] if value.bare or not self.before_data]
        met = [value for value in pool if not value.bare]
        for group, probability in ((loose, 0.5), (met, 0.4), (pool, 0.8)):
            found = [value for value in group if low <= value.rank <= high]
            if found and self.chance(probability):
                chosen = self.rng.choice(found)
                return self.real(chosen) if real else chosen
        shape = self.shape(low, min(high, 3))
        return self.leaf(shape) or Value(self._const(shape), shape, jnp.dtype(float), bare=True)

    def _const(self, shape):
        return f"const({', '.join(map(str, (self.seed(), *shape)))})"

    def real(self, value):
        """A real value made of this one."""
        if not value.complex:
            return value
        form = self.one_of("jnp.real({})", "jnp.imag({})", "jnp.abs({})", "jnp.square(jnp.abs({}))")
        return Value(form.format(value.name), value.shape, jnp.zeros((), value.dtype).real.dtype, value.bare)

    def any(self, low=0, high=4):
        """Some value, real or complex: for operations that are linear, or are defined for both."""
        return self.value(low, high, real=False)

    def of_shape(self, *shape, weight=False, real=True):
        """An expression of this shape: a value that has it, a new leaf, or part of something else.

        ``weight`` asks for a parameter, or something made of parameters, perhaps used elsewhere, or in another shape.
        """
        pool = self._pool(bare=weight)
        if self.chance(0.5):
            same = [value for value in pool if value.shape == shape]
            if same:
                chosen = self.rng.choice(same)
                return (self.real(chosen) if real else chosen).name
        if self.chance(0.6 if weight else 0.35):
            made = self.leaf(shape)
            if made is not None:
                return made.name
        if pool and not self.chance(0.1):
            chosen = self.rng.choice(pool)
            return self.fit(self.real(chosen) if real else chosen, shape)
        return self._const(shape)

    def fit(self, value, shape):
        """An expression of this shape, made of a value of any shape."""
        count, name = math.prod(shape), value.name
        if value.shape == tuple(shape):
            return name
        if value.size == count:
            return f"jnp.reshape({name}, {tuple(shape)})"
        if value.rank == len(shape) == 2 and value.shape[::-1] == tuple(shape):
            return f"{name}.T"
        if value.size > count:
            return f"jnp.reshape(jnp.ravel({name})[:{count}], {tuple(shape)})"
        if value.size == 1 or self.chance(0.3):
            return f"jnp.broadcast_to(jnp.sum({name}), {tuple(shape)})"
        return f"jnp.resize({name}, {tuple(shape)})"

    def index(self, high, rank=None):
        """An expression for integers below ``high``, which belong to the example or are fixed."""
        rank = self.rng.randint(0, 1) if rank is None else rank
        if self.chance(0.5) and not self.before_data:
            return f"(k % {high})" if rank else f"(k[{self.rng.randrange(2)}] % {high})"
        return f"ints({', '.join(map(str, (self.seed(), high, *(self.size() for _ in range(rank)))))})"

    # Results.

    def unused(self):
        """The values that nothing uses yet."""
        return [value for value in self.own if value.name not in self.used]

    def result(self, like):
        """An expression for what a function returns."""
        loose = self.unused() or self.values[-1:]
        if like is None:
            return self.real(loose[-1]).name
        shape, dtype = like
        parts = [self.fit(self.real(value), shape) for value in loose[-2:]]
        total = " + ".join(parts)
        return f"jnp.tanh({total}).astype(jnp.{dtype})" if self.chance(0.7) else f"({total}).astype(jnp.{dtype})"

    def density(self):
        """An expression for a number to which all unused values contribute."""
        return "\n    + ".join(self._number(value) for value in self.unused()[-6:] or self.own[-1:])

    def _number(self, value):
        value, target = self.real(value), self._const(value.shape)
        given = [other for other in self.values if other.name in ("x", "z")]
        if self.chance(0.5):
            target = self.fit(self.rng.choice(given), value.shape)
        form = self.one_of(
            "-jnp.sum(jnp.square({} - {}))",
            "jnp.sum(jnp.tanh({}) * {})",
            "-jnp.mean(jnp.log1p(jnp.square({} - {})))",
            "jnp.sum(jax.nn.log_sigmoid({} + {}))",
            "jnp.sum({} * {})",
            "-jnp.square(jnp.sum({} * {}) - 1.0)",
            "jax.nn.logsumexp({} + {})",
        )
        return form.format(value.name, target) + ".astype(float)"


def _words(text):
    return set(re.findall(r"\w+", text))


def _fits(value):
    """Whether a value is one that later statements may use."""
    if not isinstance(value, jax.Array) or math.prod(value.shape) > LARGEST or value.size == 0 or value.ndim > 5:
        return False
    narrow = (jnp.float8_e4m3fn, jnp.float8_e5m2)
    return jnp.issubdtype(value.dtype, jnp.inexact) and value.dtype not in map(jnp.dtype, narrow)


def new_scope():
    """The names of the prelude."""
    return {name: getattr(prelude, name) for name in prelude.__all__}


@dataclasses.dataclass(frozen=True)
class Program:
    """A log-density of one example as text, with its parameters' shapes and the data's."""

    seed: int
    source: str
    leaves: dict
    data: tuple
    """The shape of each argument of an example; integers where the dtype says so."""
    eps: float
    shapes: dict = dataclasses.field(compare=False, repr=False)
    """Shape and dtype of each variable."""

    @property
    def log_prob(self):
        scope = new_scope()
        exec(compile(self.source, f"<program {self.seed}>", "exec"), scope)
        return scope["log_prob"]

    def params(self, draw=0):
        """Parameters; other draws give other numbers."""
        rng = np.random.default_rng((self.seed, draw))
        return {
            name: jnp.asarray(0.8 * rng.standard_normal(shape), dtype) for name, (shape, dtype) in sorted(self.leaves.items())
        }

    def examples(self, draw=0):
        """The data of five examples."""
        rng = np.random.default_rng((self.seed, draw, 1))
        return tuple(
            jnp.asarray(rng.integers(0, HIGH, (EXAMPLES, *shape)))
            if dtype == "int64"
            else jnp.asarray(0.8 * rng.standard_normal((EXAMPLES, *shape)), dtype)
            for shape, dtype in self.data
        )

    def __str__(self):
        leaves = ", ".join(f"{name} {dtype}{list(shape)}" for name, (shape, dtype) in sorted(self.leaves.items()))
        data = ", ".join(f"{name} {dtype}{list(shape)}" for name, (shape, dtype) in zip("xzk", self.data, strict=True))
        return f"# program {self.seed}; p: {leaves}; one example: {data}\n{self.source}"
