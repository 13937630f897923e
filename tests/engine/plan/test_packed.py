"""Packed sequences: several samples in one row. What is chosen, is chosen in each as if it were alone.

Shape letters: B batch, T tokens, W tokens of the longest sample.
"""

from typing import Any

import families
import pytest
import torch
from helpers import Spy, batch, checkpointed, close, dropped, llama, loss_of
from hypothesis import given, settings
from hypothesis import strategies as st

import tokendrop as td
from tokendrop.engine.reference import reference
from tokendrop.roles import Encoded, LayerRoute, Merge, Role, Scoring, Select

SAMPLES = ["tttiiiitt", "iittiitit", "tttii", "iiiitttt"]
METHODS: dict[str, Any] = {
    "himix": td.HiMix("1:", "shared"),
    "hmgen": td.HMGen("1:3", "shared"),
    "fastv": td.FastV(1, 0.5),
    "pyramid": td.PyramidDrop((1, 2), (0.5, 0.25)),
    "renumbered": td.PyramidDrop((1, 2), (0.5, 0.25), "renumber"),
    "hidrop": td.HiDrop(1, (2,), (0.6,), 3),
    "duet": td.DuetVLM((1, 3), (0.5, 0)),
    "pmod": td.PMoD(0.2),
    "sprint": td.Sprint("1:3", 0.5),
    "cd_pruner": td.CDPruner(0.5),
    "div_prune": td.DivPrune(0.5),
    "dart": td.DART(2, 0.5, 1, 2),
    "svd": td.SVDPrune(0.5, rank=1),
    "depths": td.MixtureOfDepths("0:3", 0.5),
    "count": td.Drop("1:3", 2, "value_norm", "gone"),
    "gone": td.Drop("1:", 0.5, "similarity", "gone"),
    "context": td.Drop("1:3", 0.5, "norm", "context"),
    "transformers": td.MixtureOfTransformers("1:"),
    "merge": td.Drop("1:3", 0.5, "norm", "merge"),
    "attend": td.Drop("1:", 0.5, "norm", "attend"),
    "uniform": td.Drop("0:2", 0.5, "uniform"),
    "leverage": td.Drop("1:", 0.5, "leverage"),
    "attention": td.Drop("2:", 0.5, "attention"),
    "norm": td.Drop("1:", 1, "norm"),
}
SEPARATE = ("himix", "hmgen", "transformers")
# These end image rows CONTEXT or GONE, which nothing may train.
TRAINS_NO_IMAGE = "u"


def nearest_kept(scoring: Scoring, kept: torch.Tensor) -> Merge:
    """Each image token that leaves goes to the first kept one of its sample, by half."""
    at = torch.arange(kept.shape[1]).expand_as(kept)
    first = kept.int().argmax(1, keepdim=True).expand_as(at)
    leaves = scoring.image & ~kept & kept.any(1, keepdim=True)
    return Merge(at.where(~leaves, first), torch.full(kept.shape, 0.5).where(leaves, 1.0))


class Merging:
    """Half of the image tokens are GONE from layer 1 on, merged into the first that stays."""

    separate = "none"

    def route(self, num_layers: int, strength: float = 1.0) -> Any:
        select = Select(0.5, lambda scoring: scoring.states.norm(dim=-1), 1, merge=nearest_kept)
        return (LayerRoute(), *(LayerRoute(Role.GONE, select=select),) * (num_layers - 1))


def packed(samples: list[str] = SAMPLES, seed: int = 0) -> tuple[list[Any], Any, torch.Tensor]:
    """The samples in one row, and what each would be alone."""
    alone = [batch([sample], TRAINS_NO_IMAGE, seed=seed + at) for at, sample in enumerate(samples)]
    together = {name: torch.cat([getattr(one, name) for one in alone], 1) for name in ("ids", "image", "labels")}
    positions = torch.cat([torch.arange(one.ids.shape[1]) for one in alone])[None]
    return alone, together, positions


def numbered(samples: list[str]) -> torch.Tensor:
    """(1, T), the sample of each token."""
    return torch.cat([torch.full((len(one),), at) for at, one in enumerate(samples)])[None]


def run(model: Any, drop: Any, ids: Any, layout: Any, positions: Any = None, first: int = 0) -> Any:
    with drop.layout(layout, step=(0, 0), first=first):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = loss_of(logits, layout.labels)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return logits.detach(), dict(zip([name for name, _ in model.named_parameters()], grads, strict=True))


def apart(model: Any, drop: Any, alone: list[Any]) -> Any:
    """Each sample in a batch of its own: logits one behind the other, gradients summed."""
    runs = [run(model, drop, x.ids, td.TokenLayout(x.image, labels=x.labels), first=at) for at, x in enumerate(alone)]
    logits = torch.cat([logits for logits, _ in runs], 1)
    zero = torch.zeros(())
    return logits, {name: sum(zero if g[name] is None else g[name] for _, g in runs) for name in runs[0][1]}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("said", ["by position ids", "by the layout"])
@pytest.mark.parametrize("method", METHODS)
def test_packed_equals_each_sample_alone(method: str, said: str, attention: str) -> None:
    model, drop = dropped(llama(attention, torch.float64), METHODS[method], multiple=4)
    alone, together, positions = packed()
    packs = numbered(SAMPLES) * 7 - 3 if said == "by the layout" else None
    layout = td.TokenLayout(together["image"], labels=together["labels"], packs=packs)
    expected, real = apart(model, drop, alone), torch.ones_like(together["image"])
    tolerance = 1e-9 if attention == "sdpa" else 1e-5  # the eager softmax is of float32
    assert close(run(model, drop, together["ids"], layout, positions), expected, real, tolerance)


@pytest.mark.parametrize("method", ["himix", "hmgen"])
def test_without_restarts_a_sample_sees_those_before_it(method: str) -> None:
    model, drop = dropped(llama(), METHODS[method], multiple=4)
    alone, together, _ = packed()
    layout = td.TokenLayout(together["image"], labels=together["labels"])
    real = torch.ones_like(together["image"])
    assert not close(run(model, drop, together["ids"], layout), apart(model, drop, alone), real, 1e-2)


@pytest.mark.parametrize("method", [td.RandomLTD("1:3", 0.5), td.Drop("1:", 0.5, "random", seed=3), Merging()])
def test_a_packed_sample_is_numbered_as_a_sample_of_the_batch(method: Any) -> None:
    model, drop = dropped(llama(dtype=torch.float64), method, multiple=4)
    samples = ["tttiiiiiiiitt"] * 3
    alone, together, positions = packed(samples)
    layout = td.TokenLayout(together["image"], labels=together["labels"], packs=numbered(samples))
    real = torch.ones_like(together["image"])
    assert close(run(model, drop, together["ids"], layout, positions), apart(model, drop, alone), real, 1e-9)


def rows_of(written: list[list[str]], side: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Several rows, each of several samples; padded on a side."""
    made = batch(["".join(row) for row in written], TRAINS_NO_IMAGE * len(written), side)
    packs, positions = torch.full(made.ids.shape, -1), torch.zeros(made.ids.shape, dtype=torch.int64)
    for row, samples in enumerate(written):
        at = int(made.real[row].int().argmax())
        for number, sample in enumerate(samples):
            stop = at + len(sample)
            made.labels[row, at] = -100
            packs[row, at:stop], positions[row, at:stop] = number, torch.arange(len(sample))
            at = stop
    return made, packs, positions


def block_mask(packs: torch.Tensor) -> torch.Tensor:
    """(B, 1, T, T) bool: causal within a sample; padding sees itself."""
    tokens = packs.shape[1]
    same = (packs[:, :, None] == packs[:, None]) & (packs >= 0)[:, :, None]
    return ((same & torch.ones(tokens, tokens).tril().bool()) | torch.eye(tokens).bool())[:, None]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in SEPARATE] + ["merging"])
def test_rows_of_packed_samples_equal_the_reference(method: str, side: str) -> None:
    """Two tasks, padding, and a mask of the caller's own."""
    methods = {"u": METHODS.get(method) or Merging(), "g": td.HMGen("1:3")}
    base = llama(dtype=torch.float64)
    model, drop = dropped(base, methods, multiple=4)
    drop.in_training = True  # also for a method that is for training only
    made, packs, positions = rows_of([["tiiitt", "iitit"], ["ttiit", "t", "iiiitt"], ["tttitt"], ["iit", "iiit"]], side)
    layout = made.layout(packs=packs, task=("u", "u", "g", "u"))
    given = {"input_ids": made.ids, "position_ids": positions, "attention_mask": block_mask(packs), "use_cache": False}
    with drop.layout(layout, step=(0, 0)), torch.no_grad():
        found = model(**given).logits
    with reference(base, methods, layout, drop.layers), torch.no_grad():
        expected = base(**given).logits
    assert (found - expected)[made.real].abs().max() <= 1e-9 * expected[made.real].abs().max()


sample_texts = st.lists(st.text("ti", min_size=1, max_size=7), min_size=1, max_size=5)


@given(sample_texts, st.sampled_from([0.3, 0.5, 1, 2]), st.sampled_from(["norm", "uniform", "similarity", "leverage"]))
@settings(max_examples=15)
def test_what_is_kept_is_kept_of_each(samples: list[str], keep: Any, score: str) -> None:
    model, drop = dropped(BASE, td.Drop("1:", keep, score), multiple=1)
    alone, together, positions = packed(samples)
    image = together["image"]
    counts = [Select(keep, lambda s: s.states, 1).count(one.count("i")) for one in samples]
    plan = drop.plan(td.TokenLayout(image, packs=numbered(samples)))
    choice = plan.span_of[1].groups[0].choice
    if image.any():
        assert choice is not None
        assert choice.kept.tolist() == (counts if len(samples) > 1 else [sum(counts)])
        assert choice.counts.tolist() == [int((~image).sum()) + sum(counts)]
    with torch.no_grad():
        with drop.layout(td.TokenLayout(image, packs=numbered(samples))):
            found = model(input_ids=together["ids"], position_ids=positions, use_cache=False).logits
        for one, part in zip(alone, found.split([len(one) for one in samples], 1), strict=True):
            with drop.layout(td.TokenLayout(one.image)):
                expected = model(input_ids=one.ids, use_cache=False).logits
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)


BASE = llama()


def test_a_score_sees_each_sample_as_a_row() -> None:
    """Padded on the right to the longest; attention over its own tokens alone, which sums to one."""
    spy = Spy()
    queries = td.FastV(1).route(4)[1].select.queries
    select = Select(2, spy, 1, queries=queries)

    class Watching:
        separate = "none"

        def route(self, num_layers: int, strength: float = 1.0) -> Any:
            return (LayerRoute(), *(LayerRoute(Role.GONE, select=select),) * (num_layers - 1))

    model, drop = dropped(BASE, Watching())
    _, together, positions = packed()
    layout = td.TokenLayout(together["image"], packs=numbered(SAMPLES))
    with torch.no_grad(), drop.layout(layout, first=5):
        model(input_ids=together["ids"], position_ids=positions, use_cache=False)
    (scoring,) = spy.given
    assert scoring.image.tolist() == [[c == "i" for c in one.ljust(9)] for one in SAMPLES]
    assert scoring.samples.tolist() == [5, 6, 7, 8]
    assert scoring.counts.tolist() == [2, 2, 2, 2]
    attention = scoring.attention
    assert attention is not None
    assert attention.valid.sum(1).tolist() == [1, 1, 1, 1]
    for at, one in enumerate(SAMPLES):
        seen = attention.probabilities[at, :, 0]
        torch.testing.assert_close(seen[:, : len(one)].sum(-1), torch.ones(len(seen)))


def test_a_sample_of_padding_only_and_one_sample_in_each_row_change_nothing() -> None:
    made, packs, _ = rows_of([["tiiitt"], ["tiit"]], "right")
    _, drop = dropped(BASE, td.FastV(1, 0.5))
    assert drop.plan(made.layout(packs=packs)).packs is None
    nothing = torch.zeros_like(made.image)
    assert drop.plan(made.layout(packs=packs, padding=nothing, labels=None)).packs is None


def test_indices_of_packed_samples_are_unique(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENDROP_DEBUG", "1")
    model, drop = dropped(BASE, METHODS["pyramid"])
    _, together, positions = packed(["t", "tttiiiitt", "iit"])
    with drop.layout(td.TokenLayout(together["image"], packs=numbered(["t", "tttiiiitt", "iit"]))):
        model(input_ids=together["ids"], position_ids=positions, use_cache=False)


def test_lengths_say_where_samples_begin() -> None:
    model, drop = dropped(BASE, METHODS["gone"])
    alone, together, positions = packed()
    lengths = torch.tensor([0, *torch.tensor([len(one) for one in SAMPLES]).cumsum(0)], dtype=torch.int32)
    given = {"input_ids": together["ids"], "position_ids": positions, "cu_seq_lens_q": lengths, "use_cache": False}
    with drop.layout(td.TokenLayout(together["image"], labels=together["labels"])), torch.no_grad():
        found = model(**given).logits
    torch.testing.assert_close(found, apart(model, drop, alone)[0], rtol=1e-4, atol=1e-4)


def test_packed_samples_that_the_attention_does_not_keep_apart_are_said_once() -> None:
    model, drop = dropped(BASE, METHODS["himix"])
    _, together, positions = packed()
    layout = td.TokenLayout(together["image"], labels=together["labels"], packs=numbered(SAMPLES))
    with drop.layout(layout):
        model(input_ids=together["ids"], position_ids=positions, use_cache=False)
        with pytest.warns(td.LayoutWarning, match="4 samples packed into 1 rows.*position_ids.*use_cache=False"):
            model(input_ids=together["ids"], position_ids=positions)
        model(input_ids=together["ids"], use_cache=False)


@pytest.mark.filterwarnings("ignore:the layout has 4 samples packed:tokendrop.LayoutWarning")
def test_packed_samples_are_not_continued() -> None:
    model, drop = dropped(BASE, METHODS["gone"])
    _, together, _ = packed()
    layout = td.TokenLayout(together["image"], packs=numbered(SAMPLES))
    with drop.layout(layout), pytest.raises(td.UnsupportedError, match=r"4 samples are packed into 1 rows.*Generate"):
        model.generate(input_ids=together["ids"], max_new_tokens=3, do_sample=False)


@torch.no_grad()
def test_positions_that_begin_behind_padding_pack_nothing() -> None:
    """In a prompt whose layout does not say what is padding, also without a cache."""
    model, drop = dropped(BASE, td.Drop("1:", 0.5, "random", "gone"))
    ids, image = torch.randint(1, 50, (2, 10)), torch.zeros(2, 10, dtype=torch.bool)
    image[:, 4:8] = True
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[1, :2] = 0
    found = []
    for cached in (True, False):
        with drop.layout(td.TokenLayout(image), step=(0, 0)):
            options = {"max_new_tokens": 4, "do_sample": False, "use_cache": cached, "output_logits": True}
            made = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
        found.append(torch.stack(made.logits))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_what_the_encoder_says_is_cut_into_samples() -> None:
    _, together, _ = packed()
    _, drop = dropped(BASE, METHODS["gone"])
    packs = drop.plan(td.TokenLayout(together["image"], packs=numbered(SAMPLES))).packs
    tokens = together["image"].shape[1]
    said = Encoded(*(torch.arange(2 * tokens).view(shape) for shape in ((2, 1, tokens), (2, 1, tokens, 1))),
                   torch.arange(3 * tokens).view(1, tokens, 3))  # fmt: skip
    cut = packs.encoded(said)
    start = 0
    for at, one in enumerate(SAMPLES):
        stop = start + len(one)
        assert torch.equal(cut.attention[:, at, : len(one)], said.attention[:, 0, start:stop])
        assert torch.equal(cut.keys[:, at, : len(one)], said.keys[:, 0, start:stop])
        assert torch.equal(cut.place[at, : len(one)], said.place[0, start:stop])
        start = stop


@pytest.mark.parametrize("what", ["cu_seq_lens_q", "position ids that restart"])
def test_packed_sequences_that_an_attention_tells_apart_itself_are_refused(what: str) -> None:
    """An attention that nobody knows; FlashAttention is told of them again."""
    model, drop = dropped(llama(), td.HMGen("1:3"))
    model.config._attn_implementation = "of_their_own"
    _, together, positions = packed()
    layer, rotary = model.model.layers[0], model.model.rotary_emb
    states = torch.zeros(1, positions.shape[1], 32)
    given = {"attention_mask": None, "position_embeddings": rotary(states, positions)}
    given |= {"cu_seq_lens_q": torch.tensor([0, 9])} if what == "cu_seq_lens_q" else {"position_ids": positions}
    layout = td.TokenLayout(together["image"])
    with drop.layout(layout), pytest.raises(td.UnsupportedError, match=rf"{what}.*'of_their_own'.*'sdpa'"):
        layer(states, **given)


def test_lengths_of_packed_sequences_change_nothing_where_the_mask_says_it() -> None:
    model, drop = dropped(llama(), METHODS["hmgen"])
    _, together, positions = packed()
    lengths = torch.tensor([0, *torch.tensor([len(one) for one in SAMPLES]).cumsum(0)], dtype=torch.int32)
    with drop.layout(td.TokenLayout(together["image"])), torch.no_grad():
        given = {"input_ids": together["ids"], "position_ids": positions, "use_cache": False}
        more = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 9, "max_length_k": 9}
        assert torch.equal(model(**given, **more).logits, model(**given).logits)


@pytest.mark.filterwarnings("ignore:the layout has 3 samples packed:tokendrop.LayoutWarning")
@pytest.mark.parametrize(
    "method", [td.VScan(0.5, (2,), (0.5,), -1, -1, 1), td.DuetVLM((2,), (0.5,), 0.25, 0.25, 2, -1)]
)
def test_samples_packed_with_images_of_an_encoder_equal_the_reference(method: Any) -> None:
    data, base = families.batch("llava", None), families.model("llava", "sdpa")
    # The second row holds two images, and a border between them.
    packs = torch.zeros(data.image.shape, dtype=torch.int64)
    packs[1, int(data.image[1].int().argmax()) + 5 :] = 1
    assert [int((data.image[1] & (packs[1] == pack)).sum()) for pack in (0, 1)] == [4, 4]
    layout = td.TokenLayout(data.image, labels=data.trained([False, False]), packs=packs)
    model, drop = dropped(base, method, multiple=1)
    with drop.layout(layout), torch.no_grad():
        found = model(**data.inputs, use_cache=False).logits
    with reference(base, {None: method}, layout), torch.no_grad():
        expected = base(**data.inputs, use_cache=False).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("method", ["fastv", *(pytest.param(x, marks=pytest.mark.slow) for x in ("depths", "gone"))])
def test_packed_samples_compiled(method: str) -> None:
    torch._dynamo.reset()
    model, drop = dropped(BASE, METHODS[method], multiple=4)
    _, together, positions = packed()
    layout = td.TokenLayout(together["image"], labels=together["labels"], packs=numbered(SAMPLES))
    given = {"input_ids": together["ids"], "position_ids": positions, "use_cache": False}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with drop.layout(layout, step=(0, 0)):
        plain = model(**given).logits  # first, for what transformers makes once under locks that Dynamo cannot trace
        torch.testing.assert_close(compiled(**given).logits, plain, rtol=1e-4, atol=1e-4)


def test_packed_samples_under_activation_checkpointing() -> None:
    model, drop = dropped(BASE, METHODS["fastv"], multiple=4)
    _, together, positions = packed()
    layout = td.TokenLayout(together["image"], labels=together["labels"], packs=numbered(SAMPLES))
    plain = run(model.train(), drop, together["ids"], layout, positions)
    assert close(
        run(checkpointed(model), drop, together["ids"], layout, positions),
        plain,
        torch.ones_like(together["image"]),
        1e-6,
    )
