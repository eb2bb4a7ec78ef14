"""MATE: exact attention, forward pass, with the calls of FlashAttention-3."""

from mate import _library
from mate._functions import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)
from mate._info import info
from mate._warmup import warmup

__version__: str = _library.version()

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "info",
    "warmup",
]
