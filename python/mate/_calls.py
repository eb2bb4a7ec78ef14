"""What the library is asked to do: one named tuple for each of its functions, and the eager way to run it.

The fields and their order are those of the functions in src/python/binding.cpp; :mod:`mate._operators` derives the
schemas of PyTorch's operators from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mate import _library
from mate._arguments import Index, Number, boolean, integer, number

# How the calling function calls its arguments, for messages: AttentionCall.names, an index.
PLAIN_NAMES, CACHE_NAMES, PACKED_NAMES = range(3)
_USER_NAMES: tuple[dict[str, str], ...] = (
    {},
    {"k": "k_cache", "v": "v_cache", "k_new": "k", "v_new": "v", "seqused_k": "cache_seqlens"},
    {"q": "qkv", "k": "qkv", "v": "qkv"},
)


class AttentionCall(NamedTuple):
    """All that ``mate::attention`` takes but its results; include/mate/attention.h says what each field means.

    Make it by :func:`attention_call`: by keyword that takes two microseconds more.
    """

    # What all functions have comes first, so that the others need not say what they leave out.
    names: int
    q: Tensor
    k: Tensor
    v: Tensor
    qv: Tensor | None
    softmax_scale: Number | None
    causal: bool
    window_left: Index
    window_right: Index
    attention_chunk: Index
    softcap: Number
    q_descale: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None
    learnable_sink: Tensor | None
    cp_world_size: Index
    cp_rank: Index
    cp_tot_seqused_k: Tensor | None
    num_splits: Index
    pack_gqa: bool | None
    sm_margin: Index
    batch_invariant: bool
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    max_seqlen_q: Index | None = None
    max_seqlen_k: Index | None = None
    page_table: Tensor | None = None
    scheduler_metadata: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    k_new: Tensor | None = None
    v_new: Tensor | None = None
    cu_seqlens_k_new: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    rotary_seqlens: Tensor | None = None
    rotary_interleaved: bool = True

    def new_out(self) -> Tensor:
        """An uninitialised ``out``, as the library makes it, for what traces a call."""
        dtype = torch.bfloat16 if self.q.dtype is torch.float8_e4m3fn else self.q.dtype
        return self.q.new_empty(self.q.shape[:-1] + self.v.shape[-1:], dtype=dtype)

    def new_lse(self) -> Tensor:
        """An uninitialised ``lse``. Its shape means nothing where q has a wrong one, which the library refuses."""
        *batch, sq, h = self.q.shape[:-1] if self.q.dim() >= 3 else (0, 0)
        return self.q.new_empty((*batch, h, sq), dtype=torch.float32)

    def differentiable(self) -> list[Tensor]:
        """The inputs that require grad."""
        inputs = (self.q, self.k, self.v, self.qv, self.k_new, self.v_new, self.rotary_cos, self.rotary_sin)
        scales = (self.q_descale, self.k_descale, self.v_descale, self.learnable_sink)
        try:
            return [x for x in inputs + scales if x is not None and x.requires_grad]
        except AttributeError:
            return []  # something is no tensor: the library refuses it

    def plain(self) -> AttentionCall:
        """The call with plain numbers. Raises TypeError or ValueError, with the argument's name, for what is none."""
        return AttentionCall._make(_plain_values(self, _KINDS_OF_ATTENTION, self.names))

    def run(self, out: Tensor | None, lse: Tensor | None) -> Tensor:
        """Writes ``out`` (which the library makes where it is None), and ``lse`` where it is given. Returns out."""
        try:
            made: Tensor | None = _library.attention(*self, out, lse)
            return out if made is None else made  # type: ignore[return-value]
        except Exception as error:
            refusal = error
        # Here, so that what is raised now is not shown as a consequence of the refusal.
        return _plain_if_refused(refusal, self, out).run(out, lse)


if TYPE_CHECKING:
    attention_call = AttentionCall
else:
    _DEFAULTS = (
        *[None] * (len(AttentionCall._fields) - len(AttentionCall._field_defaults)),
        *AttentionCall._field_defaults.values(),
    )

    def attention_call(*fields: Any) -> AttentionCall:
        """An AttentionCall, by position, in half of the time that its own constructor takes."""
        return AttentionCall._make(fields + _DEFAULTS[len(fields) :])


class CombineCall(NamedTuple):
    """All that ``mate::combine`` takes but its results."""

    out_partial: Tensor
    lse_partial: Tensor

    def new_out(self, dtype: torch.dtype) -> Tensor:
        return self.out_partial.new_empty(self.out_partial.shape[1:], dtype=dtype)

    def differentiable(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor.requires_grad]

    def new_lse(self) -> Tensor:
        return self.lse_partial.new_empty(self.lse_partial.shape[1:], dtype=torch.float32)

    def run(self, out: Tensor, lse: Tensor) -> None:
        try:
            _library.combine(*self, out, lse)
        except Exception as error:
            raise _explained(error, self, out) from None


class SchedulerMetadataCall(NamedTuple):
    """All that ``mate::scheduler_metadata`` takes but its result."""

    batch_size: int
    max_seqlen_q: Index
    max_seqlen_k: Index
    num_heads_q: Index
    num_heads_kv: Index
    headdim: Index
    headdim_v: Index | None
    qkv_dtype: torch.dtype
    kv_dtype: torch.dtype | None
    cache_seqlens: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    cu_seqlens_k_new: Tensor | None
    seqused_q: Tensor | None
    cache_leftpad: Tensor | None
    page_size: Index | None
    max_seqlen_k_new: Index
    causal: bool
    window_left: Index
    window_right: Index
    attention_chunk: Index
    has_softcap: bool
    has_qv: bool
    num_splits: Index
    pack_gqa: bool | None
    sm_margin: Index
    cp_world_size: Index
    cp_rank: Index
    cp_tot_seqused_k: Tensor | None
    batch_invariant: bool

    def lengths(self) -> Tensor | None:
        """The tensor that says where the metadata belongs."""
        return self.cu_seqlens_k if self.cache_seqlens is None else self.cache_seqlens

    def new_out(self) -> Tensor:
        """Uninitialised metadata, as the library makes it, for what traces a call."""
        lengths = self.lengths()
        return torch.empty(self.batch_size, dtype=torch.int32, device=None if lengths is None else lengths.device)

    def plain(self) -> SchedulerMetadataCall:
        """The call with plain numbers: see AttentionCall."""
        return SchedulerMetadataCall._make(_plain_values(self, _KINDS_OF_METADATA, PLAIN_NAMES))

    def run(self, out: Tensor | None) -> Tensor:
        """Writes ``out``, which the library makes where it is None, and returns it."""
        try:
            made: Tensor | None = _library.scheduler_metadata(*self, out)
            return out if made is None else made  # type: ignore[return-value]
        except Exception as error:
            refusal = error
        return _plain_if_refused(refusal, self, out).run(out)


# The library takes plain numbers alone, and refuses others before it does anything: what a caller may write besides is
# made plain only then, since to look at each of them would cost every call a microsecond.
_Call = TypeVar("_Call", AttentionCall, SchedulerMetadataCall)
_PLAIN_VALUE: dict[str, Callable[[str, Any], Any]] = {"Index": integer, "Number": number, "bool": boolean}


def fields_of(call: type) -> dict[str, str]:
    """The fields of a call and their annotations, as written."""
    return {name: str(getattr(kind, "__forward_arg__", kind)) for name, kind in call.__annotations__.items()}


# A field's name, what it holds, and whether it may be None.
_Kinds = tuple[tuple[str, str, bool], ...]


def _kinds_of(call: type) -> _Kinds:
    split = {field: annotation.split(" | ") for field, annotation in fields_of(call).items()}
    return tuple((field, kinds[0], len(kinds) > 1) for field, kinds in split.items())


# Looked up ahead, since what traces a call cannot ask classes for their annotations.
_KINDS_OF_ATTENTION = _kinds_of(AttentionCall)
_KINDS_OF_METADATA = _kinds_of(SchedulerMetadataCall)


def _plain_values(values: Iterable[Any], kinds: _Kinds, names: int) -> list[Any]:
    plain = []
    for (field, kind, optional), value in zip(kinds, values):
        if kind in _PLAIN_VALUE and not (value is None and optional):
            value = _PLAIN_VALUE[kind](_user_name(names, field), value)
        plain.append(value)
    return plain


def _plain_if_refused(error: Exception, call: _Call, out: object) -> _Call:
    """What to try in place of a call that the library has refused. Raises what there is to say, if there is nothing."""
    # A tensor for a number never reaches the library, whatever the error: it has done nothing.
    kinds = _kinds_of(type(call))
    odd = any(isinstance(value, Tensor) and kind in _PLAIN_VALUE for value, (_, kind, _) in zip(call, kinds))
    if odd or isinstance(error, (TypeError, BufferError)):
        made = call.plain()
        if any(a is not b for a, b in zip(made, call)):
            return made
    raise _explained(error, call, out)


def _user_name(names: int, field: str) -> str:
    """How the caller calls an argument."""
    return "window_size" if field.startswith("window") else _USER_NAMES[names].get(field, field)


def _explained(error: Exception, call: Any, out: object) -> Exception:
    """The error to raise for one of the library's: its own, unless an argument could not even be handed to it."""
    annotations = fields_of(type(call))
    tensors = []
    for field, value in (*call._asdict().items(), ("out", out)):
        name = _user_name(getattr(call, "names", PLAIN_NAMES), field)
        annotation = annotations.get(field, "Tensor | None")
        if "Tensor" in annotation:
            if value is None and "None" in annotation:
                continue
            if not isinstance(value, Tensor):
                return TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
            if value.layout is not torch.strided:
                return TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
            tensors.append((name, value.device))
        elif type(value) is int and not -(2**63) <= value < 2**63:
            return ValueError(f"{name} must fit in 64 bits, got {value}")
    if not tensors or all(device.type in ("cpu", "cuda") for _, device in tensors):
        return error
    first_name, first = tensors[0]
    for name, device in tensors:
        if device != first:
            return ValueError(
                f"{name} is on {device} and {first_name} on {first}: all tensors of a call must be on one device"
            )
    return NotImplementedError(f"MATE has no backend for the device {first}")
