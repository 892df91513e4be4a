"""The rank grid over several real ranks."""

import os
import socket
import time

import torch.distributed as dist

from megatron_pdmd.parallel import destroy_topology, initialize_topology, patient_group

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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_environment_of_torchrun_is_enough(run_ranks):
    port = free_port()

    def meet():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        topology = initialize_topology()
        return topology.rank, topology.world_size, topology.data_rank, topology.backend

    assert run_ranks(meet, 2, rendezvous=False) == [(0, 2, 0, "gloo"), (1, 2, 1, "gloo")]


def test_the_patient_group_waits_longer_than_the_others_and_goes_with_its_topology(run_ranks):
    """Rank 1 is late by twice the time after which the other groups give up."""
    port, seconds = free_port(), 1.0

    def rank():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        assert patient_group() is None
        initialize_topology(tensor=2, timeout_minutes=seconds / 60)
        group = patient_group()
        assert patient_group() is group
        time.sleep(2 * seconds * dist.get_rank())
        dist.barrier(group)
        described = dist.get_process_group_ranks(group), dist.get_backend(group)
        destroy_topology()
        assert patient_group() is None
        return described

    assert run_ranks(rank, 2, rendezvous=False) == [([0, 1], "gloo")] * 2
