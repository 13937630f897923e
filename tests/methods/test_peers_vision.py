"""What the peers' own code chose by the vision encoder, recorded in tests/data/peers with its source.

A difference that remains is the peer's own, and its test says which. Shape letters: B batch, T tokens, D hidden.
"""

import re

import peer_inputs
import pytest
import torch
from peers import CASES, Run, cases, close, made, model_of

import tokendrop as td
from tokendrop import scores


def merged(run, inputs):
    """The states of image tokens that stay, as they enter layer 0, by patch, and the output."""
    entered = []
    hook = run.drop.decoder_layers[0].register_forward_pre_hook(
        lambda _, args, __: entered.append(args[0][0]), with_kwargs=True
    )
    out = run.model(**inputs)
    hook.remove()
    (layer,) = out.past_key_values.layers[:1]
    places = layer.positions[0].tolist() if hasattr(layer, "positions") else range(len(entered[0]))
    valid = layer.valid[0].tolist() if hasattr(layer, "valid") else [True] * len(entered[0])
    pairs = zip(places, valid, entered[0][: len(places)], strict=True)  # rows that fill up are not stored
    return {at - peer_inputs.BEFORE: x for at, real, x in pairs if real and run.layout.image[0, at]}, out


def llava(method):
    given = made("vscan-text-96-32-kept")
    run = Run("llava()", method, td.TokenLayout(given["ids"] == 127))
    return run, {"input_ids": given["ids"], "pixel_values": given["pixels"]}


@pytest.mark.parametrize("name", cases("vscan-llava"))
def test_vscan_for_llava(name):
    """Of 100 the peer keeps 98, floor(50 / 16) of each window; ours fills its half up."""
    case, settings = CASES[name], CASES[name]["settings"]
    count = settings["visual_token_num"]
    more = {name: settings[name] for name in ("local_layer", "global_layer")}
    run, inputs = llava(td.VScan(count, (), (), window=settings["window_size"], **more))
    with torch.no_grad(), run:
        states, _ = merged(run, inputs)
    assert len(states) == count
    theirs = set(case["kept"][0])
    assert len(theirs - set(states)) == 0
    assert len(set(states) - theirs) == (2 if count == 100 else 0)
    if count != 100:  # two more take members of others
        for patch, name in ((min(theirs), "merged_first_kept_token"), (max(theirs), "merged_last_kept_token")):
            torch.testing.assert_close(states[patch][:8], torch.tensor(case[name]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", cases("vscan-text"))
def test_vscan_in_the_decoder(name):
    case, settings = CASES[name], CASES[name]["settings"]
    positions = "renumber" if "renumbered" in case["condition"] else "keep"
    method = td.VScan(settings["visual_token_num"], settings["layers"], settings["keep"], positions=positions)
    run, inputs = llava(method)
    with torch.no_grad(), run:
        out = run.model(**inputs)
        assert [run.kept(layer) for layer in settings["layers"]] == case["kept"]
        close(out.logits[0, -1], case["logits_last_row"])
        if "tokens" in case:
            logits, held = run.fed(out.past_key_values, case["tokens"])
            close(logits, case["logits_after_them"])
            assert set(held) == set(case["cache_length_by_layer"])


@pytest.mark.parametrize("name", cases("vscan-qwen-1", "vscan-qwen-2"))
def test_vscan_for_qwen(name):
    case = CASES[name]
    rows, columns = map(int, re.findall(r"\d+", case["input"][0]))
    given = peer_inputs.grid(rows, columns)
    local, whole = given["local"][None], given["whole"][None]
    image = torch.ones(1, rows * columns, dtype=torch.bool)
    place = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(rows), torch.arange(columns))[None]
    share, window = case["settings"]["image_token_ratio"], case["settings"]["window_size"]
    method = td.VScan(share, (), (), local_layer=7, global_layer=-1, window=window, scan="capped")
    count = method.route(2)[0].select.count(rows * columns)
    assert [count] == case["counts"]
    found = scores.capped_scan(local, whole, image, place, torch.tensor([count]), window)
    assert found.isposinf().nonzero()[:, 1].tolist() == case["local"]
    assert found[0].topk(count).indices.sort().values.tolist() == case["kept"][0]


@pytest.mark.parametrize("images", [256, 576, 600, 1024, 1196])
def test_the_decoders_stage_of_vscan_for_qwen_rounds_down_too(images):
    """Its code has int(share m) of the m tokens that are left, as recorded for m = 600."""
    case = CASES["vscan-qwen-text"]
    (share,) = case["settings"]["image_token_ratio_list"]

    def counts(keep):
        method = td.VScan(keep, (14,), (share,), local_layer=7, global_layer=-1, window=4, scan="capped")
        return [layer.select.count(images) for layer in method.route(28)[13:15]]

    left = int(0.167 * images)
    assert counts(0.167) == [left, int(share * left)]
    if images == 600:
        assert counts(images) == [images, *case["counts"]]


def test_vscan_for_qwen_by_sample_and_image():
    """Samples and their images do not see one another, except that a sample's count is one for all its images."""
    made = [peer_inputs.grid(16, 16), peer_inputs.grid(15, 22)]
    size = max(len(one["local"]) for one in made)
    local, whole = (torch.stack([torch.nn.functional.pad(one[at], (0, size - len(one[at]))) for one in made])
                    for at in ("local", "whole"))  # fmt: skip
    image = torch.stack([torch.arange(size) < len(one["local"]) for one in made])
    place = torch.zeros(2, size, 3, dtype=torch.long)
    for sample, (rows, columns) in enumerate(((16, 16), (15, 22))):
        each = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(rows), torch.arange(columns))
        place[sample, : rows * columns] = each
    found = scores.capped_scan(local, whole, image, place, torch.tensor([42, 55]), 4)
    for sample, name in enumerate(("vscan-qwen-16x16-0.167", "vscan-qwen-15x22-0.167")):
        assert found[sample].isposinf().nonzero()[:, 0].tolist() == CASES[name]["local"]


def encoder():
    """Of the recorded CLIP: layer -2's output (577, D), keys (576, D), [CLS] attention (576,), and the projector."""
    model = model_of("llava()").model
    tower, found = model.vision_tower, {}
    attention = next(m for name, m in tower.named_modules() if name.endswith("layers.6.self_attn"))
    hooks = [
        attention.k_proj.register_forward_hook(lambda _, __, out: found.update(keys=out[0])),
        attention.q_proj.register_forward_hook(lambda _, __, out: found.update(queries=out[0])),
    ]
    with torch.no_grad():
        states = tower(peer_inputs.clip()["pixels"], output_hidden_states=True).hidden_states[-2][0]
    for hook in hooks:
        hook.remove()
    queries, keys = (found[name].unflatten(-1, (4, -1)) for name in ("queries", "keys"))
    seen = torch.einsum("hd,thd->ht", queries[0], keys) / keys.shape[-1] ** 0.5
    return states, keys.mean(1)[1:], seen.softmax(-1).mean(0)[1:], model.multi_modal_projector


def as_shipped(name, anchors, members):
    """The rows that the peer gives the projector, written out: [CLS], dominant ones, and contextual ones before it."""
    states, _, _, projector = encoder()
    groups = {anchor: [one for one in members if members[one] == anchor] for anchor in anchors}
    contextual = [
        states[1 + anchor] + (states[[1 + one for one in group]].mean(0) if group else 0)
        for anchor, group in groups.items()
    ]
    rows = torch.cat([states[:1], states[[1 + one for one in CASES[name]["dominant"]]], torch.stack(contextual)])
    with torch.no_grad():
        return torch.stack(contextual), projector(rows)


def check_features(name, contextual, projected):
    case = CASES[name]
    found = contextual[:, :4]
    torch.testing.assert_close(found, torch.tensor(case["contextual_features"]), rtol=0, atol=1e-4)
    count = len(contextual)
    for at, key in ((-count, "projected_first_contextual"), (-1, "projected_last_contextual")):
        torch.testing.assert_close(projected[at][:8], torch.tensor(case[key]), rtol=0, atol=1e-4)


def duet(name):
    """Dominant patches, anchors, and the anchor of each member, as the library chooses them."""
    settings = CASES[name]["settings"]
    _, keys, looked, _ = encoder()
    every, count = torch.ones(1, 576, dtype=torch.bool), settings["dominant"] - 1 + settings["contextual"]
    asked = torch.tensor([count]), torch.tensor([settings["contextual"]]), settings["cluster_width"]
    dominant, anchors, pool = scores.dominant(looked[None], every, *asked)
    members = pool & ~anchors
    into, _ = scores.nearest(keys[None], members, anchors)
    found = (one[0].nonzero().flatten().tolist() for one in (dominant, anchors, members))
    return (*found, into[0].tolist(), looked)


@pytest.mark.parametrize("name", cases("duet-vision"))
def test_the_vision_stage_of_duet(name):
    """Same patches and groups; the peer keeps a [CLS] row, which is no token here, and merges before the projector.

    Merged there from the library's groups, its features are the peer's.
    """
    case = CASES[name]
    dominant, anchors, members, into, looked = duet(name)
    assert dominant == case["dominant"]
    assert sorted(anchors) == sorted(case["anchors"])
    order = sorted(anchors, key=lambda one: -looked[one].item())
    assert order == case["anchors"]
    assert {str(one): order.index(into[one]) for one in members} == case["member_of"]
    check_features(name, *as_shipped(name, order, {one: into[one] for one in members}))
    settings = case["settings"]
    method = td.DuetVLM((), (), settings["dominant"] - 1, settings["contextual"], vision_layer=6)
    run, inputs = llava(method)
    with torch.no_grad(), run:
        run.model(**inputs)
        assert run.kept(0) == sorted(dominant + anchors)


def zipped(name):
    """Dominant patches, anchors and the anchor of each member, as the library chooses them; [CLS] is one of theirs."""
    settings = CASES[name]["settings"]
    _, keys, looked, _ = encoder()
    every, count = torch.ones(1, 576, dtype=torch.bool), settings["dominant"] - 1 + settings["contextual"]
    dominant, anchors = scores.spread(
        looked[None], every, torch.tensor([count]), torch.tensor([settings["contextual"]])
    )
    into, _ = scores.nearest(keys[None], every & ~dominant & ~anchors, anchors)
    members = (every & ~dominant & ~anchors)[0].nonzero().flatten().tolist()
    found = (one[0].nonzero().flatten().tolist() for one in (dominant, anchors))
    return (*found, {one: int(into[0, one]) for one in members})


@pytest.mark.parametrize("name", ["visionzip-54-10", "visionzip-191-30"])
def test_vision_zip(name):
    """Same patches and groups; the peer keeps a [CLS] row, which is no token here, and merges before the projector."""
    case = CASES[name]
    dominant, anchors, members = zipped(name)
    assert (dominant, anchors) == (case["dominant"], case["anchors"])
    assert [list(members.values()).count(anchor) for anchor in anchors] == case["members_of_each_anchor"]
    check_features(name, *as_shipped(name, anchors, members))
    settings = case["settings"]
    run, inputs = llava(td.VisionZip(settings["dominant"] - 1, settings["contextual"], vision_layer=6))
    with torch.no_grad(), run:
        states, _ = merged(run, inputs)
        whole = run.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    assert sorted(states) == sorted(dominant + anchors)
    for anchor in anchors:
        own = [one for one in members if members[one] == anchor]
        expected = whole[anchor] + (whole[own].mean(0) if own else 0)
        torch.testing.assert_close(states[anchor], expected, rtol=0, atol=1e-4)


def test_vision_zip_as_a_whole():
    """Its decoder sees the shortened sequence at positions 0 to 128, its image block in its own order."""
    case, name = CASES["visionzip-whole-54-10"], "visionzip-54-10"
    _, anchors, members = zipped(name)
    _, rows = as_shipped(name, anchors, members)
    given, model = made("visionzip-whole-54-10"), model_of("llava()")
    embed, ids = model.get_input_embeddings(), given["ids"][0]
    with torch.no_grad():
        parts = [embed(ids[: peer_inputs.BEFORE]), rows, embed(ids[peer_inputs.BEFORE + 576 :])]
        logits = model(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits
    close(logits[0, -1], case["logits_last_row"])


@pytest.mark.parametrize("name", cases("divprune", "dualspeed-divprune"))
def test_div_prune(name):
    """DualSpeed rounds the share down."""
    case, features = CASES[name], made(name)["features"]
    count = td.DivPrune(case["settings"]["ratio"]).route(1)[0].select.count(len(features))
    assert count - case["counts"][0] == (1 if name == "dualspeed-divprune-57" else 0)
    every, count = torch.ones(1, 576, dtype=torch.bool), case["counts"][0]
    found = scores.diverse(features[None], every, torch.tensor([count]))[0]
    assert found.topk(count).indices.sort().values.tolist() == case["kept"][0]
    if "order_of_choice" in case:
        assert found.topk(count).indices.tolist() == case["order_of_choice"]


@pytest.mark.parametrize("name", cases("cdpruner"))
def test_cd_pruner(name):
    """On CLIP's embeddings of image and text, as the peer weighs; the method takes the decoder's features for both."""
    case, given = CASES[name], made(name)
    both = torch.cat([given["image"], given["text"][None]], 1)
    image, text = (torch.arange(both.shape[1]) < 576)[None], (torch.arange(both.shape[1]) >= 576)[None]
    weight, count = scores.relevance(both, image, text)[:, :576], case["counts"][0]
    found = scores.conditional(given["features"][None], weight, image[:, :576], torch.tensor([count]))[0]
    assert found.topk(count).indices.tolist() == case["order_of_choice"]
    assert found.topk(count).indices.sort().values.tolist() == case["kept"][0]
    assert td.CDPruner(case["settings"]["visual_token_num"]).route(1)[0].select.count(576) == count


@pytest.mark.parametrize("name", cases("dart"))
def test_dart(name):
    """The peer's pivots are in the order of a Python set, ours by length; in its order they keep what it keeps.

    Its states stand behind the decoder's final norm; the library takes them as they enter the layer.
    """
    case, given = CASES[name], made(name)
    image = torch.zeros(1, 641, dtype=torch.bool)
    image[:, given["start"] : given["start"] + given["images"]] = True
    settings, count = case["settings"], torch.tensor(case["counts"])
    found, valid = scores.pivots(
        given["keys"], image, ~image, settings["pivot_image_token"], settings["pivot_text_token"]
    )
    assert valid.all()
    ours = sorted(found[0].tolist())
    assert ours == sorted(case["rows_of_pivots_in_the_order_visited"])
    assert sorted(found[0, :4].tolist()) == [given["start"] + at for at in case["image_pivots"]]
    assert sorted(found[0, 4:].tolist()) == case["text_pivot_rows"]
    for order in (torch.tensor([case["rows_of_pivots_in_the_order_visited"]]), found):
        score = scores.unlike(given["states"], image, count, order, valid)
        kept = (score[0].topk(int(count)).indices - given["start"]).sort().values.tolist()
        assert int((score > 0).sum()) == int(count)
        assert set(case["image_pivots"]) <= set(kept)
        assert (kept == case["kept"][0]) is (order is not found)


def test_duet_as_a_whole():
    """On the rows that the peer's projector gives, the decoder is the peer's."""
    case, name = CASES["duet-whole-301-7-shipped"], "duet-vision-301-7"
    _, anchors, members, into, looked = duet(name)
    order = sorted(anchors, key=lambda one: -looked[one].item())
    _, rows = as_shipped(name, order, {one: into[one] for one in members})
    given, settings = made("duet-whole-301-7-shipped"), case["settings"]
    embed = model_of("llava()").get_input_embeddings()
    before, after = given["ids"][0, : peer_inputs.BEFORE], given["ids"][0, peer_inputs.BEFORE + 576 :]
    with torch.no_grad():
        states = torch.cat([embed(before), rows, embed(after)])[None]
        image = torch.zeros(1, states.shape[1], dtype=torch.bool)
        image[:, peer_inputs.BEFORE : peer_inputs.BEFORE + 308] = True
        method = td.DuetVLM(settings["layers"], settings["keep"], positions="renumber")
        with Run("llava()", method, td.TokenLayout(image)) as run:
            logits = run.model(inputs_embeds=states, use_cache=False).logits
            assert [run.kept(layer) for layer in settings["layers"]] == case["kept_among_the_308_rows"]
    close(logits[0, -1], case["logits_last_row"])
