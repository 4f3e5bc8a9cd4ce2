"""Pieces of random programs that are functions: loops, branches, maps, custom rules, checkpoints, derivatives."""

import jax.numpy as jnp

from programs.pieces import grow, piece

INSIDE = 2
"""The most functions inside one another."""
SMOOTH = (
    "unary",
    "binary",
    "dense",
    "scaled",
    "reduction",
    "einsum",
    "reshape",
    "sliced",
    "joined",
    "tied",
    "divided_by_a_reduction",
)
"""The pieces of functions that a piece differentiates: the others take long, or have no second derivative."""


def _body(w, low=1, high=3, only=None):
    return lambda inner: grow(inner, w.rng.randint(low, high), only)


def _like(value):
    return value.shape, str(value.dtype)


def _given(*values):
    return [(value.shape, value.dtype) for value in values]


def _function(w, *values, only=None, decorator="", like=None):
    """A new function of values of these shapes."""
    return w.define(_given(*values), _body(w, only=only), decorator, like)


def nested(weight):
    """A piece that writes a function, unless it is in enough of them already."""

    def register(function):
        def write(w):
            if w.depth < INSIDE:
                function(w)

        write.__name__ = function.__name__
        write.__doc__ = function.__doc__
        return piece(weight)(write)

    return register


@nested(1.5)
def jit(w):
    a, b = w.any(), w.any()
    decorator = w.one_of("@jax.jit\n", "@functools.partial(jax.jit, inline=True)\n")
    w.say(f"{_function(w, a, b, decorator=decorator)}({a.name}, {b.name})")


POLICIES = (
    "jax.checkpoint_policies.dots_saveable",
    "jax.checkpoint_policies.nothing_saveable",
    "jax.checkpoint_policies.everything_saveable",
    "jax.checkpoint_policies.dots_with_no_batch_dims_saveable",
    "jax.checkpoint_policies.save_only_these_names('kept')",
)


@nested(2)
def checkpoint(w):
    a, b = w.any(), w.any()
    decorator = w.one_of(
        "@jax.checkpoint\n",
        f"@functools.partial(jax.checkpoint, policy={w.one_of(*POLICIES)})\n",
        "@functools.partial(jax.checkpoint, prevent_cse=False)\n",
    )
    w.say(f"{_function(w, a, b, decorator=decorator)}(checkpoint_name({a.name}, 'kept'), {b.name})")


@nested(3)
def scan(w):
    """A scan over an example's positions, over a stack of weights, or of a number of steps."""
    state = w.value(0, 2)
    start = f"({state.name})"
    options = w.one_of("", "", ", reverse=True", ", unroll=2", ", unroll=True")
    wrap = w.one_of("{}", "{}", "jax.checkpoint({})")
    if w.chance(0.3):
        function = _function(w, state, like=_like(state))
        step, xs = wrap.format(f"lambda c, _: ({function}(c), None)"), f"None, length={w.one_of(1, 2, 3)}"
    else:
        xs_value = w.value(1, 3)
        step_value = type(xs_value)("", xs_value.shape[1:], xs_value.dtype)
        function = _function(w, state, step_value, like=_like(state))
        output = w.one_of("None", "c * 1.0", f"{function}(c, x)")
        step, xs = wrap.format(f"lambda c, x: ({function}(c, x), {output})"), xs_value.name
        if output != "None" and w.chance(0.7):
            w.say(f"lax.scan({step}, {start}, {xs}{options})", count=2) or w.say(f"lax.scan({step}, {start}, {xs}{options})[0]")
            return
    w.say(f"lax.scan({step}, {start}, {xs}{options})[0]")


@nested(2)
def fixed_steps(w):
    """`fori_loop` with a known number of steps."""
    state = w.value(0, 2)
    function = _function(w, state, like=_like(state))
    if w.chance(0.3):
        table = w.of_shape(3, *state.shape, weight=True)
        step = f"lambda i, c: {function}(c) + 0.5 * ({table})[i].astype(c.dtype)"
    else:
        step = f"lambda i, c: {function}(c)"
    w.say(f"lax.fori_loop(0, {w.one_of(1, 2, 3)}, {step}, {state.name})")


@piece(1)
def loop_before_the_parameters(w):
    """A while loop of unknown length, of values that are not differentiated."""
    a = w.value(0, 2)
    halved = f"lax.while_loop(lambda c: jnp.max(jnp.abs(c)) > 0.5, lambda c: 0.5 * c, lax.stop_gradient({a.name}))"
    w.say(f"{halved} + {w.of_shape(*a.shape)}")


@nested(3)
def cond(w):
    """A branch chosen by the example, or by the parameters, which is then the same for all examples."""
    a = w.any()
    predicate = w.one_of("k[0] > 1", "x.sum() > 0.0", f"jnp.sum({w.any().name}) > 0.1", "k[1] > 0")
    dtype = "float64" if w.chance(0.8) or not w.book.dtype else w.book.dtype
    like = (a.shape if w.chance(0.6) else w.shape(0, 2), dtype)
    branches = [_function(w, a, like=like) for _ in range(w.one_of(2, 2, 3))]
    if len(branches) == 2:
        w.say(f"lax.cond({predicate}, {branches[0]}, {branches[1]}, {a.name})")
    else:
        w.say(f"lax.switch(k[0] % 3, [{', '.join(branches)}], {a.name})")


@nested(2)
def mapped(w):
    a, b = w.any(1, 3), w.any(0, 2)
    one = type(a)("", a.shape[1:], a.dtype)
    function = _function(w, one, b)
    if w.chance(0.4):
        options = w.one_of("", ", batch_size=2")
        w.say(f"lax.map(lambda a: {function}(a, {b.name}), {a.name}{options})")
    else:
        w.say(f"jax.vmap({function}, (0, None), {w.one_of(0, 0, -1)})({a.name}, {b.name})")


@nested(3)
def vmap(w):
    """`vmap` in one or two levels, over one operand or both, and over an axis that is not the first."""
    a = w.any(1, 3)
    axis = w.axis(a, signed=False)
    one = type(a)("", a.shape[:axis] + a.shape[axis + 1 :], a.dtype)
    other = w.any(0, 2)
    wide = w.of_shape(a.shape[axis], *other.shape, weight=w.chance(0.5), real=False)
    how = w.one_of("one", "both", "two", "mean")
    if how == "mean":
        name = w.one_of("lax.pmean", "lax.psum", "lax.pmax")
        w.say(f"jax.vmap(lambda a: a - 0.5 * {name}(a, 'i'), in_axes={axis}, axis_name='i')({a.name})")
        return
    function = _function(w, one, other)
    if how == "both":
        w.say(f"jax.vmap({function}, ({axis}, 0))({a.name}, {wide})")
    elif how == "one":
        w.say(f"jax.vmap({function}, ({axis}, None))({a.name}, {other.name})")
    else:
        w.say(f"jax.vmap(jax.vmap({function}, (None, 0)), ({axis}, None))({a.name}, {wide})")


# Custom rules.


@piece(1.5)
def custom_jvp(w):
    a = w.value()
    name = w.name("f")
    value, slope = w.one_of(("jnp.tanh(a)", "1.0 - y * y"), ("jnp.sin(a)", "jnp.cos(a)"), ("jnp.square(a)", "a"), ("a", "3.0"))
    text = [
        "@jax.custom_jvp",
        f"def {name}(a):",
        f"    return {value}",
        f"def {name}_jvp(primals, tangents):",
        "    (a,), (t,) = primals, tangents",
        f"    y = {name}(a)",
        f"    return y, (({slope}) * t).astype(y.dtype)",
        f"{name}.defjvp({name}_jvp)",
    ]
    w.write(text)
    w.say(f"{name}({a.name})")


COTANGENTS = (
    "g",
    "0.5 * g",
    "g * (jnp.abs(a) < 1.0)",
    "jnp.clip(g, -0.1, 0.1)",
    "jnp.round(8.0 * g) / 8.0",
    "(8.0 * g).astype(jnp.int8).astype(g.dtype) / 8.0",
    "(16.0 * g).astype(jnp.int32).astype(g.dtype) / 16.0",
    "(g > 0.0).astype(g.dtype)",
    "g.astype(bool).astype(g.dtype)",
    "g.astype(jnp.float8_e4m3fn).astype(g.dtype)",
    "g.astype(jnp.float8_e5m2).astype(g.dtype)",
    "g.astype(jnp.bfloat16).astype(g.dtype)",
    "g / (0.1 + jnp.sqrt(jnp.sum(jnp.square(g)) + 1e-3))",
    "jnp.sign(g)",
    "jnp.tanh(g)",
    "g - jnp.mean(g)",
    "jnp.sort(jnp.ravel(g)).reshape(jnp.shape(g))",
    "jnp.where(a > 0.0, g, 0.2 * g)",
    "jnp.square(g)",
    "lax.reduce_precision(g, 8, 7)",
)
FORWARDS = ("a", "jnp.round(4.0 * a) / 4.0", "jnp.sign(a)", "(4.0 * a).astype(jnp.int8).astype(a.dtype) / 4.0", "jnp.tanh(a)")


@piece(3)
def custom_vjp(w):
    """A function with its own backward pass, such as straight-through or quantised gradients."""
    a = w.value()
    name = w.name("f")
    forward, back = w.one_of(*FORWARDS), w.one_of(*COTANGENTS)
    text = [
        "@jax.custom_vjp",
        f"def {name}(a):",
        f"    return {forward}",
        f"{name}.defvjp(lambda a: ({name}(a), a), lambda a, g: (({back}).astype(a.dtype),))",
    ]
    w.write(text)
    w.say(f"{name}({a.name})")


@piece(2)
def custom_dense(w):
    """A dense layer whose backward pass makes the weight's gradient itself, perhaps in a narrow or quantised way."""
    x = w.value(1, 1)
    outputs, name = w.size(), w.name("f")
    weight = w.of_shape(x.shape[0], outputs, weight=True)
    outer = w.one_of(
        "jnp.outer(x, g)",
        "x[:, None] * g[None]",
        "jnp.outer(x, g.astype(jnp.bfloat16).astype(g.dtype))",
        "jnp.outer((8.0 * x).astype(jnp.int8).astype(x.dtype) / 8.0, g)",
        "jnp.outer(x, g).astype(jnp.float8_e4m3fn).astype(g.dtype)",
        "(16.0 * jnp.outer(x, g)).astype(int).astype(g.dtype) / 16.0",
        "jnp.outer(x, g) / (0.5 + jnp.max(jnp.abs(jnp.outer(x, g))))",
    )
    text = [
        "@jax.custom_vjp",
        f"def {name}(x, w):",
        "    return x @ w",
        f"{name}.defvjp(lambda x, w: (x @ w, (x, w)), "
        f"lambda r, g: ((lambda x, w: ((w @ g).astype(x.dtype), ({outer}).astype(w.dtype)))(*r)))",
    ]
    w.write(text)
    w.say(f"{name}({x.name}, {weight})")


# Derivatives inside the density.


@nested(3)
def derivative(w):
    """A derivative with respect to an input or a value, as in physics-informed losses and forces."""
    a = w.value(0, 2)
    form = w.one_of(
        "jax.grad(lambda a: jnp.sum({f}(a)))({a})",
        "jax.jvp({f}, ({a},), (jnp.ones_like({a}),))[1]",
        "jax.hessian(lambda a: jnp.sum({f}(a)))({a})",
        "jnp.trace(jnp.reshape(jax.hessian(lambda a: jnp.sum({f}(a)))({a}), ({n}, {n})))",
        "jax.jacfwd({f})({a})",
        "jax.jacrev({f})({a})",
        "jax.vjp({f}, {a})[1](jnp.ones_like({f}({a})))[0]",
        "jax.jvp(jax.grad(lambda a: jnp.sum({f}(a))), ({a},), (jnp.ones_like({a}),))[1]",
        "jax.linearize({f}, {a})[1](jnp.ones_like({a}))",
        "jax.value_and_grad(lambda a: jnp.sum({f}(a)))({a})[1]",
    )
    function = _function(w, a, only=SMOOTH)
    w.say(form.format(f=function, a=a.name, n=a.size))


@nested(1)
def gradient_step(w):
    """A weight after one step on the example itself, as in meta-learning."""
    weight = w.rng.choice(w.leaves()) if w.leaves() else w.leaf(w.shape(1, 2))
    if weight is not None and jnp.dtype(weight.dtype) == jnp.float64:
        function = _function(w, weight, only=SMOOTH)
        w.say(f"{weight.name} - 0.3 * jax.grad(lambda a: jnp.sum(jnp.square({function}(a) - x.sum())))({weight.name})")
