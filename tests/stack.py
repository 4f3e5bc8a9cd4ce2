"""Room on the interpreter's stack, and one source location for all operations: together they save a quarter of tracing time.

Also one MLIR context in which all programs are lowered.
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
    """A context that gives all operations one source location. Finding the real one takes a tenth of a trace."""
    return source_info_util.user_context(source_info_util.current().traceback)


def look_for_garbage_seldom():
    """Make Python's garbage collector run rarely, and ignore what was imported; otherwise it takes a tenth of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def lower_in_one_context():
    """Share one MLIR context between programs. JAX 0.10 makes one for each, which is half of the lowering of a small program.

    Later versions use a context ten times, since it keeps the constants of the programs that were lowered in it.
    """
    if not hasattr(mlir, "_create_ir_context"):
        mlir.make_ir_context = functools.lru_cache(maxsize=1)(mlir.make_ir_context)


def forget_context():
    """Free what the context keeps."""
    if hasattr(mlir.make_ir_context, "cache_clear"):
        mlir.make_ir_context.cache_clear()


def run(script):
    """Run a script's main function in the same way as a test."""
    lower_in_one_context()
    look_for_garbage_seldom()
    with one_place():
        with_room(script)()
