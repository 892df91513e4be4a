"""The Wan2.1 and Wan2.2 diffusion transformers."""

from megatron_pdmd.models.wan.config import WAN_PRESETS, WanConfig
from megatron_pdmd.models.wan.model import Hidden, WanModel, check_layout

__all__ = ["WAN_PRESETS", "Hidden", "WanConfig", "WanModel", "check_layout"]
