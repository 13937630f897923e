"""The runs of the demo by name, and its study at the smallest size that runs.

Shape letters: none.
"""

from tokendrop.study.study import Study

NAMES = (
    "U-only", "G-only", "unified", "unified x0.6", "HiMix-U", "HMGen-G", "share-all", "share-partial", "ours",
)  # fmt: skip
TINY = Study(
    codes=16, hidden=16, layers=4, heads=2, shallow="1:3:2", steps=2, batch_size=4, val_scenes=4, test_scenes=4,
    curve_points=1, timing_rounds=3,
)  # fmt: skip
