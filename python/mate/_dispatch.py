"""Runs a call: directly where tensors are plain, as an operator of PyTorch where something traces or wraps them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from mate import _operators
from mate._calls import AttentionCall, CombineCall, SchedulerMetadataCall

_PLAIN = (Tensor, torch.nn.Parameter)


def run_attention(
    function: str, call: AttentionCall, out: Tensor | None, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """out, and lse where it is wanted."""
    _check_forward_mode(function, call)
    if _is_traced(call.q):
        return _operators.attention(function, call.plain(), out, with_lse)
    inputs = call.differentiable() if torch.is_grad_enabled() else []
    if out is not None:
        _check_writable(out, inputs)
    lse = call.new_lse() if with_lse else None
    try:
        result = call.run(out, lse)
    except Exception:
        if _is_wrapped(call):
            _check_functional_grad(function, call)
            return _operators.attention(function, call.plain(), out, with_lse)
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
    _check_forward_mode(function, call)
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
            _check_functional_grad(function, call)
            return _operators.combine(function, call, out, out_dtype)
        raise
    if out is not None:
        increment_version(out)
    if inputs:
        result, lse = _operators.without_backward(function, (result, lse), inputs)
    return result, lse


def run_scheduler_metadata(call: SchedulerMetadataCall, out: Tensor | None) -> Tensor:
    if _is_traced(call.lengths()):
        return _operators.scheduler_metadata(call.plain(), out)
    try:
        result = call.run(out)
    except Exception:
        if _is_wrapped(call):
            return _operators.scheduler_metadata(call.plain(), out)
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


# Backward raises when somebody runs it. Forward mode and torch.func compute derivatives with the call itself.


def _check_forward_mode(function: str, call: Sequence[object]) -> None:
    if forward_ad._current_level < 0:
        return
    for value in call:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(f"{function} has no forward-mode derivative: MATE computes the forward pass only")


def _check_functional_grad(function: str, call: Sequence[object]) -> None:
    for value in call:
        if isinstance(value, Tensor) and torch._C._functorch.is_gradtrackingtensor(value):
            _operators.raise_no_backward(function, (), ())


def _check_writable(out: Tensor, inputs: Sequence[Tensor]) -> None:
    # What a leaf is computed from nobody knows; another tensor's past is overwritten with it.
    leaf = out if out._base is None else out._base
    if torch.is_grad_enabled() and leaf.is_leaf and leaf.requires_grad:
        raise ValueError("out must not be a leaf that requires grad, nor a view of one: it is overwritten")
    autograd = torch._C._autograd
    if inputs and out._is_view() and autograd._get_creation_meta(out) != autograd.CreationMeta.DEFAULT:
        raise ValueError(
            "out must not be a view that was made without grad, or one of several that one function made, where an "
            "input requires grad: PyTorch lets nobody write to it"
        )
    if inputs and out.is_inference():
        raise ValueError("out must not be an inference tensor where an input requires grad")
