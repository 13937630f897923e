"""What the peers' own published code chose on given inputs, recorded in tests/data/peers with its source.

Shape letters: B batch, T tokens.
"""

import json
import re
from pathlib import Path

import pytest
import torch

import tokendrop as td
from tokendrop import scores

DATA = Path(__file__).parents[1] / "data" / "peers"
VSCAN_QWEN = {one["id"]: one for one in json.loads((DATA / "vscan-qwen.json").read_text())}


def uniform(generator, *shape):
    return torch.randint(1, 2**23 + 1, shape, generator=generator).float() / 2**23


def grid(rows, columns):
    """The recorded input: "local" is up to eight times as high in some blocks of 6 x 6 tokens as in others."""
    generator = torch.Generator().manual_seed(730 + 40 * rows + columns)
    block = torch.randint(1, 9, (-(-rows // 6), -(-columns // 6)), generator=generator).float()
    block = block.repeat_interleave(6, 0).repeat_interleave(6, 1)[:rows, :columns]
    local = uniform(generator, rows, columns) * block / 8
    return local.flatten()[None], uniform(generator, rows * columns)[None]


@pytest.mark.parametrize("name", VSCAN_QWEN)
def test_vscan_for_qwen(name):
    case = VSCAN_QWEN[name]
    rows, columns = map(int, re.findall(r"\d+", case["input"][0]))
    local, whole = grid(rows, columns)
    image = torch.ones(1, rows * columns, dtype=torch.bool)
    place = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(rows), torch.arange(columns))[None]
    share, window = case["settings"]["image_token_ratio"], case["settings"]["window_size"]
    method = td.VScan(share, (), (), local_layer=7, global_layer=-1, window=window, scan="capped")
    count = method.route(2)[0].select.count(rows * columns)
    assert [count] == case["counts"]
    found = scores.capped_scan(local, whole, image, place, torch.tensor([count]), window)
    assert found.isposinf().nonzero()[:, 1].tolist() == case["local"]
    assert found[0].topk(count).indices.sort().values.tolist() == case["kept"][0]


def test_vscan_for_qwen_by_sample_and_image():
    """Samples and their images do not see one another, except that a sample's count is one for all its images."""
    made = [grid(16, 16), grid(15, 22)]
    size = max(local.shape[1] for local, _ in made)
    local, whole = (torch.stack([torch.nn.functional.pad(one[at][0], (0, size - one[at].shape[1])) for one in made])
                    for at in (0, 1))  # fmt: skip
    image = torch.stack([torch.arange(size) < one[0].shape[1] for one in made])
    place = torch.zeros(2, size, 3, dtype=torch.long)
    for sample, (rows, columns) in enumerate(((16, 16), (15, 22))):
        each = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(rows), torch.arange(columns))
        place[sample, : rows * columns] = each
    counts = torch.tensor([42, 55])
    found = scores.capped_scan(local, whole, image, place, counts, 4)
    for sample, name in enumerate(("vscan-qwen-16x16-0.167", "vscan-qwen-15x22-0.167")):
        assert found[sample].isposinf().nonzero()[:, 0].tolist() == VSCAN_QWEN[name]["local"]
