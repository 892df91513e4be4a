"""How the work is split over ranks: process groups, data parallelism, and megatron-core without CUDA."""

from megatron_pdmd.parallel.cpu import without_cuda
from megatron_pdmd.parallel.data_parallel import data_parallel, finish_gradient_sync, no_sync, release_data_parallel
from megatron_pdmd.parallel.topology import Topology, current_topology, destroy_topology, initialize_topology

__all__ = [
    "Topology",
    "current_topology",
    "data_parallel",
    "destroy_topology",
    "finish_gradient_sync",
    "initialize_topology",
    "no_sync",
    "release_data_parallel",
    "without_cuda",
]
