"""The pictures that docs/frontier.md shows, made of the committed rows.

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
SHOWN = (IMAGES.parent / "frontier.md").read_text()

if __name__ == "__main__":
    for scale in SCALES:
        for split in ("val", "test"):
            path = IMAGES / f"{frontier_name(scale, split)}.png"
            if path.name in SHOWN:
                rows = frontier_rows(scale, split)
                seeds = len({row["seed"] for row in rows})
                path.write_bytes(frontier_png(rows, f"{scale}, {split}, up to {seeds} seeds a run"))
                print(path)
