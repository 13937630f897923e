"""Budgets of each image or frame: who stays, by loops; and the engine against the reference.

Shape letters: B batch, T tokens.
"""

import copy
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from families import IMAGE, batch, model
from helpers import batch as texts
from helpers import close, dropped, llama, loss_of
from hypothesis import given
from hypothesis import strategies as st

import tokendrop as td
from tokendrop.callbacks.batch import batch_layout
from tokendrop.engine.plan.parts import Parts, highest_of_each, part_numbers
from tokendrop.engine.reference import reference
from tokendrop.layout import TokenLayout

SAMPLES = ["tiiiiitiitt", "iitttiiiiit", "ttttttt", "tiiiiiiitt"]
# The frame of each token; what stands at text means nothing.
FRAMES = ["00011000000", "00000012220", "0000000", "0000111200"]
METHODS = {
    "norm": td.Drop("1:", 0.5, "norm", "gone", per="image"),
    "rejoin": td.Drop("1:3", 1, "similarity", per="frame"),
    "context": td.Drop("0:2", 0.3, "leverage", "context", per="frame"),
    "fastv": td.FastV(1, 0.5, per="image"),
    "pyramid": td.PyramidDrop((1, 2), (0.7, 0.4), per="frame"),
    "renumbered": td.PyramidDrop((1, 2), (0.7, 0.4), "renumber", per="image"),
    "hidrop": td.HiDrop(1, (1, 2), (0.6, 1), 3, per="frame"),
    "svd": td.SVDPrune(0.5, rank=1, per="frame"),
}


def numbers(made, rows=FRAMES):
    """(B, T), the digits, each sample padded on the right."""
    total = made.ids.shape[1]
    return torch.tensor([[int(c) for c in row.ljust(total, "0")] for row in rows])


def run(module, made):
    logits = module(input_ids=made.ids, attention_mask=made.mask, use_cache=False).logits
    loss_of(logits, made.labels).backward()
    return logits.detach(), {name: p.grad for name, p in module.named_parameters()}


def checked(base, methods, made, layout):
    """The handle and what the reference says, after the engine was found to say the same."""
    model, drop = dropped(base, methods, multiple=4)
    with drop.layout(layout):
        found = run(model, made)
    expected = copy.deepcopy(base)
    with reference(expected, methods, layout):
        theirs = run(expected, made)
    assert close(found, theirs, made.real, 1e-5)
    return drop, theirs


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_the_engine_equals_the_reference(method, attn):
    made, methods = texts(SAMPLES, "uuuu"), {"u": METHODS[method]}
    layout = made.layout(frames=numbers(made))
    base = llama(attn)
    _, theirs = checked(base, methods, made, layout)
    # Kept of the whole sample, others would stay.
    plain, drop = dropped(base, {"u": replace(METHODS[method], per="sample")})
    with drop.layout(layout):
        assert not close(run(plain, made), theirs, made.real, 1e-3)


def kept(method, made, layout, strength=1.0, layer=1):
    """The image tokens of each sample that compute in a layer."""
    module, drop = dropped(llama(), {"u": method}, multiple=1)
    drop.strength = strength
    with drop.layout(layout), torch.no_grad():
        cache = module(input_ids=made.ids, attention_mask=made.mask, use_cache=True).past_key_values.layers[layer]
    image = layout.image
    return [{int(t) for t in cache.positions[b, cache.valid[b]] if image[b, t]} for b in range(len(image))]


def by_loops(made, states, keep, names):
    """For each sample, of each name's image tokens the longest states."""
    chosen = []
    for b, row in enumerate(made.image.tolist()):
        parts = {}
        for t, image in enumerate(row):
            if image:
                parts.setdefault(names(b, t), []).append(t)
        best = {name: sorted(part, key=lambda t: -states[b, t].norm().item()) for name, part in parts.items()}
        counts = {
            name: max(1, round(keep * len(part))) if isinstance(keep, float) else keep for name, part in parts.items()
        }
        chosen.append({t for name, part in best.items() for t in part[: counts[name]]})
    return chosen


@pytest.mark.parametrize("keep", [0.5, 0.2, 2])
def test_each_image_and_each_frame_keeps_its_own(keep):
    made = texts(SAMPLES, "uuuu")
    made.labels.fill_(-100)
    frames = numbers(made)
    layout = TokenLayout(made.image, ["u"] * 4, padding=made.real, frames=frames)
    states = llama().model.embed_tokens(made.ids)
    runs = [[n for n, (_, run) in enumerate(groupby(row)) for _ in run] for row in made.image.tolist()]
    for per, names in (("image", lambda b, t: runs[b][t]), ("frame", lambda b, t: (runs[b][t], int(frames[b, t])))):
        method = td.Drop("0:", keep, "norm", "gone", per=per)
        assert kept(method, made, layout) == by_loops(made, states, keep, names)
    # What the layout says goes before runs: the first and the last image token of a sample as one image.
    ends = made.image.int().argmax(1), made.image.shape[1] - 1 - made.image.flip(1).int().argmax(1)
    said = torch.full(frames.shape, 7)
    said[torch.arange(4), ends[0]] = said[torch.arange(4), ends[1]] = 90
    other = TokenLayout(made.image, ["u"] * 4, padding=made.real, images=said)
    method = td.Drop("0:", keep, "norm", "gone", per="image")
    assert kept(method, made, other) == by_loops(made, states, keep, lambda b, t: int(said[b, t]))


def test_a_schedule_lowers_each_budget():
    # Of five and of two tokens, half of what leaves stays: 5 - int(0.5 (5 - 2)) and 2 - int(0.5 (2 - 1)).
    made = texts(["tiiiiitiitt"], "u")
    layout = TokenLayout(made.image, ["u"])
    found = kept(td.Drop("0:", 0.4, "norm", "gone", per="image"), made, layout, strength=0.5)
    assert [sum(t < 6 for t in found[0]), sum(t > 6 for t in found[0])] == [4, 2]


def test_packed_samples_and_their_images():
    # Images that touch across the border of two packed samples are two.
    made = texts(["tiiii" + "iiiit"], "u")
    packs = torch.tensor([[0] * 5 + [1] * 5])
    assert part_numbers(TokenLayout(made.image, packs=packs), "image").tolist() == [[-1, 0, 0, 0, 0, 1, 1, 1, 1, -1]]
    layout = made.layout(packs=packs, frames=torch.tensor([[0, 0, 0, 1, 1, 0, 1, 1, 1, 0]]))
    for method in (td.Drop("1:", 1, "norm", "gone", per="frame"), td.Drop("1:3", 0.5, "attention", per="image")):
        base, positions = llama(), torch.tensor([[*range(5), *range(5)]])
        module, drop = dropped(base, {"u": method}, multiple=1)
        with drop.layout(layout):
            found = module(input_ids=made.ids, position_ids=positions, use_cache=False).logits
        with reference(base, {"u": method}, layout):
            expected = base(input_ids=made.ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


TEMPORAL = {
    "gone": td.Drop("1:", 0.6, "temporal", "gone"),
    "of frames": td.Drop("1:3", 1, "temporal", per="frame"),
    "context": td.Drop("0:2", 0.4, "temporal", "context", per="image"),
}


class Twice:
    """Half of the tokens are GONE, then half of those by what stood still."""

    separate = "none"

    def route(self, num_layers, strength=1.0):
        first = td.Drop("0:", 0.7, "norm", "gone").route(num_layers)
        return (first[0], *td.Drop("1:", 0.4, "temporal", "gone").route(num_layers)[1:])


@pytest.mark.parametrize("method", [*TEMPORAL, "behind others"])
def test_what_stands_still_between_frames_leaves(method):
    made, methods, base = texts(SAMPLES, "uuuu"), {"u": TEMPORAL.get(method, Twice())}, llama()
    layout = made.layout(frames=numbers(made, ["00011220000", *FRAMES[1:]]))
    drop, _ = checked(base, methods, made, layout)
    with pytest.raises(td.LayoutError, match=r"a score compares frames.*give TokenLayout\(frames="):
        drop.plan(made.layout(frames=None))


def test_frames_that_stand_still():
    # Two frames of three tokens, equal but for one of them; first frames stay before all others.
    made = texts(["tiiiiiitt"], "u")
    made.ids[0, 4:7] = made.ids[0, 1:4]
    made.ids[0, 5] = 1 + made.ids[0, 2] % 40
    layout = TokenLayout(made.image, ["u"], frames=torch.tensor([[0, 0, 0, 0, 1, 1, 1, 0, 0]]))
    assert kept(td.Drop("0:", 4, "temporal", "gone"), made, layout) == [{1, 2, 3, 5}]
    assert kept(td.Drop("0:", 1, "temporal", "gone", per="frame"), made, layout) == [{1, 5}]


def test_a_score_of_ones_own_sees_frames():
    made, seen = texts(SAMPLES, "uuuu"), []

    @td.sees(frames=True)
    def score(scoring):
        seen.append(scoring)
        return scoring.frames.float()

    module, drop = dropped(llama(), {"u": td.Drop("1:", 0.5, score, "gone")}, multiple=1)
    layout = made.layout(frames=numbers(made), images=numbers(made) * -7)
    with drop.layout(layout):
        run(module, made)
    image = layout.image[[0, 1, 3]]
    assert torch.equal(seen[0].images >= 0, image)
    assert torch.equal(seen[0].frames[image], layout.frames[[0, 1, 3]][image])
    same = layout.images[[0, 1, 3], :, None] == layout.images[[0, 1, 3], None]
    both = image[:, :, None] & image[:, None]
    assert torch.equal((seen[0].images[:, :, None] == seen[0].images[:, None])[both], same[both])


RISING = {
    "shares": td.PyramidDrop((1, 2), (0.3, 0.6)),
    "a share, then a count": td.PyramidDrop((1, 2), (0.1, 5)),
    "of images": td.HiDrop(1, (1, 2), (0.2, 3), 3, per="image"),
    "of frames": td.PyramidDrop((1, 2, 3), (1, 4, 0.5), "renumber", per="frame"),
}


@pytest.mark.parametrize("method", RISING)
def test_a_stage_that_asks_for_more_than_are_left_brings_none_back(method):
    made, methods, base = texts(SAMPLES, "uuuu"), {"u": RISING[method]}, llama()
    layout = made.layout(frames=numbers(made))
    checked(base, methods, made, layout)
    prompt = TokenLayout(made.image, ["u"] * 4, padding=made.real, frames=layout.frames)
    first, then = (kept(RISING[method], made, prompt, layer=layer) for layer in (1, 2))
    assert all(later <= earlier for earlier, later in zip(first, then, strict=True))
    assert any(first)


class Unlike:
    """Half of a sample, then half of each image."""

    separate = "none"

    def route(self, num_layers, strength=1.0):
        first = td.Drop("0:", 0.5, "norm", "gone").route(num_layers)
        then = td.Drop("1:", 0.5, "norm", "gone", per="image").route(num_layers)
        return (first[0], *then[1:])


def test_budgets_of_another_kind_behind_those_that_are_gone_are_refused():
    made = texts(SAMPLES, "uuuu")
    _, drop = dropped(llama(), {"u": Unlike()})
    with pytest.raises(
        td.MethodError, match=r"per='image' at layer 1 behind one with per='sample'.*give both the same"
    ):
        drop.plan(made.layout())


@given(
    st.lists(st.integers(-1, 3), min_size=1, max_size=9), st.lists(st.integers(0, 3), min_size=4, max_size=4), st.data()
)
def test_the_best_of_each_part(number, counts, data):
    order = data.draw(st.permutations(range(len(number))))
    parts = Parts(torch.tensor([number]), torch.tensor([counts]))
    found = highest_of_each(torch.tensor([order]), parts.number >= 0, parts, parts.number)
    expected = {t for part in range(4) for t in [t for t in order if number[t] == part][: counts[part]]}
    assert set(found[0].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("search", [{}, {"num_beams": 2}])
def test_generation_with_a_cache_equals_without(search):
    made, base = texts(SAMPLES, "uuuu", side="left"), llama()
    frames = torch.stack([made.image.cumsum(1)[b] // 3 for b in range(4)])
    layout = TokenLayout(made.image, ["u"] * 4, padding=made.real, frames=frames)
    module, drop = dropped(base, {"u": METHODS["pyramid"]}, multiple=4)
    more = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True} | search
    outs = []
    for cached in (True, False):
        with drop.layout(layout, step=(0, 0)):
            outs.append(module.generate(made.ids, attention_mask=made.real.long(), use_cache=cached, **more))
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    for one, other in zip(outs[0].logits, outs[1].logits, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


def test_frames_that_nobody_knows_are_refused():
    made = texts(SAMPLES, "uuuu")
    _, drop = dropped(llama(), {"u": td.Drop("1:", 0.5, per="frame")})
    with pytest.raises(td.LayoutError, match=r"per='frame'.*give TokenLayout\(frames=.*batch_layout.*video_grid_thw"):
        drop.plan(made.layout(frames=None))
    drop.plan(made.layout(frames=torch.zeros_like(made.ids)))
    assert td.flops(llama().config, td.Drop("1:", 0.5, per="frame"), text=4, image=4).ratio < 1


def test_images_and_frames_of_a_batch_of_grids():
    # Two images and two videos, the second video in a sample of its own; a frame of it has 2 x 1 tokens.
    module = model("qwen2_5_vl", "sdpa")
    grids = {
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4]]),
        "video_grid_thw": torch.tensor([[2, 2, 4], [3, 4, 2]]),
    }
    rows = ["tiiiitvvvvtiit", "tvvvvvvttttttt"]
    ids = torch.tensor([[{"t": 11, "i": IMAGE, "v": 6}[c] for c in row] for row in rows])
    expected_images = ["-1111-aaaa-22-", "-bbbbbb-------"]
    expected_frames = ["-0000-0011-00-", "-001122-------"]
    for kinds in ({}, {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == 6).long()}):
        layout = batch_layout({"input_ids": ids} | grids | kinds, module)
        assert_named(layout, layout.images, expected_images)
        assert_named(layout, layout.frames, expected_frames, equal=True)
    # Without anything to see nobody knows.
    assert batch_layout({"input_ids": ids}, module).frames is None
    made = {"inputs_embeds": torch.zeros(2, 14, 4), "mm_token_type_ids": (ids != 11).long()}
    assert batch_layout(made | grids, module).frames is None
    assert batch_layout({"input_ids": ids} | grids, llama(), (IMAGE, 6)).frames is None


def assert_named(layout, found, rows, equal=False):
    """Image tokens of one letter, and no others, have one number; or, equal, the digit itself."""
    names = {}
    for b, row in enumerate(rows):
        for t, c in enumerate(row):
            assert (c != "-") == bool(layout.image[b, t])
            if c != "-":
                names.setdefault(c, set()).add(int(found[b, t]))
    assert all(len(one) == 1 for one in names.values())
    assert len(set.union(*names.values())) == len(names)
    assert not equal or all(one == {int(c)} for c, one in names.items())


def test_images_and_frames_of_a_batch_of_videos():
    # Three frames of two tokens, and a newline, which is of the last; an image beside them is in one piece.
    config = copy.deepcopy(model("llava_onevision", "sdpa").config)
    module = torch.nn.Module()
    module.config = config
    ids = torch.tensor([[{"t": 11, "i": IMAGE, "v": 6}[c] for c in "tiiitvvvvvvvtvvvvvvvt"]])
    pixels = {"pixel_values_videos": torch.zeros(2, 3, 3, 8, 8), "pixel_values": torch.zeros(1, 2, 3, 8, 8)}
    layout = batch_layout({"input_ids": ids} | pixels, module)
    assert_named(layout, layout.images, ["-iii-aaaaaaa-bbbbbbb-"])
    assert_named(layout, layout.frames, ["-000-0011222-0011222-"], equal=True)
    # A batch of videos alone says it also where nobody knows which id is theirs.
    layout = batch_layout(
        {"image_mask": ids == 6, "pixel_values_videos": pixels["pixel_values_videos"]}, torch.nn.Module()
    )
    assert_named(layout, layout.frames, ["-----0011222-0011222-"], equal=True)
    images = batch_layout({"image_mask": ids == IMAGE, "pixel_values": pixels["pixel_values"]}, torch.nn.Module())
    assert_named(images, images.frames, ["-000-----------------"], equal=True)


def test_a_forward_of_its_own_keeps_a_share_of_each_frame():
    data, module = batch("qwen2_5_vl", None), copy.deepcopy(model("qwen2_5_vl", "sdpa")).eval()
    td.apply(module, td.Drop("1:", 1, "norm", "gone", per="frame"), multiple=1, layout="auto")
    with torch.no_grad():
        cache = module(**data.inputs, use_cache=True).past_key_values.layers[1]
    left = [int(data.image[b, cache.positions[b, cache.valid[b]]].sum()) for b in range(2)]
    assert left == [1, 2]  # of one image and of two, four tokens each
