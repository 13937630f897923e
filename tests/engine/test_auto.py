"""A model that makes its own layouts: the same numbers as with an entered one, however it is called."""

import copy
import inspect
import pickle
from types import MethodType, SimpleNamespace

import pytest
import torch
from helpers import MIXED, batch, checkpointed, llama, perturbed, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, MixtralForCausalLM

import tokendrop as td

IMAGE = 7
METHODS = {
    "context": {"u": td.HiMix(separate="shared"), "g": td.HMGen("1:", "shared")},
    "random": {"u": td.RandomLTD(":", 2), "g": td.Drop("1:", 0.5)},
    "gone": {"u": td.FastV(1, 0.5), "g": None},
}


def with_ids(made):
    """The batch with one id for its image tokens, and no other token of it."""
    made.ids[made.ids == IMAGE] = IMAGE + 1
    made.ids[made.image] = IMAGE
    made.labels = made.ids.masked_fill(made.labels == -100, -100)
    return made


MADE = with_ids(batch(*MIXED))
PROMPT = with_ids(batch(["tiiitt", "ttiitt"], "uu", side="left"))


def vlm(**more):
    model = llama(**more)
    model.config.image_token_id = IMAGE
    return model


def pair(methods, **more):
    """Twins, with a layout of their own and without."""
    own, plain = vlm(), vlm()
    handles = td.apply(own, methods, layout="auto", **more), td.apply(plain, methods, **more)
    return own, plain, *map(perturbed, handles)


def arguments(made=MADE, **more):
    return {"input_ids": made.ids, "attention_mask": made.mask, "labels": made.labels, "use_cache": False, **more}


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def same_gradients(one, other):
    names = [name for name, grad in gradients(other).items() if grad is not None]
    assert names
    assert all(torch.equal(gradients(one)[name], gradients(other)[name]) for name in names)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
def test_like_an_entered_layout_with_the_backward_outside(name, recompute):
    own, plain, _, drop = pair(METHODS[name])
    if recompute:
        checkpointed(own), checkpointed(plain)
    for _ in range(2):  # random selections move on with each
        loss = own(**arguments(task=list(MADE.tasks))).loss
        with drop.layout(MADE.layout()):
            expected = plain(**arguments()).loss
            expected.backward()
        assert torch.equal(loss, expected)
        loss.backward()
    same_gradients(own, plain)


class Around(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def hung(model):
    """A forward hung on the instance, which goes past that of the class as TRL's does."""
    plain = model._tokendrop_base.forward
    model.forward = MethodType(lambda self, *args, **kwargs: plain(self, *args, **kwargs), model)
    return model


WAYS = {
    "inside": lambda model: Around(model),
    "forward": lambda model: model.forward,
    "hung": hung,
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


# Dynamo asks every tensor for its gradient, and torch warns of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("way", WAYS)
def test_however_it_is_called(way):
    torch._dynamo.reset()
    own, plain, _, drop = pair(METHODS["context"])
    run = WAYS[way](own)
    kwargs = arguments(task=list(MADE.tasks))
    del kwargs["input_ids"], kwargs["attention_mask"]
    run(MADE.ids, MADE.mask, **kwargs).loss.backward()
    with drop.layout(MADE.layout()):
        plain(**arguments()).loss.backward()
    for name, grad in gradients(plain).items():
        torch.testing.assert_close(gradients(own)[name], grad, msg=name)
    torch._dynamo.reset()


def test_a_compiled_model_is_one_graph_and_the_making_of_layouts_none():
    torch._dynamo.reset()
    graphs = []
    model = vlm(layers=2)
    td.apply(model, td.HMGen("1:"), layout="auto", multiple=8)
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph)
    for _ in range(3):
        compiled(**arguments(batch(["tiiittttt"], "g")))
    assert len(graphs) == 1
    with td.handle(model).disabled():  # what is entered is traced through
        torch.compile(model, backend="eager", fullgraph=True)(**arguments())
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own question
def test_adapters_around():
    peft = pytest.importorskip("peft")
    own, plain, _, drop = pair(METHODS["random"])
    settings = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    wrapped = []
    for model in (own, plain):
        torch.manual_seed(1)
        wrapped.append(peft.get_peft_model(model, settings))
    loss = wrapped[0](**arguments(task=list(MADE.tasks))).loss
    with drop.layout(MADE.layout()):
        assert torch.equal(loss, wrapped[1](**arguments()).loss)
    found = wrapped[0].generate(**prompt(task="u"))
    with drop.layout(prompt_layout()):
        assert torch.equal(found, wrapped[1].generate(**prompt()))


def prompt(**more):
    limits = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    return {"input_ids": PROMPT.ids, "attention_mask": PROMPT.mask} | limits | more


def prompt_layout():
    return td.TokenLayout.from_ids(PROMPT.ids, IMAGE, "u", attention_mask=PROMPT.mask)


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "uncached"])
@pytest.mark.parametrize("method", [td.HiMix(), td.HMGen("1:", "shared"), td.Drop("1:", 0.5, then="gone")], ids=str)
def test_generate_keeps_the_layout_of_its_prompt(method, more):
    own, plain, mine, drop = pair({"u": method})
    with drop.layout(prompt_layout()):
        expected = plain.generate(**prompt(**more))
    found = own.generate(**prompt(task="u", **more))
    assert torch.equal(found, expected)
    assert mine.entered == 0
    rest = {name: value for name, value in prompt(**more).items() if name != "input_ids"}
    assert torch.equal(own.train().generate(PROMPT.ids, **rest), expected)


def test_what_is_entered_wins():
    own, plain, mine, drop = pair(td.HMGen("1:"))
    image = torch.zeros_like(MADE.image)
    image[:, 1] = True
    with drop.layout(td.TokenLayout(image, labels=MADE.labels)):
        expected = plain(**arguments()).logits
    with mine.layout(td.TokenLayout(image, labels=MADE.labels)):
        assert torch.equal(own(**arguments(task="u")).logits, expected)
    with mine.disabled():
        assert torch.equal(own(**arguments()).logits, vlm()(**arguments()).logits)


def test_a_function_sees_the_arguments_and_none_is_dense():
    seen = []

    def layout(args, kwargs):
        seen.append((args, kwargs))
        return kwargs["which"] and MADE.layout()

    own, plain = vlm(), vlm()
    td.apply(own, METHODS["random"], layout=layout)
    drop = td.apply(plain, METHODS["random"])
    with drop.layout(MADE.layout()):
        expected = plain(MADE.ids, MADE.mask, use_cache=False).logits
    own.forward(MADE.ids, MADE.mask, use_cache=False, which=True)
    mine = own.tokendrop
    mine.entered = 0
    assert torch.equal(own(MADE.ids, MADE.mask, use_cache=False, which=True).logits, expected)
    dense = own(MADE.ids, MADE.mask, use_cache=False, which=None).logits
    assert torch.equal(dense, vlm()(MADE.ids, MADE.mask, use_cache=False).logits)
    assert [len(args) for args, _ in seen] == [2, 2, 2]
    assert set(seen[0][1]) == {"use_cache", "which"}


def test_a_function_sees_the_prompt_by_name():
    seen = []
    own = vlm()
    td.apply(own, td.HiMix(), layout=lambda args, kwargs: seen.append((args, set(kwargs))) or prompt_layout())
    own.generate(PROMPT.ids, max_new_tokens=2)
    assert seen == [((), {"input_ids", "max_new_tokens"})]


class Step(nn.Module):
    """A module of a user, whose forward takes a batch and names the task itself."""

    def __init__(self):
        super().__init__()
        self.model = vlm()

    def forward(self, batch, task=None):
        self.task = task
        return self.model(**batch).loss


def test_a_forward_of_a_batch_that_names_the_task_itself():
    own, plain = Step(), Step()
    td.apply(own, METHODS["gone"], layout="auto")
    with td.apply(plain, METHODS["gone"]).layout(MADE.layout()):
        expected = plain(arguments())
    assert torch.equal(own(arguments(), task=MADE.tasks), expected)
    assert own.task == MADE.tasks
    assert not hasattr(own, "generate")


def test_other_ways_to_say_which_tokens_are_images():
    own, _, mine, _ = pair(td.HiMix())
    own.config.image_token_id = None
    plans = []
    for key, value in {"image_mask": MADE.image, "mm_token_type_ids": MADE.image.long()}.items():
        positions = torch.arange(MADE.ids.shape[1]).expand_as(MADE.ids)
        given = {name: value for name, value in arguments(position_ids=positions).items() if name != "labels"}
        plans.append(own(**given, **{key: value}).logits)
    with mine.layout(td.TokenLayout(MADE.image, padding=MADE.real)):
        expected = own(input_ids=MADE.ids, attention_mask=MADE.mask, use_cache=False).logits
    assert all(torch.equal(found[MADE.real], expected[MADE.real]) for found in plans)


def test_nothing_is_left_and_removing_restores_everything():
    for base in (vlm(), Step()):
        before = snapshot(base)
        drop = td.apply(base, td.HiMix(), layout="auto")
        cls = type(base)
        assert cls.__name__ in ("LlamaForCausalLM", "Step")
        assert cls is not type(base)._tokendrop_base
        drop.remove()
        assert snapshot(base) == before
    fresh = cls()  # of the class that a dropped model had
    assert torch.equal(fresh(arguments()), base(arguments()))


def test_copies_pickles_and_what_follows():
    own, _, _, _ = pair(METHODS["context"])
    expected = own(**arguments(task=MADE.tasks)).loss
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):  # noqa: S301
        assert type(other) is type(own)
        assert torch.equal(other(**arguments(task=MADE.tasks)).loss, expected)
        td.handle(other).remove()
        assert type(other) is type(llama())
        assert torch.equal(own(**arguments(task=MADE.tasks)).loss, expected)


def test_a_model_whose_class_is_swapped_for_its_experts_too():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, num_hidden_layers=2, num_local_experts=2, vocab_size=50, image_token_id=IMAGE)
    own = MixtralForCausalLM(config)
    before, plain = list(map(type, own.modules())), copy.deepcopy(own)
    mine, drop = td.apply(own, td.HMGen("1:"), layout="auto"), td.apply(plain, td.HMGen("1:"))
    with drop.layout(MADE.layout(task=None)):
        expected = plain(**arguments(output_router_logits=True)).loss
    other = pickle.loads(pickle.dumps(own))  # noqa: S301
    for model in (own, other, copy.deepcopy(own)):
        assert torch.equal(model(**arguments(output_router_logits=True)).loss, expected)
        assert "input_ids" in inspect.signature(model.forward).parameters
    mine.remove()
    assert list(map(type, own.modules())) == before


def test_columns_that_a_trainer_keeps():
    own, plain, *_ = pair(td.HiMix())
    names = set(inspect.signature(own.forward).parameters)
    assert names - set(inspect.signature(plain.forward).parameters) == {"task", "image_mask", "segments"}
    assert not hasattr(own.forward, "__wrapped__") or hasattr(plain.forward, "__wrapped__")


REFUSED = {
    "embeddings": ({"inputs_embeds": torch.zeros(1, 4, 32)}, r"with inputs_embeds \(1, 4, 32\), from which"),
    "nothing": ({}, "with no arguments, from which layout='auto'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_says_nothing_of_images(name):
    own, _, mine, _ = pair(td.HMGen("1:"))
    given, message = REFUSED[name]
    with pytest.raises(td.MissingLayoutError, match=message) as caught:
        own(**given)
    assert "drop.layout(layout)" in str(caught.value)
    assert mine.entered == 0
    own(**arguments())


def test_no_config_that_knows_image_ids():
    model = llama()
    td.apply(model, td.HiMix(), layout="auto")
    for run in (model, lambda **kwargs: model.generate(max_new_tokens=1, **kwargs)):
        with pytest.raises(td.MissingLayoutError, match=r"input_ids \(2, 6\).*neither image_ids= nor the model's conf"):
            run(input_ids=PROMPT.ids)


def test_two_candidates():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = vlm()

        def forward(self, chosen, rejected):
            return self.model(**chosen).loss - self.model(**rejected).loss

    model = Pair()
    td.apply(model, td.HiMix(), layout="auto")
    with pytest.raises(td.MissingLayoutError, match="2 batches, 'chosen', 'rejected', which no one layout describes"):
        model(arguments(), arguments())
    model = nn.ModuleDict({"one": vlm(), "other": nn.Module()})
    model["other"].config = SimpleNamespace(image_token_id=3)
    model.forward = None
    del model.forward
    td.apply(model, td.HiMix(), layout="auto")
    with pytest.raises(
        td.MissingLayoutError, match=r"2 models whose configs name different image ids, \(7,\) and \(3,"
    ):
        model(input_ids=MADE.ids)


def test_functions_that_are_wrong():
    model = vlm()
    before = snapshot(model)
    for wrong in ("image", 3, td.TokenLayout, lambda: None, lambda batch: None):
        with pytest.raises(td.MethodError, match="layout: expected"):
            td.apply(model, td.HiMix(), layout=wrong)
        assert snapshot(model) == before
    td.apply(model, td.HiMix(), layout=lambda args, kwargs: kwargs["input_ids"])
    with pytest.raises(td.LayoutTypeError, match=r"to return a TokenLayout, or None to run dense; found Tensor"):
        model(**arguments())


def test_tasks_that_are_wrong():
    own, *_ = pair(METHODS["gone"])
    with pytest.raises(td.LayoutError, match="'u', 'g'; name the task \\(collators drop text\\)"):
        own(**arguments())
    with pytest.raises(
        td.LayoutTypeError, match=r"task: expected a string, or one string for each sample; found tensor"
    ):
        own(**arguments(task=torch.tensor([0, 1, 0, 0, 1])))
    with pytest.warns(td.NoEffectWarning, match="no method for task 'typo'"):
        own(**arguments(task="typo"))


def test_a_layer_that_runs_outside():
    own, *_ = pair(td.HiMix())
    with pytest.raises(
        td.MissingLayoutError, match=r"layout='auto' holds inside the forward and generate of the Llama"
    ):
        own.model(MADE.ids)


def test_a_recompute_of_the_whole_model():
    own, plain, mine, drop = pair(td.RandomLTD(":", 2))
    embeddings = own.get_input_embeddings().weight

    def run(model):
        return checkpoint(lambda: model(**arguments()).loss, use_reentrant=False)

    with pytest.raises(td.UnsupportedError, match=r"a backward recomputes the whole forward of LlamaForCausalLM"):
        run(own).backward()
    embeddings.grad = None
    with mine.layout(MADE.layout(task=None), step=(0, 0)):
        run(own).backward()
    with drop.layout(MADE.layout(task=None), step=(0, 0)):
        plain(**arguments()).loss.backward()
    same_gradients(own, plain)


def test_evaluations_change_no_draw():
    own, _, mine, _ = pair(td.RandomLTD(":", 2))
    own(**arguments())
    with torch.no_grad():
        own(**arguments())
    own.generate(PROMPT.ids, max_new_tokens=1)
    assert mine.entered == 1


class Kept(nn.Module):
    """A module that says what of it is pickled, as Lightning's leave their trainer out."""

    def __init__(self):
        super().__init__()
        self.model, self.trainer = vlm(), lambda: None

    def __getstate__(self):
        return self.__dict__ | {"trainer": None}

    def forward(self, **batch):
        return self.model(**batch).loss


def test_what_a_class_says_of_its_state_holds():
    module = Kept()
    td.apply(module, td.HMGen("1:"), layout="auto")
    other = pickle.loads(pickle.dumps(module))  # noqa: S301
    assert other.trainer is None
    assert torch.equal(other(**arguments()), module(**arguments()))


def test_a_replica_of_data_parallel_is_refused():
    """Which the Hugging Face Trainer makes where a process sees several devices."""
    own, _, _, _ = pair(METHODS["context"])
    with pytest.raises(td.UnsupportedError, match=r"nn.DataParallel runs copies of .* torchrun .* CUDA_VISIBLE_"):
        own._replicate_for_data_parallel()(**arguments(task=MADE.tasks))
