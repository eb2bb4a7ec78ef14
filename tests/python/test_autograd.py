"""Inputs that require grad: the forward pass is served, the backward pass says that it is not."""

from types import ModuleType

import pytest
import torch
from calls import FUNCTIONS, Call, draw_some
from judge import same_bits


def differentiable(function: str, device: str) -> Call:
    """A call of the function whose tensors may require grad."""

    def has_rows(call: Call) -> bool:
        a = call.normalised
        return a.q.numel() > 0 and a.k.numel() > 0 and "out" not in call.arguments and call.returns_lse

    types = [(torch.bfloat16, torch.bfloat16)]
    (call,) = draw_some(1, 3, has_rows, device=device, functions=(function,), types=types, append=False)
    call.with_metadata = False
    return call


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("which", ["first", "all"])
def test_backward_names_the_function(mate: ModuleType, device: str, function: str, which: str) -> None:
    call = differentiable(function, device)
    want = call.run(mate)
    names = ["qkv"] if "qkv" in call.arguments else ["q"]
    if which == "all":
        names = [name for name in ("qkv", "q", "k", "v", "qv", "k_cache", "v_cache") if name in call.arguments]
    for name in names:
        call.arguments[name] = call.arguments[name].detach().requires_grad_()
    out, lse = call.run(mate)
    assert same_bits((out, lse), want)
    assert out.requires_grad
    with pytest.raises(NotImplementedError, match=function):
        out.float().nansum().backward()


def test_backward_of_combine(mate: ModuleType, device: str) -> None:
    out = torch.randn(2, 1, 3, 2, 8, device=device, requires_grad=True)
    lse = torch.randn(2, 1, 3, 2, device=device)
    merged, _ = mate.flash_attn_combine(out, lse)
    assert same_bits(merged, mate.flash_attn_combine(out.detach(), lse)[0])
    with pytest.raises(NotImplementedError, match="flash_attn_combine"):
        merged.sum().backward()


def test_backward_of_append(mate: ModuleType, device: str) -> None:
    """New keys that require grad are written into the cache all the same."""
    q, k = (torch.randn(1, 1, 2, 8, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    cache = torch.zeros(1, 4, 2, 8, device=device, dtype=torch.bfloat16)
    out = mate.flash_attn_with_kvcache(q, cache, cache.clone(), k, k, cache_seqlens=2)
    assert same_bits(cache[:, 2:3], k.detach())
    with pytest.raises(NotImplementedError, match="flash_attn_with_kvcache"):
        out.sum().backward()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_without_grad_nothing_is_recorded(mate: ModuleType, device: str, function: str) -> None:
    call = differentiable(function, device)
    name = "qkv" if "qkv" in call.arguments else "q"
    call.arguments[name] = call.arguments[name].detach().requires_grad_()
    with torch.no_grad():
        out, lse = call.run(mate)
    assert not out.requires_grad
    assert not lse.requires_grad
    with torch.inference_mode():
        assert same_bits(call.run(mate), (out, lse))


@pytest.mark.parametrize("name", ["q_descale", "v_descale", "learnable_sink"])
def test_backward_of_scales_and_sinks(mate: ModuleType, device: str, name: str) -> None:
    q = torch.randn(1, 3, 2, 8, device=device, dtype=torch.bfloat16).to(torch.float8_e4m3fn)
    scale = torch.ones(2, device=device) if name == "learnable_sink" else torch.ones(1, 2, device=device)
    out = mate.flash_attn_func(q, q, q, **{name: scale.requires_grad_()})
    with pytest.raises(NotImplementedError, match="flash_attn_func"):
        out.float().sum().backward()


def test_what_is_written_is_known_to_autograd(mate: ModuleType, device: str) -> None:
    """Tensors that a graph has saved and a call then overwrites are noticed when backward needs them."""
    q, cache = (torch.randn(1, n, 2, 8, device=device, dtype=torch.bfloat16) for n in (1, 4))
    out, weight = torch.randn_like(q), torch.ones_like(q, requires_grad=True)
    product = out * weight
    mate.flash_attn_func(q, q, q, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    versions = cache._version
    mate.flash_attn_with_kvcache(q, cache, cache.clone(), q, q, cache_seqlens=1)
    assert cache._version > versions


def test_out_must_not_require_grad(mate: ModuleType, device: str) -> None:
    q = torch.randn(1, 3, 2, 8, device=device, dtype=torch.bfloat16)
    out = torch.zeros_like(q).requires_grad_()
    with pytest.raises(ValueError, match="out must not be a leaf that requires grad"):
        mate.flash_attn_func(q, q, q, out=out)
    assert (out == 0).all()


def test_out_that_is_a_view_of_a_buffer(mate: ModuleType, device: str) -> None:
    q = torch.randn(1, 3, 2, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    buffer = torch.zeros(2, 1, 3, 2, 8, device=device, dtype=torch.bfloat16)
    want = mate.flash_attn_func(*[q.detach()] * 3, return_attn_probs=True)
    for i in range(2):
        result, lse = mate.flash_attn_func(q, q, q, out=buffer[i], return_attn_probs=True)
        assert same_bits((result.detach(), lse.detach()), want)
        with pytest.raises(NotImplementedError, match="flash_attn_func"):
            lse.sum().backward()
    buffer = torch.zeros_like(buffer, requires_grad=False)
    with pytest.raises(ValueError, match="out must not be a view"):
        mate.flash_attn_func(q, q, q, out=buffer.unbind()[0])
    assert (buffer == 0).all()


def test_out_is_used_again(mate: ModuleType, device: str) -> None:
    """It then carries the graph of the call before, which is overwritten with it."""
    q = torch.randn(1, 3, 2, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    out = torch.zeros_like(q, requires_grad=False)
    for _ in range(2):
        mate.flash_attn_func(q, q, q, out=out)
        assert out.grad_fn is not None
    partial = torch.randn(2, 1, 3, 2, 8, device=device, requires_grad=True)
    lse, buffer = torch.zeros(partial.shape[:-1], device=device), torch.zeros(2, 1, 3, 2, 8, device=device)
    for _ in range(2):
        mate.flash_attn_combine(partial, lse, out=buffer[1])


def test_derivatives_that_come_with_the_call_are_refused(mate: ModuleType, device: str) -> None:
    q = torch.randn(1, 3, 2, 8, device=device, dtype=torch.bfloat16)

    def attention(x: torch.Tensor) -> torch.Tensor:
        return mate.flash_attn_func(x, q, q)

    with pytest.raises(NotImplementedError, match="flash_attn_func has no forward-mode derivative"):
        torch.func.jvp(attention, (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(NotImplementedError, match="flash_attn_func has no forward-mode derivative"):
            attention(dual)
        assert attention(q).shape == q.shape
    with pytest.raises(NotImplementedError, match="flash_attn_func has no backward"):
        torch.func.grad(lambda x: attention(x).float().sum())(q)
    with pytest.raises(NotImplementedError, match="flash_attn_func has no backward"):
        torch.func.vmap(torch.func.grad(lambda x: attention(x).float().sum()))(q[None])
