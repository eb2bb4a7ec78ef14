"""FlashAttention-3's package of this name, served by MATE."""

# The FlashAttention-3 whose calls are served, for programs that ask; MATE's own is mate.__version__.
__version__ = "3.0.0"
