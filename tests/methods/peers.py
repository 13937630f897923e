"""The recorded cases of the peers' own code, and the library run on the same inputs.

Shape letters: B batch, T tokens, M image tokens, D hidden.
"""

import json
import re
from functools import lru_cache
from pathlib import Path

import peer_inputs
import torch
import transformers as hf

import tokendrop as td
from tokendrop.engine.forward.state import frames

CASES = {
    one["id"]: one
    for one in json.loads((Path(__file__).parents[1] / "data" / "peers" / "chosen.json").read_text())["cases"]
}
CLOSE = {"rtol": 0, "atol": 2e-5}  # recorded to six digits, in float32


def cases(*begins, without=()):
    """Names of the cases that begin so."""
    return [name for name in CASES if name.startswith(begins) and name not in without]


@lru_cache
def _made(text):
    name, inside = re.fullmatch(r"(\w+)\((.*)\)", text).groups()
    kwargs = {"images" if name == "prompt" else "": int(inside)} if inside.isdigit() else {}
    if inside and not inside.isdigit():
        key, value = inside.split("=")
        kwargs = {key: int(value)}
    args = [kwargs.pop("")] if "" in kwargs else []
    return getattr(peer_inputs, name)(*args, **kwargs)


def made(case, number=0):
    """One of the inputs of a case."""
    return _made(CASES[case]["input"][number])


@lru_cache
def model_of(text):
    """The recorded model."""
    if text == "llava()":
        given = _made(text)
        text_config, vision = hf.LlamaConfig(**given["text"]), hf.CLIPVisionConfig(**given["vision"])
        config = hf.LlavaConfig(text_config=text_config, vision_config=vision, image_token_index=127)
        model = hf.LlavaForConditionalGeneration(config)
    else:
        given = _made(text)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**given["config"], attn_implementation="sdpa"))
    missing = model.load_state_dict(given["state_dict"], strict=False)
    assert not missing.unexpected_keys
    assert all("post_layernorm" in one or "position_ids" in one for one in missing.missing_keys)
    return model.eval()


class Run:
    """A model under a method, inside its layout.

    Args:
        text: which model.
        method: on it.
        layout: of the batch.
    """

    def __init__(self, text, method, layout):
        self.model, self.layout = model_of(text), layout
        self.drop = td.apply(self.model, method)
        self.entered = self.drop.layout(layout)

    def __enter__(self):
        self.entered.__enter__()
        return self

    def __exit__(self, *error):
        self.entered.__exit__(*error)
        self.drop.remove()
        self.model.zero_grad()
        self.model.eval()

    def kept(self, layer, sample=0):
        """Image tokens of a sample that computed in a layer, counted from its first."""
        image = self.layout.image[sample]
        (group,) = frames(self.drop.key)[-1].ran[layer].groups
        if group.active is None:
            return list(range(int(image.sum())))
        rows = group.active.index[sample][group.active.valid[sample]].sort().values
        return (rows[image[rows]] - int(image.int().argmax())).tolist()

    def fed(self, cache, tokens):
        """Logits (V,) after tokens that are fed one by one, and the rows that each layer's cache holds then."""
        for token in tokens:
            out = self.model(torch.tensor([[token]]), past_key_values=cache)
        held = [int(one.valid.sum()) if hasattr(one, "valid") else one.keys.shape[2] for one in cache.layers]
        return out.logits[0, -1], held


def close(found, recorded):
    torch.testing.assert_close(found[: len(recorded)].detach(), torch.tensor(recorded), **CLOSE)
