"""MATE as an attention implementation of Hugging Face Transformers (version 5).

    from mate.integrations import transformers as mate_transformers

    mate_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="mate")

Transformers builds the mask of a forward pass once and hands it to the attention of every layer. `make_mask`
takes the place of that builder. It builds no tensor of queries by keys: an `AttentionMask` says which of
MATE's masks is meant and where the tokens of each sequence lie. `attention_forward` is then one call of MATE:

| batch | call |
| --- | --- |
| without padding | `flash_attn_func` |
| padded on the left, the right or both; keys in a static cache | `flash_attn_with_kvcache`: no copy is made |
| sequences packed one after the other; padding between tokens | `flash_attn_varlen_func` |

What MATE cannot express (masks given as tensors, masks of a model's own making, dropout, position biases)
raises NotImplementedError. Where the mask tells that a query is padding, its output is
zero.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any, Callable, cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from mate import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

__all__ = ["AttentionMask", "Packing", "Visibility", "attention_forward", "make_mask", "register"]


def register(name: str = "mate") -> None:
    """Make `attn_implementation=name` select MATE, for every model that uses the attention interface."""
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, make_mask)


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which keys a query sees by their positions, in the terms of MATE's calls."""

    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0

    @property
    def bounded(self) -> bool:
        """Whether a key can be too far from a query to be seen."""
        return self.window_size != (-1, -1) or self.attention_chunk > 0

    def __and__(self, other: Visibility) -> Visibility:
        """What both allow."""
        if self.attention_chunk and other.attention_chunk:
            raise NotImplementedError("MATE cannot combine two sizes of attention chunks")
        (left, right), (other_left, other_right) = self.window_size, other.window_size
        return Visibility(
            causal=self.causal or other.causal,
            window_size=(_narrower(left, other_left), _narrower(right, other_right)),
            attention_chunk=self.attention_chunk or other.attention_chunk,
        )

    def within(self, length: int) -> Visibility:
        """The same among `length` positions, where a wide enough window is none."""
        left, right = (-1 if bound >= length - 1 else bound for bound in self.window_size)
        return dataclasses.replace(self, window_size=(left, right))


def _narrower(a: int, b: int) -> int:
    """The narrower of two bounds of a window; a negative one is no bound."""
    return max(a, b) if a < 0 or b < 0 else min(a, b)


@dataclasses.dataclass(frozen=True)
class Packing:
    """How a batch of rows becomes ragged sequences.

    The tokens are given by two indices, row of the batch and place in the row, in the order of the sequences;
    None stands for every place of every row. Where `cu_seqlens_q` is None the queries stay rows, one a
    sequence.
    """

    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int | None
    max_seqlen_k: int
    query_tokens: tuple[torch.Tensor, ...] | None = None
    key_tokens: tuple[torch.Tensor, ...] | None = None


@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """The mask of one forward pass: what is visible, and where each sequence lies in its row of the batch.

    `generate` with a static cache makes the mask ahead and passes it through the model as `attention_mask`.
    On its way Transformers asks it for its `ndim`, and to be `contiguous()`.
    """

    visibility: Visibility
    q_length: int
    kv_length: int
    cache_leftpad: torch.Tensor | None = None  # int32 (b,): where the keys of each sequence start
    cache_seqlens: torch.Tensor | None = None  # int32 (b,): where they end
    seqused_q: torch.Tensor | None = None  # int32 (b,): how many queries precede the padding
    packing: Packing | None = None

    ndim = 0  # neither a mask of padding (2) nor one of queries by keys (4)

    def contiguous(self) -> AttentionMask:
        return self


# ---- The mask: from what Transformers says to an AttentionMask ----


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | AttentionMask | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> AttentionMask:
    """The mask builder for `AttentionMaskInterface`.

    Query i has position q_offset + i, key j has position kv_offset + j, and `mask_function` says which
    positions see which. `attention_mask` (b, positions) is True for tokens and False for padding, as are
    positions past its end. A static cache hands out more keys (kv_length) than it has filled, and gives
    q_offset as a tensor. What else Transformers gives says how to build a tensor, and means nothing here.
    """
    pattern = _recognise(mask_function)
    visibility = pattern.visibility.within(kv_length)
    if isinstance(attention_mask, AttentionMask):
        made_for = (attention_mask.visibility, attention_mask.q_length, attention_mask.kv_length)
        if made_for != (visibility, q_length, kv_length):
            raise ValueError(f"the mask was made for {made_for}, not for {(visibility, q_length, kv_length)}")
        return attention_mask
    if attention_mask is not None and attention_mask.ndim != 2:
        raise NotImplementedError(f"MATE takes a 2-D mask of padding, got one of {attention_mask.ndim}-D")

    if pattern.sequence_ids is not None:
        if attention_mask is not None or q_length != kv_length or visibility.attention_chunk:
            raise NotImplementedError("packed sequences combine neither with padding, nor a cache, nor chunks")
        packing = _pack_sequences(pattern.sequence_ids.expand(batch_size, -1))
        return AttentionMask(visibility, q_length, kv_length, packing=packing)

    # MATE aligns the last query with the last key. So where positions matter, the keys must end with the last
    # query: a causal mask hides later ones (the free part of a static cache) from every query, others may
    # not.
    first_query = q_offset - kv_offset
    kv_end: int | torch.Tensor = kv_length
    if visibility.causal:
        kv_end = first_query + q_length
        if isinstance(kv_end, int) and not q_length <= kv_end <= kv_length:
            raise NotImplementedError(f"queries {first_query} .. {kv_end} are not among {kv_length} keys")
    elif visibility.bounded and first_query + q_length != kv_length:
        raise NotImplementedError("a bidirectional window needs the last query at the last key")

    if attention_mask is None and not visibility.attention_chunk:
        lengths = None
        if isinstance(kv_end, torch.Tensor) or kv_end < kv_length:
            lengths = torch.as_tensor(kv_end, device=device).to(torch.int32).expand(batch_size).contiguous()
        return AttentionMask(visibility, q_length, kv_length, cache_seqlens=lengths)

    place = torch.arange(kv_length, device=device)
    is_key = (place < kv_end).expand(batch_size, -1)
    if attention_mask is not None:
        is_token = attention_mask[:, kv_offset : kv_offset + kv_length].to(device=device, dtype=torch.bool)
        is_key = is_key & torch.nn.functional.pad(is_token, (0, kv_length - is_token.shape[1]))
    if q_length == 1:  # then what is too far is no key for anyone, and padding between tokens does no harm
        is_key = is_key & _near(place, first_query, pattern, kv_offset)

    count = is_key.sum(dim=1)
    start = torch.where(is_key, place, kv_length).amin(dim=1).where(count > 0, 0)
    end = torch.where(is_key, place + 1, 0).amax(dim=1)
    if (end - start != count).any():
        if visibility.bounded and q_length > 1:
            raise NotImplementedError("padding between tokens would count as no distance in a window or chunk")
        queries = first_query + torch.arange(q_length, device=device)
        packing = _pack_tokens(is_key[:, queries] if visibility.causal else None, is_key)
        return AttentionMask(visibility, q_length, kv_length, packing=packing)

    if visibility.attention_chunk and q_length > 1:
        # MATE counts chunks from the first key: let that be where the chunk of the first query starts.
        chunk, origin = visibility.attention_chunk, pattern.chunk_origin - kv_offset
        first_chunk = origin + (first_query - origin).div(chunk, rounding_mode="floor") * chunk
        start = torch.minimum(torch.maximum(start, first_chunk), end)
        if ((start < end) & ((start - origin) % chunk != 0)).any():
            raise NotImplementedError("attention chunks must be counted from the first token")

    # Where positions align queries with keys, padding on the right is no query either.
    right_padding = kv_end - end
    trimmed = (visibility.causal or visibility.bounded) and bool((right_padding > 0).any())
    whole_rows = bool(((start == 0) & (end == kv_length)).all())
    return AttentionMask(
        visibility,
        q_length,
        kv_length,
        cache_leftpad=start.to(torch.int32) if not whole_rows else None,
        cache_seqlens=end.to(torch.int32) if not whole_rows else None,
        seqused_q=(q_length - right_padding).clamp(min=0).to(torch.int32) if trimmed else None,
    )


def _near(place: torch.Tensor, query: int | torch.Tensor, pattern: _Pattern, kv_offset: int) -> bool | torch.Tensor:
    """Which keys the window and chunk of one query reach, as booleans that broadcast to (b, kv_length)."""
    left, right = pattern.visibility.window_size
    near: bool | torch.Tensor = True
    if left >= 0:
        near = near & (place >= query - left)
    if right >= 0:
        near = near & (place <= query + right)
    if pattern.visibility.attention_chunk:
        chunk, origin = pattern.visibility.attention_chunk, (pattern.chunk_origin - kv_offset)[:, None]
        query_chunk = (query - origin).div(chunk, rounding_mode="floor")
        near = near & ((place - origin).div(chunk, rounding_mode="floor") == query_chunk)
    return near


@dataclasses.dataclass(frozen=True)
class _Pattern:
    """What a mask function of Transformers was made from."""

    visibility: Visibility = Visibility()
    sequence_ids: torch.Tensor | None = None  # (1 or b, s): which of the packed sequences a token belongs to
    chunk_origin: Any = None  # (b,): the position from which chunks are counted


def _recognise(mask_function: Callable[..., Any]) -> _Pattern:
    """Read a mask function back into its parts, or raise NotImplementedError.

    Transformers composes masks of closures that its own factories make, and a closure carries the code it was
    made with. To look at that takes no time at any length, and no other function can pass for one of these.
    """
    if mask_function is masking_utils.causal_mask_function:
        return _Pattern(Visibility(causal=True))
    if mask_function is masking_utils.bidirectional_mask_function:
        return _Pattern()
    factory = _FACTORIES.get(getattr(mask_function, "__code__", None))
    if factory is None:
        name = getattr(mask_function, "__qualname__", repr(mask_function))
        raise NotImplementedError(f"MATE cannot express the mask function {name}")
    made_from = inspect.getclosurevars(mask_function).nonlocals
    if factory == "and_masks":
        return functools.reduce(_both, map(_recognise, made_from["mask_functions"]))
    if factory == "packed_sequence_mask_function":
        return _Pattern(sequence_ids=made_from["packed_sequence_mask"])
    if factory == "remap_positions_for_packed_sequence":  # distances within a sequence stay what they are
        return _recognise(made_from["mask_function"])
    if factory == "chunked_overlay":
        visibility = Visibility(attention_chunk=made_from["chunk_size"])
        return _Pattern(visibility, chunk_origin=made_from["left_padding"])
    width = made_from["sliding_window"]
    if width < 1:
        raise NotImplementedError(f"a sliding window must be at least 1 wide, got {width}")
    if factory == "sliding_window_overlay":
        return _Pattern(Visibility(window_size=(width - 1, -1)))
    return _Pattern(Visibility(window_size=(width, width)))  # sliding_window_bidirectional_overlay


def _both(a: _Pattern, b: _Pattern) -> _Pattern:
    if a.sequence_ids is not None and b.sequence_ids is not None:
        raise NotImplementedError("MATE cannot combine two packings of the same tokens")
    return _Pattern(
        a.visibility & b.visibility,
        a.sequence_ids if a.sequence_ids is not None else b.sequence_ids,
        a.chunk_origin if a.chunk_origin is not None else b.chunk_origin,
    )


def _factories() -> dict[Any, str]:
    """The code of what each of Transformers' mask factories makes -> the name of the factory."""
    arguments: dict[str, tuple[Any, ...]] = {
        "and_masks": (masking_utils.causal_mask_function,),
        "sliding_window_overlay": (1,),
        "sliding_window_bidirectional_overlay": (1,),
        "chunked_overlay": (1, None),
        "packed_sequence_mask_function": (None,),
        "remap_positions_for_packed_sequence": (masking_utils.causal_mask_function, None),
    }
    return {
        getattr(masking_utils, name)(*made_from).__code__: name
        for name, made_from in arguments.items()
        if hasattr(masking_utils, name)  # the last is not in every version
    }


_FACTORIES = _factories()


def _pack_sequences(sequence_ids: torch.Tensor) -> Packing:
    """Sequences that stand one after the other in the rows of a batch; each is a run of the same id."""
    starts_here = torch.ones_like(sequence_ids, dtype=torch.bool)
    starts_here[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    starts = starts_here.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.nn.functional.pad(starts, (0, 1), value=sequence_ids.numel()).to(torch.int32)
    longest = int(cu_seqlens.diff().max())
    return Packing(cu_seqlens, cu_seqlens, longest, longest)


def _pack_tokens(is_query: torch.Tensor | None, is_key: torch.Tensor) -> Packing:
    """The tokens of each row of the batch as one sequence; without `is_query` the queries stay rows."""
    cu_seqlens_k, max_seqlen_k = _cumulative(is_key.sum(dim=1))
    key_tokens = is_key.nonzero(as_tuple=True)
    if is_query is None:
        return Packing(None, cu_seqlens_k, None, max_seqlen_k, key_tokens=key_tokens)
    cu_seqlens_q, max_seqlen_q = _cumulative(is_query.sum(dim=1))
    query_tokens = is_query.nonzero(as_tuple=True)
    return Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, query_tokens, key_tokens)


def _cumulative(lengths: torch.Tensor) -> tuple[torch.Tensor, int]:
    """cu_seqlens and the longest length."""
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return cu_seqlens, int(lengths.max())


# ---- The attention of one layer ----

_NOT_SERVED = (
    "position_bias",
    "attention_bias",
    "sinks",
    "indices",
    "block_indices",
    "block_table",
    "cache",
)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AttentionMask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function for `AttentionInterface`.

    query (b, h, sq, d), key (b, hk, sk, d) and value (b, hk, sk, dv) give an output (b, sq, h, dv) in query's
    type, and no attention weights. `attention_mask` says what is visible; only where there is none do
    `is_causal` (or else the module's) and `sliding_window` say it. `s_aux` (h,) is the sink of each head.
    cu_seq_lens and max_length describe packed sequences where `attention_mask` does not.
    """
    if dropout:
        raise NotImplementedError(f"MATE has no dropout: it must be 0, got {dropout}")
    if kwargs.get("output_attentions"):
        raise NotImplementedError('MATE returns no attention weights; attn_implementation="eager" does')
    for name in _NOT_SERVED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"MATE does not serve {name}")

    q_length, kv_length = query.shape[2], key.shape[2]
    mask = attention_mask
    if mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        mask = _implied_mask(causal, sliding_window, q_length, kv_length)
    if not isinstance(mask, AttentionMask):
        raise NotImplementedError("MATE cannot express a mask given as a tensor; give the model a 2-D mask of padding")
    if (mask.q_length, mask.kv_length) != (q_length, kv_length):
        made_for = f"{mask.q_length} queries and {mask.kv_length} keys"
        raise ValueError(f"the mask is for {made_for}, got {q_length} and {kv_length}")
    packing = mask.packing
    if packing is None and cu_seq_lens_q is not None:
        if cu_seq_lens_k is None or max_length_q is None or max_length_k is None:
            raise ValueError("cu_seq_lens_q needs cu_seq_lens_k, max_length_q and max_length_k")
        if mask.cache_seqlens is not None:
            raise NotImplementedError("packed sequences (cu_seq_lens_q) combine neither with padding nor with a cache")
        cu_seqlens = (cu_seq_lens_q.to(torch.int32), cu_seq_lens_k.to(torch.int32))
        packing = Packing(*cu_seqlens, int(max_length_q), int(max_length_k))

    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "causal": mask.visibility.causal,
        "window_size": mask.visibility.window_size,
        "attention_chunk": mask.visibility.attention_chunk,
        "softcap": softcap or 0.0,
        "learnable_sink": s_aux,
    }
    if packing is not None:
        return _packed_attention(q, k, v, packing, options), None
    if mask.cache_seqlens is not None:
        options |= {
            "cache_seqlens": mask.cache_seqlens,
            "cache_leftpad": mask.cache_leftpad,
            "seqused_q": mask.seqused_q,
        }
        return cast(torch.Tensor, flash_attn_with_kvcache(q, _usable_cache(k), _usable_cache(v), **options)), None
    return cast(torch.Tensor, flash_attn_func(q, k, v, **options)), None


def _implied_mask(causal: bool, sliding_window: int | None, q_length: int, kv_length: int) -> AttentionMask:
    """The mask of a model that makes none, where there is only one way to read that."""
    if causal and q_length != kv_length and q_length != 1:
        raise NotImplementedError(
            f"causal attention of {q_length} queries to {kv_length} keys needs a mask to align them"
        )
    visibility = Visibility(causal, (sliding_window - 1 if sliding_window else -1, -1)).within(kv_length)
    if visibility.bounded and not causal:
        raise NotImplementedError("a bidirectional sliding window needs a mask to say how wide it is")
    return AttentionMask(visibility, q_length, kv_length)


def _packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, options: dict[str, Any]
) -> torch.Tensor:
    """Attention over the ragged sequences that `packing` makes of q, k and v (b, s, heads, size), in q's layout."""

    def packed(x: torch.Tensor, tokens: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        return x.flatten(0, 1) if tokens is None else x[tokens]

    ragged = flash_attn_varlen_func(
        packed(q, packing.query_tokens) if packing.cu_seqlens_q is not None else q,
        packed(k, packing.key_tokens),
        packed(v, packing.key_tokens),
        packing.cu_seqlens_q,
        packing.cu_seqlens_k,
        packing.max_seqlen_q,
        packing.max_seqlen_k,
        **options,
    )
    out = cast(torch.Tensor, ragged)
    if packing.query_tokens is None:
        return out.view(*q.shape[:3], v.shape[-1])
    padded = out.new_zeros(*q.shape[:3], v.shape[-1])
    padded[packing.query_tokens] = out
    return padded


def _usable_cache(x: torch.Tensor) -> torch.Tensor:
    """x, copied only where its last dimension is not contiguous, which a key/value cache may not be."""
    return x if x.stride(-1) == 1 else x.contiguous()
