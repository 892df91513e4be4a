"""How the work is split over ranks: process groups, data parallelism, and megatron-core without CUDA."""

from megatron_pdmd.parallel.agreement import together
from megatron_pdmd.parallel.cpu import without_cuda
from megatron_pdmd.parallel.data_parallel import (
    data_parallel,
    finish_gradient_sync,
    finish_param_gather,
    no_sync,
    release_data_parallel,
    start_param_gather,
)
from megatron_pdmd.parallel.patience import patient_group
from megatron_pdmd.parallel.topology import Topology, current_topology, destroy_topology, initialize_topology

__all__ = [
    "Topology",
    "current_topology",
    "data_parallel",
    "destroy_topology",
    "finish_gradient_sync",
    "finish_param_gather",
    "initialize_topology",
    "no_sync",
    "patient_group",
    "release_data_parallel",
    "start_param_gather",
    "together",
    "without_cuda",
]
