"""Timers by level: on the CPU by the clock, on a GPU between events that are read without waiting."""

import time

import pytest
import torch

from megatron_pdmd.training.logs.timers import Timers

CPU = torch.device("cpu")


def test_spans_add_up_by_name_and_may_lie_inside_each_other():
    timers = Timers(2, CPU)
    for _ in range(2):
        with timers("update", 1):
            with timers("pass", 2):
                time.sleep(0.002)
            time.sleep(0.002)
    taken = timers.take()
    assert list(taken) == ["pass", "update"]
    assert taken["pass"] >= 4 and taken["update"] >= taken["pass"] + 4
    assert timers.take() == {}


@pytest.mark.parametrize(("level", "names"), [(0, []), (1, ["update"]), (2, ["pass", "update"])])
def test_a_span_above_the_level_is_not_measured(level, names):
    timers = Timers(level, CPU)
    with timers("update", 1), timers("pass", 2):
        pass
    assert list(timers.take()) == names


def test_a_span_that_is_off_costs_microseconds_at_most():
    """0.1 us when measured; ten microseconds are for a busy machine, and a pass takes milliseconds."""
    timers, started = Timers(0, CPU), time.perf_counter()
    for _ in range(100_000):
        with timers("pass", 2):
            pass
    assert time.perf_counter() - started < 1


class RecordedEvent:
    """A CUDA event of a GPU that works off a queue: its time is known once the GPU has come to it."""

    reached = 0  # events that the GPU has come to
    recorded = 0
    waits = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        type(self).recorded += 1
        self.position = self.recorded

    def query(self):
        return self.position <= self.reached

    def synchronize(self):
        cls = type(self)
        cls.waits += 1
        cls.reached = max(cls.reached, self.position)

    def elapsed_time(self, end):
        assert self.query() and end.query(), "read before the GPU came to it"
        return float(10 * (end.position - self.position))


@pytest.fixture
def gpu(monkeypatch):
    """The double's class, in the place of torch's."""
    for name in ("record", "query", "synchronize", "elapsed_time"):
        assert callable(getattr(torch.cuda.Event, name))
    event = type("Event", (RecordedEvent,), {})
    monkeypatch.setattr(torch.cuda, "Event", event)
    return event


def test_on_a_gpu_nothing_waits_until_an_entry_is_due(gpu):
    timers = Timers(2, torch.device("cuda", 0))
    for _ in range(2):
        with timers("update", 1):  # events 1 and 4, 5 and 8
            with timers("pass", 2):  # 2 and 3, 6 and 7
                pass
            gpu.reached = 3
            timers.collect()
    assert gpu.waits == 0
    assert timers.take() == {"pass": 20.0, "update": 60.0}
    assert gpu.waits == 1
    assert timers.take() == {} and gpu.waits == 1


def test_events_that_the_gpu_has_come_to_are_freed(gpu):
    timers = Timers(1, torch.device("cuda", 0))
    for reached in (2, 3):
        with timers("update", 1):
            pass
        gpu.reached = reached
        timers.collect()
    assert len(timers._pending) == 1 and gpu.waits == 0


def test_a_gpu_sees_no_event_when_timers_are_off(gpu):
    timers = Timers(0, torch.device("cuda", 0))
    with timers("update", 1):
        pass
    timers.collect()
    assert timers.take() == {} and gpu.recorded == 0 and gpu.waits == 0
