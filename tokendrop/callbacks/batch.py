"""The token layout of a batch, by the code that a model with `layout="auto"` uses."""

from tokendrop.engine.model.batch import batch_layout, sub_batches

__all__ = ["batch_layout", "sub_batches"]
