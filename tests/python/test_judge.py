"""The judge accepts the reference put in the library's place, and notices each way to be wrong."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import FUNCTIONS, Call, draw, draw_some
from judge import check, out_dtype
from reference import evaluate, raw, sequences


class ReferenceLibrary:
    """A library whose calls are the reference's, rounded to the types of the contract."""

    def get_scheduler_metadata(self, **arguments: Any) -> torch.Tensor:
        return torch.zeros(4, dtype=torch.int32)

    def __getattr__(self, function: str) -> Callable:
        assert function in FUNCTIONS

        def run(**arguments: Any) -> Any:
            call = Call(function, arguments)
            expected = evaluate(function, arguments)
            for name in ("k_cache", "v_cache"):
                if name in arguments:
                    raw(arguments[name]).copy_(raw(expected.after[0][name]))
            a = call.normalised
            out = expected.out.to(out_dtype(call)) if a.out is None else a.out.copy_(expected.out)
            result = self.spoil(call, out, expected.lse.float())
            padding = (None, None) if function == "flash_attn_with_kvcache" else ()
            return (*result, *padding) if call.returns_lse else result[0]

        return run

    def spoil(self, call: Call, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return out, lse


def test_the_reference_passes(seed: int) -> None:
    for i in range(150):
        check(draw(seed + i), ReferenceLibrary())


class WrongRow(ReferenceLibrary):
    def spoil(self, call, out, lse):
        out[sequences(call.normalised)[0].rows][:1] += 1
        return out, lse


class WrongLse(ReferenceLibrary):
    def spoil(self, call, out, lse):
        return out, lse + 1e-3


class NanInPadding(ReferenceLibrary):
    def spoil(self, call, out, lse):
        return out.view(-1).index_fill_(0, torch.tensor([0]), torch.nan).view_as(out), lse


class WrongType(ReferenceLibrary):
    def spoil(self, call, out, lse):
        return out.double(), lse


class OtherOut(ReferenceLibrary):
    def spoil(self, call, out, lse):
        return out.clone(), lse


class WritesInput(ReferenceLibrary):
    def spoil(self, call, out, lse):
        raw(call.normalised.q).fill_(3)
        return out, lse


class WritesBehindTheSequence(ReferenceLibrary):
    def spoil(self, call, out, lse):
        raw(call.normalised.k)[-1] = 7
        return out, lse


class WritesBetweenRowsOfOut(ReferenceLibrary):
    def spoil(self, call, out, lse):
        torch.empty(0, dtype=out.dtype).set_(out.untyped_storage())[0] = 5
        return out, lse


def has_rows(call: Call) -> bool:
    a = call.normalised
    first = sequences(a)[:1]
    return bool(first) and first[0].sq > 0 and evaluate(call.function, call.arguments).lse.isfinite().all().item()


def gives_out(call: Call) -> bool:
    return call.arguments.get("out") is not None and call.arguments["out"].numel() > 0


@pytest.mark.parametrize(
    ("library", "where"),
    [
        (WrongRow, has_rows),
        (WrongLse, lambda call: has_rows(call) and call.returns_lse),
        (NanInPadding, lambda call: not gives_out(call) and call.normalised.q.numel() > 0),
        (WrongType, lambda call: call.normalised.q.numel() > 0),
        (OtherOut, gives_out),
        (WritesInput, lambda call: call.normalised.q.numel() > 0),
        (WritesBehindTheSequence, lambda call: call.normalised.k.numel() > 0),
        (WritesBetweenRowsOfOut, lambda call: gives_out(call) and call.arguments["out"].storage_offset() > 0),
    ],
)
def test_a_wrong_library_is_noticed(library: type, where: Callable[[Call], bool], seed: int) -> None:
    for call in draw_some(10, seed, where):
        with pytest.raises(AssertionError):
            check(copy.deepcopy(call), library())
