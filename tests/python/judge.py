"""Compares what the library returns with the reference, and two results bit for bit."""

import copy
from typing import Any, NamedTuple, Optional

import torch
from calls import Call
from reference import FP8, Expected, evaluate


class Bars(NamedTuple):
    """How far results may be off."""

    out: float  # RMS error over the larger of RMS(out) and RMS(sqrt(sum (p v)**2)); of one row alone, 5 times that
    lse: float = 5e-5  # absolute, and relative where lse is larger than 1


BARS = {torch.float32: Bars(2e-6), torch.bfloat16: Bars(4e-3), torch.float16: Bars(5e-4), FP8: Bars(4e-3)}
# Where a GPU multiplies e4m3 as it is, weights are rounded to it, and sums of products are short.
E4M3_PRODUCTS = Bars(4e-2, 5e-3)


def is_widened(call: Call) -> bool:
    """Whether a GPU widens what is e4m3 in such a call, wherever its rows lie and however its keys are shared out."""
    a = call.normalised
    if a.qv is not None or a.batch_invariant or max(a.q.shape[-1], a.v.shape[-1]) > 256:
        return True
    ragged = a.cu_seqlens_q is not None
    if ragged and a.seqused_q is not None:
        return False
    rows = int(a.max_seqlen_q) if ragged else a.q.shape[1]
    group = 1 if a.pack_gqa is False else a.q.shape[-2] // max(a.k.shape[-2], 1)
    return rows * group <= 64  # decoding


def bars(*calls: Call, device: Any = None) -> Bars:
    """The widest of some calls' that are made on `device`, if not where their tensors are."""
    q = calls[0].normalised.q
    on_gpu = torch.device(device or q.device).type == "cuda"
    return E4M3_PRODUCTS if on_gpu and q.dtype is FP8 and not all(map(is_widened, calls)) else BARS[q.dtype]


def rms(x: torch.Tensor, dim: Any = None) -> torch.Tensor:
    return x.square().mean(dim).sqrt() if x.numel() else x.new_zeros(())


def error(
    got: torch.Tensor, want: torch.Tensor, magnitude: Optional[torch.Tensor] = None, dim: Any = None
) -> torch.Tensor:
    """RMS error over the larger of RMS(want) and RMS(magnitude); exact zeros must be met exactly.

    Rounding a tiny number to half a step of the subnormal numbers of `got` is no error: 1e-10 is 0 in float16.
    """
    least = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    beyond_rounding = ((got.double() - want.double()).abs() - least / 2).clamp(min=0)
    difference = rms(beyond_rounding, dim)
    size = rms(want.double(), dim)
    if magnitude is not None:
        size = torch.maximum(size, rms(magnitude, dim))
    return torch.where(difference == 0, 0.0, difference / size)


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor as integers of its element size."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.detach().contiguous().view(kinds[x.element_size()])


def same_bits(a: Any, b: Any) -> bool:
    """Whether two tensors, or two tuples of them, are equal bit for bit."""
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b))
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def storage(x: torch.Tensor) -> torch.Tensor:
    """All of the storage behind a tensor, the gaps between its rows included, as integers."""
    whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    return bits(whole)


def check_unwritten(arguments: dict, before: dict, skip: tuple[str, ...] = ()) -> None:
    """Every tensor argument, with all that surrounds it in memory, is bit for bit what it was."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type != "meta" and name not in skip:
            assert torch.equal(storage(value), storage(before[name])), f"{name} was written"


def check_arguments(arguments: dict, after: list[dict]) -> None:
    """Each element of every argument's storage, `out` excepted, is what some version of `after` says."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and name != "out":
            whole = storage(value)
            right = torch.zeros_like(whole, dtype=torch.bool)
            for version in after:
                right |= whole == storage(version[name])
            wrong = int((~right).sum())
            assert wrong == 0, f"{name}: {wrong} of {right.numel()} elements of its storage are not as expected"


def check_surroundings(out: torch.Tensor, before: torch.Tensor) -> None:
    """Nothing but the elements of `out` was written in its storage; `before` is a copy of the tensor."""
    patched = copy.deepcopy(out)
    patched.copy_(before)
    assert torch.equal(storage(patched), storage(before)), "out: elements between its rows were written"


def check_result(
    out: torch.Tensor,
    lse: Optional[torch.Tensor],
    expected: Expected,
    limits: Bars,
) -> None:
    """out and lse against the reference."""
    assert out.shape == expected.out.shape, f"out has shape {tuple(out.shape)}, not {tuple(expected.out.shape)}"
    assert not out.isnan().any(), f"out: {int(out.isnan().sum())} NaN of {out.numel()}"
    whole = float(error(out, expected.out, expected.magnitude))
    assert whole <= limits.out, f"out: error {whole:.3g} above {limits.out:.3g}"
    if out.numel():
        rows = error(out, expected.out, expected.magnitude, dim=-1)
        worst = float(rows.max())
        where = [int(x) for x in torch.unravel_index(rows.argmax(), rows.shape)]
        assert worst <= 5 * limits.out, f"out: error {worst:.3g} in row {where}"
    if lse is not None:
        check_lse(lse, expected.lse, limits.lse)


def check_lse(lse: torch.Tensor, expected: torch.Tensor, bar: float) -> None:
    assert lse.dtype == torch.float32
    assert lse.shape == expected.shape, f"lse has shape {tuple(lse.shape)}, not {tuple(expected.shape)}"
    nothing = torch.isneginf(expected)
    assert torch.equal(torch.isneginf(lse), nothing), "lse: -inf in other places than expected"
    difference = (lse.double() - expected)[~nothing].abs() / expected[~nothing].abs().clamp(min=1)
    assert not difference.isnan().any(), "lse: NaN"
    if difference.numel():
        assert float(difference.max()) <= bar, f"lse: error {float(difference.max()):.3g} above {bar:.3g}"


def out_dtype(call: Call) -> torch.dtype:
    """The type that the call's output must have."""
    a = call.normalised
    if a.out is not None:
        return a.out.dtype
    return torch.bfloat16 if a.q.dtype == FP8 else a.q.dtype


def poison_free_memory(call: Call) -> None:
    """Leaves NaN in the memory that the allocator hands out next, which may become the call's results."""
    a = call.normalised
    rows = a.q[..., 0].numel()
    for _ in range(2):
        garbage = [torch.full((rows, size), torch.nan, device=a.q.device) for size in (1, a.v.shape[-1])]
        garbage += [torch.full((rows, a.v.shape[-1]), torch.nan, dtype=out_dtype(call), device=a.q.device)]
        del garbage


def check(call: Call, library: Any) -> None:
    """Makes the call and checks all that it must do and must not do."""
    expected = evaluate(call.function, call.arguments)
    out = check_against(expected, call, library)
    # A GPU has other kernels for calls that do not ask for lse: see is_plain in forward_arguments.h.
    if call.returns_lse and out.is_cuda:
        want = out.clone()
        out.fill_(torch.nan)
        assert same_bits(check_against(expected, call.without_lse(), library), want), "out: other bits without lse"


def check_against(expected: Expected, call: Call, library: Any) -> torch.Tensor:
    """The results of a call, its arguments and all that surrounds them in memory. Returns out."""
    a = call.normalised
    before = None if a.out is None else copy.deepcopy(a.out)
    poison_free_memory(call)
    out, lse = call.run(library)
    if a.out is not None:
        assert out.data_ptr() == a.out.data_ptr(), "out is not the tensor given"
        assert out.stride() == a.out.stride(), "out is not the tensor given"
        check_surroundings(a.out, before)
    assert out.dtype == out_dtype(call), f"out is {out.dtype}, not {out_dtype(call)}"
    assert (lse is not None) == call.returns_lse
    check_arguments(call.arguments, expected.after)
    check_result(out, lse, expected, bars(call))
    return out
