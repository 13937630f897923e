"""Image tokens that are no patches one by one: what is seen of them, against loops over the eager encoder's attention.

Shape letters: N images, crops or frames, P patches of each, D hidden.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from families import _TEXT, _VISION, IMAGE, Batch, _redraw, batch, model
from helpers import Spy
from torch import Tensor

import tokendrop as td
from tokendrop.roles import Encoded, LayerRoute, Role, Select

VIDEO = 6


class Looking:
    """Keeps every image token, and looks at layers of the vision encoder."""

    separate: Any = "none"

    def __init__(self, score: Any, layers: tuple[int, ...]) -> None:
        self.score, self.layers = score, layers

    def route(self, num_layers: int, strength: float = 1.0) -> Any:
        select = Select(1.0, self.score, 0, 0, strength, encoder=self.layers)
        return (LayerRoute(Role.GONE, select=select),) * num_layers


def given(module: Any, data: Batch, layers: tuple[int, ...] = (0, -1)) -> Encoded:
    """What a score is given of the encoder."""
    spy, module = Spy(), copy.deepcopy(module).eval()
    drop = td.apply(module, Looking(spy, layers))
    with drop.layout(td.TokenLayout(data.image, padding=data.real)), torch.no_grad():
        module(**data.inputs, use_cache=False)
    seen = spy.given[0].encoded
    assert seen is not None
    return seen


def eager(tower: Any, images: Tensor, **more: Any) -> tuple[list[Tensor], list[Tensor]]:
    """For each layer (N, P), the mean row of the encoder's own eager attention, and the keys (N, P, D / H)."""
    config = copy.deepcopy(tower.config)
    config._attn_implementation = "eager"
    other, keys = type(tower)(config), []
    other.load_state_dict(tower.state_dict())
    for name, one in other.named_modules():
        if name.endswith("k_proj"):
            one.register_forward_hook(lambda _, __, out: keys.append(out.unflatten(-1, (2, -1)).mean(2)))
    with torch.no_grad():
        out = other.eval()(pixel_values=images, output_attentions=True, **more)
    return [one.mean(1).mean(1) for one in out.attentions], keys


def places(sizes: list[tuple[int, int]]) -> list[list[int]]:
    return [[n, r, c] for n, (rows, columns) in enumerate(sizes) for r in range(rows) for c in range(columns)]


def square(maps: Tensor, side: int) -> Tensor:
    """Of (N, P) or (N, P, D), the mean of each two by two patches, (V) or (V, D)."""
    found = []
    for one in maps:
        for row in range(0, side, 2):
            for column in range(0, side, 2):
                at = [(row + r) * side + column + c for r in (0, 1) for c in (0, 1)]
                found.append(one[at].mean(0))
    return torch.stack(found)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["internvl", "smolvlm", "idefics3"])
def test_squares_of_a_pixel_shuffle(name: str, attention: str) -> None:
    data, module = batch(name, "left"), model(name, attention)
    inner = module.model
    tower = inner.vision_tower if name == "internvl" else inner.vision_model
    images = data.inputs["pixel_values"].flatten(0, -4)
    images = images[images.flatten(1).any(1)]  # those that only fill up do not run
    attentions, keys = eager(tower, images)
    if name == "internvl":  # it has [CLS], whose row it is
        with torch.no_grad():
            config = copy.deepcopy(tower.config)
            config._attn_implementation = "eager"
            other = type(tower)(config)
            other.load_state_dict(tower.state_dict())
            out = other.eval()(images, output_attentions=True)
        attentions, keys = [one.mean(1)[:, 0, 1:] for one in out.attentions], [one[:, 1:] for one in keys]
    seen = given(module, data)
    for at in (0, 1):
        torch.testing.assert_close(seen.attention[at][data.image], square(attentions[at], 4), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(seen.keys[at][data.image], square(keys[at], 4), rtol=1e-4, atol=1e-5)
    assert seen.place[data.image].tolist() == places([(2, 2)] * 3)
    # The projector gets the same squares: features that are the numbers of the patches.
    shuffles = inner if name == "internvl" else inner.connector
    number = torch.arange(16.0).view((1, 4, 4, 1) if name == "internvl" else (1, 16, 1))
    parts = shuffles.pixel_shuffle(number, 0.5 if name == "internvl" else 2).reshape(4, 4).sort(1).values
    assert parts.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_of_an_image_is_not_looked_from(attention: str) -> None:
    data, module = batch("smolvlm", None), model("smolvlm", attention)
    mask = torch.ones(2, 2, 8, 8)
    mask[1, 0, 4:], mask[1, 1, :, 6:] = 0, 0
    data = replace(data, inputs=data.inputs | {"pixel_attention_mask": mask})
    seen, images = given(module, data), data.inputs["pixel_values"]
    real = [(0, 0, 16), (1, 0, 8), (1, 1, 12)]
    for at, (sample, number, count) in enumerate(real):
        patches = mask[sample, number, ::2, ::2].flatten().bool()
        assert int(patches.sum()) == count
        config = copy.deepcopy(module.model.vision_model.config)
        config._attn_implementation = "eager"
        tower = type(module.model.vision_model)(config).eval()
        tower.load_state_dict(module.model.vision_model.state_dict())
        with torch.no_grad():
            out = tower(
                images[sample, number][None], patch_attention_mask=patches.view(1, 4, 4), output_attentions=True
            )
        expected = out.attentions[0][0].mean(0)[patches].mean(0)
        assert expected[~patches].abs().sum() == 0
        found = seen.attention[0][data.image][4 * at : 4 * at + 4]
        torch.testing.assert_close(found, square(expected[None], 4), rtol=1e-5, atol=1e-6)


def onevision(next_: bool = False, **more: Any) -> Any:
    """Crops of 4 x 4 patches; LLaVA-NeXT's has [CLS]."""
    text = hf.Qwen2Config(**_TEXT)
    shape = _VISION | {"patch_size": 2}
    kind: Any = hf.LlavaNextConfig if next_ else hf.LlavaOnevisionConfig
    vision = hf.CLIPVisionConfig(**shape) if next_ else hf.SiglipVisionConfig(**shape, vision_use_head=False)
    pinpoints = [[8, 16], [16, 16]]
    config = kind(
        text_config=text, vision_config=vision, image_grid_pinpoints=pinpoints, image_token_index=IMAGE, **more
    )
    made: Any = hf.LlavaNextForConditionalGeneration if next_ else hf.LlavaOnevisionForConditionalGeneration
    module = made(config)
    _redraw(module)
    return module.eval()


def filled(inputs: dict[str, Tensor], counts: list[int], token: int = IMAGE) -> Batch:
    """A batch of one sample with so many image tokens in each run."""
    row = [11]
    for count in counts:
        row += [token] * count + [12, 13]
    ids = torch.tensor([row])
    return Batch({"input_ids": ids} | inputs, ids == token, torch.ones_like(ids).bool(), ids)


def check(seen: Encoded, data: Batch, expected: list[tuple[Any, list[int]]], attentions: Tensor, keys: Tensor) -> None:
    """Each token is the mean of (crop, patch)s, at a place."""
    assert int(data.image.sum()) == len(expected)
    assert seen.place[data.image].tolist() == [place for _, place in expected]
    for found, key, (sources, _) in zip(seen.attention[0][data.image], seen.keys[0][data.image], expected, strict=True):
        at = tuple(torch.tensor(sources).T) if sources else None
        torch.testing.assert_close(found, attentions[at].mean() if at else torch.tensor(0.0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(key, keys[at].mean(0) if at else torch.zeros_like(key), rtol=1e-4, atol=1e-5)


def whole(crop: int, number: int) -> list[tuple[Any, list[int]]]:
    return [([(crop, r * 4 + c)], [number, r, c]) for r in range(4) for c in range(4)]


def joined(crops: list[list[int]], rows: range, number: int) -> list[tuple[Any, list[int]]]:
    """Some rows of the image that crops of 4 x 4 patches make, a newline behind each."""
    found: list[tuple[Any, list[int]]] = []
    for r in rows:
        columns = range(4 * len(crops[0]))
        found += [([(crops[r // 4][c // 4], r % 4 * 4 + c % 4)], [number, r - rows.start, c]) for c in columns]
        found.append(([], [-1, -1, -1]))
    return found


@pytest.mark.parametrize("next_", [False, True], ids=["onevision", "next"])
def test_crops_and_newlines(next_: bool) -> None:
    # One image of two crops; one a strip half as high, padded above and below; one of two by two crops.
    module = onevision(next_)
    images = torch.randn(3, 5, 3, 8, 8)
    data = filled(
        {"pixel_values": images, "image_sizes": torch.tensor([[8, 16], [4, 16], [16, 16]])},
        [16 + 4 * 9, 16 + 2 * 9, 16 + 8 * 9],
    )
    run = torch.cat([images[0, :3], images[1, :3], images[2]])
    attentions, keys = eager(module.model.vision_tower, run)
    seen = given(module, data, (0,))
    if next_:
        config = copy.deepcopy(module.config.vision_config)
        config._attn_implementation = "eager"
        tower = hf.CLIPVisionModel(config).eval()
        tower.load_state_dict(module.model.vision_tower.state_dict())
        with torch.no_grad():
            attentions = [tower(run, output_attentions=True).attentions[0].mean(1)[:, 0, 1:]]
        keys = [keys[0][:, 1:]]
    expected = whole(0, 0) + joined([[1, 2]], range(4), 1)
    expected += whole(3, 2) + joined([[4, 5]], range(1, 3), 3)
    expected += whole(6, 4) + joined([[7, 8], [9, 10]], range(8), 5)
    check(seen, data, expected, attentions[0], keys[0])


def test_crops_scaled_down() -> None:
    # At most one crop's tokens: 8 x 8 become 4 x 4, each the mean of two by two.
    module = onevision(vision_aspect_ratio="anyres_max_1")
    images = torch.randn(1, 5, 3, 8, 8)
    data = filled({"pixel_values": images, "image_sizes": torch.tensor([[16, 16]])}, [16 + 4 * 5])
    attentions, keys = eager(module.model.vision_tower, images[0])
    fine = [one for one in joined([[1, 2], [3, 4]], range(8), 1) if one[0]]
    expected = whole(0, 0)
    for r in range(4):
        for c in range(4):
            expected.append(([fine[(2 * r + y) * 8 + 2 * c + x][0][0] for y in (0, 1) for x in (0, 1)], [1, r, c]))
        expected.append(([], [-1, -1, -1]))
    check(given(module, data, (0,)), data, expected, attentions[0], keys[0])


def test_several_images_of_one_crop() -> None:
    module, images = onevision(), torch.randn(2, 1, 3, 8, 8)
    inputs = {"pixel_values": images, "image_sizes": torch.full((2, 2), 8), "batch_num_images": torch.tensor([2])}
    data = filled(inputs, [17, 17])
    attentions, keys = eager(module.model.vision_tower, images[:, 0])
    newline: list[tuple[Any, list[int]]] = [([], [-1, -1, -1])]
    check(given(module, data, (0,)), data, whole(0, 0) + newline + whole(1, 1) + newline, attentions[0], keys[0])
    module.model.image_newline = None
    data = filled(inputs, [16, 16])
    check(given(module, data, (0,)), data, whole(0, 0) + whole(1, 1), attentions[0], keys[0])


def test_frames_of_a_video() -> None:
    # Each frame is shrunk to half its sides; one newline behind all frames of a video.
    module, videos = onevision(video_token_index=VIDEO), torch.randn(2, 3, 3, 8, 8)
    data = filled({"pixel_values_videos": videos}, [3 * 4 + 1] * 2, VIDEO)
    attentions, keys = eager(module.model.vision_tower, videos.flatten(0, 1))
    expected: list[tuple[Any, list[int]]] = []
    for video in range(2):
        for frame in range(3 * video, 3 * video + 3):
            for r in range(2):
                for c in range(2):
                    sources = [(frame, (2 * r + y) * 4 + 2 * c + x) for y in (0, 1) for x in (0, 1)]
                    expected.append((sources, [frame, r, c]))
        expected.append(([], [-1, -1, -1]))
    check(given(module, data, (0,)), data, expected, attentions[0], keys[0])
