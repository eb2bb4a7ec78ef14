"""flash_attn_combine."""

import copy
from types import ModuleType
from typing import Optional

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import check_unwritten, error, same_bits, storage


def partial_results(splits: int, b: int, s: int, h: int, dv: int, device: str, dead: float = 0.3) -> tuple:
    """Random partial results; those of splits whose lse is -inf are NaN."""
    out = torch.randn(splits, b, s, h, dv, device=device)
    lse = 3 * torch.randn(splits, b, s, h, device=device)
    empty = torch.rand(splits, b, s, h, device=device) < dead
    return out.masked_fill(empty[..., None], torch.nan), lse.masked_fill(empty, -torch.inf)


def merged(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in float64."""
    out, lse = out.double(), lse.double()
    total = torch.logsumexp(torch.cat([lse, torch.full_like(lse[:1], -torch.inf)]), 0)
    weights = torch.exp(lse - total).masked_fill(torch.isneginf(lse), 0)
    return (weights[..., None] * out.masked_fill(torch.isneginf(lse)[..., None], 0)).sum(0), total


def check_merged(got: tuple, out: torch.Tensor, lse: torch.Tensor, bar: float = 1e-6) -> None:
    want, want_lse = merged(out, lse)
    assert got[0].shape == want.shape
    assert got[1].shape == want_lse.shape
    assert got[1].dtype == torch.float32
    assert not got[0].isnan().any()
    assert error(got[0], want) <= bar
    assert (got[0][torch.isneginf(want_lse)] == 0).all()
    assert torch.equal(torch.isneginf(got[1]), torch.isneginf(want_lse))
    torch.testing.assert_close(got[1].double(), want_lse, rtol=1e-6, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    splits=st.integers(1, 20),
    b=st.integers(0, 3),
    s=st.integers(0, 9),
    h=st.integers(1, 5),
    dv=st.integers(1, 70),
    dead=st.sampled_from([0.0, 0.3, 1.0]),
    number=st.integers(0, 2**31),
)
def test_is_the_merge_by_lse(mate, device, splits, b, s, h, dv, dead, number) -> None:
    torch.manual_seed(number)
    out, lse = partial_results(splits, b, s, h, dv, device, dead)
    before = copy.deepcopy({"out": out, "lse": lse})
    check_merged(mate.flash_attn_combine(out, lse), out, lse)
    check_unwritten({"out": out, "lse": lse}, before)


def test_256_splits_and_wide_heads(mate: ModuleType, device: str) -> None:
    out, lse = partial_results(256, 1, 2, 3, 512, device)
    check_merged(mate.flash_attn_combine(out, lse), out, lse)


def test_strided_partial_results(mate: ModuleType, device: str) -> None:
    out, lse = partial_results(4, 2, 5, 3, 7, device)
    heads_first = torch.full((2, 3, 6, 4, 9), torch.nan, device=device)
    strided = heads_first[:, :, 1:, :, :7].permute(3, 0, 2, 1, 4)
    strided.copy_(out)
    lse_strided = torch.full((3, 2, 5, 4), torch.nan, device=device).permute(3, 1, 2, 0)
    lse_strided.copy_(lse)
    got = mate.flash_attn_combine(strided, lse_strided)
    assert same_bits(got, mate.flash_attn_combine(out, lse))


@pytest.mark.parametrize(
    ("given_out", "out_dtype", "result"),
    [
        (None, None, torch.float32),
        (None, torch.bfloat16, torch.bfloat16),
        (None, torch.float16, torch.float16),
        (None, torch.float32, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float16),
        (torch.float32, None, torch.float32),
        (torch.float16, torch.float16, torch.float16),
    ],
)
def test_type_of_the_result(
    mate: ModuleType,
    device: str,
    given_out: Optional[torch.dtype],
    out_dtype: Optional[torch.dtype],
    result: torch.dtype,
) -> None:
    out, lse = partial_results(3, 2, 4, 2, 24, device)
    target = None
    if given_out is not None:
        target = torch.full((2, 5, 2, 30), torch.nan, dtype=given_out, device=device)[:, 1:, :, 2:26]
        surroundings = copy.deepcopy(target)
    got = mate.flash_attn_combine(out, lse, out=target, out_dtype=out_dtype)
    assert got[0].dtype == result
    check_merged(got, out, lse, {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}[result])
    if target is not None:
        assert got[0].data_ptr() == target.data_ptr()
        surroundings.copy_(target)
        assert torch.equal(storage(target), storage(surroundings)), "elements between the rows of out were written"
