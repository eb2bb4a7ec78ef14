"""The functions of :mod:`flash_attn_interface`, under the name that they have in FlashAttention-3's wheels."""

from flash_attn_interface import *  # noqa: F403
from flash_attn_interface import __all__ as __all__
