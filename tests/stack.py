"""Room on the interpreter's stack, and one place for all operations: together they spare a trace a quarter of its time.

And one context in which programs are lowered.
"""

import functools
import gc

from jax._src.interpreters import mlir
from jax.extend import source_info_util


def with_room(function):
    """The same function, with half a megabyte of stack for all that it calls.

    CPython keeps the frames of calls in chunks of 16 kB, and gives a chunk back to the system as soon as no frame is in it. A
    trace is hundreds of frames deep, and its small calls cross the end of a chunk again and again: each time takes as long as
    forty calls. A frame that is larger than a chunk gets one of its own, in which there is room for those above it.
    """

    def call(*args, **kwargs):
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_stacksize=2**16)
    return functools.wraps(function)(call)


def one_place():
    """Inside, all operations are said to be traced here: to find out where takes a tenth of a trace, and no test reads it."""
    return source_info_util.user_context(source_info_util.current().traceback)


def look_for_garbage_seldom():
    """And not among what was imported: otherwise looking takes a tenth of all the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def lower_in_one_context():
    """JAX 0.10 makes a new context of MLIR, with all dialects, for each program: for a small one that is half of lowering it.

    Later versions use one ten times, since it keeps the constants of what was lowered in it.
    """
    if not hasattr(mlir, "_create_ir_context"):
        mlir.make_ir_context = functools.lru_cache(maxsize=1)(mlir.make_ir_context)


def forget_context():
    """Let go of what the context keeps."""
    if hasattr(mlir.make_ir_context, "cache_clear"):
        mlir.make_ir_context.cache_clear()


def run(script):
    """A script's own function, in the same way as a test."""
    lower_in_one_context()
    look_for_garbage_seldom()
    with one_place():
        with_room(script)()
