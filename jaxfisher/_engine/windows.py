"""The windows of a convolution: the left factors of a kernel's gradient, stored as the image that they are cut from."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxfisher._pytree import array_fields


@array_fields("image", eq=False)
class Windows:
    """An image seen through the window of a convolution; `array` makes the windows, which take many times the image's memory.

    ``image`` has axes ``[rows, depth, *spatial]`` and is already padded and dilated. Output ``p`` at offset ``k`` of the window
    reads ``p * stride + k * dilation`` along each spatial axis. Groups split the rows or the depth.
    """

    image: Array
    outputs: tuple[int, ...]
    offsets: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    row_groups: int
    depth_groups: int

    @property
    def size(self) -> int:
        """How many numbers `array` gives for one row."""
        rows, depth = self.image.shape[-2 - len(self.outputs) : -len(self.outputs)]
        return rows * depth * math.prod(self.outputs) * math.prod(self.offsets) // max(self.row_groups, self.depth_groups)

    def array(self) -> Array:
        """The windows, ``[groups, depth * offsets, rows, *outputs]``."""
        x = self.image
        for axis in range(len(self.outputs)):
            # Every step replaces one spatial axis by two, (output, offset), appended at the end.
            x = _window(x, 2, self.outputs[axis], self.offsets[axis], self.strides[axis], self.dilations[axis])
        count = len(self.outputs)
        rows, depth = x.shape[:2]
        x = x.reshape(self.row_groups, rows // self.row_groups, self.depth_groups, depth // self.depth_groups, *x.shape[2:])
        outputs, offsets = [4 + 2 * k for k in range(count)], [5 + 2 * k for k in range(count)]
        x = x.transpose(0, 2, 3, *offsets, 1, *outputs)
        groups = self.row_groups * self.depth_groups
        return x.reshape(groups, -1, rows // self.row_groups, *self.outputs)

    def largest(self) -> Array:
        """The largest entries of the windows in absolute value at each of their offsets, ``[groups, depth * offsets]``."""
        shape = (self.image.shape[0] // self.row_groups, 1, *self.outputs)
        x = jax.lax.reduce_window(
            jnp.abs(self.image),
            jnp.zeros((), self.image.dtype),
            jax.lax.max,
            shape,
            (shape[0], 1, *self.dilations),
            "VALID",
            window_dilation=(1, 1, *self.strides),
        )
        x = x[(slice(None), slice(None), *(slice(size) for size in self.offsets))]
        return x.reshape(self.row_groups * self.depth_groups, -1)


def _window(x: Array, axis: int, outputs: int, offsets: int, stride: int, dilation: int) -> Array:
    """Replace ``axis`` by two axes at the end, ``[outputs, offsets]``, with one slice for each entry of the shorter one."""
    if outputs <= offsets:
        starts, step, length = [p * stride for p in range(outputs)], dilation, offsets
    else:
        starts, step, length = [k * dilation for k in range(offsets)], stride, outputs
    cuts = [
        jnp.moveaxis(jax.lax.slice_in_dim(x, start, start + step * (length - 1) + 1, step, axis), axis, -1) for start in starts
    ]
    return jnp.stack(cuts, axis=-2 if outputs <= offsets else -1)
