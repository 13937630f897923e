"""Where scripts written before the engine had rooms look for selections; they are made in `engine/plan`."""

from tokendrop.engine.plan.selection import highest as highest
