"""The judge: attention in float64, written straight from the contract of the calls.

`evaluate(function, arguments)` takes the name of a call and its keyword arguments and says what the call must
return and how its arguments must look afterwards. It is plain loops over sequences and heads of keys, slow and
easy to check by eye, on whatever device the arguments are; it shares no code with the library.
"""

import copy
from dataclasses import dataclass, fields
from typing import Any, Optional

import torch

FP8 = torch.float8_e4m3fn
ALIASES = {
    "sinks": "learnable_sink",
    "s_aux": "learnable_sink",
    "block_table": "page_table",
    "return_softmax_lse": "return_attn_probs",
    "seqused_k": "cache_seqlens",
}


@dataclass
class Arguments:
    """The arguments of any of the attention calls under one set of names: k and v are the keys and values
    attended to (the cache, where there is one), k_new and v_new those that the call appends."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_new: Optional[torch.Tensor] = None
    v_new: Optional[torch.Tensor] = None
    qv: Optional[torch.Tensor] = None
    rotary_cos: Optional[torch.Tensor] = None
    rotary_sin: Optional[torch.Tensor] = None
    rotary_seqlens: Optional[torch.Tensor] = None
    rotary_interleaved: bool = True
    cache_seqlens: Any = None
    cache_batch_idx: Optional[torch.Tensor] = None
    cache_leftpad: Optional[torch.Tensor] = None
    page_table: Optional[torch.Tensor] = None
    cu_seqlens_q: Optional[torch.Tensor] = None
    cu_seqlens_k: Optional[torch.Tensor] = None
    cu_seqlens_k_new: Optional[torch.Tensor] = None
    max_seqlen_q: Any = None
    max_seqlen_k: Any = None
    seqused_q: Optional[torch.Tensor] = None
    q_descale: Optional[torch.Tensor] = None
    k_descale: Optional[torch.Tensor] = None
    v_descale: Optional[torch.Tensor] = None
    softmax_scale: Optional[float] = None
    causal: bool = False
    window_size: Any = (-1, -1)
    attention_chunk: Any = 0
    softcap: float = 0.0
    num_splits: Any = 1
    pack_gqa: Optional[bool] = None
    deterministic: bool = False
    sm_margin: Any = 0
    return_attn_probs: bool = False
    scheduler_metadata: Optional[torch.Tensor] = None
    learnable_sink: Optional[torch.Tensor] = None
    cp_world_size: Any = 1
    cp_rank: Any = 0
    cp_tot_seqused_k: Optional[torch.Tensor] = None
    out: Optional[torch.Tensor] = None
    batch_invariant: bool = False

    @property
    def batch(self) -> int:
        return len(self.q) if self.cu_seqlens_q is None else len(self.cu_seqlens_q) - 1

    @property
    def capacity(self) -> int:
        """How many positions a sequence of the cache has room for."""
        if self.page_table is not None:
            return self.page_table.shape[1] * self.k.shape[1]
        return self.k.shape[1]

    @property
    def scale(self) -> float:
        """softmax_scale, or its default."""
        if self.softmax_scale is not None:
            return float(self.softmax_scale)
        return (self.q.shape[-1] + (0 if self.qv is None else self.v.shape[-1])) ** -0.5

    @property
    def mask(self) -> dict:
        """The arguments of `visible` that all sequences of the call share."""
        left, right = (-1 if side is None else int(side) for side in self.window_size)
        chunk = 0 if self.attention_chunk is None else int(self.attention_chunk)
        return {
            "causal": bool(self.causal),
            "window": (left, right),
            "chunk": chunk,
            "world_size": int(self.cp_world_size),
            "rank": int(self.cp_rank),
        }


def normalise(function: str, arguments: dict) -> Arguments:
    """The arguments of a call under the names of `Arguments`. Tensors are views of the originals."""
    named = dict(arguments)
    if function == "flash_attn_qkvpacked_func":
        qkv, heads_q = named.pop("qkv"), named.pop("num_heads_q", None)
        if qkv.dim() == 5:
            named["q"], named["k"], named["v"] = qkv.unbind(2)
        else:
            heads_k = (qkv.shape[2] - heads_q) // 2
            named["q"], named["k"], named["v"] = qkv.split([heads_q, heads_k, heads_k], 2)
    if function == "flash_attn_with_kvcache":
        named["k_new"], named["v_new"] = named.pop("k", None), named.pop("v", None)
        named["k"], named["v"] = named.pop("k_cache"), named.pop("v_cache")
    result: dict = {}
    for name, value in named.items():
        name = ALIASES.get(name, name)
        assert result.get(name) is None, f"{name} given twice"
        result[name] = value
    assert set(result) <= {field.name for field in fields(Arguments)}, result.keys()
    return Arguments(**result)


@dataclass
class Sequence:
    """Where one sequence of a call lies."""

    index: int
    rows: tuple  # q[rows] is (sq, h, d); qv, out and lse (heads last) alike
    sq: int
    keys: tuple  # k[keys] is (sk, hk, d), the appended keys included
    sk: int
    new_rows: Optional[tuple]  # k_new[new_rows] is (appended, hk, d)
    appended: int  # how many keys, the last ones, the call appends
    total: int  # keys of the whole sequence, over all ranks of context parallel
    position: int  # rotary position of the first new key


def sequences(a: Arguments) -> list[Sequence]:
    """Where each sequence of a call lies: the tables of the contract under "Where queries and keys live"."""
    host = {}
    for name in (
        *(
            "cu_seqlens_q",
            "cu_seqlens_k",
            "cu_seqlens_k_new",
            "seqused_q",
            "cache_seqlens",
            "cache_batch_idx",
        ),
        *("cache_leftpad", "page_table", "rotary_seqlens", "cp_tot_seqused_k"),
    ):
        value = getattr(a, name)
        host[name] = value.tolist() if isinstance(value, torch.Tensor) and value.dim() > 0 else value
    result = []
    for b in range(a.batch):
        if a.cu_seqlens_q is None:
            start, sq = None, a.q.shape[1]
        else:
            start, sq = host["cu_seqlens_q"][b], host["cu_seqlens_q"][b + 1] - host["cu_seqlens_q"][b]
        if a.seqused_q is not None:
            sq = host["seqused_q"][b]
        rows = (b, slice(0, sq)) if start is None else (slice(start, start + sq),)

        new_rows, appended = None, 0
        if a.k_new is not None:
            if a.cu_seqlens_k_new is None:
                appended = a.k_new.shape[1]
                new_rows = (b, slice(0, appended))
            else:
                first, last = host["cu_seqlens_k_new"][b], host["cu_seqlens_k_new"][b + 1]
                appended = last - first
                new_rows = (slice(first, last),)

        held = a.capacity
        if a.cu_seqlens_k is not None:
            held = host["cu_seqlens_k"][b + 1] - host["cu_seqlens_k"][b]
        if a.cache_seqlens is not None:
            lengths = host["cache_seqlens"]
            held = lengths[b] if isinstance(lengths, list) else int(lengths)
        leftpad = 0 if a.cache_leftpad is None else host["cache_leftpad"][b]
        positions = torch.arange(leftpad, held + appended, device=a.k.device)
        if a.cu_seqlens_k is not None:
            keys = (host["cu_seqlens_k"][b] + positions,)
        else:
            row = b if a.cache_batch_idx is None else host["cache_batch_idx"][b]
            if a.page_table is None:
                keys = (torch.full_like(positions, row), positions)
            else:
                page_size = a.k.shape[1]
                pages = [host["page_table"][row][t // page_size] for t in range(leftpad, held + appended)]
                keys = (torch.tensor(pages, dtype=torch.long, device=a.k.device), positions % page_size)

        world_size = int(a.cp_world_size)
        result.append(
            Sequence(
                index=b,
                rows=rows,
                sq=sq,
                keys=keys,
                sk=len(positions),
                new_rows=new_rows,
                appended=appended,
                total=len(positions) if world_size == 1 else host["cp_tot_seqused_k"][b],
                position=held if a.rotary_seqlens is None else host["rotary_seqlens"][b],
            )
        )
    return result


def visible(
    sq: int,
    sk: int,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    chunk: int = 0,
    world_size: int = 1,
    rank: int = 0,
    total: Optional[int] = None,
    device: Any = "cpu",
) -> torch.Tensor:
    """(sq, sk), True where key j is visible to row i: the table of the contract, one line for each rule."""
    total = sk if total is None else total
    p = torch.arange(sq, device=device)[:, None] + total - sq
    j = torch.arange(sk, device=device)[None, :] * world_size + rank
    left, right = window
    see = (j < total).expand(sq, sk)
    if causal:
        see = see & (j <= p)
    if left >= 0:
        see = see & (j >= p - left)
    if right >= 0:
        see = see & (j <= p + right)
    if chunk > 0:
        see = see & (p // chunk == j // chunk)
    return see


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    see: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sink: Any = None,
    qv: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One head of keys of one sequence, all float64: q (sq, d), k (sk, d), v (sk, dv), see (sq, sk). Returns out
    (sq, dv), lse (sq,), and sqrt(sum (p v)**2) (sq, dv), which says how large the terms of out are. q, qv and the
    results may have heads in front, and sink then one number for each."""
    s = q @ k.T
    if qv is not None:
        s = s + qv @ v.T
    s = scale * s
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~see, -torch.inf)
    # The sink is one more score, which has no value.
    last = s.new_full((*s.shape[:-1], 1), -torch.inf)
    if sink is not None:
        last[:] = torch.as_tensor(sink)[..., None, None]
    lse = torch.logsumexp(torch.cat([s, last], -1), -1)
    p = torch.exp(s - lse[..., None]).masked_fill(torch.isneginf(lse)[..., None], 0)
    v = v.masked_fill(~see.any(0)[:, None], 0)  # a key that no row sees never reaches a result
    return p @ v, lse, torch.sqrt((p * p) @ (v * v))


# Where a float32 a*cos - b*sin may be rounded: after both products, or after one of them when the other is
# part of a fused multiply-add. The contract permits each.
CONTRACTIONS = ("none", "first product", "second product")


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, contraction: str = "none"
) -> torch.Tensor:
    """Rotates x (n, heads, d) in float32; row t by cos[t] and sin[t], each (n, rotary_dim / 2)."""

    def products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        # A product of two float32 is exact in float64.
        if contraction != "first product":
            left = left.float().double()
        if contraction != "second product":
            right = right.float().double()
        return (left + right).float()

    half = cos.shape[1]
    x = x.float()
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    a, b = x[..., first].double(), x[..., second].double()
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    result = x.clone()
    result[..., first] = products(a * cos, -(b * sin))
    result[..., second] = products(a * sin, b * cos)
    return result


def round_to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x rounded to dtype; float8 saturates."""
    return x.float().clamp(-448, 448).to(dtype) if dtype == FP8 else x.to(dtype)


def raw(x: torch.Tensor) -> torch.Tensor:
    """x, as bytes where it is float8, for which PyTorch has few operations."""
    return x.view(torch.uint8) if x.dtype == FP8 else x


def take(x: torch.Tensor, index: tuple) -> torch.Tensor:
    """x[index]."""
    return raw(x)[index].view(x.dtype)


def rotary_rows(a: Arguments, first: int, count: int, varying: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the rotary tables for `count` positions from `first` on, or `count` times `first`."""
    positions = torch.arange(first, first + count) if varying else torch.full((count,), first)
    positions = positions.clamp(0, len(a.rotary_cos) - 1).to(a.q.device)
    return take(a.rotary_cos, (positions,)), take(a.rotary_sin, (positions,))


def append(a: Arguments, contraction: str) -> None:
    """Writes the new keys and values into the cache."""
    for s in sequences(a):
        where = tuple(index[s.sk - s.appended :] for index in s.keys)
        for cache, new, descale in ((a.k, a.k_new, a.k_descale), (a.v, a.v_new, a.v_descale)):
            x = take(new, s.new_rows)
            if new is a.k_new and a.rotary_cos is not None:
                cos, sin = rotary_rows(a, s.position, s.appended)
                x = rotate(x, cos, sin, a.rotary_interleaved, contraction)
            if cache.dtype == FP8 and new.dtype != FP8 and descale is not None:
                x = x.float() / descale[s.index, :, None]
            raw(cache)[where] = raw(round_to(x, cache.dtype))


def queries(a: Arguments, s: Sequence) -> torch.Tensor:
    """The queries of a sequence, (sq, h, d), rotated where the call rotates them."""
    q = take(a.q, s.rows)
    if a.rotary_cos is not None:
        mask = a.mask
        varying = mask["causal"] or max(mask["window"]) >= 0 or mask["chunk"] > 0
        cos, sin = rotary_rows(a, s.position, s.sq, varying)
        q = round_to(rotate(q, cos, sin, a.rotary_interleaved), q.dtype)
    return q


def scaled(x: torch.Tensor, descale: Optional[torch.Tensor], b: int) -> torch.Tensor:
    """x (n, heads, ·) in float64, times the descale of its key/value head where one is given."""
    x = x.double()
    if descale is None:
        return x
    factors = descale[b].double().repeat_interleave(x.shape[1] // descale.shape[1])
    return x * factors[:, None]


@dataclass
class Expected:
    """What a call must return (float64), and its arguments as they must be afterwards: one version for each
    way in which the rotation may be rounded."""

    out: torch.Tensor
    lse: torch.Tensor
    magnitude: torch.Tensor  # sqrt(sum (p v)**2), shaped like out
    after: list[dict]


def evaluate(function: str, arguments: dict) -> Expected:
    """What the call `function(**arguments)` must do. Leaves the arguments as they are."""
    a = normalise(function, arguments)
    after = [copy.deepcopy(arguments) for _ in (CONTRACTIONS if a.rotary_cos is not None else CONTRACTIONS[:1])]
    if a.k_new is not None:
        for version, contraction in zip(after, CONTRACTIONS):
            append(normalise(function, version), contraction)
    a = normalise(function, after[0])

    heads_k, dv = a.k.shape[-2], a.v.shape[-1]
    group = a.q.shape[-2] // heads_k
    out = torch.zeros(*a.q.shape[:-1], dv, dtype=torch.float64, device=a.q.device)
    magnitude = torch.zeros_like(out)
    lse = torch.full(a.q.shape[:-1], -torch.inf, dtype=torch.float64, device=a.q.device)
    q_descale = a.q_descale if a.q.dtype == FP8 else None
    k_descale, v_descale = (a.k_descale, a.v_descale) if a.k.dtype == FP8 else (None, None)
    sinks = None if a.learnable_sink is None else a.learnable_sink.double()
    for s in sequences(a):
        q = scaled(queries(a, s), q_descale, s.index)
        qv = None if a.qv is None else scaled(take(a.qv, s.rows), q_descale, s.index)
        k = scaled(take(a.k, s.keys), k_descale, s.index)
        v = scaled(take(a.v, s.keys), v_descale, s.index)
        see = visible(s.sq, s.sk, **a.mask, total=s.total, device=a.q.device)
        for head_k in range(heads_k):
            of_group = slice(head_k * group, (head_k + 1) * group)
            results = attend(
                q[:, of_group].transpose(0, 1),
                k[:, head_k],
                v[:, head_k],
                see,
                a.scale,
                a.softcap,
                None if sinks is None else sinks[of_group],
                None if qv is None else qv[:, of_group].transpose(0, 1),
            )
            for whole, part in zip((out, lse, magnitude), results):
                whole[(*s.rows, of_group)] = part.transpose(0, 1)
    return Expected(out, lse.transpose(-1, -2), magnitude, after)
