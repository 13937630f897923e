"""The pictures of docs/frontier.md, made of the committed rows.

    python benchmarks/frontier/picture.py

Shape letters: none.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.table import PAGES, frontier_name, frontier_rows
from tokendrop.study.frontier import SCALES
from tokendrop.study.frontier_summary import frontier_png

IMAGES = PAGES[0].parent / "docs" / "images"

if __name__ == "__main__":
    for scale in SCALES:
        for split in ("val", "test"):
            rows = frontier_rows(scale, split)
            if rows:
                seeds = len({row["seed"] for row in rows})
                path = IMAGES / f"{frontier_name(scale, split)}.png"
                path.write_bytes(frontier_png(rows, f"{scale}, {split}, up to {seeds} seeds a run"))
                print(path)
