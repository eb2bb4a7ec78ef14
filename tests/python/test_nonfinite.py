"""Infinities and NaN: where they may go and where they must not."""

from types import ModuleType
from typing import Optional

import pytest
import torch
from judge import same_bits

INF, NAN = torch.inf, torch.nan
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(device: str, dtype: torch.dtype = torch.float32, sq: int = 6, sk: int = 200) -> list[torch.Tensor]:
    """q, k, v of two sequences with four query heads over two key heads."""
    numbers = torch.Generator().manual_seed(7)
    shapes = ((2, sq, 4, 8), (2, sk, 2, 8), (2, sk, 2, 8))
    return [torch.randn(shape, generator=numbers).to(device, dtype) for shape in shapes]


def attention(mate: ModuleType, *args: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return mate.flash_attn_func(*args, return_attn_probs=True, **options)


@pytest.fixture(params=TYPES, ids=str)
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    if device != "cpu" and request.param == torch.float32:
        pytest.skip("float32 is for the CPU backend")
    return request.param


def check_unchanged(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal up to rounding, and finite."""
    assert got.isfinite().all()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("sink", [None, 0.5, -20.0, INF, NAN])
@pytest.mark.parametrize("hidden", ["no keys", "beyond the total", "in the first rows"])
def test_no_visible_key(mate: ModuleType, device: str, dtype: torch.dtype, sink: Optional[float], hidden: str) -> None:
    rows = 6
    q, k, v = tensors(device, dtype, rows, 0 if hidden == "no keys" else 4)
    if hidden != "in the first rows":
        k[:], v[:] = NAN, NAN
    options = {} if sink is None else {"learnable_sink": torch.full((4,), sink, device=device)}
    if hidden == "beyond the total":
        options |= {"cp_world_size": 2, "cp_tot_seqused_k": torch.zeros(2, dtype=torch.int32, device=device)}
    if hidden == "in the first rows":
        options["causal"] = True
        rows -= 4
    out, lse = attention(mate, q, k, v, **options)
    assert (out[:, :rows] == 0).all()
    lse = lse[..., :rows]
    expected = torch.full_like(lse, -INF if sink is None else sink)
    torch.testing.assert_close(lse, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("sink", [None, 0.5])
def test_all_visible_scores_minus_infinity(
    mate: ModuleType, device: str, dtype: torch.dtype, sink: Optional[float]
) -> None:
    q, k, v = tensors(device, dtype)
    q[0].abs_()
    k[0] = -INF
    sinks = None if sink is None else torch.full((4,), sink, device=device)
    out, lse = attention(mate, q, k, v, learnable_sink=sinks)
    assert (out[0] == 0).all()
    assert torch.equal(lse[0], torch.full_like(lse[0], -INF if sink is None else sink))
    assert out[1].isfinite().all()
    assert lse[1].isfinite().all()


@pytest.mark.parametrize("where", [0, 63, 64, 150])
def test_some_visible_scores_minus_infinity(mate: ModuleType, device: str, dtype: torch.dtype, where: int) -> None:
    """A key of score -inf counts as much as a key that is not there, even where it comes first."""
    q, k, v = tensors(device, dtype)
    q.abs_()
    k[:, : where + 1] = -INF
    got = attention(mate, q, k, v)
    want = attention(mate, q, k[:, where + 1 :], v[:, where + 1 :])
    torch.testing.assert_close(got[0].float(), want[0].float(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("where", [0, 100, 199])
def test_a_visible_score_of_infinity(
    mate: ModuleType, device: str, dtype: torch.dtype, where: int, num_splits: int
) -> None:
    q, k, v = tensors(device, dtype)
    q.abs_()
    k[0, where, 0] = INF
    out, lse = attention(mate, q, k, v, num_splits=num_splits)
    assert out[0, :, :2].isnan().all()
    assert (lse[0, :2].isnan() | (lse[0, :2] == INF)).all()
    assert out[0, :, 2:].isfinite().all()
    assert out[1].isfinite().all()
    assert lse[0, 2:].isfinite().all()
    assert lse[1].isfinite().all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_nonfinite_key_reaches_only_the_rows_that_see_it(
    mate: ModuleType, device: str, dtype: torch.dtype, value: float, num_splits: int
) -> None:
    q, k, v = tensors(device, dtype, sq=100)
    options = {"causal": True, "num_splits": num_splits}
    clean = attention(mate, q, k, v, **options)
    key = 150  # rows from 50 on see it
    k[0, key, 1] = value
    out, lse = attention(mate, q, k, v, **options)
    for got, want in ((out, clean[0]), (lse.transpose(1, 2), clean[1].transpose(1, 2))):
        check_unchanged(got[1], want[1])
        check_unchanged(got[0, :, :2], want[0, :, :2])
        check_unchanged(got[0, :50, 2:], want[0, :50, 2:])
    if value != value:
        assert out[0, 50:, 2:].isnan().all()
        assert lse[0, 2:, 50:].isnan().all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_nonfinite_value_stays_in_its_sequence_and_head(
    mate: ModuleType, device: str, dtype: torch.dtype, value: float, num_splits: int
) -> None:
    q, k, v = tensors(device, dtype, sq=100)
    options = {"causal": True, "num_splits": num_splits}
    clean = attention(mate, q, k, v, **options)
    v[0, 150, 1] = value
    out, lse = attention(mate, q, k, v, **options)
    check_unchanged(lse, clean[1])
    check_unchanged(out[1], clean[0][1])
    check_unchanged(out[0, :, :2], clean[0][0, :, :2])
    seeing, others = out[0, 50:, 2:], out[0, :50, 2:]
    assert (seeing.isnan() if value != value else seeing == value).all()
    check_unchanged(torch.where(others.isnan(), clean[0][0, :50, 2:], others), clean[0][0, :50, 2:])


@pytest.mark.parametrize("value", [NAN, INF])
def test_nonfinite_key_and_value_that_no_row_sees(
    mate: ModuleType, device: str, dtype: torch.dtype, value: float
) -> None:
    q, k, v = tensors(device, dtype, sq=6)
    options = {"window_size": (5, 0)}  # keys from 189 on
    clean = attention(mate, q, k, v, **options)
    k[:, :189], v[:, :189] = value, value
    assert same_bits(attention(mate, q, k, v, **options), clean)


def test_nonfinite_query_row_stays_alone(mate: ModuleType, device: str, dtype: torch.dtype) -> None:
    q, k, v = tensors(device, dtype)
    clean = attention(mate, q, k, v)
    q[0, 3, 1] = NAN
    out, lse = attention(mate, q, k, v)
    assert out[0, 3, 1].isnan().all()
    assert lse[0, 1, 3].isnan()
    others = torch.ones(2, 6, 4, dtype=torch.bool, device=device)
    others[0, 3, 1] = False
    check_unchanged(out[others], clean[0][others])
    check_unchanged(lse.transpose(1, 2)[others], clean[1].transpose(1, 2)[others])


def test_a_sink_of_minus_infinity_is_none(mate: ModuleType, device: str, dtype: torch.dtype) -> None:
    q, k, v = tensors(device, dtype)
    sinks = torch.full((4,), -INF, device=device)
    got, want = attention(mate, q, k, v, learnable_sink=sinks), attention(mate, q, k, v)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])


def test_scale_of_zero_is_the_mean(mate: ModuleType, device: str, dtype: torch.dtype) -> None:
    q, k, v = tensors(device, dtype)
    out, lse = attention(mate, q, k, v, softmax_scale=0.0)
    mean = v.double().mean(1, keepdim=True).repeat_interleave(2, 2).expand(2, 6, 4, 8)
    torch.testing.assert_close(out.double(), mean, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(lse, torch.full_like(lse, 200.0).log())


def test_very_large_scores(mate: ModuleType, device: str, dtype: torch.dtype) -> None:
    """Scores far beyond the range of exp: the largest one wins."""
    q, k, v = tensors(device, dtype)
    q[:], k[:] = 1, 0
    k[:, 77] = 1
    out, lse = attention(mate, q, k, v, softmax_scale=1e4)
    assert torch.equal(out, v[:, 77:78].repeat_interleave(2, 2).expand(2, 6, 4, 8))
    torch.testing.assert_close(lse, torch.full_like(lse, 8e4))
    out, lse = attention(mate, q, k, v, softmax_scale=-1e4)
    torch.testing.assert_close(lse, torch.full_like(lse, 199.0).log(), rtol=1e-4, atol=1e-4)


def test_a_sink_of_infinity_takes_everything(mate: ModuleType, device: str, dtype: torch.dtype) -> None:
    q, k, v = tensors(device, dtype)
    want = attention(mate, q, k, v)
    out, lse = attention(mate, q, k, v, learnable_sink=torch.tensor([INF, -INF, INF, -INF], device=device))
    assert (out[:, :, ::2] == 0).all()
    assert (lse[:, ::2] == INF).all()
    check_unchanged(out[:, :, 1::2], want[0][:, :, 1::2])
    check_unchanged(lse[:, 1::2], want[1][:, 1::2])


@pytest.mark.parametrize("options", [{"softmax_scale": 3e38}, {"softcap": 1e-39}, {"softcap": 1e-50}])
def test_scores_of_zero_are_uniform_at_any_scale(
    mate: ModuleType, device: str, dtype: torch.dtype, options: dict
) -> None:
    q, k, v = tensors(device, dtype)
    out, _ = attention(mate, torch.zeros_like(q), k, v, **options)
    mean = v.double().mean(1, keepdim=True).repeat_interleave(2, 2).expand(2, 6, 4, 8)
    torch.testing.assert_close(out.double(), mean, rtol=1e-2, atol=1e-3)


def test_products_are_scaled_when_they_are_finished(mate: ModuleType) -> None:
    q, k = torch.full((1, 1, 1, 1), 3e38), torch.full((1, 1, 1, 1), 1e-38)
    _, lse = attention(mate, q, k, k, softmax_scale=1.0)
    torch.testing.assert_close(lse, torch.full_like(lse, 3.0))


@pytest.mark.parametrize("num_splits", [1, 2, 4])
def test_nan_behind_a_score_of_minus_infinity(mate: ModuleType, device: str, num_splits: int) -> None:
    """Weight 0 times NaN is NaN, in whichever split the key is."""
    q, k, v = tensors(device, torch.bfloat16, sk=256)
    q.abs_()
    k[:, :128] = -INF
    v[0, 3] = NAN
    out, _ = attention(mate, q, k, v, num_splits=num_splits)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
