"""From a layout and routes to index tensors; knows no model."""
