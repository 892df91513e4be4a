"""Topologies of one process, and what is refused."""

import dataclasses
import sys

import pytest
import torch
import torch.distributed as dist

from megatron_pdmd.parallel import current_topology, destroy_topology, initialize_topology


@pytest.fixture
def world(monkeypatch):
    """Pretend that torchrun started this many ranks; every layout that is refused is refused before they meet."""

    def start(size):
        monkeypatch.setenv("WORLD_SIZE", str(size))
        monkeypatch.delenv("RANK", raising=False)

    return start


def test_a_process_alone_is_a_world_of_one(topology):
    assert (topology.rank, topology.world_size) == (0, 1)
    assert (topology.tensor, topology.pipeline, topology.context, topology.data) == (1, 1, 1, 1)
    assert (topology.tensor_rank, topology.pipeline_rank, topology.context_rank, topology.data_rank) == (0, 0, 0, 0)
    assert topology.device == (torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    assert topology.groups.dp.size() == topology.groups.tp.size() == 1
    assert current_topology() is topology
    with pytest.raises(dataclasses.FrozenInstanceError):
        topology.tensor = 2


def test_the_same_arguments_give_the_same_topology_and_others_are_refused(topology):
    assert initialize_topology() is topology
    assert initialize_topology(backend=topology.backend) is topology
    with pytest.raises(ValueError, match="destroy_topology"):
        initialize_topology(tensor=2)


def test_it_can_be_made_again_after_it_was_destroyed():
    for _ in range(2):
        initialize_topology()
        destroy_topology()
        assert not dist.is_initialized()
    destroy_topology()
    with pytest.raises(RuntimeError, match="initialize_topology"):
        current_topology()


@pytest.mark.parametrize(
    ("size", "layout", "words"),
    [
        (6, {"tensor": 4}, "--tensor-model-parallel-size 3 or 6, or start 4 or 8 ranks"),
        (8, {"tensor": 2, "context": 3}, "--context-parallel-size 2 or 4, or start 6 or 12 ranks"),
        (
            12,
            {"tensor": 4, "pipeline": 2},
            "--tensor-model-parallel-size 3 or 6, or --pipeline-model-parallel-size 1 or 3",
        ),
        (1, {"context": 2}, "--context-parallel-size 1, or start 2 ranks"),
    ],
)
def test_sizes_that_do_not_divide_the_world_name_those_that_do(world, size, layout, words):
    world(size)
    with pytest.raises(ValueError, match=f"a world of {size} .* use .*{words}"):
        initialize_topology(**layout)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pipeline": 0}, "--pipeline-model-parallel-size is 0"),
        ({"sequence_parallel": True}, "--sequence-parallel .* --tensor-model-parallel-size"),
        ({"backend": "smoke"}, "--distributed-backend smoke .* nccl, gloo, fake"),
    ],
)
def test_what_cannot_work_is_refused_by_flag(arguments, words):
    with pytest.raises(ValueError, match=words):
        initialize_topology(**arguments)
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="nccl works here")
def test_nccl_without_cuda_is_refused():
    with pytest.raises(ValueError, match="nccl needs a CUDA device"):
        initialize_topology(backend="nccl")


def test_a_world_size_without_a_rendezvous_is_refused(world):
    world(2)
    with pytest.raises(ValueError, match="torchrun"):
        initialize_topology()


def test_a_fake_world_has_many_ranks_in_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setenv("RANK", "13")
    topology = initialize_topology(tensor=4, context=2, pipeline=2, sequence_parallel=True, backend="fake")
    try:
        assert topology.data == 4
        assert (topology.tensor_rank, topology.context_rank, topology.data_rank, topology.pipeline_rank) == (1, 1, 1, 0)
    finally:
        destroy_topology()


def test_a_mistake_is_told_without_importing_megatron_core(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(ValueError, match="--tensor-model-parallel-size"):
        initialize_topology(tensor=3)
