"""The table of docs/families.md: every cell is the result of tests, which hold the committed table to it.

`pytest --families-table tests/engine` writes it anew, with `-m ""` also the slow cells.
"""

from collections import defaultdict
from functools import lru_cache
from pathlib import Path

from families import FAMILIES, NAMES

PATH = Path(__file__).parent.parent / "docs" / "families.md"
COLUMNS = (
    "HiMix",
    "HMGen",
    "projections",
    "parts",
    "drop, rejoin",
    "drop, gone",
    "attend",
    "generate",
    "checkpointing",
    "compile",
    "flash",
    "flex",
)
HEAD = """# Model families

Written by `make families` from the results of the test suite, which fails where a cell does not say what its test
found.

Every family is a tiny model of random weights, with real pixel values where it has a vision part. *pass*: logits and
all gradients equal those of the dense, masked definition of the same roles (1e-5 relative), with sdpa and eager
attention, unpadded, left- and right-padded. The columns:

- **HiMix**, **HMGen**: over all layers and over a range, alone and mixed in one batch, with the first
  `Drop(then="context")`; **projections**: image-only ones, `shared` and `per-task`; **drop, rejoin** and
  **drop, gone**: `td.Drop`, half of the image tokens, and with the
  first RandomLTD and MixtureOfDepths. FastV, PyramidDrop, HiDrop, DuetVLM and SVDPrune run in the same test; VScan and
  DuetVLM's vision stage in LLaVA, LLaVA-OneVision, Qwen2.5-VL, Qwen3-VL, InternVL, SmolVLM, Idefics 3 and Janus, whose
  vision encoders can be looked into.
- **parts**: output projection, norms and FFN of image tokens beside their projections, in one way for each family.
- **attend**: `Drop(then="attend")`, image tokens without FFN, half of them and all; in one way for each family, its
  steps with a cache equal to those without, and a layer equal to x + attention by the family's own code.
- **generate**: greedy generation with a cache equals that without one, under HiMix, HMGen and `Drop(then="gone")`.
- **checkpointing**: the model's own activation checkpointing is bit-identical to none.
- **compile**: `torch.compile(fullgraph=True)` with inductor gives one graph, none more for moved images or another
  selection, and the same logits and gradients.
- **flash**, **flex**: FlashAttention and FlexAttention, written plainly on torch with their documented semantics, as
  there is no GPU; HiMix or FastV, with HMGen in one batch. *not run*: what transformers itself does not run there.

Some layers carry a state from row to row (linear attention, state space models, short convolutions). There a token that
is BYPASS or GONE is no step: the others are a sequence of their own, whose decay and convolution go from one to the
next as if nothing had been between, while positions of rotary attention are kept. Their definition is a loop over
samples and the rows that take part, unpadded, in float64. CONTEXT needs keys and values, so it is for layers without a
state, and a cache would hold a state of rows that only fill up, so such models generate without one under a method.

The loss that balances experts counts the rows that compute and are no padding, layer by layer; `router_logits` of an
output have all rows that ran, with those that only fill up. gpt-oss and Gemma 2 have eager attention only.

Qwen3-VL adds features of its vision encoder to image tokens behind its first decoder layers (DeepStack). That is no
part of a layer: a token that skips layers, or is CONTEXT, gets them all the same, and those of a token that is GONE go
with it; one that is merged for a range has those of the token it went to. A decoder that adds them in a way of its own
(Granite 4 Vision) is refused across these layers.

"""


def render(cells: dict[tuple[str, str], str], refusals: dict[tuple[str, str], set[str]]) -> str:
    """The page, from the result of each cell and the families by what is refused and why."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, family in FAMILIES.items():
        row = " | ".join(cells.get((name, column), "not run") for column in COLUMNS)
        lines.append(f"| {family.model.__name__} (`{name}`) | {row} |")
    lines += ["", "## What is refused", "", "| what | families | the error says |", "|---|---|---|"]
    for (what, message), families in sorted(refusals.items()):
        names = "all" if families >= set(NAMES) else ", ".join(sorted(families))
        lines.append(f"| {what} | {names} | {message} |")
    return HEAD + "\n".join(lines) + "\n"


@lru_cache
def committed() -> tuple[dict[tuple[str, str], str], dict[tuple[str, str], set[str]]]:
    """What the committed page says."""
    rows = [line.strip("| \n").split(" | ") for line in PATH.read_text().splitlines() if line.startswith("| ")]
    split = next(index for index, row in enumerate(rows) if row[0] == "what")
    cells = {
        (row[0].partition("`")[2].rstrip("`)"), column): result
        for row in rows[1:split]
        for column, result in zip(COLUMNS, row[1:], strict=True)
    }
    refusals = {
        (what, message): set(NAMES) if names == "all" else set(names.split(", "))
        for what, names, message in rows[split + 1 :]
    }
    return cells, refusals


class Collector:
    """A pytest plugin that collects what the tests found, from every worker, and writes the page."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], str] = {}
        self.refusals: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)
        for kind, value in report.user_properties if report.when == "call" else ():
            if kind == "cell":
                self.cells[value[0], value[1]] = value[2]
            elif kind == "refusal":
                self.refusals[value[1], value[2]].add(value[0])

    def pytest_sessionfinish(self):
        # What this run did not reach keeps what it said.
        cells, refusals = committed() if PATH.exists() else ({}, {})
        if not self.failed:
            PATH.write_text(render(cells | self.cells, refusals | self.refusals))
