"""`DropLayers` against a loop over samples: a hand-written decoder, and torch's own encoder layers used causally.

Shape letters: B batch, T tokens, D hidden.
"""

import copy
from typing import Any

import pytest
import torch
from hand_written import LAYERS, WIDTH, Block, CachedBlock, context_oracle, oracle, rotary
from torch import Tensor, nn

import tokendrop as td
from tokendrop import scores
from tokendrop.errors import LayoutError, MissingLayoutError, UnsupportedError

# Its layers are hand-written, its loss is a sum of their output.
pytestmark = pytest.mark.filterwarnings("ignore:the layout has no labels:tokendrop.LayoutWarning")
TOLERANCE = 1e-5
T = 10
IMAGE = torch.tensor([[c == "i" for c in row] for row in ("ttiiiittit", "tiittttttt", "tttttttttt")])


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True)


def stack(make: Any, count: int = LAYERS) -> list[nn.Module]:
    torch.manual_seed(0)
    layers = [make() for _ in range(count)]
    for layer in layers:
        for p in layer.parameters():
            p.data += 0.3 * torch.randn_like(p)
    return layers


def states() -> Tensor:
    return torch.randn(3, T, WIDTH, generator=torch.Generator().manual_seed(4))


def causal(make: Any, form: str) -> dict[str, Any]:
    """What a layer is called with to be causal."""
    if make is encoder:
        return {"src_mask": nn.Transformer.generate_square_subsequent_mask(T), "is_causal": True}
    cos, sin = rotary(T)
    lower = torch.ones(T, T, dtype=torch.bool).tril()
    masks = {
        "none": None,
        "shared": lower[None, None],
        "each": lower.expand(3, 1, T, T),
        "additive": torch.zeros(1, 1, T, T).masked_fill(~lower, -torch.inf),
    }
    return {"cos": cos, "sin": sin, "attention_mask" if make is CachedBlock else "mask": masks[form]}


class Run:
    """The output, and the gradients of the layers and of the input."""

    def __init__(self, layers: list[nn.Module], hidden: Tensor, out: Tensor) -> None:
        weights = [p for layer in layers for p in layer.parameters()]
        away = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
        self.out = out.detach()
        self.grads = torch.autograd.grad((out * away).sum(), [*weights, hidden])

    def equals(self, other: "Run") -> bool:
        largest = max(grad.abs().max() for grad in other.grads)
        errors = [(a - b).abs().max() / largest for a, b in zip(self.grads, other.grads, strict=True)]
        return bool((self.out - other.out).abs().max() < TOLERANCE * other.out.abs().max() and max(errors) < TOLERANCE)


def routed(make: Any, method: Any, form: str = "none", multiple: int = 1) -> tuple[td.DropLayers, Run]:
    layers, hidden = stack(make), states().requires_grad_()
    run = td.DropLayers(layers, method, multiple=multiple)
    with run.tokendrop.layout(td.TokenLayout(IMAGE), step=(0, 0)):
        return run, Run(layers, hidden, run(hidden, **causal(make, form)))


def expected(make: Any, takes_part: list[Tensor]) -> Run:
    layers, hidden = stack(make), states().requires_grad_()
    return Run(layers, hidden, oracle(layers, hidden, takes_part))


EVERY = torch.ones_like(IMAGE)
FORMS = [(encoder, "none"), *((Block, form) for form in ("none", "shared", "each", "additive"))]


def uniform(keep: float) -> Tensor:
    """The image tokens that "uniform" keeps, and all text."""
    kept = ~IMAGE
    for b in range(len(IMAGE)):
        at = IMAGE[b].nonzero()[:, 0]
        if len(at):
            ranked = scores.uniform(IMAGE[b : b + 1])[0, at]
            count = max(1, round(keep * len(at)))
            kept[b, at[ranked.argsort(descending=True, stable=True)[:count]]] = True
    return kept


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize(("make", "form"), FORMS)
def test_bypass(make: Any, form: str, multiple: int) -> None:
    _, found = routed(make, td.HMGen("0:3:2"), form, multiple)
    right = expected(make, [~IMAGE, EVERY, ~IMAGE, EVERY])
    assert found.equals(right)
    assert not right.equals(expected(make, [EVERY] * LAYERS))


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize(("make", "form"), FORMS)
def test_drop_and_rejoin(make: Any, form: str, multiple: int) -> None:
    _, found = routed(make, td.Drop("1:3", 0.5, score="uniform"), form, multiple)
    kept = uniform(0.5)
    assert found.equals(expected(make, [EVERY, kept, kept, EVERY]))


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize(("make", "form"), FORMS)
def test_drop_for_good(make: Any, form: str, multiple: int) -> None:
    _, found = routed(make, td.Drop("1:", 0, then="gone"), form, multiple)
    assert found.equals(expected(make, [EVERY, ~IMAGE, ~IMAGE, ~IMAGE]))
    _, found = routed(make, td.Drop("1:", 0.5, score="uniform", then="gone"), form, multiple)
    kept = uniform(0.5)
    assert found.equals(expected(make, [EVERY, kept, kept, kept]))


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("form", ["none", "shared", "each", "additive"])
def test_context_in_a_layer_with_a_cache_and_a_mask(form: str, multiple: int) -> None:
    _, found = routed(CachedBlock, td.HiMix(), form, multiple)
    layers, hidden = stack(CachedBlock), states().requires_grad_()
    assert found.equals(Run(layers, hidden, context_oracle(layers, hidden, IMAGE)))


def test_context_where_the_cache_argument_is_given() -> None:
    layers, hidden = stack(CachedBlock), states()
    run = td.DropLayers(layers, td.HiMix(), multiple=1)
    with run.tokendrop.layout(td.TokenLayout(IMAGE)):
        given = run(hidden, **causal(CachedBlock, "none"), past_key_values=None)
        left_out = run(hidden, **causal(CachedBlock, "none"))
    assert torch.equal(given, left_out)


@pytest.mark.parametrize(("make", "name"), [(encoder, "TransformerEncoderLayer"), (Block, "Block")])
def test_context_is_refused_without_a_cache(make: Any, name: str) -> None:
    layers = stack(make)
    with pytest.raises(UnsupportedError, match=f"{name}.forward takes no key and value cache, through which it would"):
        td.DropLayers(layers, td.HiMix())
    assert all("_tokendrop" not in layer.__dict__ for layer in layers)


def test_projections_are_refused_where_q_k_and_v_are_one_parameter() -> None:
    with pytest.raises(UnsupportedError, match="no linears for q, k and v in TransformerEncoderLayer"):
        td.DropLayers(stack(encoder), td.HMGen("0:3:2", separate="shared"))


def test_a_tensor_without_a_batch_dimension_is_refused() -> None:
    run, hidden = td.DropLayers(stack(Block), td.HMGen("0:3:2"), multiple=1), states()
    cos, sin = rotary(T)
    with (
        run.tokendrop.layout(td.TokenLayout(IMAGE)),
        pytest.raises(UnsupportedError, match=r"'cos' of shape \(10, 8\) has a row for each.*pass it as \(1, 10, 8\)"),
    ):
        run(hidden, cos[0], sin[0])


def test_a_tensor_with_as_many_columns_as_tokens_is_refused_too() -> None:
    # (T, d) with d = T could be taken for a mask.
    run, hidden = td.DropLayers(stack(Block), td.HMGen("0:3:2"), multiple=1), states()
    with run.tokendrop.layout(td.TokenLayout(IMAGE)), pytest.raises(UnsupportedError, match="'cos'"):
        run(hidden, torch.ones(T, T), torch.ones(T, T))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_for_all_samples_that_is_not_causal_is_refused(dtype: torch.dtype) -> None:
    run = td.DropLayers(stack(encoder), td.HMGen("0:3:2"), multiple=1)
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    seen[5, :2] = False
    mask = ~seen if dtype == torch.bool else torch.zeros(T, T).masked_fill(~seen, -torch.inf)
    with (
        run.tokendrop.layout(td.TokenLayout(IMAGE)),
        pytest.raises(UnsupportedError, match=r"'src_mask' of shape \(10, 10\) is one mask.*or a causal one"),
    ):
        run(states(), src_mask=mask)


def test_a_causal_bool_mask_of_torch() -> None:
    # torch's encoder layers mean True = hidden.
    layers, hidden = stack(encoder), states().requires_grad_()
    run = td.DropLayers(layers, td.HMGen("0:3:2"), multiple=1)
    with run.tokendrop.layout(td.TokenLayout(IMAGE)):
        out = run(hidden, src_mask=torch.ones(T, T, dtype=torch.bool).triu(1))
    assert Run(layers, hidden, out).equals(expected(encoder, [~IMAGE, EVERY, ~IMAGE, EVERY]))


def test_a_batch_as_large_as_its_samples_are_long() -> None:
    # (T, T) masks and (B, T) padding look the same where B = T.
    layers, hidden = stack(encoder), torch.randn(T, T, WIDTH)
    image = torch.zeros(T, T, dtype=torch.bool)
    image[:, 2:5] = True
    run = td.DropLayers(layers, td.HMGen("0:3:2"), multiple=1)
    with run.tokendrop.layout(td.TokenLayout(image)):
        out = run(hidden, **causal(encoder, "none"))
    every = torch.ones_like(image)
    right = oracle(stack(encoder), hidden, [~image, every, ~image, every])
    assert (out - right).abs().max() < TOLERANCE * right.abs().max()


def test_remove_restores() -> None:
    layers, hidden = stack(Block), states()
    dense = oracle(layers, hidden, [EVERY] * LAYERS)
    before = [(type(layer), sorted(layer.__dict__)) for layer in layers]
    run = td.DropLayers(layers, td.HMGen("0:3:2"))
    with pytest.raises(MissingLayoutError, match=r"Block 0 runs without.*drop\.disabled"):
        run(hidden, *rotary(T))
    with run.tokendrop.disabled():
        assert torch.equal(run(hidden, *rotary(T)), copy.deepcopy(run)(hidden, *rotary(T)))
    run.tokendrop.remove()
    assert [(type(layer), sorted(layer.__dict__)) for layer in layers] == before
    assert list(run.state_dict()) == [f"layers.{key}" for key in nn.ModuleList(layers).state_dict()]
    assert (run(hidden, *rotary(T)) - dense).abs().max() < TOLERANCE * dense.abs().max()


def test_the_layout_of_another_batch() -> None:
    run = td.DropLayers(stack(Block), td.HMGen("0:3:2"))
    with run.tokendrop.layout(td.TokenLayout(IMAGE[:2])), pytest.raises(LayoutError, match=r"\(3, 10, 16\)"):
        run(states(), *rotary(T))
