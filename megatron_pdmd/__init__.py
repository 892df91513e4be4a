"""A Megatron-style training stack for Phased DMD."""

import warnings

# megatron-core tells at every import what it does without, and of a default of its own that it deprecates.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
warnings.filterwarnings("ignore", message="full scope is deprecated")
