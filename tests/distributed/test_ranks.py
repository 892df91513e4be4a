"""The harness itself: results by rank, and failures that neither hang nor go unnoticed."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist


def test_returns_each_ranks_result_and_ranks_really_communicate(run_ranks):
    def sum_of_ranks():
        total = torch.tensor(dist.get_rank() + 1)
        dist.all_reduce(total)
        return dist.get_rank(), total.item()

    assert run_ranks(sum_of_ranks, 3) == [(0, 6), (1, 6), (2, 6)]


def test_ranks_can_run_backward_after_the_parent_did(run_ranks):
    weight = torch.ones(3, requires_grad=True)
    weight.sum().backward()

    def gradient():
        leaf = torch.ones(3, requires_grad=True)
        (2 * leaf).sum().backward()
        return leaf.grad.tolist()

    assert run_ranks(gradient, 2) == [[2.0] * 3] * 2


def test_a_rank_that_raises_takes_down_those_that_wait_for_it(run_ranks, tmp_path):
    def fail_on_last():
        rank = dist.get_rank()
        (tmp_path / str(rank)).write_text(str(os.getpid()))
        dist.barrier()
        if rank == 2:
            raise KeyError("a reason to look for")
        time.sleep(50)

    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 2 failed:(.|\n)*fail_on_last(.|\n)*a reason to look for"):
        run_ranks(fail_on_last, 3, timeout=40)
    assert time.monotonic() - start < 20
    for rank in range(3):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)


def test_the_first_failure_is_reported_not_the_ones_it_causes(run_ranks):
    def fail_then_collective():
        if dist.get_rank() == 1:
            raise KeyError("the cause")
        dist.barrier()

    with pytest.raises(RuntimeError, match=r"rank 1 failed:(.|\n)*the cause"):
        run_ranks(fail_then_collective, 2)


def test_a_ranks_own_processes_end_with_it(run_ranks):
    def spawn() -> int:
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
        child.start()
        return child.pid

    for pid in run_ranks(spawn, 2):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_killed_rank_and_a_hanging_rank_are_failures(run_ranks):
    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="exit code -9"):
        run_ranks(die, 2)
    with pytest.raises(RuntimeError, match=r"did not finish in 0\.5 s"):
        run_ranks(time.sleep, 2, 30, timeout=0.5)
