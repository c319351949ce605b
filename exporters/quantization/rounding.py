"""Weights to few bits: the step that loses least, and rounding that makes up for what was lost before.

The second is GPTQ (arXiv:2210.17323): weights along the input are rounded one after the other, and what each rounding
changes in the layer's output is taken back by the weights that are still to come, as far as the inputs' second moments
say. Those are known by stretches of the input (`cvx_deploy.quantize.table`), and each stretch is rounded by itself.
Inside a stretch the inputs of the largest second moment come first, as GPTQ's authors advise ("act order").

torchao 0.18 has GPTQ too, and asserts a CUDA device; other libraries round whole models that they hold in memory.
"""

import torch

Limits = tuple[int, int]

_SHRUNK = 16  # steps that are tried, from the one that clips nothing down, by a 32nd of it each
_DAMPING = 0.01  # of the mean second moment, added to each: GPTQ's choice
_AT_ONCE = 1 << 18  # weights that are worked on together, so that they stay in the processor's cache


def least_error_step(weight: torch.Tensor, group: int, limits: Limits) -> torch.Tensor:
    """Return the step of each group, ``(out, in / group)``, with which rounding to nearest changes the weights least.

    A step that is smaller than a group's largest weight needs clips that weight, and is nearer to all others. Judged by
    the sum of squares.

    Args:
        weight: Float32 ``(out, in)``.
        group: How many weights along the input share a step; it divides ``in``.
        limits: Of the integers.
    """
    parts = weight.chunk(_parts(weight))
    return torch.cat([_step_of_rows(some.reshape(len(some), -1, group), limits) for some in parts])


def _parts(weight: torch.Tensor) -> int:
    """Return into how many parts, of whole rows, work on weights is divided."""
    return -(-weight.numel() // _AT_ONCE)


def _step_of_rows(weight: torch.Tensor, limits: Limits) -> torch.Tensor:
    whole = weight.abs().amax(-1, keepdim=True) / limits[1]
    best, least = whole, torch.full_like(whole, torch.inf)
    for index in range(_SHRUNK):
        step = (whole * (1 - index / 32)).clamp(min=torch.finfo(weight.dtype).tiny)
        error = (to_nearest(weight, step, limits) * step - weight).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best[..., 0]


def to_nearest(weight: torch.Tensor, step: torch.Tensor, limits: Limits) -> torch.Tensor:
    """Return weights in steps, rounded to the nearest integer, halves to even, and clipped."""
    return (weight / step).round().clamp(*limits)


def rounded_by_moments(weight: torch.Tensor, step: torch.Tensor, moments: torch.Tensor, limits: Limits) -> torch.Tensor:
    """Return weights in steps as integers in float32, ``(out, in)``, that change the layer's outputs little.

    Args:
        weight: Float32 ``(out, in)``.
        step: Of each group, ``(out, groups)``.
        moments: The inputs' second moments by stretches, ``(stretches, size, size)``; a size holds whole groups.
        limits: Of the integers.
    """
    stretches, size, _ = moments.shape
    order = moments.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(stretches, device=order.device)[:, None] * size
    order_of_all = (order + first).flatten()
    factor = _factor(moments, order)
    steps = step.repeat_interleave(weight.shape[1] // step.shape[1], 1)
    result = torch.empty_like(weight)
    parts = _parts(weight)
    for some, its_steps, target in zip(weight.chunk(parts), steps.chunk(parts), result.chunk(parts), strict=True):
        laid_out = [part[:, order_of_all].reshape(-1, stretches, size).permute(2, 1, 0) for part in (some, its_steps)]
        rounded = _one_after_the_other(laid_out[0].contiguous(), laid_out[1].contiguous(), factor, limits)
        target[:, order_of_all] = rounded.permute(2, 1, 0).reshape(len(some), -1)
    return result


def _factor(moments: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the upper Cholesky factor of each stretch's inverted moments, damped, in the order given.

    Its row i is what the inputs after i can do against an error at i, given those before are settled; see GPTQ.
    """
    picked = moments.double().gather(1, order[:, :, None].expand_as(moments))
    picked = picked.gather(2, order[:, None, :].expand_as(moments))
    diagonal = picked.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    diagonal += torch.where(mean > 0, _DAMPING * mean, 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(picked))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor


def _one_after_the_other(left: torch.Tensor, steps: torch.Tensor, factor: torch.Tensor, limits: Limits) -> torch.Tensor:
    """Round weights ``(size, stretches, rows)`` along their first axis; `left` is used up."""
    result = torch.empty_like(left)
    for index in range(len(left)):
        result[index] = to_nearest(left[index], steps[index], limits)
        lost = (left[index] - result[index] * steps[index]) / factor[:, index, index, None]
        left[index + 1 :] -= factor[:, index, index + 1 :].T[:, :, None] * lost
    return result
