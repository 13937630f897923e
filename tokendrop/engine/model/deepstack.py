"""Visual features that a decoder adds between its first layers, at full length.

Shape letters: L layers.
"""

from torch import nn

# What transformers calls the method that adds visual features (DeepStack) between two layers of a decoder.
ADDS_FEATURES = "_deepstack_process"


def deepstack_layers(model: nn.Module, layers: nn.ModuleList) -> list[int]:
    """The decoder layers behind which visual features are added at full length, in a way that inspection cannot follow.

    Args:
        model: any module.
        layers: its decoder's.
    """
    decoder = next((one for one in model.modules() if any(child is layers for child in one.children())), None)
    if decoder is None or hasattr(decoder, ADDS_FEATURES):
        return []
    behind: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        vision = getattr(config, "vision_config", None)
        behind.update(range(len(getattr(vision, "deepstack_visual_indexes", None) or ())))
        # Granite 4 Vision's, which are added in front of a layer.
        before = [layer for _, layer in getattr(config, "deepstack_layer_map", None) or ()]
        before += getattr(config, "spatial_target_layers", None) or ()
        behind.update(layer - 1 for layer in before)
    return sorted(index for index in behind if 0 <= index < len(layers) - 1)
