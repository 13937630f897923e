"""The loss that balances experts, against its formula on the rows that compute, gathered by a loop.

Shape letters: B batch, T tokens, L layers, E experts.
"""

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from families import _TEXT, batch, model
from torch import Tensor, nn

import tokendrop as td
from tokendrop.engine.reference import reference

# Qwen3-MoE has no gate in its layer 1.
ROUTED = {"mixtral": ["layers.0", "layers.1", "layers.2", "layers.3", "layers.4"]}
ROUTED["qwen3_moe"] = [name for name in ROUTED["mixtral"] if name != "layers.1"]
# Method of each task, and the layers in which its image tokens compute.
METHODS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "himix": ({"u": td.HiMix("2:")}, {"u": (0, 1)}),
    "hmgen": ({"g": td.HMGen("1:3")}, {"g": (0, 3, 4)}),
    "attend": ({"g": td.Drop("1:3", 0, then="attend"), "u": td.HiMix("2:")}, {"g": (0, 3, 4), "u": (0, 1)}),
    "mixed": ({"u": td.HiMix("2:"), "g": td.HMGen("1:3")}, {"u": (0, 1), "g": (0, 3, 4)}),
}
COEFFICIENT, EXPERTS, CHOSEN = 0.5, 4, 2


def balance(layers: list[Tensor]) -> Tensor:
    """E sum_e (share of the rows that chose e) (mean probability of e), over the rows of all layers."""
    probabilities = torch.cat(layers).softmax(-1)
    chosen = torch.zeros_like(probabilities)
    for row, best in zip(chosen, probabilities.topk(CHOSEN).indices, strict=True):
        row[best] = 1.0
    return EXPERTS * (chosen.mean(0) * probabilities.mean(0)).sum()


def gate_logits(module: nn.Module, layers: list[str], seen: list[Tensor]) -> list[Any]:
    """What the gates of some layers give, in order."""
    gates = [module.get_submodule(f"model.{layer}.mlp.gate") for layer in layers]
    return [gate.register_forward_hook(lambda *args: seen.append(args[2][0])) for gate in gates]


def prepared(name: str) -> Any:
    module = copy.deepcopy(model(name, "sdpa"))
    module.router_aux_loss_coef = COEFFICIENT
    return module


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ROUTED)
def test_the_balance_loss_is_that_of_the_rows_that_compute(name: str, method: str, padding: str | None) -> None:
    (methods, computes), data = METHODS[method], batch(name, padding)
    tasks = (list(methods) * 2)[:2]
    labels = data.trained([task == "g" for task in tasks])
    layout = td.TokenLayout(data.image, tasks, padding=data.real, labels=labels)
    # By definition: every row computes, and those of the roles are picked out.
    plain, seen = prepared(name), []
    hooks = gate_logits(plain, ROUTED[name], seen)
    with reference(plain, methods, layout):
        out = plain(**data.inputs, labels=labels)
    rows = []
    for layer, logits in zip(ROUTED[name], seen, strict=True):
        images = torch.tensor([int(layer[-1]) in computes[task] for task in tasks])
        rows.append(logits[(data.real & (~data.image | images[:, None])).flatten()])
    expected = balance(rows)
    (out.loss + COEFFICIENT * expected).backward()
    for hook in hooks:
        hook.remove()
    dropped = prepared(name)
    drop = td.apply(dropped, methods, multiple=4)
    with drop.layout(layout):
        found = dropped(**data.inputs, labels=labels, output_router_logits=True)
    found.loss.backward()
    torch.testing.assert_close(found.aux_loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.loss, out.loss + COEFFICIENT * expected, rtol=1e-5, atol=1e-6)
    largest = max(parameter.grad.abs().max() for parameter in plain.parameters() if parameter.grad is not None)
    pairs = zip(dropped.parameters(), plain.parameters(), strict=True)
    assert (
        max((ours.grad - theirs.grad).abs().max() for ours, theirs in pairs if theirs.grad is not None) < 1e-5 * largest
    )
    # All rows that ran, by layer.
    assert len(found.router_logits) == len(ROUTED[name])
    assert found.router_logits[0].shape == (data.image.numel(), EXPERTS)


def test_without_dropping_the_balance_loss_is_the_models_own() -> None:
    data, module = batch("mixtral", "left"), prepared("mixtral")
    arguments = {**data.inputs, "labels": data.labels, "output_router_logits": True}
    expected = module(**arguments)
    drop = td.apply(module, td.HMGen("1:3"))
    none = td.TokenLayout(torch.zeros_like(data.image), labels=data.labels)
    with drop.layout(none):
        found = module(**arguments)
    with drop.disabled():
        disabled = module(**arguments)
    for out in (found, disabled):
        assert torch.equal(out.aux_loss, expected.aux_loss)
        assert torch.equal(out.loss, expected.loss)
    drop.remove()
    assert torch.equal(module(**arguments).loss, expected.loss)


def test_arguments_by_position_and_a_model_without_its_head() -> None:
    data, module = batch("mixtral", "left"), prepared("mixtral").eval()
    ids, mask = data.inputs["input_ids"], data.inputs["attention_mask"]
    layout = td.TokenLayout(data.image, labels=data.labels)
    drop = td.apply(module, td.HMGen("1:3"), multiple=4)
    with drop.layout(layout), torch.no_grad():
        named = module(input_ids=ids, attention_mask=mask, output_router_logits=True)
        placed = module(ids, mask, output_router_logits=True)
    assert torch.equal(placed.aux_loss, named.aux_loss)
    assert torch.equal(placed.logits, named.logits)
    drop.remove()
    # Nobody here counts a mask: what the decoder gives are the rows that compute, fillers left out.
    drop = td.apply(module.model, td.HMGen("1:3"), multiple=4)
    with drop.layout(layout), torch.no_grad():
        logits = module.model(ids, mask, output_router_logits=True).router_logits
    assert [len(layer) for layer in logits] == [ids.numel(), *[int((~data.image).sum())] * 2, *[ids.numel()] * 2]


def test_logits_of_gates_that_cannot_be_told_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data, module = batch("mixtral", None), prepared("mixtral")
    # A gate that transformers collects and does not declare so.
    gates = "tokendrop.engine.forward.routers._is_gate"
    monkeypatch.setattr(gates, lambda *_: False)
    drop = td.apply(module, td.HMGen("1:3"))
    with drop.layout(td.TokenLayout(data.image, labels=data.labels)):
        with pytest.raises(
            td.UnsupportedError, match=r"router logits of \[.*expected \[\].*output_router_logits=False"
        ):
            module(**data.inputs, output_router_logits=True)
        module(**data.inputs)


def test_a_vision_language_model_of_experts() -> None:
    vision = hf.models.qwen3_vl_moe.configuration_qwen3_vl_moe.Qwen3VLMoeVisionConfig
    shape = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    config = hf.Qwen3VLMoeConfig(
        text_config={
            **_TEXT,
            "num_experts": EXPERTS,
            "num_experts_per_tok": CHOSEN,
            "moe_intermediate_size": 16,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config=vision(**shape, patch_size=4, deepstack_visual_indexes=[0]).to_dict(),
        image_token_id=5,
    )
    module, data = hf.Qwen3VLMoeForConditionalGeneration(config), batch("llama", "right")
    layout, seen = td.TokenLayout(data.image, labels=data.labels, padding=data.real), []
    drop = td.apply(module, td.HMGen("1:3"), multiple=1)
    layers = module.model.language_model.layers
    hooks = [layer.mlp.gate.register_forward_hook(lambda *args: seen.append(args[2][0])) for layer in layers]
    with drop.layout(layout) as plan:
        out = module(**data.inputs, labels=data.labels, output_router_logits=True)
    for hook in hooks:
        hook.remove()
    kept = []
    for logits, span in zip(seen, plan.span_of, strict=True):
        (group,) = span.groups
        real = data.real.flatten()
        kept.append(logits[real if group.active is None else group.active.valid.flatten()])
    assert [len(one) for one in kept][1] == int((data.real & ~data.image).sum())
    torch.testing.assert_close(out.aux_loss, balance(kept))
