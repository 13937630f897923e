"""One forward of a routed layer: spans entered and left, groups, arguments, attention rows, generation, head."""
