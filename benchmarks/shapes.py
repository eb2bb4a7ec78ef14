"""What the rows of the benchmarks have in common."""

import torch
from torch import Tensor


def heads_last(out: Tensor) -> Tensor:
    return out.transpose(1, 2)


E4M3 = torch.float8_e4m3fn
TYPE_LABELS = {torch.bfloat16: "bf16", E4M3: "e4m3"}


def random_on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda").to(dtype)


def heads_label(heads_q: int, heads_k: int) -> str:
    return str(heads_q) if heads_q == heads_k else f"{heads_q}/{heads_k}"


def visible_pairs(length: int, causal: bool, window: int | None = None) -> float:
    """How many pairs of a query and a key count as work."""
    if window is not None:
        return sum(min(row, window) + 1 for row in range(length))
    return length**2 / 2 if causal else length**2
