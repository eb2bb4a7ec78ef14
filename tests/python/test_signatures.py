"""The calls' signatures, and how their arguments may be given."""

import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from calls import Call, draw_some
from judge import check, same_bits
from reference import evaluate

REQUIRED = inspect.Parameter.empty
DROP_IN = Path(__file__).resolve().parents[2] / "python" / "flash-attn-3"

# Positional order and defaults: those of official FlashAttention-3.
DESCALES = {"q_descale": None, "k_descale": None, "v_descale": None}
MASK = {"window_size": (-1, -1), "attention_chunk": 0}
SCORES = {
    "causal": False,
    "qv": None,
    **DESCALES,
    **MASK,
    "softcap": 0.0,
    "num_splits": 1,
    "pack_gqa": None,
    "deterministic": False,
    "sm_margin": 0,
    "return_attn_probs": False,
}
POSITIONAL: dict[str, dict[str, Any]] = {
    "flash_attn_func": {"q": REQUIRED, "k": REQUIRED, "v": REQUIRED, "softmax_scale": None, **SCORES},
    "flash_attn_varlen_func": {
        **dict.fromkeys(("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"), REQUIRED),
        "max_seqlen_q": REQUIRED,
        "max_seqlen_k": REQUIRED,
        "seqused_q": None,
        "seqused_k": None,
        "softmax_scale": None,
        **SCORES,
    },
    "flash_attn_with_kvcache": {
        **dict.fromkeys(("q", "k_cache", "v_cache"), REQUIRED),
        **dict.fromkeys(("k", "v", "qv", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx")),
        **dict.fromkeys(("cache_leftpad", "page_table", "cu_seqlens_q", "cu_seqlens_k_new", "max_seqlen_q")),
        "rotary_seqlens": None,
        **DESCALES,
        "softmax_scale": None,
        "causal": False,
        **MASK,
        "softcap": 0.0,
        "rotary_interleaved": True,
        "scheduler_metadata": None,
        "num_splits": 0,
        "pack_gqa": None,
        "sm_margin": 0,
        "return_softmax_lse": False,
    },
    "get_scheduler_metadata": {
        **dict.fromkeys(("batch_size", "max_seqlen_q", "max_seqlen_k"), REQUIRED),
        **dict.fromkeys(("num_heads_q", "num_heads_kv", "headdim", "cache_seqlens"), REQUIRED),
        "qkv_dtype": torch.bfloat16,
        "headdim_v": None,
        "cu_seqlens_q": None,
        "cu_seqlens_k_new": None,
        "cache_leftpad": None,
        "page_size": None,
        "max_seqlen_k_new": 0,
        "causal": False,
        **MASK,
        "has_softcap": False,
        "num_splits": 0,
        "pack_gqa": None,
        "sm_margin": 0,
    },
    "flash_attn_combine": {"out_partial": REQUIRED, "lse_partial": REQUIRED, "out": None, "out_dtype": None},
    "flash_attn_qkvpacked_func": {
        "qkv": REQUIRED,
        "softmax_scale": None,
        "causal": False,
        **DESCALES,
        "window_size": (-1, -1),
        "attention_chunk": 0,
        "softcap": 0.0,
        "deterministic": False,
        "num_heads_q": None,
        "sm_margin": 0,
        "return_attn_probs": False,
    },
}
# MATE's own arguments, by keyword.
EVERYWHERE = {
    "learnable_sink",
    "sinks",
    "s_aux",
    "cp_world_size",
    "cp_rank",
    "cp_tot_seqused_k",
    "out",
    "batch_invariant",
}
PLANNED = {"page_table", "block_table", "scheduler_metadata"}
OWN: dict[str, set[str]] = {
    "flash_attn_func": {*EVERYWHERE, "return_softmax_lse"},
    "flash_attn_varlen_func": {*EVERYWHERE, *PLANNED, "return_softmax_lse"},
    "flash_attn_with_kvcache": {*EVERYWHERE, "block_table", "seqused_q"},
    "flash_attn_qkvpacked_func": {*EVERYWHERE, "return_softmax_lse"},
    "get_scheduler_metadata": {
        *("seqused_k", "seqused_q", "cu_seqlens_k", "has_qv", "cp_world_size", "cp_rank", "cp_tot_seqused_k"),
        *("batch_invariant", "kv_dtype", "out"),
    },
    "flash_attn_combine": set(),
}


@pytest.fixture(scope="module", params=["mate", "flash_attn_interface"])
def module(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The package, and the module that stands in FlashAttention-3's place, installed or not."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec(request.param) is None:
            patch.syspath_prepend(str(DROP_IN))
        yield importlib.import_module(request.param)


@pytest.mark.parametrize("function", POSITIONAL)
def test_positional_order_and_defaults(module: ModuleType, function: str) -> None:
    signature = inspect.signature(getattr(module, function)).parameters
    positional = {
        name: parameter.default
        for name, parameter in signature.items()
        if parameter.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
    }
    assert list(positional) == list(POSITIONAL[function])
    for name, default in POSITIONAL[function].items():
        if name == "cache_seqlens" and function == "get_scheduler_metadata":
            assert positional[name] in (None, REQUIRED)  # it has a second name
        elif default is REQUIRED:
            assert positional[name] is REQUIRED, name
        else:
            assert positional[name] == default, name
            assert type(positional[name]) is type(default), name


@pytest.mark.parametrize("function", POSITIONAL)
def test_own_arguments_are_spelled_out_and_by_keyword(module: ModuleType, function: str) -> None:
    signature = inspect.signature(getattr(module, function)).parameters
    kinds = {parameter.kind for parameter in signature.values()}
    assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    by_keyword = {name for name, p in signature.items() if p.kind == inspect.Parameter.KEYWORD_ONLY}
    assert by_keyword >= OWN[function]
    defaults = {
        "cp_world_size": 1,
        "cp_rank": 0,
        "batch_invariant": False,
        "has_qv": False,
        "return_softmax_lse": False,
    }
    for name in OWN[function]:
        assert signature[name].default == defaults.get(name), name


def test_flash_attn_3_is_the_name_of_the_drop_in(module: ModuleType) -> None:
    if module.__name__ == "flash_attn_interface":
        inner = importlib.import_module("flash_attn_3.flash_attn_interface")
        assert importlib.import_module("flash_attn_3").__version__.startswith("3.")
        for function in POSITIONAL:
            assert getattr(inner, function) is getattr(module, function)
    for function in POSITIONAL:
        assert getattr(module, function) is getattr(importlib.import_module("mate"), function)


def test_all_positionally(mate: ModuleType, device: str) -> None:
    numbers = torch.Generator().manual_seed(3)
    q, k, v, qv = (torch.randn(2, 5, 4, 8, generator=numbers).to(device, torch.bfloat16) for _ in range(4))
    scale = torch.full((2, 4), torch.nan, device=device)
    tail = (True, qv, scale, scale, scale, (3, 0), 4, 2.0, 1, None, False, 0, True)
    cu = torch.tensor([0, 5, 10], dtype=torch.int32, device=device)
    used = torch.tensor([5, 3], dtype=torch.int32, device=device)
    named = dict(zip(SCORES, tail))
    whole = {"q": q, "k": k, "v": v, "softmax_scale": 0.3, **named}
    check(Call("flash_attn_func", whole), mate)
    assert same_bits(mate.flash_attn_func(q, k, v, 0.3, *tail), mate.flash_attn_func(**whole))
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    ragged = dict(zip("qkv", rows), softmax_scale=0.3, **{**named, "qv": qv.flatten(0, 1)})
    ragged |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 5, "max_seqlen_k": 5}
    ragged |= {"seqused_q": used, "seqused_k": used}
    check(Call("flash_attn_varlen_func", ragged), mate)
    tail = (tail[0], qv.flatten(0, 1), *tail[2:])
    got = mate.flash_attn_varlen_func(*rows, cu, cu, 5, 5, used, used, 0.3, *tail)
    assert same_bits(got, mate.flash_attn_varlen_func(**ragged))


@pytest.mark.parametrize("integer", [int, np.int32, np.uint8, torch.tensor], ids=["int", "int32", "uint8", "tensor"])
def test_integers_may_be_anything_with_an_index(mate: ModuleType, device: str, integer: Any) -> None:
    q = torch.randn(6, 4, 8, device=device, dtype=torch.bfloat16)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)

    def run(of: Any) -> tuple:
        window, numbers = (of(3), of(1)), {"attention_chunk": of(5), "num_splits": of(2), "sm_margin": of(1)}
        total = torch.tensor([4, 8], dtype=torch.int32, device=device)
        numbers |= {"cp_world_size": of(2), "cp_rank": of(1), "cp_tot_seqused_k": total}
        return mate.flash_attn_varlen_func(
            q, q, q, cu, cu, of(4), of(4), window_size=window, return_attn_probs=True, **numbers
        )

    assert same_bits(run(integer), run(int))


@pytest.mark.parametrize(
    "arguments",
    [
        {"causal": np.True_},
        {"causal": torch.tensor(1)},
        {"softmax_scale": np.float32(0.25)},
        {"softmax_scale": torch.tensor(0.25)},
        {"softmax_scale": np.broadcast_to(np.array(0.25), ())},  # read-only
        {"softcap": 2, "sm_margin": np.int64(1), "pack_gqa": np.False_},
    ],
    ids=lambda arguments: ", ".join(f"{name}={type(value).__name__}" for name, value in arguments.items()),
)
def test_numbers_of_other_types(mate: ModuleType, device: str, arguments: dict[str, Any]) -> None:
    q = torch.randn(1, 3, 2, 16, device=device, dtype=torch.bfloat16)
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in arguments.items()}
    assert same_bits(mate.flash_attn_func(q, q, q, **arguments), mate.flash_attn_func(q, q, q, **plain))


@pytest.mark.parametrize("integer", [int, np.int64, torch.tensor], ids=["int", "int64", "tensor"])
def test_an_integer_for_cache_seqlens_is_the_length_of_all(mate: ModuleType, device: str, integer: Any) -> None:
    q, cache = (torch.randn(3, n, 2, 8, device=device, dtype=torch.bfloat16) for n in (1, 20))
    lengths = torch.full((3,), 13, dtype=torch.int32, device=device)
    want = mate.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths)
    assert same_bits(mate.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=integer(13)), want)


@pytest.mark.parametrize("alias", ["sinks", "s_aux"])
@pytest.mark.parametrize("function", [name for name in OWN if "sinks" in OWN[name]])
def test_names_of_the_sink(mate: ModuleType, device: str, function: str, alias: str) -> None:
    def without_sink(call: Call) -> Call:
        names = call.arguments.keys() - {"learnable_sink", "sinks", "s_aux"}
        return Call(function, {name: call.arguments[name] for name in names})

    def largest_lse(call: Call) -> float:
        return max(evaluate(function, call.arguments).lse.flatten().tolist(), default=-torch.inf)

    def sees_keys(call: Call) -> bool:
        return largest_lse(without_sink(call)) > -torch.inf

    (drawn,) = draw_some(1, 5, sees_keys, device=device, functions=(function,), append=False)
    call = without_sink(drawn)
    # It weighs about as much as the keys of a row.
    sink = largest_lse(call) + torch.randn(call.normalised.q.shape[-2], device=device)
    got, want = (Call(function, {**call.arguments, name: sink}).run(mate) for name in (alias, "learnable_sink"))
    assert same_bits([x.clone() for x in got if x is not None], [x for x in want if x is not None])
    assert not same_bits(want[0].clone(), call.run(mate)[0])


@pytest.mark.parametrize("function", ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_qkvpacked_func"])
def test_names_of_returning_lse(mate: ModuleType, device: str, function: str) -> None:
    (call,) = draw_some(1, 9, device=device, functions=(function,))
    for name in ("return_attn_probs", "return_softmax_lse"):
        call.arguments.pop(name, None)
    call.arguments.pop("out", None)
    one, other = (getattr(mate, function)(**call.arguments, **{name: True}) for name in
                  ("return_attn_probs", "return_softmax_lse"))  # fmt: skip
    assert len(one) == len(other) == 2
    assert same_bits(one, other)


@pytest.mark.parametrize("function", ["flash_attn_varlen_func", "flash_attn_with_kvcache"])
def test_names_of_the_page_table(mate: ModuleType, device: str, function: str) -> None:
    def has_pages(call: Call) -> bool:
        return call.normalised.page_table is not None

    for call in draw_some(5, 11, has_pages, device=device, functions=(function,), append=False):
        call.arguments.pop("out", None)
        table = call.arguments.pop("page_table", None)
        table = call.arguments.pop("block_table", table)
        one, other = (Call(function, {**call.arguments, name: table}) for name in ("page_table", "block_table"))
        assert same_bits(one.run(mate), other.run(mate))


@pytest.mark.parametrize("heads_k", [1, 2, 4])
def test_qkvpacked_is_the_call_on_its_parts(mate: ModuleType, device: str, heads_k: int) -> None:
    qkv = torch.randn(2, 9, 4 + 2 * heads_k, 24, device=device, dtype=torch.bfloat16)
    options = {"causal": True, "window_size": (3, 0), "softcap": 5.0, "return_attn_probs": True}
    want = mate.flash_attn_func(*qkv.split([4, heads_k, heads_k], 2), **options)
    assert same_bits(mate.flash_attn_qkvpacked_func(qkv, num_heads_q=4, **options), want)
    if heads_k == 4:
        assert same_bits(mate.flash_attn_qkvpacked_func(qkv.unflatten(2, (3, 4)), **options), want)
