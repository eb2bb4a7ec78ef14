"""What callers may write, made into what the library takes: numbers, aliases, windows, contiguous rows."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

# What callers may write for an integer, and for a number.
Index = SupportsIndex
Number = SupportsFloat


def integer(name: str, value: Index) -> int:
    if type(value) is int:
        return value
    if isinstance(value, torch.SymInt):  # of a graph that is being traced: a number would fix it
        return value  # type: ignore[return-value]
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {_describe(value)}") from None


def number(name: str, value: Number) -> float:
    if type(value) is float:
        return value
    if isinstance(value, torch.SymFloat):
        return value  # type: ignore[return-value]
    # float() takes strings too.
    if not hasattr(value, "__float__") and not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a number, got {_describe(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit a float, got a larger number") from None
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {_describe(value)}") from None


def boolean(name: str, value: object) -> bool:
    if value is True or value is False:
        return value
    if isinstance(value, (bool, torch.SymBool)):  # what follows from a size that is being traced is a bool, and neither
        return bool(value)
    # Nearly everything has a truth value: numbers, and elements of arrays, are meant to.
    is_scalar = hasattr(value, "__index__") or hasattr(value, "dtype")
    try:
        if is_scalar:
            return bool(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name} must be a bool, got {_describe(value)}")


def window(window_size: Sequence[Any]) -> tuple[Any, Any]:
    """(left, right), where a negative number is no bound, as is None."""
    try:
        left, right = window_size
    except TypeError:
        raise TypeError(f"window_size must be a sequence of two integers, got {_describe(window_size)}") from None
    except ValueError:
        raise ValueError(f"window_size must have two elements, got {window_size!r}") from None
    return -1 if left is None else left, -1 if right is None else right


def chunk(attention_chunk: Index | None) -> Index:
    return 0 if attention_chunk is None else attention_chunk


def same_length(name: str, value: Index, batch: int, device: torch.device | None, capacity: int = 2**31 - 1) -> Tensor:
    """One length for all sequences, as a tensor (batch,)."""
    length = integer(name, value)
    if not 0 <= length <= capacity:
        raise ValueError(f"{name} must be from 0 to {capacity}, got {length}")
    return torch.full((batch,), length, dtype=torch.int32, device=device)


def dtype(name: str, value: torch.dtype) -> torch.dtype:
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype, got {_describe(value)}")
    return value


def one_of(**aliases: Any) -> Any:
    """The one of several names for an argument under which it was given; None where it was not."""
    given = {name: value for name, value in aliases.items() if value is not None}
    if len(given) > 1:
        raise TypeError(f"{' and '.join(given)} are names of one argument: give one of them")
    return next(iter(given.values()), None)


def contiguous_rows(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where its last dimension is not contiguous."""
    try:
        # The first question is the cheaper one, and enough for most.
        if tensor.is_contiguous() or tensor.stride(-1) == 1:
            return tensor
        return tensor.contiguous()
    except RuntimeError:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}") from None
    except AttributeError:
        pass
    raise _no_tensor(name, tensor)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise _no_tensor(name, value)


def _no_tensor(name: str, value: object) -> TypeError:
    return TypeError(f"{name} must be a torch.Tensor, got {_describe(value)}")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"{value!r}" if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"
