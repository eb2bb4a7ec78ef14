"""Runs a call: directly where tensors are plain, as an operator of PyTorch where something traces them."""

from __future__ import annotations

import torch
from torch import Tensor

from mate import _operators
from mate._calls import AttentionCall, CombineCall, SchedulerMetadataCall

_PLAIN = (Tensor, torch.nn.Parameter)


def _is_traced(tensor: Tensor | None) -> bool:
    return torch.compiler.is_compiling() or (tensor is not None and type(tensor) not in _PLAIN)


def run_attention(
    function: str, call: AttentionCall, out: Tensor | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """out, and lse where it is wanted."""
    if _is_traced(call.q):
        return _operators.attention(function, call, out, with_lse)
    lse = call.new_lse() if with_lse else None
    result = call.run(out, lse)
    if torch.is_grad_enabled() and call.requires_grad():
        results = (result,) if lse is None else (result, lse)
        result, *rest = _operators.without_backward(function, results, call.differentiable())
        lse = rest[0] if rest else None
    return result, lse


def run_combine(function: str, call: CombineCall, out: Tensor | None, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if _is_traced(call.out_partial):
        return _operators.combine(function, call, out, out_dtype)
    result = call.new_out(out_dtype) if out is None else out
    lse = call.new_lse()
    call.run(result, lse)
    if torch.is_grad_enabled():
        inputs = [x for x in call if x.requires_grad]
        if inputs:
            result, lse = _operators.without_backward(function, (result, lse), inputs)
    return result, lse


def run_scheduler_metadata(call: SchedulerMetadataCall, out: Tensor | None) -> Tensor:
    if _is_traced(call.cache_seqlens):
        return _operators.scheduler_metadata(call, out)
    result = call.new_out() if out is None else out
    call.run(result)
    return result
