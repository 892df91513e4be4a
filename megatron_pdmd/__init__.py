"""A Megatron-style training stack for Phased DMD."""

import warnings

# megatron-core tells at every import what it does without; which backend runs is told by the flags that choose it.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
