"""What the peers' own published code did on given inputs, recorded in tests/data/peers with its source.

A difference that remains is the peer's own, and its test says which. Shape letters: B batch, T tokens.
"""

import pytest
import torch
from peers import CASES, CLOSE, Run, cases, close, made
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import tokendrop as td
from tokendrop.engine.forward.state import frames
from tokendrop.engine.plan.selection import highest
from tokendrop.methods import drop as drop_method
from tokendrop.roles import LayerRoute, Role, Select


def method_of(name):
    settings = CASES[name]["settings"]
    positions = "renumber" if "renumbered" in CASES[name]["condition"] else "keep"
    if name.startswith("fastv"):
        return td.FastV(settings["k"], 1 - settings["r"])
    if name.startswith("hidrop"):
        return td.HiDrop(settings["entry"], settings["layers"], settings["keep"], settings["exit"])
    kind = td.PyramidDrop if name.startswith("pyramiddrop") else td.DuetVLM
    return kind(settings["layers"], settings["keep"], positions=positions)


def stages(name):
    return CASES[name]["settings"].get("layers") or [CASES[name]["settings"]["k"]]


DECODER = cases(
    "fastv",
    "pyramiddrop",
    "hidrop",
    "duet-text",
    without=("fastv-batch2-as-shipped", "pyramiddrop-gqa", "hidrop-topk-ties"),
)


@pytest.mark.parametrize("name", DECODER)
def test_stages_of_the_decoder(name):
    case, given = CASES[name], made(name, 1)
    trains, only = "train" in name, slice(int(name[-1]), None) if "alone" in name else slice(None)
    rows = slice(0, None if trains else given["length"])
    image, states = given["image"][only, rows][:1], given["embeddings"][only, rows][:1]
    labels = given["labels"][:1] if trains else None
    with torch.no_grad(), Run(case["input"][0], method_of(name), td.TokenLayout(image, labels=labels)) as run:
        run.model.train(trains)
        out = run.model(inputs_embeds=states, labels=labels, use_cache=not trains)
        assert [run.kept(layer) for layer in stages(name)] == case["kept"]
        if trains:
            close(out.logits[0, given["length"] - 1], case["logits_last_prompt_row"])
            torch.testing.assert_close(out.loss, torch.tensor(case["loss"]), **CLOSE)
        elif "tokens" in case:
            logits, held = run.fed(out.past_key_values, case["tokens"])
            close(logits, case["logits_after_them"])
            assert set(held) == set(case["cache_length_by_layer"])
        else:
            close(out.logits[0, -1], case["logits_last_row"])


def test_fastv_ranks_each_sample_by_itself(monkeypatch):
    """In a batch the peer uses sample 0's ranking for all; with that one line it is equal."""
    name = "fastv-batch2-as-shipped"
    case, given = CASES[name], made(name, 1)
    rows, own = slice(0, given["length"]), drop_method.SCORES["attention"]
    for score, same in ((own, False), (lambda scoring: own(scoring)[:1].expand(2, -1), True)):
        monkeypatch.setitem(drop_method.SCORES, "attention", score)
        with torch.no_grad(), Run("llama(4)", method_of(name), td.TokenLayout(given["image"][:, rows])) as run:
            logits = run.model(inputs_embeds=given["embeddings"][:, rows], use_cache=False).logits
            assert run.kept(2) == case["kept"][0]
            assert (run.kept(2, 1) == case["kept"][0]) is same
        close(logits[0, -1], case["logits_last_row_0"])
        found = logits[1, -1, :8]
        assert torch.allclose(found, torch.tensor(case["logits_last_row_1"]), **CLOSE) is same


def test_pyramid_drop_with_grouped_heads():
    """The peer fails there."""
    assert "RuntimeError" in CASES["pyramiddrop-gqa"]["fails"]
    given = made("pyramiddrop-gqa", 1)
    rows, method = slice(0, given["length"]), method_of("pyramiddrop-shipped")
    with torch.no_grad(), Run("llama(2)", method, td.TokenLayout(given["image"][:, rows])) as run:
        run.model(inputs_embeds=given["embeddings"][:, rows], use_cache=False)
        assert [len(run.kept(layer)) for layer in (8, 16, 24)] == [288, 144, 72]


def test_hidrop_keeps_the_asked_count_with_ties():
    """The peer keeps all whose share of scores not above their own exceeds 1 - k / M, so all of a tie."""
    case, scores = CASES["hidrop-topk-ties"], torch.arange(144.0).repeat_interleave(4)
    every = torch.ones(1, 576, dtype=torch.bool)
    for k, theirs in zip(case["settings"]["k"], case["counts"], strict=True):
        share = (scores[None] <= scores[:, None]).double().mean(1)
        assert int((share > 1 - k / 576).sum()) == theirs
        assert int(highest(scores[None], every, torch.tensor([k])).sum()) == k
        assert int(highest(torch.rand(1, 576), every, torch.tensor([k])).sum()) == k
    assert case["settings"]["k"] == case["counts_without_ties"]


def test_vscan_for_qwen_ranks_without_rotation():
    """The peer does not rotate queries and keys in its ranking; where nothing is rotated, it is ours."""
    case, given = CASES["vscan-qwen-text"], made("vscan-qwen-text")
    config = {"hidden_size": 64, "intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=8, num_hidden_layers=1, rms_norm_eps=1e-6, **config)).eval()
    layer = model.model.layers[0]
    names = {"q_weight": "q_proj.weight", "q_bias": "q_proj.bias", "k_weight": "k_proj.weight", "k_bias": "k_proj.bias"}
    layer.self_attn.load_state_dict({there: given[name] for name, there in names.items()}, strict=False)
    layer.input_layernorm.weight.data = given["norm"]
    image, rows = torch.zeros(1, 665, dtype=torch.bool), slice(given["start"], given["start"] + given["images"])
    image[:, rows] = True
    drop, found = td.apply(model, td.PyramidDrop((0,), case["settings"]["image_token_ratio_list"])), []
    for at in (torch.zeros(1, 665, dtype=torch.long), torch.arange(665)[None]):
        with torch.no_grad(), drop.layout(td.TokenLayout(image)):
            more = {"position_ids": at, "attention_mask": torch.ones(1, 665), "use_cache": True}
            cache = model(inputs_embeds=given["states"], **more).past_key_values.layers[0]
        kept = cache.positions[0][cache.valid[0]]
        found.append(sorted((kept[image[0, kept]] - given["start"]).tolist()))
    assert [len(one) for one in found] == [199, 199]
    assert found[0] == case["kept"][0] != found[1]


@pytest.mark.parametrize("name", cases("himix"))
def test_himix(name):
    """The peer takes the image apart, so here it comes first; as shipped its keys are not rotated: at position 0."""
    case, given = CASES[name], made(name, 1)
    at = torch.cat([torch.arange(given["start"], given["start"] + given["images"]), torch.arange(given["start"])])
    order = torch.cat([at, torch.arange(given["start"] + given["images"], given["length"])])
    images = torch.zeros(given["images"]).long() if "shipped" in name else torch.arange(given["images"])
    text = torch.arange(65) + (0 if "shipped" in name else given["images"])
    with torch.no_grad(), Run(case["input"][0], td.HiMix(), td.TokenLayout(given["image"][:1, order])) as run:
        more = {"position_ids": torch.cat([images, text])[None], "attention_mask": torch.ones(1, 641)}
        logits = run.model(inputs_embeds=given["embeddings"][:1, order], use_cache=False, **more).logits[0]
    close(logits[given["images"]], case["logits_first_text_row"])
    close(logits[-1], case["logits_last_row"])


@pytest.mark.parametrize("name", cases("random-ltd-schedule"))
def test_the_schedule_of_random_ltd(name):
    """One line, which ours rounds up to a whole token, and the peer down to a multiple of `seq_per_step`."""
    case, settings = CASES[name], CASES[name]["settings"]
    least, most, unit = settings["min_value"], settings["max_value"], settings["seq_per_step"]
    schedule, method = td.Schedule(steps=settings["require_steps"], direction="out"), td.RandomLTD(keep=least)

    def line(step):
        return least + (most - least) * min(1, step / settings["require_steps"])

    for step in range(101):
        kept = method.route(3, schedule.strength(step))[1].select.count(most)
        assert -1e-6 < kept - line(step) < 1
    theirs = [int(line(step) + 1e-9) // unit * unit for step in range(101)]
    assert {step: theirs[int(step)] for step in case["kept_length_at_step"]} == case["kept_length_at_step"]
    assert [t for t in range(1, 101) if theirs[t] != theirs[t - 1]] == case["steps_at_which_it_changes"]


class Given:
    """Rows of each inner layer that are given."""

    separate = "none"

    def __init__(self, rows, renumber):
        self.rows, self.renumber = rows, renumber

    def route(self, num_layers, strength=1.0):
        def score(scoring):
            found = torch.zeros(scoring.image.shape)
            found[:, self.rows[scoring.layer - 1]] = 1.0
            return found

        inner = [
            LayerRoute(Role.BYPASS, select=Select(288, score, layer), renumber=self.renumber)
            for layer in range(1, num_layers - 1)
        ]
        return (LayerRoute(), *inner, LayerRoute())


@pytest.mark.parametrize("name", cases("random-ltd-gathered", "random-ltd-first"))
def test_the_layers_of_random_ltd(name):
    """With the positions of the chosen rows, as the library; and with 0 to 364, as layers that count their own rows."""
    case, given = CASES[name], made(name, 1)
    states = given["embeddings"].clone().requires_grad_()
    layout = td.TokenLayout(given["image"], labels=given["labels"])
    with Run("llama(4)", Given(made(name, 2), name.endswith("first")), layout) as run:
        run.model.train()
        out = run.model(inputs_embeds=states, labels=given["labels"], use_cache=False)
        out.loss.backward()
        grads = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    close(out.logits[0, given["length"] - 1], case["logits_last_prompt_row"])
    torch.testing.assert_close(out.loss.detach(), torch.tensor(case["loss"]), **CLOSE)
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    assert norm.item() == pytest.approx(case["gradient_norm"], rel=1e-5)
    assert states.grad.norm().item() == pytest.approx(case["gradient_norm_of_embeddings"], rel=1e-5)
    query = grads["model.layers.15.self_attn.q_proj.weight"].flatten()[:8]
    torch.testing.assert_close(query, torch.tensor(case["gradient_of_layer_15_q_proj"]), rtol=1e-4, atol=1e-7)


def test_random_ltd_as_it_is():
    """Around layers of transformers 5 the peer fails; the library runs there, above."""
    assert "RuntimeError" in CASES["random-ltd-as-is"]["fails"]


def layer_1(name):
    """A Llama whose one layer is layer 1 of the recorded one."""
    given = made(name)
    model = LlamaForCausalLM(LlamaConfig(**given["config"] | {"num_hidden_layers": 1})).eval()
    start, state = "model.layers.1.", given["state_dict"]
    model.model.layers[0].load_state_dict({n.removeprefix(start): w for n, w in state.items() if n.startswith(start)})
    return model


def routed(name, keep):
    """Layer 1 alone under Mixture-of-Depths: the rows, r, x, the layer's own output of these, and ours of all."""
    given, model = made(name, 1), layer_1(name)
    layout = td.TokenLayout(torch.ones(1, 200, dtype=torch.bool))
    drop, seen = td.apply(model, td.MixtureOfDepths(":", keep)), []
    drop.layers[0]["router"].weight.data = given["router"][None]
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad(), drop.layout(layout):
        model(inputs_embeds=given["states"], use_cache=False)
        (group,) = frames(drop.key)[-1].ran[0].groups
    hook.remove()
    drop.remove()
    x, r = given["states"][0], given["states"][0] @ given["router"]
    rows = group.active.index[0][group.active.valid[0]].sort().values
    return rows, r, x, x[rows] + (seen[0][rows] - x[rows]) / r[rows, None], seen[0]


def rows_and_sums(out, rows, case, tolerance=2e-5):
    torch.testing.assert_close(out[rows[0]][:8], torch.tensor(case["output_first_chosen_row"]), rtol=0, atol=tolerance)
    torch.testing.assert_close(out[rows[-1]][:8], torch.tensor(case["output_last_chosen_row"]), rtol=0, atol=tolerance)
    assert out.sum().item() == pytest.approx(case["output_sum"], abs=2e-3)
    assert out.square().sum().item() == pytest.approx(case["output_square_sum"], rel=1e-5)


def test_mixture_of_depths_is_the_equation():
    case = CASES["mod-paper"]
    rows, _, _, _, out = routed("mod-paper", case["settings"]["capacity"])
    assert rows.tolist() == case["kept"][0]
    rows_and_sums(out, rows, case)


def test_two_repositories_of_mixture_of_depths_differ_from_the_equation():
    """astramind keeps only scores above the k-th and scales the residual too; kyegomez weighs by softmax."""
    case = CASES["mod-astramind"]
    rows, r, x, through, _ = routed("mod-astramind", 25)
    above = r[rows] > r[rows].min()
    assert rows[above].tolist() == case["kept"][0]
    # Attention among 24 rows is another than among 25, so the layer runs on theirs.
    rows, r, x, through, _ = routed("mod-astramind", 24)
    rows_and_sums(x.index_copy(0, rows, r[rows, None] * through), rows, case)
    case = CASES["mod-kyegomez"]
    rows, r, x, through, _ = routed("mod-kyegomez", case["settings"]["capacity"])
    assert rows.tolist() == case["kept"][0]
    weighed = x[rows] + r[rows].softmax(0)[:, None] * through
    rows_and_sums(x.index_copy(0, rows, weighed), rows, case)
