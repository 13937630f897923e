"""Rows of tokens moved into and out of compact form."""

from tokendrop.kernels.rows import gather_rotary, gather_tokens, merge_tokens, scatter_tokens

__all__ = ["gather_rotary", "gather_tokens", "merge_tokens", "scatter_tokens"]
