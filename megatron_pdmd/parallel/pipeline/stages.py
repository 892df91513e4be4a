"""Which layers of a model stand on which pipeline stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Stage:
    """One stage's part of a model. The first also embeds, the last also has the head.

    Attributes:
        index, count: this stage, and how many there are.
        layers: the layers that stand here.
    """

    index: int
    count: int
    layers: range

    @property
    def is_first(self) -> bool:
        """Whether latents enter here."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the flow appears here."""
        return self.index == self.count - 1

    @classmethod
    def of(cls, index: int, split: Sequence[int]) -> "Stage":
        """A stage of a model whose stages have so many layers each."""
        ends = [0, *accumulate(split)]
        return cls(index, len(split), range(ends[index], ends[index + 1]))


def layer_split(layers: int, stages: int, asked: Sequence[int] = ()) -> tuple[int, ...]:
    """How many layers each stage has.

    Args:
        layers: of the model.
        stages: `--pipeline-model-parallel-size`.
        asked: `--pipeline-layer-split`; where empty, an even split in which the embeddings and the head count as a
            layer each.

    Raises:
        ValueError: more stages than layers, or a split that does not add up; names the flag.
    """
    if stages > layers:
        raise ValueError(
            f"--pipeline-model-parallel-size {stages}: the model has {layers} layers and a stage needs one; "
            f"use {layers} or fewer"
        )
    if asked:
        told = ",".join(map(str, asked))
        if len(asked) != stages:
            raise ValueError(
                f"--pipeline-layer-split {told}: names {len(asked)} stages, --pipeline-model-parallel-size is {stages}"
            )
        if sum(asked) != layers or min(asked) < 1:
            raise ValueError(
                f"--pipeline-layer-split {told}: adds up to {sum(asked)}, the model has {layers} layers; "
                "give each stage one at least, and all of them together"
            )
        return tuple(asked)
    if stages == 1:
        return (layers,)
    return _even(layers, stages)


def _even(layers: int, stages: int) -> tuple[int, ...]:
    """Layers dealt out so that no stage has more than it must; of the rest, stages in the middle take one first."""
    split = [1] * stages
    load = [1 + (stage in (0, stages - 1)) for stage in range(stages)]
    for _ in range(layers - stages):
        inner = sorted(range(stages), key=lambda stage: (load[stage], abs(2 * stage - stages + 1)))
        split[inner[0]] += 1
        load[inner[0]] += 1
    return tuple(split)
