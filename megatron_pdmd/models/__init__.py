"""The diffusion transformers, their adapters, and their way in from Hugging Face folders."""

from megatron_pdmd.models.conditions import Conditions
from megatron_pdmd.models.loading import from_hf, to_hf_state_dict
from megatron_pdmd.models.lora import (
    AdapterConfig,
    adapter_parameters,
    adapter_state_dict,
    add_adapter,
    base_parameters,
    load_adapter_state_dict,
    merged_state_dict,
    remove_adapter,
)
from megatron_pdmd.models.wan import WAN_PRESETS, Hidden, WanConfig, WanModel

__all__ = [
    "WAN_PRESETS",
    "AdapterConfig",
    "Conditions",
    "Hidden",
    "WanConfig",
    "WanModel",
    "adapter_parameters",
    "adapter_state_dict",
    "add_adapter",
    "base_parameters",
    "from_hf",
    "load_adapter_state_dict",
    "merged_state_dict",
    "remove_adapter",
    "to_hf_state_dict",
]
