"""Gathers, scatters, sorts and convolutions in NumPy, by loops over positions: programs are small, and compiling is dear."""

import itertools

import numpy as np


def _windows(operand, indices, numbers, sizes, offset_dims):
    """For each position in the batch: its index, the window's corner as given, and the largest corner at which it fits."""
    batch_axes = [axis for axis in range(len(offset_dims) + indices.ndim - 1) if axis not in offset_dims]
    own = numbers.operand_batching_dims
    if hasattr(numbers, "start_index_map"):
        of_indices, index_map = numbers.start_indices_batching_dims, numbers.start_index_map
    else:
        of_indices, index_map = numbers.scatter_indices_batching_dims, numbers.scatter_dims_to_operand_dims
    room = np.array(operand.shape) - np.array(sizes)
    for place in np.ndindex(*indices.shape[:-1]):
        corner = np.zeros(operand.ndim, int)
        corner[list(index_map)] = indices[place]
        for axis, of in zip(own, of_indices, strict=True):
            corner[axis] = place[of]
        where = [slice(None)] * (len(offset_dims) + len(place))
        for axis, i in zip(batch_axes, place, strict=True):
            where[axis] = i
        yield tuple(where), corner, room


def _kept(shape, collapsed):
    return [size for axis, size in enumerate(shape) if axis not in collapsed]


def gather(operand, indices, *, dimension_numbers, slice_sizes, mode, fill_value=None, **_):
    """XLA's gather; a window that does not fit is clipped or filled as ``mode`` says."""
    numbers = dimension_numbers
    collapsed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    window = _kept(slice_sizes, collapsed)
    ndim = len(numbers.offset_dims) + indices.ndim - 1
    batch = iter(indices.shape[:-1])
    offsets = iter(window)
    shape = [next(offsets) if axis in numbers.offset_dims else next(batch) for axis in range(ndim)]
    made = np.zeros(shape, operand.dtype)
    filling = "FILL" in str(mode).upper()
    for where, corner, room in _windows(operand, indices, numbers, slice_sizes, numbers.offset_dims):
        if filling and (np.any(corner < 0) or np.any(corner > room)):
            made[where] = _filling(operand.dtype) if fill_value is None else fill_value
            continue
        start = np.clip(corner, 0, room)
        made[where] = operand[tuple(map(slice, start, start + np.array(slice_sizes)))].reshape(window)
    return made


def _filling(dtype):
    """JAX's default fill value: NaN for floats, the least signed integer, or the largest unsigned one."""
    if dtype.kind == "b":
        return True
    if not np.issubdtype(dtype, np.integer):
        return np.nan
    return np.iinfo(dtype).min if np.issubdtype(dtype, np.signedinteger) else np.iinfo(dtype).max


def scatter_with(update):
    """XLA's scatter with ``update(old, new)``; a window that does not fit is dropped or clipped as ``mode`` says."""

    def scatter(operand, indices, updates, *, dimension_numbers, mode, **_):
        numbers = dimension_numbers
        collapsed = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
        own = iter(updates.shape[axis] for axis in numbers.update_window_dims)
        sizes = [1 if axis in collapsed else next(own) for axis in range(operand.ndim)]
        made = operand.copy()
        clipping = "CLIP" in str(mode).upper()
        for where, corner, room in _windows(operand, indices, numbers, sizes, numbers.update_window_dims):
            if not clipping and (np.any(corner < 0) or np.any(corner > room)):
                continue
            start = np.clip(corner, 0, room)
            window = tuple(map(slice, start, start + np.array(sizes)))
            made[window] = update(made[window], updates[where].reshape(sizes))
        return made

    return scatter


def sort(operands, *, dimension, num_keys, **_):
    """A stable sort of several arrays by the first ``num_keys`` of them."""
    order = np.argsort(operands[num_keys - 1], axis=dimension, kind="stable")
    for key in reversed(operands[: num_keys - 1]):
        again = np.argsort(np.take_along_axis(key, order, dimension), axis=dimension, kind="stable")
        order = np.take_along_axis(order, again, dimension)
    return [np.take_along_axis(operand, order, dimension) for operand in operands]


def fourier(x, *, fft_type, fft_lengths):
    """One of the four transforms over the last axes."""
    axes, name = tuple(range(-len(fft_lengths), 0)), str(fft_type).rsplit(".", maxsplit=1)[-1].lower()
    name = {"0": "fft", "1": "ifft", "2": "rfft", "3": "irfft"}.get(name, name)
    return getattr(np.fft, f"{name}n")(x, s=fft_lengths, axes=axes)


def convolution(
    image,
    kernel,
    *,
    window_strides,
    padding,
    lhs_dilation,
    rhs_dilation,
    dimension_numbers,
    feature_group_count,
    batch_group_count,
    **_,
):
    """A convolution with strides, padding, dilations and groups, as a product at each position of the output."""
    numbers = dimension_numbers
    image, kernel = image.transpose(numbers.lhs_spec), kernel.transpose(numbers.rhs_spec)
    image = _spread(image, lhs_dilation, padding)
    kernel = _spread(kernel, rhs_dilation, [(0, 0)] * len(rhs_dilation))
    window, strides = kernel.shape[2:], window_strides
    counts = [max(0, (n - m) // stride + 1) for n, m, stride in zip(image.shape[2:], window, strides, strict=True)]
    batch, outputs = image.shape[0] // batch_group_count, kernel.shape[0]
    made = np.zeros((batch, outputs, *counts), image.dtype)
    groups = max(feature_group_count, batch_group_count)
    features, wide = kernel.shape[1], outputs // groups
    for place in np.ndindex(*counts):
        cut = tuple(slice(i * stride, i * stride + m) for i, stride, m in zip(place, strides, window, strict=True))
        patch = image[(slice(None), slice(None), *cut)]
        for group in range(groups):
            mine = patch[:, group * features : (group + 1) * features] if feature_group_count > 1 else patch
            mine = mine[group * batch : (group + 1) * batch] if batch_group_count > 1 else mine
            part = slice(group * wide, (group + 1) * wide)
            made[(slice(None), part, *place)] = np.tensordot(mine, kernel[part], (range(1, mine.ndim), range(1, kernel.ndim)))
    return made.transpose(np.argsort(numbers.out_spec))


def _spread(array, dilations, padding):
    """The array with zeros between its entries, and before and after them; negative padding removes entries."""
    shape = [(n - 1) * step + 1 if n else 0 for n, step in zip(array.shape[2:], dilations, strict=True)]
    wide = np.zeros((*array.shape[:2], *shape), array.dtype)
    wide[(slice(None), slice(None), *(slice(None, None, step) for step in dilations))] = array
    wide = np.pad(wide, [(0, 0), (0, 0), *((max(low, 0), max(high, 0)) for low, high in padding)])
    ends = [(max(-low, 0), n - max(-high, 0)) for n, (low, high) in zip(wide.shape[2:], padding, strict=True)]
    return wide[(slice(None), slice(None), *itertools.starmap(slice, ends))]
