"""Every public parameter, every way it can be wrong: the documented error with the value, and nothing else changes.

The catalogue is held against the signatures: a parameter without an entry turns the test red.
Shape letters: B batch, T tokens, D hidden.
"""

import contextlib
import inspect
import tempfile

import pytest
import torch
from helpers import llama, snapshot
from torch import nn

import tokendrop as td

BASE = llama()
IMAGE = torch.tensor([[False, True, True, False]])
ROWS, META = torch.zeros(1, 4, 2), torch.zeros(1, 4, device="meta")
NAN = float("nan")
SAVED = tempfile.NamedTemporaryFile()  # noqa: SIM115, which lives as long as this module
torch.save({"callbacks": {"TokenDrop": td.to_config(td.HiMix())}}, SAVED.name)
METHOD = (td.MethodError, [None, 3, "HiMix", {}, {3: td.HiMix()}, {"u": 3}, {"a.b": None}, td.HiMix])
LAYERS = (td.LayerRangeError, ["1-3", "3:2", "2:24", (9,), (1, 1), (), 1.5, None, ("1",), (True,)])
STAGES = (
    (td.LayerRangeError, [(3, 1), (1, 1), (-1, 2), (1, 24), ("1", 2), (1.0, 2)]),
    (td.MethodError, [(), "12", None, 3, (1,)]),
)
KEEPS = (td.MethodError, [(0.5,), (0.5, 1.5), (0.5, -1), (0.5, NAN), (0.5, "1"), (), None, 0.5])
KEEP = (td.MethodError, [0.0, 1.5, -1, -0.5, True, NAN, "half", None, [0.5]])
SHARE = (td.MethodError, [0, 1, 0.0, -0.5, 1.5, NAN, "half", None, True])
PER = (td.MethodError, ["video", "Frame", "", None, 1, ["image"]])
SEED = (td.MethodError, [1.5, "0", None, True])
COUNT = (td.MethodError, [0, -4, 1.5, "64", True, [64]])
FLAG = (td.MethodError, [1, "no", None])
SEPARATE = (td.MethodError, ["sometimes", None, 1, ["none"]])
PARTS = (td.MethodError, ["", "qkv+", "head", "QKV", "qq", "qkv,o", "norms", "qkv+o", None, 3, ["qkv"]])
SCHEDULE = (td.MethodError, [3, "late", {"start": 3}])
CLASSES = (td.MethodError, [None, 3, "HiMix", [3], [int]])
POSITIONS = (td.MethodError, ["anew", "Keep", 3, None, True, ["keep"]])
STEPS = (td.MethodError, [-1, 1.5, "1", None, True])
MODEL = (td.DecoderError, [None, "llama", 3, [BASE], nn.Linear(2, 2)])
PATH = (td.DecoderError, ["model.blocks", "lm_head", "", 3, ["model"]])
TASK = ((td.LayoutTypeError, [3, b"u", ["u", 3], {"u"}]), (td.LayoutError, [["u", "g"], []]))


def tensors(dtype, *wrong):
    """Wrong kinds, dtypes, shapes and devices of a (1, 4) tensor."""
    shaped = [torch.zeros(shape, dtype=dtype) for shape in ((2, 4), (1, 3), (4,), (1, 4, 1))]
    return (
        (td.LayoutTypeError, ["x", 3, [[True]], *wrong]),
        (td.LayoutError, [*shaped, META.to(dtype)]),
    )


def layouts():
    other = td.TokenLayout(torch.tensor([[False, True, True, False]]), ["u"])
    return (td.LayoutTypeError, [None, "layout", IMAGE, {"image": IMAGE}]), (td.LayoutError, [other.to("meta")])


INDICES = (
    (td.LayoutTypeError, [None, [[1]], torch.tensor([[1.0]]), torch.tensor([[1]], dtype=torch.int32)]),
    (td.LayoutError, [torch.tensor([1]), torch.tensor([[1], [1]]), torch.tensor([[4]]), torch.tensor([[-1]])]),
    (td.LayoutError, [torch.tensor([[1, 1]]), torch.zeros(1, 5).long(), torch.zeros(1, 1).long().to("meta")]),
)
ROW_KINDS = (td.MethodError, ["some", 3, None, ["all"]])
FUNCTION = (td.MethodError, ["image_mask", 3])
VISION_STAGES = (
    (td.LayerRangeError, [(3, 1), (1, 1), (-1, 2), ("1", 2), (0, 2)]),
    (td.MethodError, ["12", None, 3, (1,)]),
)
INDEX = (td.MethodError, [1.5, "0", None, True])
TOKENS = (td.LayoutError, [-1, 1.5, "8", None, True])
CATALOGUE = {
    "flops.model_or_config": ((td.DecoderError, [None, 3, [BASE], "no/such/config.json", nn.Linear(2, 2)]),),
    "flops.methods": (METHOD,),
    "flops.text": (TOKENS, (td.LayoutError, [1 << 20])),
    "flops.image": (TOKENS, (td.LayoutError, [1 << 20])),
    "flops.task": ((td.LayoutTypeError, [3, b"u"]),),
    "flops.before": (TOKENS, (td.LayoutError, [9])),
    "flops.labelled": ((td.LayoutError, [-1, 1.5, "8", True]),),
    "flops.multiple": (COUNT,),
    "flops.backward": (FLAG,),
    "flops.counted": (FLAG,),
    "flops.layers": (PATH,),
    "recipe.config_or_model": ((td.DecoderError, [None, 3, [BASE], "no/such/config.json", nn.Linear(2, 2)]),),
    "recipe.task": ((td.MethodError, [None, 3, "u", "Understanding", ["generation"], True]),),
    "recipe.budget": ((td.MethodError, [0, 0.0, -0.5, 1.5, 2, NAN, float("inf"), "half", None, True, [0.5], 0.001]),),
    "recipe.text": (TOKENS, (td.LayoutError, [1 << 20])),
    "recipe.image": (TOKENS, (td.LayoutError, [1 << 20])),
    "recipe.layers": (PATH,),
    "AttentionAllocation.batches": (COUNT,),
    "AttentionAllocation.rows": (ROW_KINDS,),
    "AttentionAllocation.layout": (FUNCTION,),
    "AttentionAllocation.loss": (FUNCTION,),
    "attention_allocation.model": (MODEL,),
    "attention_allocation.batches": (
        (td.LayoutTypeError, [None, 3, "ab", {"input_ids": IMAGE}, IMAGE, [IMAGE]]),
        (td.LayoutError, [[], [{"input_ids": META.long()}]]),
    ),
    "attention_allocation.layout": (
        (td.MethodError, ["image_mask", 3, None, lambda: None]),
        (td.LayoutTypeError, [type]),
    ),
    "attention_allocation.rows": (ROW_KINDS,),
    "attention_allocation.heads": (FLAG,),
    "attention_allocation.blocks": ((td.MethodError, [-1, 1.5, "2", None, True]),),
    "attention_allocation.loss": (FUNCTION, (td.MethodError, [lambda: None, lambda one, two: None])),
    "attention_allocation.layers": (PATH,),
    "benchmark.model": (MODEL,),
    "benchmark.batches": (
        (td.LayoutTypeError, [None, 3, "ab", {"input_ids": IMAGE}, IMAGE, [IMAGE]]),
        (td.LayoutError, [[], [{"input_ids": META.long()}]]),
    ),
    "benchmark.layout": ((td.MethodError, ["image_mask", 3, None, lambda: None]), (td.LayoutTypeError, [type])),
    "benchmark.methods": (METHOD, (td.MethodError, [[], [td.HiMix(), 3]])),
    "benchmark.loss": (FUNCTION, (td.MethodError, [lambda: None, lambda one, two: None])),
    "benchmark.rounds": (COUNT,),
    "benchmark.optimizer": ((td.MethodError, ["AdamW", 3, lambda: None]),),
    "benchmark.unchecked": (FLAG,),
    "benchmark.layers": (PATH,),
    "benchmark.multiple": (COUNT,),
    "benchmark.labelled_logits": (FLAG,),
    "benchmark.out": ((td.MethodError, [3, b"a", "", ["a"], SAVED.name]),),
    "benchmark.progress": ((td.MethodError, ["print", 3, lambda: None]),),
    "DuetVLM.dominant": (KEEP,),
    "DuetVLM.contextual": (KEEP,),
    "DuetVLM.cluster_width": (COUNT,),
    "DuetVLM.positions": (POSITIONS,),
    "DuetVLM.vision_layer": (INDEX,),
    "MixtureOfDepths.layers": (LAYERS,),
    "MixtureOfDepths.keep": (KEEP,),
    "DART.layer": ((td.LayerRangeError, [-1, 24, 1.5, "2", None, True]), (td.MethodError, [0])),
    "CDPruner.keep": (KEEP,),
    "DART.keep": (KEEP,),
    "DART.image_pivots": (COUNT,),
    "DART.text_pivots": (COUNT,),
    "DivPrune.keep": (KEEP,),
    "VisionZip.dominant": (KEEP,),
    "VisionZip.contextual": (KEEP,),
    "VisionZip.vision_layer": (INDEX,),
    "sees.attention": ((td.MethodError, ["all", "Answer", 3, True, ["answer"]]),),
    "sees.before": (FLAG,),
    "sees.frames": (FLAG,),
    "sees.encoder": ((td.MethodError, [3, "12", None, (1.5,), ("1",), (True,)]),),
    "PMoD.shift": ((td.MethodError, [-1.5, 1.5, NAN, "half", None, True]),),
    "PMoD.most": (SHARE, (td.MethodError, [0.1])),
    "PMoD.least": (SHARE, (td.MethodError, [0.9])),
    "PMoD.gate": (SHARE,),
    "SVDPrune.keep": (KEEP,),
    "Sprint.layers": (LAYERS,),
    "Sprint.keep": (KEEP,),
    "Sprint.seed": (SEED,),
    "SkipVision.layers": (LAYERS,),
    "SkipVision.keep": (KEEP,),
    "SkipVision.score": ((td.MethodError, ["loudest", 3, None, ["random"]]),),
    "SkipVision.seed": (SEED,),
    "SVDPrune.rank": (COUNT,),
    "SVDPrune.per": (PER,),
    "SVDPrune.energy": ((td.MethodError, [0, 1, 0.0, 1.0, -0.5, NAN, "half", None, True]),),
    "VScan.keep": (KEEP,),
    "VScan.text_layers": VISION_STAGES,
    "VScan.text_keep": (KEEPS,),
    "VScan.local_layer": (INDEX,),
    "VScan.global_layer": (INDEX,),
    "VScan.window": (COUNT,),
    "VScan.merge": (FLAG,),
    "VScan.positions": (POSITIONS,),
    "VScan.scan": ((td.MethodError, ["windows", 3, None, ["capped"]]),),
    "Drop.layers": (LAYERS,),
    "Drop.keep": (KEEP,),
    "Drop.score": ((td.MethodError, ["loudest", 3, None, ["random"]]),),
    "Drop.then": ((td.MethodError, ["stay", "Context", 3, None, ["gone"], {"context": 1}]),),
    "Drop.seed": (SEED,),
    "Drop.per": (PER,),
    "DropLayers.layers": ((td.DecoderError, [[], None, 3, "ab", [3], [nn.Linear(2, 2), nn.ReLU()]]),),
    "DropLayers.methods": (METHOD,),
    "DropLayers.multiple": (COUNT,),
    "DuetVLM.text_layers": STAGES,
    "DuetVLM.text_keep": (KEEPS,),
    "FastV.layer": ((td.LayerRangeError, [-1, 24, 1.5, "2", None, True]),),
    "FastV.keep": (KEEP,),
    "FastV.per": (PER,),
    "HMGen.shallow": (LAYERS,),
    "HMGen.separate": (SEPARATE,),
    "HiDrop.entry": ((td.LayerRangeError, [-1, 2, 1.5, "0", None, True]),),
    "HiDrop.layers": STAGES,
    "HiDrop.keep": (KEEPS,),
    "HiDrop.per": (PER,),
    "HiDrop.exit": ((td.LayerRangeError, [2, 24, 3.5, "3", None]),),
    "HiMix.layers": (LAYERS,),
    "HiMix.separate": (SEPARATE,),
    "HiMix.parts": (PARTS, (td.MethodError, ["qkv+ffn", "o"])),
    "HMGen.parts": (PARTS,),
    "MixtureOfTransformers.layers": (LAYERS,),
    "MixtureOfTransformers.separate": (SEPARATE, (td.MethodError, ["none"])),
    "MixtureOfTransformers.parts": ((td.MethodError, [one for one in PARTS[1] if one != "qkv+o"]),),
    "PyramidDrop.layers": STAGES,
    "PyramidDrop.keep": (KEEPS,),
    "PyramidDrop.per": (PER,),
    "PyramidDrop.positions": (POSITIONS,),
    "RandomLTD.layers": (LAYERS,),
    "RandomLTD.keep": (KEEP,),
    "RandomLTD.seed": (SEED,),
    "Role.value": ((ValueError, [9, "ACTIVE", None]),),
    "Schedule.start": (STEPS,),
    "Schedule.steps": (STEPS,),
    "Schedule.dense_tail": (STEPS,),
    "Schedule.direction": ((td.MethodError, ["up", "IN", None, True, 1, ["in"]]),),
    "Schedule.dense_every": (STEPS,),
    "Schedule.drawn": (FLAG,),
    "Schedule.seed": (SEED,),
    "to_config.methods": (METHOD,),
    "to_config.schedule": (SCHEDULE,),
    "from_config.config": ((td.MethodError, [None, 3, "HiMix", {}, {"methods": 3}, {"methods": {"class_path": "x"}}]),),
    "from_config.classes": (CLASSES,),
    "methods_of.path": ((td.MethodError, [None, 3, b"a.ckpt", "no/such.ckpt", ["a.ckpt"]]),),
    "methods_of.classes": (CLASSES,),
    "Segment.value": ((ValueError, [9, "IMAGE", None]),),
    "SynergyMonitor.tasks": ((td.MethodError, ["u", ("u",), ("u", "u"), (1, 2), None, 3, ()]),),
    "SynergyMonitor.every_n_steps": (COUNT,),
    "SynergyMonitor.loss": ((td.MethodError, ["loss", 3]),),
    "SynergyMonitor.params": ((td.MethodError, [3, (3,), ()]),),
    "SynergyMonitor.fidelity": (FLAG,),
    "SynergyMonitor.affinity": ((td.MethodError, [0, -1.0, NAN, float("inf"), "0.1", True]),),
    "SynergyMonitor.sketch": (COUNT,),
    "SynergyMonitor.window": (COUNT,),
    "SynergyMonitor.history": ((td.MethodError, [3, ["a"], b"a"]),),
    "SynergyMonitor.seed": (SEED,),
    "TokenDrop.methods": (METHOD,),
    "TokenDrop.layout": ((td.MethodError, ["image_mask", 3]),),
    "TokenDrop.schedule": (SCHEDULE,),
    "TokenDrop.image_ids": ((td.LayoutTypeError, [["a"], [1.5], [True], "ab", torch.tensor([1.5])]),),
    "TokenDrop.consume": (FLAG,),
    "TokenDrop.layers": ((td.MethodError, [3, ["model"], ("a",)]),),
    "TokenDrop.multiple": (COUNT,),
    "TokenDrop.labelled_logits": (FLAG,),
    "TokenLayout.image": (
        (td.LayoutTypeError, [None, "x", [[True]], IMAGE.long(), IMAGE[0], IMAGE[None]]),
        (td.LayoutError, [IMAGE[:0], IMAGE[:, :0]]),
    ),
    "TokenLayout.task": TASK,
    "TokenLayout.segments": (*tensors(torch.int64, IMAGE, ROWS[..., 0]), (td.LayoutError, [IMAGE * 4, IMAGE * -1])),
    "TokenLayout.padding": tensors(torch.bool, IMAGE.long()),
    "TokenLayout.labels": tensors(torch.int64, IMAGE, IMAGE.int(), ROWS[..., 0]),
    "TokenLayout.image_ids": ((td.LayoutTypeError, [3, [3], torch.tensor([1.5]), torch.zeros(0).long()]),),
    "TokenLayout.packs": tensors(torch.int64, IMAGE, IMAGE.int(), ROWS[..., 0]),
    "TokenLayout.images": tensors(torch.int64, IMAGE, IMAGE.int(), ROWS[..., 0]),
    "TokenLayout.frames": tensors(torch.int64, IMAGE, IMAGE.int(), ROWS[..., 0]),
    "TokenLayout.new": ((td.LayoutError, ["video", "", 3, ["text"], IMAGE]),),
    "TokenLayout.from_ids.input_ids": ((td.LayoutTypeError, [None, [[1]], IMAGE, ROWS, torch.zeros(4).long()]),),
    "TokenLayout.from_ids.image_ids": ((td.LayoutTypeError, [None, 1.5, "a", [], [True], torch.tensor([0.5])]),),
    "TokenLayout.from_ids.task": TASK,
    "TokenLayout.from_ids.labels": tensors(torch.int64, IMAGE, ROWS[..., 0]),
    "TokenLayout.from_ids.attention_mask": (
        (td.LayoutTypeError, ["x", 3, [[1]]]),
        (td.LayoutError, [torch.ones(1, 3), torch.ones(4), META]),
    ),
    "Handle.layout.layout": layouts(),
    "Handle.layout.step": ((td.LayoutTypeError, [3, (1,), (1, 2, 3), (1, -2), (1.5, 0), ("1", 0), "12"]),),
    "Handle.layout.first": ((td.LayoutTypeError, [-1, 1.5, "0", None, True]),),
    "apply.model": (MODEL,),
    "apply.methods": (METHOD,),
    "apply.layers": (PATH,),
    "apply.multiple": (COUNT,),
    "apply.labelled_logits": (FLAG,),
    "apply.layout": (
        (td.MethodError, ["Auto", "", 3, True, td.TokenLayout, lambda: None, lambda one: None]),
    ),
    "gather_tokens.x": (
        (td.LayoutTypeError, [None, [[1]]]),
        (td.LayoutError, [ROWS[0], ROWS[:, :, 0], ROWS.to("meta")]),
    ),
    "gather_tokens.idx": INDICES,
    "handle.model": ((td.TokenDropError, [None, "llama", 3, nn.Linear(2, 2)]),),
    "inspect.model": (MODEL,),
    "inspect.layers": (PATH,),
    "scatter_tokens.full": (
        (td.LayoutTypeError, [None, [[1]], ROWS.double()]),
        (td.LayoutError, [ROWS[0], ROWS.to("meta")]),
    ),
    "scatter_tokens.kept": (
        (td.LayoutTypeError, [None, 3, torch.zeros(1, 2, 2).double()]),
        (td.LayoutError, [torch.zeros(1, 1, 2), torch.zeros(2, 2), torch.zeros(1, 2, 2, device="meta")]),
    ),
    "scatter_tokens.idx": INDICES,
    "scatter_tokens.valid": (
        (td.LayoutTypeError, [3, "x", torch.ones(1, 2)]),
        (td.LayoutError, [torch.ones(1, 1).bool()]),
    ),
}  # fmt: skip
MADE_BY_OTHERS = {
    "Allocation": "attention_allocation",
    "Benchmark": "benchmark",
    "FlopReport": "flops",
    "Handle": "apply",
    "Inspection": "inspect",
    "Method": "HiMix",  # a protocol
}
METHODS = {name for name, value in vars(td).items() if isinstance(value, type) and hasattr(value, "route")} - {"Method"}
GOOD = {
    "AttentionAllocation": {},
    "attention_allocation": {
        "model": BASE,
        "batches": [{"input_ids": IMAGE.long()}],
        "layout": lambda _: td.TokenLayout(IMAGE, "u"),
    },
    "benchmark": {
        "model": BASE,
        "batches": [{"input_ids": IMAGE.long(), "labels": IMAGE.long()}],
        "layout": lambda _: td.TokenLayout(IMAGE, "u"),
        "methods": {"u": td.HMGen("1:3")},
        "rounds": 1,
    },
    "flops": {"model_or_config": BASE, "methods": {"u": td.HiMix()}, "text": 8, "image": 8},
    "recipe": {"config_or_model": BASE, "task": "generation", "budget": 0.9, "text": 8, "image": 8},
    "MixtureOfDepths": {},
    "MixtureOfTransformers": {},
    "PMoD": {},
    "SVDPrune": {"keep": 1, "rank": 1},
    "SkipVision": {},
    "Sprint": {"layers": "1:-1"},
    "DART": {"layer": 1},
    "CDPruner": {},
    "DivPrune": {},
    "VisionZip": {},
    "sees": {},
    "VScan": {"text_layers": (1, 2), "text_keep": (0.5, 0.25)},
    "Drop": {"layers": "1:3", "keep": 0.5},
    "DropLayers": {"layers": list(llama().model.layers), "methods": td.HiMix()},
    "DuetVLM": {"text_layers": (1, 2), "text_keep": (0.5, 0)},
    "FastV": {"layer": 1},
    "HMGen": {"shallow": "1:3"},
    "HiDrop": {"entry": 0, "layers": (1, 2), "keep": (0.5, 1), "exit": 3},
    "HiMix": {},
    "PyramidDrop": {"layers": (1, 2), "keep": (0.5, 0.25)},
    "RandomLTD": {},
    "Role": {"value": 1},
    "Schedule": {},
    "to_config": {"methods": {"u": td.HiMix()}},
    "from_config": {"config": td.to_config(td.HiMix())},
    "methods_of": {"path": SAVED.name},
    "Segment": {"value": 1},
    "SynergyMonitor": {"tasks": ("u", "g")},
    "TokenDrop": {"methods": {"u": td.HiMix()}},
    "TokenLayout": {"image": IMAGE},
    "TokenLayout.from_ids": {"input_ids": IMAGE.long(), "image_ids": 1},
    "Handle.layout": {"layout": td.TokenLayout(IMAGE, "u")},
    "apply": {"model": BASE, "methods": {"u": td.HiMix()}},
    "gather_tokens": {"x": ROWS, "idx": torch.tensor([[3, 1]])},
    "handle": {"model": BASE},
    "inspect": {"model": BASE},
    "scatter_tokens": {"full": ROWS, "kept": torch.ones(1, 2, 2), "idx": torch.tensor([[3, 1]])},
}
MORE = {"TokenLayout.from_ids": td.TokenLayout.from_ids, "Handle.layout": td.Handle.layout}


def public():
    """Every public callable that a caller gives arguments to, by name."""
    named = {name: getattr(td, name) for name in td.__all__ if name not in MADE_BY_OTHERS}
    errors = (BaseException,)
    return {n: v for n, v in named.items() if not (isinstance(v, type) and issubclass(v, errors))} | MORE


def parameters(function):
    names = list(inspect.signature(function).parameters)
    return ["value"] if "boundary" in names else [name for name in names if name != "self"]


def test_every_parameter_has_an_entry():
    assert set(CATALOGUE) == {f"{name}.{one}" for name, value in public().items() for one in parameters(value)}
    assert GOOD.keys() == public().keys()
    for name, maker in MADE_BY_OTHERS.items():
        assert isinstance(getattr(td, name), type)
        assert hasattr(td, maker)


def call(name, kwargs):
    """The call, and for what is only checked against a model, its application to one."""
    if name in METHODS:
        method = public()[name](**kwargs)
        if name in ("VScan", "VisionZip"):  # which a Llama has no encoder for
            return
        td.apply(BASE, {"u": method}).remove()
        return
    if name == "apply":
        td.apply(**kwargs).remove()
    elif name == "handle":
        with contextlib.ExitStack() as stack:
            if kwargs["model"] is BASE:
                stack.callback(td.apply(BASE, td.HiMix()).remove)
            td.handle(**kwargs)
    elif name == "DropLayers":
        td.DropLayers(**kwargs).tokendrop.remove()
    elif name == "Handle.layout":
        drop = td.apply(BASE, {"u": td.HiMix()})
        try:
            with drop.layout(**kwargs):
                pass
        finally:
            drop.remove()
    else:
        public()[name](**kwargs)


def fragments(value):
    """What of a value a message may show."""
    if isinstance(value, torch.Tensor):
        numbers = [] if value.is_meta else [str(one) for one in value.flatten().tolist()]
        return [str(tuple(value.shape)), str(value.dtype), str(value.device), type(value).__name__, *numbers]
    if isinstance(value, nn.Module):
        return [type(value).__name__]
    if isinstance(value, td.TokenLayout):
        return ["meta"]
    shown = [repr(value), type(value).__name__]
    if isinstance(value, dict):
        value = [part for pair in value.items() for part in pair]
    if isinstance(value, list | tuple):
        shown += [repr(tuple(value)), f"found {len(value)} ", *(text for one in value for text in fragments(one))]
    return shown


@pytest.mark.parametrize("key", CATALOGUE)
def test_refused_with_the_value_and_nothing_changes(key, monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENDROP_DEBUG", "1")  # duplicate indices are looked for only then
    monkeypatch.chdir(tmp_path)
    name, _, parameter = key.rpartition(".")
    before = snapshot(BASE)
    for error, bad in [(error, bad) for error, values in CATALOGUE[key] for bad in values]:
        with pytest.raises(error) as caught:
            call(name, GOOD[name] | {parameter: bad})
        assert issubclass(caught.type, td.TokenDropError) or name in ("Role", "Segment")
        assert any(text in str(caught.value) for text in fragments(bad)), str(caught.value)
        assert snapshot(BASE) == before, bad
        call(name, GOOD[name])
    assert snapshot(BASE) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", GOOD)
def test_what_is_right_is_taken(name):
    call(name, GOOD[name])


def test_unsorted_indices_are_right():
    assert td.gather_tokens(torch.arange(4.0).view(1, 4, 1), torch.tensor([[3, 1]])).flatten().tolist() == [3, 1]
