"""The calls under torch.compile(fullgraph=True) and torch.export do what they do eagerly."""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.fx.experimental.proxy_tensor
from judge import same_bits

H, HK, D = 4, 2, 16


def randn(*shape: int, device: str) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=numbers).to(device, torch.bfloat16)


def int32(values: list[int], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def func(mate: ModuleType, device: str) -> tuple[Callable, dict]:
    def run(q, k, v, sink):
        out, lse = mate.flash_attn_func(
            q * 2, k, v, causal=True, window_size=(4, 0), softcap=9.0, sinks=sink, return_attn_probs=True
        )
        return out + 1, lse

    sizes = {"q": (2, 5, H, D), "k": (2, 7, HK, D), "v": (2, 7, HK, D), "sink": (H,)}
    return run, {name: randn(*shape, device=device) for name, shape in sizes.items()}


def varlen(mate: ModuleType, device: str) -> tuple[Callable, dict]:
    def run(q, k, v, cu_q, cu_k):
        return mate.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 9, causal=True, num_splits=3) * 2

    sizes = {"q": (8, H, D), "k": (12, HK, D), "v": (12, HK, D)}
    tensors = {name: randn(*shape, device=device) for name, shape in sizes.items()}
    return run, {**tensors, "cu_q": int32([0, 5, 8], device), "cu_k": int32([0, 3, 12], device)}


def paged(mate: ModuleType, device: str) -> tuple[Callable, dict]:
    def run(q, pages_k, pages_v, table, lengths):
        return mate.flash_attn_with_kvcache(
            q, pages_k, pages_v, cache_seqlens=lengths, page_table=table, causal=True, return_softmax_lse=True
        )[:2]

    tensors = {"q": randn(2, 1, H, D, device=device)}
    tensors |= {name: randn(5, 4, HK, D, device=device) for name in ("pages_k", "pages_v")}
    return run, {**tensors, "table": int32([3, 1, 0, 4], device).view(2, 2), "lengths": int32([7, 2], device)}


def append(mate: ModuleType, device: str) -> tuple[Callable, dict]:
    def run(q, cache_k, cache_v, k, v, cos, sin, lengths):
        out = mate.flash_attn_with_kvcache(
            q, cache_k, cache_v, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=lengths, causal=True
        )
        return out.float() * 2, cache_k[:, :1] + 0  # the cache is read after the call wrote it

    sizes = {"q": (2, 3, H, D), "cache_k": (2, 12, HK, D), "cache_v": (2, 12, HK, D), "k": (2, 3, HK, D)}
    sizes |= {"v": (2, 3, HK, D), "cos": (20, D // 2), "sin": (20, D // 2)}
    tensors = {name: randn(*shape, device=device) for name, shape in sizes.items()}
    return run, {**tensors, "lengths": int32([0, 9], device)}


def packed(mate: ModuleType, device: str) -> tuple[Callable, dict]:
    def run(qkv):
        return mate.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=H)

    return run, {"qkv": randn(2, 6, H + 2 * HK, D, device=device)}


def into_out(mate: ModuleType, device: str) -> tuple[Callable, dict]:
    def run(q, k, v, out):
        mate.flash_attn_func(q, k, v, out=out)
        return out * 3

    sizes = {"q": (1, 5, H, D), "k": (1, 7, HK, D), "v": (1, 7, HK, D), "out": (1, 5, H, D)}
    return run, {name: randn(*shape, device=device) for name, shape in sizes.items()}


def combine(mate: ModuleType, device: str) -> tuple[Callable, dict]:
    def run(outs, lses):
        return mate.flash_attn_combine(outs, lses, out_dtype=torch.bfloat16)

    return run, {
        "outs": randn(3, 1, 5, H, D, device=device).float(),
        "lses": randn(3, 1, 5, H, device=device).float(),
    }


def planned(mate: ModuleType, device: str) -> tuple[Callable, dict]:
    def run(q, cache, lengths):
        plan = mate.get_scheduler_metadata(2, 1, 300, H, HK, D, lengths, causal=True)
        return mate.flash_attn_with_kvcache(
            q, cache, cache, cache_seqlens=lengths, causal=True, scheduler_metadata=plan
        )

    tensors = {"q": randn(2, 1, H, D, device=device), "cache": randn(2, 300, HK, D, device=device)}
    return run, {**tensors, "lengths": int32([280, 3], device)}


CASES = [func, varlen, paged, append, packed, into_out, combine, planned]


def check_against_eager(run: Callable, transformed: Callable, tensors: dict[str, torch.Tensor]) -> None:
    """Twice, so that a kept graph serves other values too. Tensors that the call writes count as results."""
    for shift in (0, 1):
        inputs = {name: value + shift if value.is_floating_point() else value for name, value in tensors.items()}
        eager = copy.deepcopy(inputs)
        want, got = run(**eager), transformed(**inputs)
        assert same_bits(got, want)
        assert same_bits(tuple(inputs.values()), tuple(eager.values()))


@pytest.mark.parametrize("case", CASES)
def test_compiled(mate: ModuleType, device: str, case: Callable) -> None:
    run, tensors = case(mate, device)
    torch._dynamo.reset()
    check_against_eager(run, torch.compile(run, fullgraph=True, backend="aot_eager"), tensors)


def test_compiled_by_inductor(mate: ModuleType, device: str) -> None:
    run, tensors = append(mate, device)
    torch._dynamo.reset()
    check_against_eager(run, torch.compile(run, fullgraph=True), tensors)


@pytest.mark.parametrize("case", [func, varlen, paged, append, packed, combine, planned])
def test_exported(mate: ModuleType, device: str, case: Callable) -> None:
    run, tensors = case(mate, device)

    class Module(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return run(**inputs)

    program = torch.export.export(Module(), (), tensors)
    check_against_eager(run, program.module(), tensors)


def test_dynamic_shapes(mate: ModuleType, device: str) -> None:
    """One graph for all lengths."""

    def run(q, k, v):
        return mate.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sq, sk in ((3, 5), (7, 9), (2, 30)):
            q, k, v = (
                randn(2, sq, H, D, device=device),
                *(randn(2, sk, HK, D, device=device) for _ in range(2)),
            )
            assert same_bits(compiled(q, k, v), run(q, k, v))


def test_a_flag_that_follows_from_a_shape(mate: ModuleType, device: str) -> None:
    def run(q, k):
        return mate.flash_attn_func(q, k, k, causal=q.shape[1] > 1)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 4, 1):
        q, k = randn(1, rows, H, D, device=device), randn(1, 7, HK, D, device=device)
        assert same_bits(compiled(q, k), run(q, k))


def test_compiled_with_grad(mate: ModuleType, device: str) -> None:
    """Compiled calls take inputs that require grad, and their backward pass names the function."""
    run, tensors = func(mate, device)
    tensors["q"].requires_grad_()
    torch._dynamo.reset()
    out, _ = torch.compile(run, fullgraph=True, backend="aot_eager")(**tensors)
    assert same_bits(out, run(**tensors)[0])
    with pytest.raises(NotImplementedError, match="flash_attn_func"):
        out.sum().backward()


def test_dynamic_scheduler_metadata(mate: ModuleType, device: str) -> None:
    def run(lengths):
        return mate.get_scheduler_metadata(lengths.shape[0], 1, 500, H, HK, D, lengths)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for values in ([3, 400], [1, 2, 3], [500] * 7):
        lengths = int32(values, device)
        assert same_bits(compiled(lengths), run(lengths))


@pytest.mark.parametrize("strict", [True, False])
def test_exported_with_a_dynamic_length(mate: ModuleType, device: str, strict: bool) -> None:
    class Module(torch.nn.Module):
        def forward(self, q, k, cu):
            return mate.flash_attn_varlen_func(q, k, k, cu, cu, q.shape[0], k.shape[0], causal=True)

    def inputs(rows: int) -> tuple[torch.Tensor, ...]:
        return (
            randn(rows, H, D, device=device),
            randn(rows, HK, D, device=device),
            int32([0, 2, rows], device),
        )

    rows = torch.export.Dim("rows", min=3, max=100)
    program = torch.export.export(Module(), inputs(8), dynamic_shapes=({0: rows}, {0: rows}, None), strict=strict)
    for length in (8, 40):
        assert same_bits(program.module()(*inputs(length)), Module()(*inputs(length)))


@pytest.mark.parametrize("case", [append, into_out])
def test_compiled_with_grad_where_arguments_are_written(mate: ModuleType, device: str, case: Callable) -> None:
    run, tensors = case(mate, device)
    tensors["q"].requires_grad_()
    torch._dynamo.reset()
    result = torch.compile(run, fullgraph=True, backend="aot_eager")(**tensors)
    first = result[0] if isinstance(result, tuple) else result
    with pytest.raises(NotImplementedError, match="flash_attn_"):
        first.sum().backward()


def test_compiled_with_grad_into_a_wrong_out(mate: ModuleType, device: str) -> None:
    run, tensors = into_out(mate, device)
    tensors["q"].requires_grad_()
    for out in (tensors["out"].float(), tensors["out"].new_empty(3, *tensors["out"].shape)):
        torch._dynamo.reset()
        with pytest.raises(Exception, match="out must"):
            torch.compile(run, fullgraph=True, backend="aot_eager")(**{**tensors, "out": out})


def test_traced_by_make_fx(mate: ModuleType, device: str) -> None:
    """A graph that is recorded from real tensors has the call in it, and not the memory of one of its results."""
    run, tensors = varlen(mate, device)
    graph = torch.fx.experimental.proxy_tensor.make_fx(run)(*tensors.values())
    others = {name: value * 2 if value.is_floating_point() else value for name, value in tensors.items()}
    assert same_bits(graph(*others.values()), run(**others))


def test_fake_tensors(mate: ModuleType, device: str) -> None:
    run, tensors = func(mate, device)
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out, lse = run(**tensors)  # real tensors under the mode
        fake_out, fake_lse = run(**{name: mode.from_tensor(value) for name, value in tensors.items()})
    assert out.shape == fake_out.shape == (2, 5, H, D)
    assert lse.shape == fake_lse.shape == (2, H, 5)
    fake = mode.from_tensor(tensors["k"])
    assert mate.flash_attn_func(tensors["q"], fake, fake).shape == (2, 5, H, D)
