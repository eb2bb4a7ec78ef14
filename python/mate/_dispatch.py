"""Runs a call: directly where tensors are plain, as an operator of PyTorch where something traces or wraps them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from mate import _operators
from mate._calls import AttentionCall, CombineCall, SchedulerMetadataCall

_PLAIN = (Tensor, torch.nn.Parameter)


def run_attention(
    function: str, call: AttentionCall, out: Tensor | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """out, and lse where it is wanted."""
    if _is_traced(call.q):
        return _operators.attention(function, call, out, with_lse)
    inputs = call.differentiable() if torch.is_grad_enabled() else []
    if out is not None:
        _check_writable(out, inputs)
    lse = call.new_lse() if with_lse else None
    try:
        result = call.run(out, lse)
    except Exception:
        if _is_wrapped(call):
            return _operators.attention(function, call, out, with_lse)
        raise
    if out is not None:
        increment_version(out)
    if call.k_new is not None:
        increment_version((call.k, call.v))
    if inputs:
        results = (result,) if lse is None else (result, lse)
        result, *rest = _operators.without_backward(function, results, inputs)
        lse = rest[0] if rest else None
    return result, lse


def run_combine(function: str, call: CombineCall, out: Tensor | None, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out, and lse."""
    if _is_traced(call.out_partial):
        return _operators.combine(function, call, out, out_dtype)
    inputs = call.differentiable() if torch.is_grad_enabled() else []
    if out is not None:
        _check_writable(out, inputs)
    result = call.new_out(out_dtype) if out is None else out
    lse = call.new_lse()
    try:
        call.run(result, lse)
    except Exception:
        if _is_wrapped(call):
            return _operators.combine(function, call, out, out_dtype)
        raise
    if out is not None:
        increment_version(out)
    if inputs:
        result, lse = _operators.without_backward(function, (result, lse), inputs)
    return result, lse


def run_scheduler_metadata(call: SchedulerMetadataCall, out: Tensor | None) -> Tensor:
    if _is_traced(call.lengths()):
        return _operators.scheduler_metadata(call, out)
    try:
        result = call.run(out)
    except Exception:
        if _is_wrapped(call):
            return _operators.scheduler_metadata(call, out)
        raise
    if out is not None:
        increment_version(out)
    return result


def _is_traced(tensor: Tensor | None) -> bool:
    """Whether something watches operators: a compiler, a mode such as FakeTensorMode, or the tensor's own type."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or (tensor is not None and type(tensor) not in _PLAIN)
    )


def _is_wrapped(call: Sequence[object]) -> bool:
    """Whether some tensor has no memory of its own but stands for others. Asked only where a call has failed."""
    return any(
        isinstance(value, Tensor)
        and (type(value) not in _PLAIN or torch._C._functorch.is_functorch_wrapped_tensor(value))
        for value in call
    )


def _check_writable(out: Tensor, inputs: Sequence[Tensor]) -> None:
    if torch.is_grad_enabled() and out.requires_grad:
        raise ValueError("out must not require grad: it is overwritten")
    if inputs and out.is_inference():
        raise ValueError("out must not be an inference tensor where an input requires grad")
