"""Lays the sequences of a call out anew: alone, in another order, ragged, padded, paged, or over ranks."""

import copy
import random
from dataclasses import fields
from typing import Any, Optional

import torch
from calls import Call
from reference import FP8, Arguments, Sequence, append, normalise, raw, sequences, take

# What a call says beyond where its queries and keys live.
OPTIONS = (
    *("softmax_scale", "causal", "window_size", "attention_chunk", "softcap", "learnable_sink"),
    *("num_splits", "pack_gqa", "sm_margin", "batch_invariant"),
)
PER_SEQUENCE = ("q_descale", "k_descale", "v_descale", "cp_tot_seqused_k")


def attended(call: Call) -> Arguments:
    """The call's arguments with its new keys already in a copy of the cache."""
    arguments = copy.deepcopy(call.arguments)
    a = normalise(call.function, arguments)
    if a.k_new is not None:
        append(a, "none")
    return a


def options(a: Arguments, order: list[int]) -> dict[str, Any]:
    """The options of the call for some of its sequences, in some order."""
    defaults = {field.name: field.default for field in fields(Arguments)}
    chosen = {name: getattr(a, name) for name in OPTIONS if getattr(a, name) is not defaults[name]}
    for name in PER_SEQUENCE:
        if getattr(a, name) is not None:
            chosen[name] = getattr(a, name)[order]
    return {**chosen, "cp_world_size": a.cp_world_size, "cp_rank": a.cp_rank, "return_attn_probs": True}


def joined(pieces: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([raw(piece) for piece in pieces]).view(pieces[0].dtype)


def poisoned(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    result = torch.empty(shape, dtype=like.dtype, device=like.device)
    raw(result).fill_(0x7F if like.dtype == FP8 else torch.nan)
    return result


def int32(values: list, device: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def offsets(lengths: list[int], device: Any) -> torch.Tensor:
    return int32([sum(lengths[:i]) for i in range(len(lengths) + 1)], device)


def alone(call: Call, sequence: Sequence) -> Call:
    """One sequence of the call as a call of its own to flash_attn_func."""
    a = attended(call)
    arguments = {"q": take(a.q, sequence.rows)[None], **options(a, [sequence.index])}
    if a.qv is not None:
        arguments["qv"] = take(a.qv, sequence.rows)[None]
    arguments["k"], arguments["v"] = take(a.k, sequence.keys)[None], take(a.v, sequence.keys)[None]
    return Call("flash_attn_func", arguments, call.seed)


def relaid(
    call: Call,
    dice: random.Random,
    order: Optional[list[int]] = None,
    ragged_q: bool = True,
    keys: str = "ragged",
    world_size: int = 1,
    rank: int = 0,
) -> Call:
    """Some sequences of the call, in some order, as a call to flash_attn_varlen_func with keys "ragged",
    "padded" or "paged", and poison where there is room. With a world_size, the part of `rank` in context
    parallel."""
    a = attended(call)
    device = a.q.device
    where = sequences(a)
    order = list(range(len(where))) if order is None else order
    where = [where[b] for b in order]
    arguments = options(a, order)
    slack = dice.choice((0, 1, 70))

    lengths_q = [s.sq for s in where]
    longest = max(lengths_q)
    for name in ("q", "qv"):
        x = getattr(a, name)
        if x is None:
            continue
        pieces = [take(x, s.rows) for s in where]
        if ragged_q:
            arguments[name] = joined(pieces)
        else:
            arguments[name] = poisoned((len(where), longest + slack, *x.shape[-2:]), x)
            for row, piece in zip(raw(arguments[name]), pieces):
                row[: len(piece)] = raw(piece)
    arguments["cu_seqlens_q"] = offsets(lengths_q, device) if ragged_q else None
    arguments["max_seqlen_q"] = longest + slack if ragged_q else None
    if not ragged_q:
        arguments["seqused_q"] = int32(lengths_q, device)

    if world_size > 1:
        arguments.update(cp_world_size=world_size, cp_rank=rank)
        arguments["cp_tot_seqused_k"] = int32([s.sk for s in where], device)
    held = [tuple(index[rank::world_size] for index in s.keys) for s in where]
    lengths_k = [len(index[0]) for index in held]
    longest = max(lengths_k)
    arguments["cu_seqlens_k"] = offsets(lengths_k, device) if keys == "ragged" else None
    arguments["max_seqlen_k"] = longest + slack
    if keys != "ragged":
        arguments["seqused_k"] = int32(lengths_k, device)
    page_size = dice.choice((1, 3, 16, 100))
    columns = -(-(longest + slack) // page_size)
    pool = dice.sample(range(len(where) * columns), len(where) * columns)
    table = torch.tensor(pool, dtype=torch.int32, device=device).view(len(where), columns)
    for name in ("k", "v"):
        x = getattr(a, name)
        pieces = [take(x, index) for index in held]
        if keys == "ragged":
            arguments[name] = joined(pieces)
        elif keys == "padded":
            arguments[name] = poisoned((len(where), longest + slack, *x.shape[-2:]), x)
            for row, piece in zip(raw(arguments[name]), pieces):
                row[: len(piece)] = raw(piece)
        else:
            arguments["page_table"] = table
            arguments[name] = poisoned((len(where) * columns, page_size, *x.shape[-2:]), x)
            for row, piece in zip(table, pieces):
                t = torch.arange(len(piece), device=device)
                raw(arguments[name])[row[t // page_size].long(), t % page_size] = raw(piece)
    return Call("flash_attn_varlen_func", arguments, call.seed)


def rows_of(call: Call, result: tuple, which: Optional[list[int]] = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """out (sq, h, dv) and lse (sq, h) of each sequence of a call, from what the call returned."""
    out, lse = result
    where = sequences(call.normalised)
    where = where if which is None else [where[b] for b in which]
    return [(out[s.rows], lse.transpose(-1, -2)[s.rows]) for s in where]
