"""Iterations as the method makes them, and as nobody would, for the tests of a pipeline's graph and schedules."""

from hypothesis import strategies as st

from megatron_pdmd.parallel.pipeline.passes import ModelPass, Outline

NETWORKS = ("teacher", "fake_score", "generator")


def fake_update(rollout: int = 2) -> Outline:
    """An update of the fake score after a rollout of so many steps."""
    steps = tuple((ModelPass("generator"),) for _ in range(rollout))
    return Outline("fake update", (*steps, (ModelPass("fake_score", gradient=True),)), "fake_score")


def generator_update(rollout: int = 1, chain: int = 1) -> Outline:
    """The generator's update: steps without gradient, a chain of steps with it, then all scores together."""
    steps = [(ModelPass("generator"),)] * rollout
    learning = [(ModelPass("generator", True, latent_gradient=place > 0),) for place in range(chain)]
    scores = (ModelPass("teacher"), ModelPass("teacher"), ModelPass("fake_score"))
    return Outline("generator update", (*steps, *learning, scores), "generator")


def iteration(fake_updates: int = 5, rollout: int = 2) -> list[Outline]:
    """Fake updates and then one of the generator."""
    return [fake_update(rollout)] * fake_updates + [generator_update(rollout - 1)]


@st.composite
def outlines(draw: st.DrawFn) -> list[Outline]:
    """An iteration of one to four programs with any groups of passes, chains, networks and starts."""
    programs: list[Outline] = []
    for position in range(draw(st.integers(1, 4))):
        trains = draw(st.sampled_from((None, *NETWORKS)))
        groups = draw(st.lists(st.lists(st.sampled_from(NETWORKS), min_size=1, max_size=3), max_size=3))
        passes = [[ModelPass(network) for network in group] for group in groups]
        if trains is not None:
            chain = [[ModelPass(trains, True, place > 0)] for place in range(draw(st.integers(1, 2)))]
            where = draw(st.integers(0, len(passes)))
            passes = passes[:where] + chain + passes[where:]
        starts = [None, *(place for place, one in enumerate(programs) if one.trains is None)]
        start = draw(st.sampled_from(starts))
        programs.append(Outline(f"program {position}", tuple(map(tuple, passes)), trains, start))
    return programs
