"""Generation whose tokens come as embeddings, alone and under guidance, equals HMGen by definition.

Shape letters: B batch, R rows of the model, T tokens of the prompt, D hidden.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from generation import EVEN, IMAGE_IDS, LAYERS, NEW, PADDED, Prompt, apart, dropped, generated, prompt, stored
from helpers import llama
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import tokendrop as td
from tokendrop.engine.reference import reference

METHODS = {"hmgen": td.HMGen("1:4:2"), "hmgen_first": td.HMGen("0:4:2"), "himix_range": td.HiMix("1:3")}
STEPS, SCALE = 4, 3.0
TEXT = prompt(["tttttttt", "tttttttt"])
RAGGED_TEXT = prompt(["tttttttt", "   ttttt"])
Inside = Callable[[Tensor], AbstractContextManager[Any]]


class Painter:
    """A decoder whose images have a vocabulary of their own, decoded under guidance by its own loop.

    Args:
        given: the prompts, whose text the other half of a doubled batch goes without.
        guided: whether the batch is doubled.
    """

    def __init__(self, given: Prompt, guided: bool = True) -> None:
        torch.manual_seed(4)
        self.table, self.head = nn.Embedding(8, 32), nn.Linear(32, 8)
        self.guided = guided
        without = torch.where(torch.isin(given.ids, IMAGE_IDS), given.ids, 2)
        self.ids = torch.cat([given.ids, without]) if guided else given.ids
        self.real = given.real.repeat(2, 1) if guided else given.real
        self.image = torch.isin(self.ids, IMAGE_IDS)

    @torch.no_grad()
    def paint(self, model: Any, cache: Any, inside: Inside, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes (B, STEPS) and the states (STEPS, R, D) that they were read from."""
        x = model.get_input_embeddings()(self.ids) if known is None else known
        image, real, codes, states = self.image, self.real, [], []
        new = x
        for _ in range(STEPS):
            given = x if cache is None else new
            with inside(image):
                out = model.model(
                    inputs_embeds=given, attention_mask=real, past_key_values=cache, use_cache=cache is not None
                )
            states.append(out.last_hidden_state[:, -1])
            scores = self.head(states[-1])
            if self.guided:
                given_text, without = scores.chunk(2)
                scores = without + (given_text - without) * SCALE
            codes.append(scores.argmax(-1))
            new = self.table(codes[-1].repeat(2 if self.guided else 1))[:, None]
            x, one = torch.cat([x, new], 1), torch.ones(len(x), 1)
            image, real = torch.cat([image, one.bool()], 1), torch.cat([real, one.long()], 1)
        return torch.stack(codes, 1), torch.stack(states)

    def by_definition(self, method: Any) -> tuple[Tensor, Tensor]:
        """Without a cache, under masks, image tokens those of the prompt and every new one."""
        model = llama(layers=LAYERS, eos_token_id=None)
        return self.paint(model, None, lambda image: reference(model, {None: method}, td.TokenLayout(image)))

    def under(self, method: Any, layout: td.TokenLayout, kind: str = "dynamic", embed_first: bool = False) -> Any:
        """By the engine: codes and states, and the cache."""
        model, drop = dropped(method)
        known = model.get_input_embeddings()(self.ids).detach() if embed_first else None
        cache: Any = {"dynamic": DynamicCache(), "none": None}.get(kind)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=40)
        with drop.layout(layout, step=(0, 0)):
            return *self.paint(model, cache, lambda _: nullcontext(), known), cache


def agree(found: Any, right: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], right[0])
    assert apart(found[1], right[1]) < 1e-5


def plain(given: Prompt, **more: Any) -> td.TokenLayout:
    return td.TokenLayout(torch.isin(given.ids, IMAGE_IDS), padding=given.real.bool(), **more)


@pytest.mark.parametrize("kind", ["dynamic", "static", "none"])
@pytest.mark.parametrize("given", [TEXT, RAGGED_TEXT], ids=["text", "padded"])
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "alone"])
@pytest.mark.parametrize("method", ["hmgen", "hmgen_first"])
def test_new_images_as_embeddings(method: str, guided: bool, given: Prompt, kind: str) -> None:
    painter = Painter(given, guided)
    right = painter.by_definition(METHODS[method])
    agree(painter.under(METHODS[method], plain(given, new="image"), kind, embed_first=True), right)
    # Where the prompt was embedded inside, what came past the vocabulary one by one is known to be an image.
    agree(painter.under(METHODS[method], plain(given), kind), right)
    agree(painter.under(METHODS[method], plain(given, image_ids=IMAGE_IDS), kind), right)
    dense = painter.under(METHODS[method], plain(given, new="text"), kind)
    assert apart(dense[1], right[1]) > 1e-3


def test_they_are_not_stored_where_they_skip() -> None:
    painter = Painter(TEXT)
    cache = painter.under(METHODS["hmgen"], plain(TEXT, new="image"))[2]
    assert stored(cache) == [11, 8, 11, 8, 11]
    assert [layer.get_seq_length() for layer in cache.layers] == [11] * LAYERS


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("method", METHODS)
def test_guidance_repeats_the_batch_behind_itself(method: str, kind: str) -> None:
    # The images of EVEN lie at different places: interleaved halves would be wrong.
    painter = Painter(EVEN)
    right = painter.by_definition(METHODS[method])
    agree(painter.under(METHODS[method], EVEN.layout, kind), right)


@pytest.mark.parametrize("kind", ["dynamic", "static", "none"])
def test_a_layout_of_both_halves(kind: str) -> None:
    painter = Painter(EVEN)
    right = painter.by_definition(METHODS["hmgen"])
    both = td.TokenLayout(painter.image, new="image")
    agree(painter.under(METHODS["hmgen"], both, kind, embed_first=True), right)


@pytest.mark.parametrize("known", [{}, {"image_ids": IMAGE_IDS}])
def test_rows_that_nobody_can_tell_apart(known: dict[str, Any]) -> None:
    painter = Painter(EVEN)
    with pytest.raises(td.LayoutError, match=r"runs 4 rows under a layout of 2 samples.*layout with all the rows"):
        painter.under(METHODS["hmgen"], plain(EVEN, new="image", **known), embed_first=True)


def test_halves_in_another_order() -> None:
    painter = Painter(EVEN)
    painter.ids = painter.ids[[0, 3, 1, 2]]
    with pytest.raises(td.LayoutError, match="runs 4 rows under a layout of 2 samples"):
        painter.under(METHODS["hmgen"], EVEN.layout)


def test_a_selection_is_not_shared_between_halves() -> None:
    painter = Painter(TEXT)
    with pytest.raises(td.LayoutError, match="runs 4 rows under a layout of 2 samples"):
        painter.under(td.Drop("1:3", 0.5), plain(TEXT, new="image"))


@pytest.mark.parametrize("ids", [False, True], ids=["embeddings", "ids"])
def test_copies_of_a_search_are_known(ids: bool) -> None:
    method = METHODS["hmgen"]
    model, drop = dropped(method)
    rows = EVEN.ids.repeat_interleave(3, 0)
    given = {"input_ids": rows} if ids else {"inputs_embeds": model.get_input_embeddings()(rows).detach()}
    with torch.no_grad(), drop.layout(plain(EVEN)):
        found = model(**given, use_cache=True).logits
    untouched = llama(layers=LAYERS, eos_token_id=None)
    with torch.no_grad(), reference(untouched, {None: method}, td.TokenLayout(torch.isin(rows, IMAGE_IDS))):
        right = untouched(input_ids=rows, use_cache=False).logits
    assert apart(found, right) < 1e-5


def test_embeddings_of_which_nothing_is_known() -> None:
    painter = Painter(TEXT)
    for kind in ("dynamic", "none"):
        with pytest.raises(td.LayoutError, match=r"1 tokens behind the prompt came as embeddings.*new='image'"):
            painter.under(METHODS["hmgen"], plain(TEXT), kind, embed_first=True)


@torch.no_grad()
def test_several_embeddings_at_once_are_not_guessed() -> None:
    model, drop = dropped(METHODS["hmgen"])
    with drop.layout(TEXT.layout):
        cache = model(**TEXT.inputs, use_cache=True).past_key_values
        with pytest.raises(td.LayoutError, match="3 tokens behind the prompt came as embeddings"):
            model(inputs_embeds=torch.ones(2, 3, 32), past_key_values=cache, use_cache=True)


def test_ids_of_an_earlier_forward_are_not_taken_for_these() -> None:
    # The prompt ends with an image; a new token without ids is not one for that.
    given = prompt(["tttttttti", "tttttttti"])
    painter = Painter(given)
    right = painter.by_definition(METHODS["hmgen"])
    agree(painter.under(METHODS["hmgen"], replace(given.layout, new="image")), right)
    dense = painter.under(METHODS["hmgen"], replace(given.layout, new="text"))
    assert apart(dense[1], right[1]) > 1e-3


@pytest.mark.parametrize("method", [td.HMGen("1:4:2"), td.HMGen("0:4:2"), td.FastV(2, 0.5), td.HiMix("1:3")])
@pytest.mark.parametrize("given", [EVEN, PADDED, TEXT], ids=["even", "padded", "text"])
def test_a_prompt_as_embeddings(given: Prompt, method: Any) -> None:
    # As LLaVA's own code calls generate: ids are seen from the first new token on.
    model, drop = dropped(method)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with drop.layout(given.layout, step=(0, 0)):
        embeds = model.get_input_embeddings()(given.ids).detach()
        found = model.generate(inputs_embeds=embeds, attention_mask=given.real, **options)
    right = generated(model, drop, given, False, do_sample=False)
    assert torch.equal(found.sequences, right.sequences[:, given.ids.shape[1] :])
    assert apart(torch.stack(found.logits), torch.stack(right.logits)) < 1e-5
    assert torch.isin(found.sequences, IMAGE_IDS).any()


def janus() -> Any:
    """A Janus, tiny."""
    torch.manual_seed(0)
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 5}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "projection_dim": 32, "num_image_tokens": 4}
    codes = {"embed_dim": 8, "num_embeddings": 16, "projection_dim": 32, "image_token_embed_dim": 32}
    codes |= {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_patches": 2}
    config = hf.JanusConfig(
        text_config=hf.LlamaConfig(**text),
        vision_config=hf.JanusVisionConfig(**vision),
        vq_config=hf.JanusVQVAEConfig(**codes, latent_channels=8),
        image_token_id=5,
    )
    model = hf.JanusForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():
        if "vqmodel" not in name and weight.dim() > 1:
            weight.data.normal_(0, 0.25)
    model.generation_config.generation_kwargs = {"boi_token_id": 4}
    model.generation_config.bos_token_id, model.generation_config.pad_token_id = 1, 0
    model.generation_config.eos_token_id = None
    return model


JANUS = prompt(["tttttttt", "   ttttt"])
JANUS.ids[:, -1] = 4


@torch.no_grad()
def janus_by_definition(method: Any, copies: int) -> Tensor:
    model, ids = janus(), JANUS.ids.repeat_interleave(copies, 0)
    without = torch.where((ids == 1) | (ids == 4), ids, 0)
    x, codes = model.get_input_embeddings()(torch.cat([ids, without])), []
    real = JANUS.real.repeat_interleave(copies, 0).repeat(2, 1)
    torch.manual_seed(1)
    for _ in range(4):
        image = torch.arange(x.shape[1]).expand(len(x), -1) >= ids.shape[1]
        with reference(model, {None: method}, td.TokenLayout(image)):
            out = model.model.language_model(inputs_embeds=x, attention_mask=real, use_cache=False)
        given, none = model.model.generation_head(out.last_hidden_state[:, -1]).chunk(2)
        scores = none + (given - none) * SCALE
        drawn = torch.multinomial(scores.softmax(-1), 1).squeeze(-1) if copies > 1 else scores.argmax(-1)
        codes.append(drawn)
        new = model.prepare_embeddings_for_image_generation(codes[-1].repeat(2)[:, None])
        x, real = torch.cat([x, new], 1), torch.cat([real, torch.ones(len(x), 1).long()], 1)
    return torch.stack(codes, 1)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("cache", ["default", "dynamic"])
@pytest.mark.parametrize("more", [{}, {"new": "image"}, {"image_ids": torch.tensor([5])}])
def test_janus_makes_images(more: dict[str, Any], cache: str, copies: int) -> None:
    method = td.HMGen("1:4")
    model = janus()
    drop = td.apply(model, method, multiple=1)
    options: dict[str, Any] = {"generation_mode": "image", "guidance_scale": SCALE, "do_sample": copies > 1}
    options["disable_compile"] = True
    if cache == "dynamic":
        options["past_key_values"] = DynamicCache()
    layout = td.TokenLayout(torch.zeros_like(JANUS.ids, dtype=torch.bool), padding=JANUS.real.bool(), **more)
    torch.manual_seed(1)
    with drop.layout(layout):
        found = model.generate(JANUS.ids, attention_mask=JANUS.real, num_return_sequences=copies, **options)
    right = janus_by_definition(method, copies)
    assert torch.equal(found, right)
    assert not torch.equal(right, janus_by_definition(td.HMGen("0:1"), copies))
