"""The calls as operators of PyTorch, for what traces them: torch.compile, torch.export, tensor subclasses.

An ordinary call never comes here: the dispatcher would cost it microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mate._calls import AttentionCall, CombineCall, SchedulerMetadataCall, fields_of

_operators = torch.library.Library("mate", "FRAGMENT")

# SymInt: a size or a length may be symbolic while a graph is traced.
_SCHEMA_TYPES = {
    "str": "str",
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "Sequence[Tensor]": "Tensor[]",
    "bool": "bool",
    "bool | None": "bool?",
    "int": "SymInt",
    "Index": "SymInt",
    "Index | None": "SymInt?",
    "Number": "float",
    "Number | None": "float?",
    "torch.dtype": "ScalarType",
    "torch.dtype | None": "ScalarType?",
}


def _define(
    name: str,
    fields: dict[str, str],
    mutated: Sequence[str],
    returns: str,
    make: Callable[..., Any],
) -> Any:
    """The operator mate::name. ``make(run, *values)`` makes its results, and fills them where ``run`` is true."""
    parameters = []
    for field, kind in fields.items():
        schema_type = _SCHEMA_TYPES[kind]
        if field in mutated:
            schema_type = schema_type.replace("Tensor", f"Tensor({chr(ord('a') + mutated.index(field))}!)")
        parameters.append(f"{schema_type} {field}")
    _operators.define(f"{name}({', '.join(parameters)}) -> {returns}")
    _operators.impl(name, lambda *values: make(True, *values), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mate::{name}", lambda *values: make(False, *values), lib=_operators)
    return getattr(torch.ops.mate, name).default


# Backward raises, and as an operator: what traces a graph traces its backward too, long before anybody runs it. It
# takes the gradients of the results, without which a compiler could run it ahead.


def raise_no_backward(function: str, grads: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor]:
    raise NotImplementedError(f"{function} has no backward: MATE computes the forward pass only")


_operators.define("no_backward(str function, Tensor?[] grads, Tensor[] inputs) -> Tensor[]")
_operators.impl("no_backward", raise_no_backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "mate::no_backward", lambda function, grads, inputs: [torch.empty_like(x) for x in inputs], lib=_operators
)


def _register_no_backward(name: str) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, ctx.count = inputs[0], len(inputs)
        ctx.differentiable = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        ctx.save_for_backward(*(inputs[i] for i in ctx.differentiable))

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = torch.ops.mate.no_backward(ctx.function, list(grads), list(ctx.saved_tensors))
        by_input = dict(zip(ctx.differentiable, gradients))
        return tuple(by_input.get(i) for i in range(ctx.count))

    torch.library.register_autograd(f"mate::{name}", backward, setup_context=setup_context, lib=_operators)


class _NoBackward(torch.autograd.Function):
    """Makes a result that exists depend, for autograd, on inputs that require grad."""

    @staticmethod
    def forward(ctx: Any, function: str, result: Tensor, *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.mark_dirty(result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return raise_no_backward(ctx.function, grads, ())


def without_backward(function: str, results: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of an eager call on inputs that require grad, such that backward raises NotImplementedError."""
    # One by one: autograd lets a function write to a view only if that is its one result.
    apply: Callable[..., Tensor] = _NoBackward.apply
    return tuple(apply(function, result, *inputs) for result in results)


# The same for operators that write to their arguments and so have no place for a backward: results go through this.
_define(
    "without_backward",
    {"function": "str", "result": "Tensor", "inputs": "Sequence[Tensor]"},
    (),
    "Tensor",
    lambda run, function, result, inputs: result.clone(),
)


def _register_no_backward_of_inputs() -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function = inputs[0]
        ctx.save_for_backward(*inputs[2])

    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        return None, None, torch.ops.mate.no_backward(ctx.function, [grad], list(ctx.saved_tensors))

    torch.library.register_autograd("mate::without_backward", backward, setup_context=setup_context, lib=_operators)


_register_no_backward_of_inputs()


# Attention: an operator for each set of arguments that is written to, since a graph copies what may be written.


def _make_attention(run: bool, function: str, *values: Any) -> tuple[Tensor, Tensor]:
    *fields, with_lse = values
    call = AttentionCall(*fields)
    out = call.new_out()
    return out, _make_lse(run, call, with_lse, out)


def _make_attention_out(run: bool, function: str, *values: Any) -> Tensor:
    *fields, with_lse, out = values
    return _make_lse(run, AttentionCall(*fields), with_lse, out)


def _make_lse(run: bool, call: AttentionCall, with_lse: bool, out: Tensor) -> Tensor:
    # An operator's result is always a tensor: one without elements stands for an lse that is not wanted.
    lse = call.new_lse() if with_lse else call.q.new_empty(0, dtype=torch.float32)
    if run:
        call.run(out, lse if with_lse else None)
    return lse


_ATTENTION = {"function": "str", **fields_of(AttentionCall), "with_lse": "bool"}
_ATTENTION_OUT = {**_ATTENTION, "out": "Tensor"}
_attention = _define("attention", _ATTENTION, (), "(Tensor, Tensor)", _make_attention)
_attention_append = _define("attention_append", _ATTENTION, ("k", "v"), "(Tensor, Tensor)", _make_attention)
_attention_out = _define("attention_out", _ATTENTION_OUT, ("out",), "Tensor", _make_attention_out)
_attention_append_out = _define(
    "attention_append_out", _ATTENTION_OUT, ("k", "v", "out"), "Tensor", _make_attention_out
)
_register_no_backward("attention")


def attention(function: str, call: AttentionCall, out: Tensor | None, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    appends = call.k_new is not None
    if not appends and out is None:
        result, lse = _attention(function, *call, with_lse)
        return result, lse if with_lse else None

    inputs = call.differentiable() if torch.is_grad_enabled() else []
    detached = _detached(call)
    if out is None:
        result, lse = _attention_append(function, *detached, with_lse)
    else:
        operator = _attention_append_out if appends else _attention_out
        # What has a derivative is copied to out, whose history then tells.
        result = torch.empty_like(out, requires_grad=False) if inputs else out
        lse = operator(function, *detached, with_lse, result)
    if inputs:
        result = torch.ops.mate.without_backward(function, result, inputs)
        lse = torch.ops.mate.without_backward(function, lse, inputs)
        result = result if out is None else out.copy_(result)
    return result, lse if with_lse else None


def _detached(call: AttentionCall | CombineCall) -> list[Any]:
    return [x.detach() if isinstance(x, Tensor) and x.requires_grad else x for x in call]


# Combine.


def _make_combined(
    run: bool, function: str, out_partial: Tensor, lse_partial: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    call = CombineCall(out_partial, lse_partial)
    out = call.new_out(out_dtype)
    return out, _make_combined_out(run, function, out_partial, lse_partial, out)


def _make_combined_out(run: bool, function: str, out_partial: Tensor, lse_partial: Tensor, out: Tensor) -> Tensor:
    call = CombineCall(out_partial, lse_partial)
    lse = call.new_lse()
    if run:
        call.run(out, lse)
    return lse


_COMBINE = {"function": "str", **fields_of(CombineCall)}
_combine = _define("combine", {**_COMBINE, "out_dtype": "torch.dtype"}, (), "(Tensor, Tensor)", _make_combined)
_combine_out = _define("combine_out", {**_COMBINE, "out": "Tensor"}, ("out",), "Tensor", _make_combined_out)
_register_no_backward("combine")


def combine(function: str, call: CombineCall, out: Tensor | None, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if out is None:
        results: tuple[Tensor, Tensor] = _combine(function, *call, out_dtype)
        return results
    inputs = call.differentiable() if torch.is_grad_enabled() else []
    if not inputs:
        return out, _combine_out(function, *call, out)
    result = torch.empty_like(out, requires_grad=False)
    lse = _combine_out(function, *_detached(call), result)
    result = torch.ops.mate.without_backward(function, result, inputs)
    return out.copy_(result), torch.ops.mate.without_backward(function, lse, inputs)


# Scheduler metadata.


def _make_metadata(run: bool, *values: Any) -> Tensor:
    call = SchedulerMetadataCall(*values)
    out = call.new_out()
    if run:
        call.run(out)
    return out


def _make_metadata_out(run: bool, *values: Any) -> None:
    *fields, out = values
    if run:
        SchedulerMetadataCall(*fields).run(out)


_METADATA = fields_of(SchedulerMetadataCall)
_scheduler_metadata = _define("scheduler_metadata", _METADATA, (), "Tensor", _make_metadata)
_scheduler_metadata_out = _define(
    "scheduler_metadata_out", {**_METADATA, "out": "Tensor"}, ("out",), "()", _make_metadata_out
)


def scheduler_metadata(call: SchedulerMetadataCall, out: Tensor | None) -> Tensor:
    if out is None:
        metadata: Tensor = _scheduler_metadata(*call)
        return metadata
    _scheduler_metadata_out(*call, out)
    return out
