"""VScan and DuetVLM's vision stage on a LLaVA: which tokens stay and what becomes of them, by hand-written loops.

Shape letters: B batch, T tokens, D hidden.
"""

import copy
from functools import lru_cache

import pytest
import torch
import transformers as hf
from families import IMAGE, _redraw

import tokendrop as td

COUNTS, TOKENS, SIDE, LAYERS = (1, 2, 0), 90, 6, 3


@lru_cache
def shared():
    """A LLaVA with 6 x 6 tokens for each image."""
    text = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=4
    )
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=24, patch_size=4
    )
    config = hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.LlavaForConditionalGeneration(config)
        _redraw(model)
    return model.eval()


@pytest.fixture
def batch():
    """Samples with one image, with two, and with none."""
    ids = torch.randint(10, 40, (3, TOKENS))
    for sample, count in enumerate(COUNTS):
        for number in range(count):
            ids[sample, 4 + number * 40 : 4 + number * 40 + SIDE**2] = IMAGE
    return {"input_ids": ids, "pixel_values": torch.randn(sum(COUNTS), 3, 24, 24)}


def run(method, batch):
    """For each sample, the states of image tokens as they were embedded and as layer 0 gets them, by position."""
    model = copy.deepcopy(shared())
    embedded, entered = [], []
    model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: embedded.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    drop = td.apply(model, method, multiple=1)
    drop.decoder_layers[0].register_forward_pre_hook(lambda _, args, kwargs: entered.append(args[0]), with_kwargs=True)
    image = batch["input_ids"] == IMAGE
    with drop.layout(td.TokenLayout(image)), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    first = cache.layers[0]
    kept = [
        {int(t): entered[0][b, at] for at, t in enumerate(first.positions[b]) if first.valid[b, at] and image[b, t]}
        for b in range(len(image))
    ]
    whole = [{int(t): embedded[0][b, t] for t in image[b].nonzero().flatten()} for b in range(len(image))]
    valid = [layer.valid if hasattr(layer, "valid") else torch.ones(3, layer.keys.shape[2]) for layer in cache.layers]
    counts = [(one.sum(1) - (~image).sum(1)).int().tolist() for one in valid]
    return whole, kept, counts


def looked(batch, layer):
    """[CLS] attention (N, 36) and keys (N, 36, D) of the vision encoder, in all three images."""
    config = copy.deepcopy(shared().config.vision_config)
    config._attn_implementation = "eager"
    tower = hf.CLIPVisionModel(config).eval()
    tower.load_state_dict(shared().model.vision_tower.state_dict())
    keys = []
    attention = next(m for name, m in tower.named_modules() if name.endswith(f"layers.{layer % 4}.self_attn"))
    attention.k_proj.register_forward_hook(lambda _, __, out: keys.append(out.unflatten(-1, (2, -1)).mean(2)[:, 1:]))
    with torch.no_grad():
        out = tower(batch["pixel_values"], output_attentions=True)
    return out.attentions[layer].mean(1)[:, 0, 1:], keys[0]


def positions(sample):
    """Image and patch of each image token of a sample, by position."""
    return {4 + n * 40 + p: (sum(COUNTS[:sample]) + n, p) for n in range(COUNTS[sample]) for p in range(SIDE**2)}


def alike(one, other):
    return torch.cosine_similarity(one, other, 0).item()


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("keep", [9, 16, 0.3])
def test_vscan(keep, merge, batch):
    method = td.VScan(keep, (1, 2), (0.5, 3), local_layer=1, global_layer=-2, window=3, merge=merge)
    whole, kept, counts = run(method, batch)
    (local, _), (deep, _) = looked(batch, 1), looked(batch, -2)
    asked = [round(keep * count * 36) if isinstance(keep, float) else min(keep, count * 36) for count in COUNTS]
    assert counts == [asked, [round(0.5 * count) for count in asked], [min(3, count) for count in asked]]
    for sample, count in enumerate(asked):
        place = positions(sample)
        windows = {}
        for token, (n, p) in place.items():
            windows.setdefault((n, p // SIDE // 3, p % SIDE // 3), []).append(token)
        turns = [sorted(tokens, key=lambda token: -local[place[token]].item()) for tokens in windows.values()]
        order = []
        while any(turns):
            order += sorted((one.pop(0) for one in turns if one), key=lambda token: -local[place[token]].item())
        chosen = order[: count // 2]
        rest = sorted(set(place) - set(chosen), key=lambda token: -deep[place[token]].item())
        chosen += rest[: count - len(chosen)]
        assert set(kept[sample]) == set(chosen)
        groups = {token: [token] for token in chosen}
        for token in set(place) - set(chosen) if merge else ():
            best = max(sorted(chosen), key=lambda other: alike(whole[sample][token], whole[sample][other]))
            groups[best].append(token)
        for token, members in groups.items():
            mean = sum(whole[sample][one] for one in members) / len(members)
            torch.testing.assert_close(kept[sample][token], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dominant", "contextual"), [(6, 3), (0.4, 0.1)])
def test_duet_vlm(dominant, contextual, batch):
    method = td.DuetVLM((1, 2), (0.5, 0), dominant, contextual, cluster_width=3, vision_layer=-2)
    whole, kept, counts = run(method, batch)
    scores, keys = looked(batch, -2)
    share = contextual / (dominant + contextual)
    asked = [
        round((dominant + contextual) * count * 36) if isinstance(dominant, float) else min(9, count * 36)
        for count in COUNTS
    ]
    assert counts == [asked, [count // 2 for count in asked], [0, 0, 0]]
    for sample, count in enumerate(asked):
        place, anchored = positions(sample), round(count * share)
        order = sorted(place, key=lambda token: -scores[place[token]].item())
        chosen, pool = order[: count - anchored], order[count - anchored :][: 3 * anchored]
        anchors = pool[::3]
        assert set(kept[sample]) == {*chosen, *anchors}
        members = {anchor: [] for anchor in anchors}
        for token in set(pool) - set(anchors):
            members[max(anchors, key=lambda one: alike(keys[place[token]], keys[place[one]]))].append(token)
        for token in chosen:
            assert torch.equal(kept[sample][token], whole[sample][token])
        for anchor, tokens in members.items():
            expected = whole[sample][anchor]
            if tokens:
                expected = expected + sum(whole[sample][one] for one in tokens) / len(tokens)
            torch.testing.assert_close(kept[sample][anchor], expected, rtol=1e-4, atol=1e-5)


def newlines():
    """A LLaVA-OneVision, its image of two crops as 16 tokens, then four rows of 8 with a newline behind each."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    text = hf.Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=LAYERS, **heads)
    vision = hf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=8, patch_size=2
    )
    config = hf.LlavaOnevisionConfig(
        text_config=text, vision_config=vision, image_grid_pinpoints=[[8, 16]], image_token_index=IMAGE
    )
    model = hf.LlavaOnevisionForConditionalGeneration(config)
    _redraw(model)
    ids = torch.randint(10, 40, (1, 60))
    ids[0, 3:55] = IMAGE
    inputs = {"pixel_values": torch.randn(1, 3, 3, 8, 8), "image_sizes": torch.tensor([[8, 16]])}
    return model.eval(), {"input_ids": ids} | inputs, [3 + 16 + 9 * row + 8 for row in range(4)]


@pytest.mark.parametrize("method", [td.VScan, td.DuetVLM])
@pytest.mark.parametrize("count", [50, 48, 20])
def test_newlines_leave_first_and_go_to_no_token(method, count, monkeypatch):
    model, batch, lines = newlines()
    monkeypatch.setattr(f"{__name__}.shared", lambda: model)
    monkeypatch.setattr(f"{__name__}.COUNTS", (1,))
    made = td.VScan(count, (), (), 1, -2, 3) if method is td.VScan else td.DuetVLM((1,), (1.0,), count - 8, 8, 20)
    (whole,), (kept,), _ = run(made, batch)
    patches = set(whole) - set(lines)
    assert len(kept) == count
    assert len(patches & set(kept)) == min(count, 48)
    assert set(lines) & set(kept) == set(lines[: count - 48] if count > 48 else ())
    # A newline that leaves goes to no token; with it gone all sums are over patches.
    groups = {token: [whole[token]] for token in kept}
    for token in patches - set(kept):
        best = max(sorted(patches & set(kept)), key=lambda one: alike(whole[token], whole[one]))
        groups[best].append(whole[token])
    if method is td.VScan:
        for token, states in groups.items():
            torch.testing.assert_close(kept[token], sum(states) / len(states), rtol=1e-4, atol=1e-5)
    elif count >= 48:
        assert all(torch.equal(state, whole[token]) for token, state in kept.items())


def test_svd_prune(batch):
    whole, kept, counts = run(td.SVDPrune(5, rank=3), batch)
    assert counts == [[5, 5, 0]] * LAYERS
    for sample in range(2):
        tokens = sorted(whole[sample])
        left, _, _ = torch.linalg.svd(torch.stack([whole[sample][token] for token in tokens]).double())
        leverage = left[:, :3].square().sum(1)
        assert set(kept[sample]) == {tokens[at] for at in leverage.topk(5).indices.tolist()}
        assert all(torch.equal(state, whole[sample][token]) for token, state in kept[sample].items())


@pytest.mark.parametrize("method", [td.VScan(9, (), (), 1), td.DuetVLM((1,), (0.5,), 6, 3), td.SVDPrune(5)], ids=str)
def test_labelled_images_are_refused(method, batch):
    drop = td.apply(copy.deepcopy(shared()), method)
    layout = td.TokenLayout(batch["input_ids"] == IMAGE, labels=batch["input_ids"])
    with pytest.raises(td.NeededRowError, match="use HMGen"), drop.layout(layout):
        pass
