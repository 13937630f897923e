"""Generation with a cache equals generation without one, in every decoder family.

Shape letters: B batch, T tokens of the prompt.
"""

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, NAMES, TEXT, Batch, batch, model
from torch import Tensor

import tokendrop as td

TOLERANCE, NEW = 1e-5, 4
METHODS: dict[str, Any] = {
    "himix": lambda n: td.HiMix(f"{n}:"),
    "hmgen": lambda _: td.HMGen("1:4:2"),
    "gone": lambda n: td.Drop(f"{max(n, 1)}:", 0.5, then="gone"),
    "hidrop": lambda n: td.HiDrop(1, (max(n, 1) + 1,), (0.5,), 4),
}


class Case:
    """A family's model under a method, and a prompt."""

    def __init__(self, name: str, method: str, attention: str, padding: str | None = None) -> None:
        self.data: Batch = batch(name, padding)
        self.model = copy.deepcopy(model(name, attention)).eval()
        self.drop = td.apply(self.model, METHODS[method](FAMILIES[name].first), multiple=4)
        padded = None if padding is None else self.data.real
        self.layout = td.TokenLayout(self.data.image, padding=padded)

    def forward(self, ids: Tensor, mask: Tensor, **more: Any) -> Any:
        rest = {name: value for name, value in self.data.inputs.items() if name not in ("input_ids", "attention_mask")}
        if "mm_token_type_ids" in rest:
            kinds = rest["mm_token_type_ids"]
            rest["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(len(ids), ids.shape[1] - kinds.shape[1])], 1)
        return self.model(input_ids=ids, attention_mask=mask, **rest, **more)

    @torch.no_grad()
    def steps(self, cached: bool) -> tuple[Tensor, Tensor]:
        """Ids and logits of a few new text tokens, step by step by the model's own forward."""
        ids, mask = self.data.inputs["input_ids"], self.data.inputs["attention_mask"]
        logits, cache = [], None
        with self.drop.layout(self.layout, step=(0, 0)):
            for _ in range(NEW):
                if cache is not None:
                    # Without padding a mask says nothing, and Qwen's would take its length for that of the new token.
                    out = self.model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
                else:
                    out = self.forward(ids, mask, use_cache=cached)
                cache = out.past_key_values if cached else None
                logits.append(out.logits[:, -1])
                new = logits[-1][:, slice(*TEXT)].argmax(-1, keepdim=True) + TEXT[0]
                ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
        return ids, torch.stack(logits)

    def generate(self, cached: bool) -> tuple[Tensor, Tensor]:
        """The same by `generate`."""
        text = set(range(*TEXT))
        options: dict[str, Any] = {
            "max_new_tokens": NEW,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
            "suppress_tokens": [one for one in range(64) if one not in text],
        }
        if "Janus" in type(self.model).__name__:
            options["generation_mode"] = "text"
        with self.drop.layout(self.layout, step=(0, 0)):
            out = self.model.generate(**self.data.inputs, use_cache=cached, **options)
        return out.sequences, torch.stack(out.logits)


def agree(cached: tuple[Tensor, Tensor], plain: tuple[Tensor, Tensor]) -> None:
    assert cached[0].shape[1] == plain[0].shape[1]
    assert torch.equal(cached[0], plain[0])
    # Chameleon gives tokens that it forbids the lowest number.
    allowed = plain[1] > torch.finfo(plain[1].dtype).min
    assert torch.equal(cached[1] > torch.finfo(plain[1].dtype).min, allowed)
    error = (cached[1] - plain[1])[allowed].abs().max() / plain[1][allowed].abs().max()
    assert error < TOLERANCE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "attention", "padding"),
    [
        (name, attention, padding)
        for name in NAMES
        for at, attention in enumerate(FAMILIES[name].attentions)
        for padding in ((None, "left") if not FAMILIES[name].alike else ("left", None)[at : at + 1])
    ],
)
def test_generate_with_a_cache_equals_without(
    name: str, method: str, attention: str, padding: str | None, cell: Any
) -> None:
    case = Case(name, method, attention, padding)
    agree(case.generate(True), case.generate(False))
    cell(name, "generate")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_steps_with_a_cache_equal_steps_without(name: str, method: str) -> None:
    case = Case(name, method, FAMILIES[name].attentions[0])
    agree(case.steps(True), case.steps(False))


@pytest.mark.parametrize("name", NAMES)
def test_steps_without_ffn(name: str) -> None:
    """A cache holds every token, and the new ones have an FFN."""
    case = Case(name, "hmgen", FAMILIES[name].attentions[0])
    case.drop.remove()
    case.drop = td.apply(case.model, td.Drop(f"{FAMILIES[name].first}:", 0, then="attend"))
    agree(case.steps(True), case.steps(False))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_the_method_is_seen(name: str, method: str) -> None:
    case = Case(name, method, FAMILIES[name].attentions[0])
    _, routed = case.steps(True)
    with torch.no_grad(), case.drop.disabled():
        inputs = case.data.inputs
        dense = case.forward(inputs["input_ids"], inputs["attention_mask"]).logits[:, -1]
    allowed = dense > torch.finfo(dense.dtype).min
    error = (routed[0] - dense)[allowed].abs().max() / dense[allowed].abs().max()
    assert error > 100 * TOLERANCE
