"""Low-rank adapters through peft: train them in, take them out again."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def with_adapters(net: nn.Module, rank: int, seed: int) -> nn.Module:
    """Put an adapter of this rank on every linear and 2-D convolution layer of `net`, in place; only they are trained.

    They start at zero, so the function is unchanged. scale alpha / rank = 2 (DiffusionNFT). Raises ImportError.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError('lora_rank needs peft, which is not installed: pip install "biorewards[lora]"') from None
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made: nn.Module = inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, lora_dropout=0.0), net
        )
    return made


@torch.no_grad()
def merged_state(net: nn.Module) -> dict[str, Tensor]:
    """State of the plain network: adapters added to the weights that they sit on. Equal to `state_dict` without any."""
    kept: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):
            delta = sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)
            kept[f"{name}.weight"] = module.base_layer.weight + delta
    state = {key.replace(".base_layer.", "."): value for key, value in net.state_dict().items() if ".lora_" not in key}
    return state | kept
