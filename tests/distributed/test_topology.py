"""The rank grid over several real ranks."""

import os
import socket

import torch.distributed as dist

from megatron_pdmd.parallel import initialize_topology

WORLD_SIZE = 8


def coordinates(layout):
    topology = initialize_topology(**layout)
    groups = topology.groups
    members = {name: dist.get_process_group_ranks(getattr(groups, name)) for name in ("tp", "cp", "dp", "dp_cp", "pp")}
    return (topology.tensor_rank, topology.context_rank, topology.data_rank, topology.pipeline_rank), members


def test_ranks_are_numbered_tensor_first_then_context_data_pipeline(run_ranks):
    results = run_ranks(coordinates, WORLD_SIZE, {"tensor": 2, "context": 2, "pipeline": 2})
    for rank, ((tensor, context, data, pipeline), members) in enumerate(results):
        assert rank == tensor + 2 * (context + 2 * (data + 1 * pipeline))
        assert members["tp"] == [rank - tensor, rank - tensor + 1]
        assert members["cp"] == [rank - 2 * context, rank - 2 * context + 2]
        assert members["pp"] == [rank - 4 * pipeline, rank - 4 * pipeline + 4]
        assert members["dp"] == [rank]
        assert members["dp_cp"] == members["cp"]


def test_the_rest_of_the_world_is_data_parallel(run_ranks):
    results = run_ranks(coordinates, 4, {"tensor": 2})
    assert [place for place, _ in results] == [(0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 1, 0), (1, 0, 1, 0)]
    assert [members["dp"] for _, members in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_the_environment_of_torchrun_is_enough(run_ranks):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def meet():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        topology = initialize_topology()
        return topology.rank, topology.world_size, topology.data_rank, topology.backend

    assert run_ranks(meet, 2, rendezvous=False) == [(0, 2, 0, "gloo"), (1, 2, 1, "gloo")]
