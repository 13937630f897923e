"""The attention of scoring rows, against the probabilities that the untouched eager model returns.

Shape letters: B batch, T tokens, R scoring rows, H heads.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from device import DEVICE
from families import FAMILIES, batch, model
from helpers import Spy, checkpointed, close, dropped, engine_step, llama, reference_step
from helpers import batch as written
from torch import Tensor, nn
from transformers import StaticCache

import tokendrop as td
from tokendrop import layout as layouts
from tokendrop.engine.forward import arguments
from tokendrop.engine.forward import attention_rows as attention
from tokendrop.engine.forward.attention_rows import caught_attention
from tokendrop.engine.plan import plan, selection
from tokendrop.engine.plan.selection import highest
from tokendrop.layout import TokenLayout, scoring_mask
from tokendrop.roles import LayerRoute, Queries, Role, Select

NAMES = ("llama", "qwen3", "gemma3", "gpt_neox", "gpt2", "phi3", "llava", "qwen2_5_vl", "chameleon")
# With sinks, biases of columns, one key for all heads, and values of another width than what is cached.
# Falcon's eager attention adds its biases twice, its sdpa once.
NAMES += ("gpt_oss", "falcon", "falcon_7b", "deepseek_v3")


@dataclass(frozen=True)
class Looking:
    """Keeps every image token at layer 2, and looks at the attention of layer `at`."""

    score: Any
    at: int
    rows: Any = "prompt"
    separate: Any = "none"

    def route(self, num_layers: int, strength: float = 1.0) -> Any:
        select = Select(1.0, self.score, 2, 0, strength, Queries(self.rows, self.at))
        return (LayerRoute(),) * 2 + (LayerRoute(Role.GONE, select=select),) * (num_layers - 2)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, one) for name in NAMES for one in FAMILIES[name].attentions if (name, one) != ("falcon", "sdpa")],
)
def test_rows_equal_those_of_the_eager_model(name: str, attention: str, padding: str | None, at: int) -> None:
    data = batch(name, padding)
    with torch.no_grad():
        dense = model(name, "eager")(**data.inputs, output_attentions=True, use_cache=False).attentions[at]
    module, spy = copy.deepcopy(model(name, attention)), Spy()
    # The second sample has another task, so that each group has some samples only.
    drop = td.apply(module, {"u": Looking(spy, at), "other": None}, multiple=4)
    for tasks in ("u", ["u", "other"]):
        labels = data.trained([False, False])
        with drop.layout(TokenLayout(data.image, tasks, padding=data.real, labels=labels)):
            module(**data.inputs, labels=labels)
        seen = spy.given.pop().attention
        assert seen is not None
        assert not seen.probabilities.requires_grad
        assert seen.probabilities.dtype == torch.float32
        chosen = scoring_mask(TokenLayout(data.image, padding=data.real, labels=labels), "prompt")
        for sample in range(len(seen.probabilities)):
            found = seen.probabilities[sample][:, seen.valid[sample]]
            torch.testing.assert_close(found, dense[sample][:, chosen[sample]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_values_of_latent_attention_are_those_attended(attention: str) -> None:
    # What it caches is what keys and values are made of; written out from its own linears.
    module, spy, data, seen = copy.deepcopy(model("deepseek_v3", attention)), Spy(), batch("deepseek_v3", None), []
    drop = td.apply(module, Looking(spy, 2), multiple=4)
    with torch.no_grad(), drop.layout(TokenLayout(data.image)):
        module(**data.inputs, use_cache=False)
    attended: Any = module.model.layers[2].self_attn
    hook = attended.kv_a_layernorm.register_forward_hook(lambda *args: seen.append(args[2]))
    with drop.disabled(), torch.no_grad():
        module(**data.inputs, use_cache=False)
        expected = attended.kv_b_proj(seen.pop()).unflatten(-1, (4, 6 + 8))[..., 6:].transpose(1, 2)
    hook.remove()
    torch.testing.assert_close(spy.given.pop().attention.values, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "labels", "which", "expected"),
    [
        # "." has a label, "t" none, "i" is an image token, " " is padding.
        ("tiittt", None, "answer", [5]),
        ("tiitt ", None, "answer", [4]),
        (" tiitt", None, "answer", [5]),
        ("tiitt..", "", "answer", [4]),
        ("tiitt..tt..", "", "answer", [4, 8]),
        ("tiittt", "", "answer", [5]),
        ("tiittt", None, "prompt", [3, 4, 5]),
        ("tiittitt", None, "prompt", [6, 7]),
        ("tiitt..tt..", "", "prompt", [3, 4, 7, 8]),
        (" tiitt..  ", "", "prompt", [4, 5]),
        ("tttii", None, "prompt", [4]),
        ("tii..", "", "prompt", [4]),
    ],
)
def test_scoring_rows(text: str, labels: str | None, which: str, expected: list[int]) -> None:
    kind = list(text)
    given = torch.tensor([[7 if letter == "." else -100 for letter in kind]])
    layout = TokenLayout(
        torch.tensor([[letter == "i" for letter in kind]]),
        padding=torch.tensor([[letter != " " for letter in kind]]),
        labels=None if labels is None else given,
    )
    assert scoring_mask(layout, which)[0].nonzero()[:, 0].tolist() == expected


def test_scoring_rows_of_samples_with_different_turns() -> None:
    labels = torch.tensor([[-100, -100, 5, -100, 5, 5], [-100, -100, -100, -100, 5, 5]])
    layout = TokenLayout(torch.zeros(2, 6, dtype=torch.bool), labels=labels)
    rows = td.apply(llama(), td.FastV(2)).plan(layout).scoring["answer"]
    assert rows.valid.tolist() == [[True, True], [True, False]]
    assert rows.index[rows.valid].tolist() == [1, 3, 3]


def test_attention_is_never_a_square(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def watched(run: Any) -> Any:
        caught = caught_attention(run)
        shapes.append(caught.logits.numel())
        return caught

    monkeypatch.setattr("tokendrop.engine.forward.attention_rows.caught_attention", watched)
    for backend in ("sdpa", "eager"):
        made = written(["ttiiiitttt", "ttttiiiitt"], "uu")
        module = llama(backend)
        drop = td.apply(module, td.FastV(2, 0.5))
        with drop.layout(TokenLayout(made.image), step=(0, 0)), torch.no_grad():
            module(made.ids, use_cache=False)
        assert shapes.pop() == 2 * 4 * 1 * 10


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("at", [1, 2])
def test_under_checkpointing_a_score_looks_once(at: int, recompute: bool) -> None:
    spy, made, module = Spy(), written(["ttiiiitttt", "ttttiiiitt"], "uu"), llama().train()
    drop = td.apply(module, Looking(spy, at))
    if recompute:
        checkpointed(module)
    with drop.layout(made.layout()):
        module(made.ids, labels=made.labels).loss.backward()
    assert len(spy.given) == 1


REFUSED = {
    "no cache": (lambda: Plain(), "PlainLayer.forward takes no key and value cache"),
    "written elsewhere": (lambda: _written(), "'of_their_own' attention takes no rectangular mask"),
}


class PlainLayer(nn.Module):
    """A layer without a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Identity()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return x


class Plain(nn.Module):
    """A decoder of such layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PlainLayer() for _ in range(4))


def _written() -> nn.Module:
    """A Llama whose attention calls a kernel of its own."""
    module = llama()
    module.config._attn_implementation = "of_their_own"
    for layer in module.model.layers:
        layer.self_attn.__class__ = Written
    return module


class Written(nn.Module):
    """An attention that looks up nothing, and hands its mask to a kernel."""

    flash_attn_of_their_own: Any

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **_: Any) -> Any:
        return self.flash_attn_of_their_own(hidden_states, attention_mask)


@pytest.mark.parametrize("method", [td.FastV(2), td.Drop("2:", 0.5, "attention"), td.Drop("2:", 0.5, "value_norm")])
@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_cannot_be_looked_into(case: str, method: Any) -> None:
    make, message = REFUSED[case]
    module = make()
    with pytest.raises(td.UnsupportedError, match=message) as caught:
        td.apply(module, method, layers="layers" if case == "no cache" else None)
    assert "scores by attention" in str(caught.value)
    assert not hasattr(module, "tokendrop")


def test_attention_of_an_unknown_kind() -> None:
    with pytest.raises(td.UnsupportedError, match="without a call of scaled_dot_product_attention or softmax"):
        caught_attention(lambda: torch.ones(2).exp())


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_cache_of_a_fixed_length(backend: str) -> None:
    made, module = written(["ttiiiitttt", "ttttiiiitt"], "uu"), llama(backend)
    drop = td.apply(module, td.FastV(2, 0.5))
    cache = StaticCache(config=module.config, max_cache_len=24)
    with drop.layout(TokenLayout(made.image)), torch.no_grad():
        found = module(made.ids, past_key_values=cache, use_cache=True).logits
    with drop.layout(TokenLayout(made.image)), torch.no_grad():
        torch.testing.assert_close(found, module(made.ids, use_cache=False).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autocast_keeps_the_gradients_of_the_layers_looked_into(attention: str) -> None:
    # Autocast remembers casted weights; one that was cast without gradients must not serve the step itself.
    made, module = written(["ttiiiitttt", "ttttiiiitt"], "uu"), llama(attention, spread=0.15)
    grads = []
    for method in (Looking(Spy(), 1), Looking(Spy(), 2), None):
        drop = td.apply(module, {"u": method})
        with drop.layout(made.layout()), torch.autocast(DEVICE.type, torch.bfloat16):
            module(made.ids, labels=made.labels, use_cache=False).loss.backward()
        grads.append({name: parameter.grad for name, parameter in module.named_parameters()})
        module.zero_grad(set_to_none=True)
        drop.remove()
    for found in grads[:2]:
        assert all(torch.equal(found[name], grad) for name, grad in grads[2].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_scored_in_single(dtype: torch.dtype) -> None:
    made, spy, module = written(["ttiiiitttt", "ttttiiiitt"], "uu"), Spy(), llama(dtype=dtype, spread=0.15)
    with td.apply(module, Looking(spy, 2)).layout(TokenLayout(made.image)), torch.no_grad():
        module(made.ids, use_cache=False)
    seen = spy.given[0].attention
    assert seen is not None
    assert seen.probabilities.dtype == torch.float32
    sums = seen.probabilities.sum(-1).transpose(1, 2)[seen.valid]
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_fastv_keeps_what_the_eager_model_looks_at_most() -> None:
    made = written(["ttiiiiiiittt", "tttiiiiiiitt"], "uu")
    with torch.no_grad():
        dense = llama("eager")(made.ids, output_attentions=True, use_cache=False).attentions[1]
    image_scores = dense[:, :, -1].mean(1).masked_fill(~made.image, -1)
    module = llama()
    drop = td.apply(module, td.FastV(2, 3), multiple=1)
    with drop.layout(TokenLayout(made.image)), torch.no_grad():
        cache = module(made.ids, use_cache=True).past_key_values
    for sample in range(2):
        kept = image_scores[sample].topk(3).indices.tolist()
        text = (~made.image[sample]).nonzero()[:, 0].tolist()
        assert cache.layers[2].positions[sample].tolist() == sorted(text + kept)


@dataclass(frozen=True)
class Watched:
    """PyramidDrop, watched."""

    spy: Spy
    separate: Any = "none"

    def route(self, num_layers: int, strength: float = 1.0) -> Any:
        def watched(select: Select) -> Select:
            return replace(select, score=lambda scoring: self.spy(scoring) + select.score(scoring))

        route = td.PyramidDrop((1, 2), (0.6, 0.3)).route(num_layers, strength)
        selects = {layer.select: watched(layer.select) for layer in route if layer.select}
        return tuple(replace(layer, select=selects.get(layer.select)) for layer in route)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_nobody_looks_at_what_has_left(backend: str) -> None:
    made, spy = written(["tiiitiiitt", "ttiiiittit", "iiiiitt"], "uuu", "left"), Spy()
    drop = td.apply(module := llama(backend), Watched(spy))
    with drop.layout(made.layout()):
        module(made.ids, attention_mask=made.mask, use_cache=False)
    for scoring, kept in zip(spy.given, (1.0, 0.6), strict=True):
        assert scoring.image.sum(1).tolist() == [int(kept * count + 1e-9) for count in made.image.sum(1).tolist()]
        assert scoring.attention is not None
        rows = scoring.attention.probabilities.transpose(1, 2)[scoring.attention.valid]
        torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]))
        left = made.image & ~scoring.image
        owners = scoring.attention.valid.nonzero()[:, 0]
        assert rows.masked_select(left[owners][:, None].expand_as(rows)).abs().sum() == 0
        assert left.any() == (kept < 1)


def agrees() -> bool:
    """Whether the engine, as it is now, equals the reference."""
    made = written(["tiiitiiitt", "ttiiiittit", "iiiiitt"], "uuu", "left")
    methods = {"u": td.PyramidDrop((1, 2), (0.6, 0.3))}
    module, drop = dropped(llama(dtype=torch.float64), methods, multiple=1)
    expected = reference_step(llama(dtype=torch.float64), methods, drop, made)
    return close(engine_step(module, drop, made), expected, made.real, 1e-9)


def test_mutations_of_the_scores_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert agrees()
    mask, rows, merged = layouts.scoring_mask, attention.probabilities, arguments._merged_mask
    mutations = [
        (plan, "scoring_mask", lambda layout, kind: mask(layout, kind).roll(1, 1)),
        (attention, "probabilities", lambda logits, live: rows(-logits, live)),
        (arguments, "_merged_mask", lambda mask, *rest: torch.zeros_like(merged(mask, *rest)).bool() | True),
        (arguments, "_merged_mask", lambda mask, at, *rest: merged(mask, at.flip(1), *rest)),
        (selection, "highest", lambda scores, *rest: highest(scores.flip(1), *rest)),
    ]
    for module, name, mutated in mutations:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, mutated)
            assert not agrees(), name
