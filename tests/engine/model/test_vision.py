"""What is seen of the vision encoder, against the probabilities of its own eager attention; and that it is let go.

Shape letters: B batch, T tokens, H heads, P patches of an image, D hidden.
"""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import IMAGE, Batch, batch, model
from families import _images as pixels
from helpers import Spy, checkpointed, snapshot
from kernels_stand_in import kernels
from torch import Tensor, nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

import tokendrop as td
from tokendrop.engine.forward.span import frames
from tokendrop.engine.model import vision
from tokendrop.engine.model.vision import Encoder
from tokendrop.layout import places, window_by_window
from tokendrop.roles import Encoded, LayerRoute, Role, Select

METHODS: dict[str, Any] = {
    "vscan": td.VScan(0.5, (2,), (0.5,), -1, -1, 1),
    "duet_vlm": td.DuetVLM((2,), (0.5,), 0.25, 0.25, 2, -1),
    "svd_prune": td.SVDPrune(0.5, rank=1),
}


@dataclass(frozen=True)
class Looking:
    """Keeps every image token, and looks at layers of the vision encoder."""

    score: Any
    layers: tuple[int, ...]
    separate: Any = "none"

    def route(self, num_layers: int, strength: float = 1.0) -> Any:
        select = Select(1.0, self.score, 0, 0, strength, encoder=self.layers)
        return (LayerRoute(Role.GONE, select=select),) * num_layers


def qwen_batch(grids: list[list[int]], counts: list[int]) -> Batch:
    """A batch of images of several sizes (frames, rows and columns of patches), so many in each sample."""
    tokens = [grid[0] * grid[1] * grid[2] // 4 for grid in grids]
    rows, at = [], 0
    for count in counts:
        row = [11, 12]
        for size in tokens[at : at + count]:
            row += [4, *[IMAGE] * size, 7, 13]
        rows.append([*row, 14, 15])
        at += count
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    image, real = ids == IMAGE, ids != 0
    patches = sum(grid[0] * grid[1] * grid[2] for grid in grids)
    inputs = {"input_ids": ids, "attention_mask": real.long(), "pixel_values": pixels([patches], 96)}
    inputs |= {"image_grid_thw": torch.tensor(grids), "mm_token_type_ids": image.long()}
    return Batch(inputs, image, real, ids.masked_fill(image | ~real, -100))


@contextmanager
def eager_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The probabilities (1, H, P, P) and keys (1, H, P, D / H) of each call of Qwen's eager attention, in order."""
    seen: list[Any] = []
    eager = qwen.eager_attention_forward

    def watched(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = eager(module, query, key, *args, **kwargs)
        if "Vision" in type(module).__name__:
            seen.append((module, out[1], key))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(qwen, "eager_attention_forward", watched)
        yield seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cls_attention_and_keys_equal_those_of_the_eager_encoder(attention: str) -> None:
    data, tower = batch("llava", "left"), model("llava", "eager").model.vision_tower
    with torch.no_grad():
        out = tower(data.inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    module, spy = copy.deepcopy(model("llava", attention)), Spy()
    drop = td.apply(module, Looking(spy, (0, -1)))
    with drop.layout(td.TokenLayout(data.image, padding=data.real, labels=data.trained([False, False]))):
        module(**data.inputs, use_cache=False)
    seen = spy.given[0].encoded
    assert seen is not None
    assert not seen.attention.requires_grad
    assert not seen.keys.requires_grad
    for at, layer in enumerate(
        tower.vision_model.encoder.layers if hasattr(tower, "vision_model") else tower.encoder.layers
    ):
        expected = out.attentions[at].mean(1)[:, 0, 1:].flatten()
        torch.testing.assert_close(seen.attention[at][data.image], expected, rtol=1e-5, atol=1e-6)
        keys = layer.self_attn.k_proj(layer.layer_norm1(out.hidden_states[at])).unflatten(-1, (2, -1)).mean(2)
        torch.testing.assert_close(seen.keys[at][data.image], keys[:, 1:].flatten(0, 1), rtol=1e-4, atol=1e-5)
        assert seen.attention[at][~data.image].abs().sum() == 0
    # One image in the first sample, two in the second, each of 2 x 2 tokens.
    expected_places = [[n, row, column] for n in range(3) for row in range(2) for column in range(2)]
    assert seen.place[data.image].tolist() == expected_places


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm", "internvl", "qwen3_vl"])
@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_an_encoder_that_runs_a_kernel_is_looked_into(name: str, attention: str) -> None:
    """In the layers that are looked at sdpa runs instead, which computes the same; the others keep the kernel."""
    data, found, logits = batch(name, "left"), [], []
    for one in ("sdpa", attention):
        module, spy = copy.deepcopy(model(name, "sdpa")), Spy()
        drop = td.apply(module, Looking(spy, (-1,)))
        module.config._attn_implementation = one
        layout = td.TokenLayout(data.image, padding=data.real, labels=data.trained([False, False]))
        with kernels() as calls, drop.layout(layout), torch.no_grad():
            logits.append(module(**data.inputs, use_cache=False).logits[data.real])
        assert bool(calls.plain or calls.varlen or calls.flex) == (one != "sdpa")
        found.append(spy.given[0].encoded)
        drop.remove()
        assert not any("_tokendrop_base" in vars(type(part)) for part in module.modules())
    for part in range(3):
        torch.testing.assert_close(found[1][part], found[0][part], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows_at_once", [3, 256])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_mean_rows_without_cls(attention: str, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks with window attention run the tokens window by window: 4 x 6 patches are 2 x 3 tokens, in windows of 2 x 2.
    data = qwen_batch([[1, 4, 10], [1, 8, 6], [2, 4, 4]], [1, 2])
    monkeypatch.setattr(vision, "_ROWS", rows_at_once)
    module = copy.deepcopy(model("qwen2_5_vl", "eager"))
    with eager_weights(monkeypatch) as calls, torch.no_grad():
        module(**data.inputs, use_cache=False)
    last = module.model.visual.blocks[-1].attn
    calls = [(weights, keys) for one, weights, keys in calls if one is last]
    assert len(calls) == 4  # one for each image, or frame
    order = qwen.get_vision_window_index(data.inputs["image_grid_thw"], 2, 16, 4)[0].argsort()

    def tokens(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).unflatten(0, (-1, 4)).mean(1)[order]

    expected = tokens([weights[0].mean(0).mean(0) for weights, _ in calls])
    keys = tokens([keys[0].mean(0) for _, keys in calls])
    spy, module = Spy(), copy.deepcopy(model("qwen2_5_vl", attention))
    drop = td.apply(module, Looking(spy, (-1,)))
    with drop.layout(td.TokenLayout(data.image, padding=data.real, labels=data.trained([False, False]))):
        module(**data.inputs, use_cache=False)
    seen = spy.given[0].encoded
    assert seen is not None
    torch.testing.assert_close(seen.attention[0][data.image], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.keys[0][data.image], keys, rtol=1e-4, atol=1e-5)
    sizes = [(2, 5), (4, 3), (2, 2), (2, 2)]
    raster = [[n, r, c] for n, (rows, columns) in enumerate(sizes) for r in range(rows) for c in range(columns)]
    assert seen.place[data.image].tolist() == raster


@pytest.mark.parametrize("side", [1, 2, 3])
def test_windows_are_those_of_qwen(side: int) -> None:
    grid = torch.tensor([[1, 6, 10], [2, 4, 8], [1, 12, 12]])
    expected = qwen.get_vision_window_index(grid, 2, side * 2 * 4, 4)[0]
    place = places([(t, h // 2, w // 2) for t, h, w in grid.tolist()], torch.device("cpu"))
    assert window_by_window(place, side).tolist() == expected.tolist()


def run(name: str, method: Any) -> tuple[Any, td.Handle, Batch]:
    data, module = batch(name, "left"), copy.deepcopy(model(name, "sdpa"))
    drop = td.apply(module, method, multiple=1)
    labels = data.trained([False, False])
    with drop.layout(td.TokenLayout(data.image, labels=labels)):
        out = module(**data.inputs, labels=labels, use_cache=False)
        out.loss.backward()
    return module, drop, data


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_where_every_token_stays_nothing_changes(name: str, method: str) -> None:
    every = {"vscan": td.VScan(1.0, (), (), -1, -1), "svd_prune": td.SVDPrune(1.0)}
    every["duet_vlm"] = td.DuetVLM((1,), (1.0,), 0.5, 0.5, 2, -1)
    data, dense = batch(name, "left"), copy.deepcopy(model(name, "sdpa"))
    labels = data.trained([False, False])
    dense(**data.inputs, labels=labels, use_cache=False).loss.backward()
    module, _, _ = run(name, every[method])
    grads = {key: parameter.grad for key, parameter in module.named_parameters()}
    for key, parameter in dense.named_parameters():
        assert parameter.grad is grads[key] is None or torch.equal(parameter.grad, grads[key]), key


def test_gradients_reach_the_encoder_through_merged_tokens() -> None:
    # With merging, tokens that leave train the encoder too: all patches of the images get gradients.
    grads = []
    for merge in (True, False):
        data, module = batch("llava", None), copy.deepcopy(model("llava", "sdpa"))
        states: list[Tensor] = []

        def keep(_: Any, __: Any, out: Tensor, states: list[Tensor] = states) -> None:
            out.retain_grad()
            states.append(out)

        module.model.multi_modal_projector.register_forward_hook(keep)
        labels = data.trained([False, False])
        drop = td.apply(module, td.VScan(0.25, (), (), 0, -1, 1, merge), multiple=1)
        with drop.layout(td.TokenLayout(data.image, labels=labels)):
            module(**data.inputs, labels=labels, use_cache=False).loss.backward()
        assert states[0].grad is not None
        grads.append((states[0].grad.abs().sum(-1) > 0).sum().item())
    assert grads == [12, 3]


@pytest.mark.parametrize("search", [{"do_sample": False}, {"num_beams": 2, "do_sample": False}])
@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in ("llava", "qwen2_5_vl") for method in METHODS]
    + [("internvl", "vscan"), ("llava_onevision", "duet_vlm"), ("smolvlm", "vscan"), ("qwen3_vl", "duet_vlm")],
)
def test_generate_with_a_cache_equals_without(name: str, method: str, search: dict[str, Any]) -> None:
    data, module = batch(name, "left"), copy.deepcopy(model(name, "sdpa")).eval()
    options = search | {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    options["suppress_tokens"] = [token for token in range(64) if not 10 <= token < 40]
    drop, outs = td.apply(module, METHODS[method], multiple=4), []
    for cached in (True, False):
        with drop.layout(td.TokenLayout(data.image, padding=data.real), step=(0, 0)):
            outs.append(module.generate(**data.inputs, use_cache=cached, **options))
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    for one, other in zip(outs[0].logits, outs[1].logits, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


def test_text_only_prompts_need_no_pixels() -> None:
    module = copy.deepcopy(model("llava", "sdpa")).eval()
    ids, drop = torch.randint(10, 40, (2, 6)), td.apply(module, METHODS["vscan"])
    with drop.disabled():
        expected = module.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    with drop.layout(td.TokenLayout(torch.zeros(2, 6, dtype=torch.bool))):
        assert torch.equal(module.generate(input_ids=ids, max_new_tokens=3, do_sample=False), expected)


def test_what_was_seen_is_let_go() -> None:
    data, module = batch("llava", None), copy.deepcopy(model("llava", "sdpa")).eval()
    drop = td.apply(module, METHODS["vscan"])
    tower, pixel_values = module.model.vision_tower, data.inputs["pixel_values"]
    tower(pixel_values)
    with drop.layout(td.TokenLayout(data.image)), torch.no_grad():
        frame = frames(drop.key)[-1]
        assert frame is not None
        tower(pixel_values)
        assert set(frame.seen) == {"grid", 1}
        with drop.disabled():
            frame.seen.clear()
            tower(pixel_values)
        assert frame.seen == {}
    held = []

    def fail() -> None:
        with drop.layout(td.TokenLayout(data.image)):
            frame = frames(drop.key)[-1]
            assert frame is not None
            tower(pixel_values)
            held.append((frame.seen, len(frame.seen)))
            raise KeyError("ended")

    with pytest.raises(KeyError, match="ended"):
        fail()
    assert held == [({}, 2)]
    assert frames(drop.key) == []


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "llava_onevision", "smolvlm"])
def test_remove_restores(name: str) -> None:
    module = copy.deepcopy(model(name, "sdpa"))
    before = snapshot(module)
    drop = td.apply(module, METHODS["vscan"])
    assert snapshot(module) != before
    drop.remove()
    assert snapshot(module) == before


@pytest.mark.parametrize("name", ["llava", "internvl", "llava_onevision"])
def test_a_copy_and_an_unpickled_model_see_their_own_encoder(name: str) -> None:
    # A new one: transformers leaves hooks that cannot be pickled on a model that has run.
    data, module = batch(name, None), model.__wrapped__(name, "sdpa").eval()
    drop = td.apply(module, METHODS["vscan"])
    teacher, loaded = copy.deepcopy(module), pickle.loads(pickle.dumps(module))  # noqa: S301
    teacher.model.vision_tower.apply(lambda one: [p.data.mul_(1.5) for p in one.parameters(recurse=False)])
    alone = copy.deepcopy(teacher)
    td.handle(alone).remove()
    with torch.no_grad():
        with td.apply(alone, METHODS["vscan"]).layout(td.TokenLayout(data.image)):
            expected = alone(**data.inputs, use_cache=False).logits
        with drop.layout(td.TokenLayout(data.image)):
            own = module(**data.inputs, use_cache=False).logits
            assert torch.equal(teacher(**data.inputs, use_cache=False).logits, expected)
            assert not torch.equal(own, expected)
        with td.handle(loaded).layout(td.TokenLayout(data.image)):
            assert torch.equal(loaded(**data.inputs, use_cache=False).logits, own)


def test_activation_checkpointing_of_the_whole_model() -> None:
    grads = []
    for recompute in (False, True):
        data, module = batch("llava", None), copy.deepcopy(model("llava", "sdpa"))
        drop = td.apply(module, METHODS["vscan"], multiple=4)
        if recompute:
            checkpointed(module)
        labels = data.trained([False, False])
        with drop.layout(td.TokenLayout(data.image, labels=labels)):
            module(**data.inputs, labels=labels, use_cache=False).loss.backward()
        grads.append({name: parameter.grad for name, parameter in module.named_parameters()})
    assert all(grad is grads[1][name] is None or torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


def test_encoded_of_some_samples() -> None:
    made = Encoded(torch.arange(6.0).view(1, 3, 2), torch.zeros(1, 3, 2, 4), torch.zeros(3, 2, 3).long())
    some = made.of(torch.tensor([2, 0]))
    assert some.attention.tolist() == [[[4.0, 5.0], [0.0, 1.0]]]
    assert [tuple(one.shape) for one in some] == [(1, 2, 2), (1, 2, 2, 4), (2, 2, 3)]


def test_encoder_is_found_by_inspection() -> None:
    found = {name: type(Encoder(model(name, "sdpa"), [-1]).tower).__name__ for name in ("llava", "qwen2_5_vl", "janus")}
    assert list(found) == ["llava", "qwen2_5_vl", "janus"]
    assert "CLIP" in found["llava"]
    assert "Qwen2_5_Vision" in found["qwen2_5_vl"]
    assert "Janus" in found["janus"]
