"""How a global batch is dealt to ranks, and how many ranks a launch starts."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_pdmd.arguments import load_recipe
from megatron_pdmd.config import Config, ParallelConfig, TrainingConfig
from megatron_pdmd.training.phase import check_batch, fitting_ranks

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


def config(global_batch: int, micro_batch: int, **layout: int) -> Config:
    training = TrainingConfig(global_batch_size=global_batch, micro_batch_size=micro_batch)
    return Config(training=training, parallel=ParallelConfig(**layout))


@pytest.mark.parametrize(
    ("gpus", "ranks"), [(1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (6, 4), (7, 4), (8, 8), (16, 16), (72, 16)]
)
def test_the_quickstart_runs_on_any_number_of_gpus(gpus, ranks):
    tiny = load_recipe(RECIPES / "tiny_wan.yaml")
    assert fitting_ranks(tiny, gpus) == ranks
    check_batch(tiny, ranks)


def test_ranks_come_in_whole_replicas():
    assert fitting_ranks(config(6, 1, tensor_model_parallel_size=2), 8) == 6
    assert fitting_ranks(config(6, 1, tensor_model_parallel_size=2, context_parallel_size=2), 8) == 8
    assert fitting_ranks(config(6, 1, tensor_model_parallel_size=2), 4, nodes=3) == 4
    assert fitting_ranks(config(6, 1, pipeline_model_parallel_size=2, context_parallel_size=2), 11) == 8
    assert fitting_ranks(config(6, 1, tensor_model_parallel_size=16), 8) == 8, "the ranks' own error says why not"


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "replicas", "mend"),
    [(16, 8, 3, "15 or 18"), (5, 2, 1, "4 or 6"), (2, 1, 4, "4"), (12, 4, 2, "8 or 16"), (64, 1, 24, "48 or 72")],
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(global_batch, micro_batch, replicas, mend):
    refused = config(global_batch, micro_batch)
    with pytest.raises(ValueError, match=f"--global-batch-size {global_batch}: not divisible .*; use {mend}$"):
        check_batch(refused, replicas)
    for size in map(int, mend.split(" or ")):
        check_batch(replace(refused, training=replace(refused.training, global_batch_size=size)), replicas)
