"""The reference against PyTorch's own attention, hand-worked values, and scalar loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import FP8, append, attend, evaluate, normalise, rotate, round_to, sequences, visible
from torch.nn.functional import scaled_dot_product_attention


def qkv(b: int, sq: int, sk: int, h: int, hk: int, d: int, dv: int) -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(b + sq * 31 + sk * 7)
    shapes = {"q": (b, sq, h, d), "k": (b, sk, hk, d), "v": (b, sk, hk, dv)}
    return {name: torch.randn(shape, generator=numbers) for name, shape in shapes.items()}


def torch_attention(arguments: dict, **options) -> torch.Tensor:
    q, k, v = (arguments[name].double().transpose(1, 2) for name in "qkv")
    return scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1, 1), (2, 5, 9, 4, 2, 16, 8), (3, 9, 9, 6, 1, 24, 24)])
def test_is_what_torch_computes(sizes: tuple) -> None:
    arguments = qkv(*sizes)
    expected = evaluate("flash_attn_func", {**arguments, "softmax_scale": 0.3})
    torch.testing.assert_close(expected.out, torch_attention(arguments, scale=0.3), rtol=1e-12, atol=1e-12)


def test_default_scale_and_causal_mask_are_those_of_torch() -> None:
    arguments = qkv(2, 7, 7, 4, 4, 16, 12)
    expected = evaluate("flash_attn_func", {**arguments, "causal": True})
    torch.testing.assert_close(expected.out, torch_attention(arguments, is_causal=True), rtol=1e-12, atol=1e-12)


def test_lse_is_the_log_of_the_sum_of_exponentials() -> None:
    arguments = qkv(1, 3, 5, 2, 1, 4, 4)
    expected = evaluate("flash_attn_func", arguments)
    scores = torch.einsum("bihd,bjd->bhij", arguments["q"].double(), arguments["k"][:, :, 0].double()) / 2
    torch.testing.assert_close(expected.lse, scores.exp().sum(-1).log(), rtol=1e-12, atol=1e-12)


def test_qv_is_part_of_the_score() -> None:
    arguments = qkv(1, 4, 6, 2, 2, 8, 5)
    qv = torch.randn(1, 4, 2, 5)
    expected = evaluate("flash_attn_func", {**arguments, "qv": qv})
    widened = dict(arguments, q=torch.cat([arguments["q"], qv], -1), k=torch.cat([arguments["k"], arguments["v"]], -1))
    torch.testing.assert_close(expected.out, torch_attention(widened), rtol=1e-12, atol=1e-12)


def test_softcap_and_sink_by_hand() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    out, lse, magnitude = attend(3 * one, 2 * one, 5 * one, one.bool(), scale=0.5, softcap=2.0, sink=1.0)
    score = 2 * math.tanh(1.5)
    p = math.exp(score) / (math.exp(score) + math.e)
    assert out.item() == pytest.approx(5 * p)
    assert magnitude.item() == pytest.approx(5 * p)
    assert lse.item() == pytest.approx(math.log(math.exp(score) + math.e))


@pytest.mark.parametrize("sink", [None, 0.7])
def test_a_row_without_keys(sink: float) -> None:
    q, k = torch.ones(2, 3, dtype=torch.float64), torch.full((4, 3), torch.nan, dtype=torch.float64)
    out, lse, magnitude = attend(q, k, k, torch.zeros(2, 4, dtype=torch.bool), scale=1.0, sink=sink)
    assert (out == 0).all()
    assert (magnitude == 0).all()
    torch.testing.assert_close(lse, torch.full_like(lse, -torch.inf if sink is None else sink))


@given(
    sq=st.integers(0, 9),
    sk=st.integers(0, 9),
    causal=st.booleans(),
    left=st.integers(-1, 6),
    right=st.integers(-1, 6),
    chunk=st.integers(0, 6),
    world_size=st.integers(1, 3),
    surplus=st.integers(-4, 4),
    data=st.data(),
)
def test_visible_is_the_table_of_rules(sq, sk, causal, left, right, chunk, world_size, surplus, data) -> None:
    rank = data.draw(st.integers(0, world_size - 1))
    total = sk if world_size == 1 else max(0, sk * world_size + surplus)
    see = visible(sq, sk, causal, (left, right), chunk, world_size, rank, total)
    assert see.shape == (sq, sk)
    for i in range(sq):
        for local in range(sk):
            p, j = i + total - sq, local * world_size + rank
            rules = [j < total, not causal or j <= p, left < 0 or j >= p - left, right < 0 or j <= p + right]
            rules.append(chunk == 0 or math.floor(p / chunk) == math.floor(j / chunk))
            assert see[i, local] == all(rules), (i, local)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_is_a_complex_product(interleaved: bool) -> None:
    x, angle = torch.randn(5, 2, 40), torch.randn(5, 8)
    got = rotate(x, angle.cos(), angle.sin(), interleaved)
    pairs = x[..., :16].unflatten(-1, (8, 2) if interleaved else (2, 8))
    a, b = pairs.unbind(-1 if interleaved else -2)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)[:, None]
    want = torch.stack([turned.real, turned.imag], -1 if interleaved else -2).flatten(-2)
    torch.testing.assert_close(got[..., :16], want, rtol=1e-5, atol=1e-6)
    assert torch.equal(got[..., 16:], x[..., 16:])


def test_float8_saturates() -> None:
    x = torch.tensor([500.0, -1e9, 448.0, 464.0, 17.0, 1e-9])
    assert round_to(x, FP8).float().tolist() == [448, -448, 448, 448, 16, 0]


def test_paged_cache_is_found_through_its_table() -> None:
    pages = torch.randn(6, 2, 1, 4)
    arguments = {
        "q": torch.randn(2, 1, 1, 4),
        "k_cache": pages,
        "v_cache": pages,
        "page_table": torch.tensor([[4, 0, -9], [-9, 5, 2]], dtype=torch.int32),
        "cache_seqlens": torch.tensor([3, 6], dtype=torch.int32),
        "cache_leftpad": torch.tensor([0, 3], dtype=torch.int32),
    }
    first, second = sequences(normalise("flash_attn_with_kvcache", arguments))
    assert torch.equal(pages[first.keys], torch.stack([pages[4, 0], pages[4, 1], pages[0, 0]]))
    assert torch.equal(pages[second.keys], torch.stack([pages[5, 1], pages[2, 0], pages[2, 1]]))


def test_append_writes_behind_the_sequence_and_is_attended_to() -> None:
    cache_k, cache_v, new_k, new_v = (torch.randn(2, n, 1, 16) for n in (8, 8, 2, 2))
    lengths = torch.tensor([3, 6], dtype=torch.int32)
    call = {"q": torch.randn(2, 1, 1, 16), "k_cache": cache_k, "v_cache": cache_v, "k": new_k, "v": new_v}
    expected = evaluate("flash_attn_with_kvcache", {**call, "cache_seqlens": lengths})
    for b, length in enumerate(lengths.tolist()):
        k, v = (torch.cat([x[b, :length], y[b]]) for x, y in ((cache_k, new_k), (cache_v, new_v)))
        assert torch.equal(expected.after[0]["k_cache"][b, : length + 2], k)
        assert torch.equal(expected.after[0]["k_cache"][b, length + 2 :], cache_k[b, length + 2 :])
        alone = {"q": call["q"][b : b + 1], "k": k[None], "v": v[None]}
        torch.testing.assert_close(expected.out[b : b + 1], torch_attention(alone), rtol=1e-12, atol=1e-12)


def test_quantised_append_divides_by_the_scale() -> None:
    arguments = {
        "q": torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16),
        "k_cache": torch.zeros(1, 1, 1, 2, dtype=FP8),
        "v_cache": torch.zeros(1, 1, 1, 2, dtype=FP8),
        "k": torch.tensor([[[[3.0, 1000.0]]]], dtype=torch.bfloat16),
        "v": torch.tensor([[[[3.0, 1000.0]]]], dtype=torch.bfloat16),
        "cache_seqlens": 0,
        "k_descale": torch.tensor([[2.0]]),
    }
    append(normalise("flash_attn_with_kvcache", arguments), "none")
    assert arguments["k_cache"].float().flatten().tolist() == [1.5, 448]
    assert arguments["v_cache"].float().flatten().tolist() == [3, 448]
    expected = evaluate("flash_attn_with_kvcache", arguments)
    assert expected.out.flatten().tolist() == [3, 448]


def test_ranks_of_context_parallel_hold_every_key_once() -> None:
    arguments = qkv(1, 6, 11, 2, 1, 8, 8)
    whole = evaluate("flash_attn_func", {**arguments, "causal": True, "window_size": (7, -1)})
    parts = []
    for rank in range(3):
        share = {"q": arguments["q"], "k": arguments["k"][:, rank::3], "v": arguments["v"][:, rank::3]}
        total = torch.tensor([11], dtype=torch.int32)
        rules = {"causal": True, "window_size": (7, -1), "cp_tot_seqused_k": total}
        parts.append(evaluate("flash_attn_func", {**share, **rules, "cp_world_size": 3, "cp_rank": rank}))
    lse = torch.stack([part.lse for part in parts])
    weights = torch.softmax(lse, 0).transpose(-1, -2)[..., None]
    torch.testing.assert_close((weights * torch.stack([part.out for part in parts])).sum(0), whole.out)
    torch.testing.assert_close(torch.logsumexp(lse, 0), whole.lse)
