"""Whatever a file or a command line holds, a program works or refuses it in one line, leaving no trace."""

import tempfile
from dataclasses import Field, fields
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
from fault_judge import judge
from fault_mutations import spoiler, spoilt_flags
from fault_programs import Outcome, run_program
from fault_world import World, built_world
from hypothesis import given
from hypothesis import strategies as st

from megatron_pdmd import preflight, pretrain
from megatron_pdmd.arguments import load_recipe, to_yaml
from megatron_pdmd.config import CommandLine, Config
from megatron_pdmd.evaluation import run_report
from megatron_pdmd.options import option_types

TEACHER = (
    "teacher/model_index.json",
    "teacher/transformer/config.json",
    "teacher/transformer_2/config.json",
    "teacher/scheduler/scheduler_config.json",
    "teacher/transformer/diffusion_pytorch_model.safetensors",
    "teacher/transformer_2/diffusion_pytorch_model.safetensors",
)
ENCODED = ("encoded/prompts.json", "encoded/prompts-00001-of-00001.safetensors")
ENCODER = (
    "prompts.txt",
    "teacher/text_encoder/config.json",
    "teacher/text_encoder/model.safetensors",
    "teacher/tokenizer/tokenizer_config.json",
)
SHARDED = (
    "sharded/transformer/diffusion_pytorch_model.safetensors.index.json",
    "sharded/transformer/diffusion_pytorch_model-00001-of-*.safetensors",
)
CHECKPOINT = (
    "run/config.yaml",
    "run/checkpoints/latest_checkpointed_iteration.txt",
    "run/checkpoints/iter_0000002/metadata.json",
    "run/checkpoints/iter_0000002/.metadata",
    "run/checkpoints/iter_0000002/*.distcp",
)
LORAS = ("loras/lora_files.json", "loras/phase_1_high_noise.safetensors")
SAMPLES = ("samples/samples.safetensors", "samples/prompts.txt")
EXPORT = (
    "run/hf/few_step_sampling.json",
    "run/hf/model_index.json",
    "run/hf/scheduler/scheduler_config.json",
    "run/hf/transformer/config.json",
    "run/hf/transformer/diffusion_pytorch_model.safetensors",
)
FLAGS = ["--" + name.replace("_", "-") for name in option_types(CommandLine)]
SAMPLING = ["--prompts", "encoded", "--save", "out", "--frames", "2", "--height", "4", "--width", "4"]


def config_of(section: Field) -> st.SearchStrategy:
    """A section of the configuration with any values that its types allow."""
    own = {
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.text(st.characters(codec="utf-8")),
        Path: st.text(st.characters(codec="utf-8", exclude_characters="\x00/"), min_size=1, max_size=40).map(Path),
    }
    numbers = {int: st.integers(-(2**70), 2**70), float: own[float]}

    def values(hint: Any) -> st.SearchStrategy:
        if get_origin(hint) is Annotated:
            return st.lists(numbers[get_args(get_args(hint)[0])[0]], min_size=1, max_size=4).map(tuple)
        if get_origin(hint) is UnionType:
            return st.none() | values(get_args(hint)[0])
        return own[hint] if hint in own else st.from_type(hint)

    hints = get_type_hints(section.default_factory, include_extras=True)
    return st.builds(section.default_factory, **{name: values(hint) for name, hint in hints.items()})


def cases(label: str, files: tuple[str, ...]) -> list:
    return [pytest.param(file, id=f"{label}:{file}") for file in files]


def attack(data: st.DataObject, program: ModuleType, file: str, flags: list[str], *, rehearsed: bool = False) -> None:
    """Spoils one file and runs a program on it.

    With `rehearsed` the preflight comes first. What passes there must work, but for numbers that are not finite, for
    which the preflight would have to read all weights.
    """
    with built_world().copy() as world:
        path = next(world.folder.glob(file))
        path.write_bytes(data.draw(spoiler(path.name)(path.read_bytes())))
        passed = rehearsed and judged(world, preflight, flags).code == 0
        if passed or not rehearsed:
            outcome = judged(world, program, flags)
            assert not passed or outcome.code == 0 or "finite" in outcome.err, f"the preflight passed: {outcome}"


def judged(world: World, program: ModuleType, flags: list[str]) -> Outcome:
    before = world.content()
    outcome = run_program(program, flags, world.folder)
    judge(outcome, world, before)
    return outcome


@pytest.mark.parametrize("file", [*cases("teacher", TEACHER), *cases("prompts", ENCODED)])
@given(data=st.data())
def test_training_on_a_spoilt_input(file, data):
    flags = [*built_world().flags(), "--no-export", "--sample-prompts", "0"]
    attack(data, pretrain, file, flags, rehearsed=True)


@pytest.mark.parametrize("file", cases("sharded", SHARDED))
@given(data=st.data())
def test_training_on_spoilt_files_of_a_sharded_teacher(file, data):
    flags = [*built_world().flags(teacher="sharded"), "--no-export", "--sample-prompts", "0"]
    attack(data, pretrain, file, flags, rehearsed=True)


@pytest.mark.parametrize("file", cases("text", ENCODER))
@given(data=st.data())
def test_training_on_spoilt_text(file, data):
    flags = [*built_world().flags(prompts="prompts.txt"), "--no-export", "--sample-prompts", "0"]
    attack(data, pretrain, file, flags)


@given(st.builds(Config, *(config_of(section) for section in fields(Config))))
def test_a_recipe_is_read_as_it_was_written(config):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        assert load_recipe(path) == config


@given(data=st.data())
def test_a_spoilt_recipe(data):
    attack(data, preflight, "recipe.yaml", ["--config", "recipe.yaml", "--save", "new"])


@given(data=st.data())
def test_spoilt_flags(data):
    with built_world().copy() as world:
        flags = data.draw(spoilt_flags(world.flags(), [*FLAGS, "--help-me", "--no-bf16", "-x"]))
        judged(world, preflight, flags)


@pytest.mark.parametrize("file", cases("resume", (*CHECKPOINT, "run/metrics.jsonl")))
@given(data=st.data())
def test_going_on_from_a_spoilt_run(file, data):
    flags = [*built_world().flags(save="run"), "--train-iters", "1,2", "--no-export"]
    attack(data, pretrain, file, flags)


@pytest.mark.parametrize("file", cases("load", CHECKPOINT))
@given(data=st.data())
def test_starting_from_a_spoilt_run(file, data):
    attack(data, pretrain, file, [*built_world().flags(), "--load", "run", "--finetune", "--no-export"])


@pytest.mark.parametrize("file", cases("export", CHECKPOINT))
@given(data=st.data())
def test_exporting_a_spoilt_run(file, data, load_tool):
    attack(data, load_tool("convert_checkpoint"), file, ["export", "--load", "run", "--hf", "out"])


@pytest.mark.parametrize("file", cases("generate", EXPORT))
@given(data=st.data())
def test_sampling_a_spoilt_export(file, data, load_tool):
    attack(data, load_tool("generate"), file, ["--load", "run", *SAMPLING])


@pytest.mark.parametrize("file", cases("loras", LORAS))
@given(data=st.data())
def test_sampling_with_spoilt_loras(file, data, load_tool, loras):
    attack(data, load_tool("generate"), file, ["--lora", "loras", "--hf", "teacher", *SAMPLING])


@given(data=st.data())
def test_sampling_with_spoilt_flags(data, load_tool):
    known = ["--" + name for name in ("seed", "num-steps", "phase-steps", "timestep-shift", "guidance-scale", "frames")]
    known += ["--" + name for name in ("height", "width", "batch-size", "max-length", "dtype", "device", "max-prompts")]
    with built_world().copy() as world:
        flags = data.draw(spoilt_flags(["--load", "run", *SAMPLING], known))
        judged(world, load_tool("generate"), flags)


@pytest.mark.parametrize("file", cases("evaluate", SAMPLES))
@given(data=st.data())
def test_measuring_spoilt_samples(file, data, load_tool):
    attack(data, load_tool("evaluate"), file, ["--samples", "samples", "--save", "metrics.json"])


@pytest.mark.parametrize("file", cases("report", ("run/metrics.jsonl", "run/summary.json")))
@given(data=st.data())
def test_a_report_of_a_spoilt_run(file, data):
    attack(data, run_report, file, ["run"])


@pytest.mark.parametrize(("figure", "log"), [("score-gap", "metrics.jsonl"), ("evaluations", "evaluations.jsonl")])
@given(data=st.data())
def test_a_plot_of_a_spoilt_log(figure, log, data, load_tool):
    attack(data, load_tool("plot_log"), f"run/{log}", ["--figure", figure, "--runs", "run", "--save", "plot.png"])


@pytest.mark.parametrize("file", cases("encode", ENCODER))
@given(data=st.data())
def test_encoding_with_a_spoilt_encoder(file, data, load_tool):
    flags = ["--prompts", "prompts.txt", "--text-encoder", "teacher", "--save", "out"]
    attack(data, load_tool("encode_prompts"), file, flags)


def test_what_is_right_is_accepted(load_tool):
    """The judge can say both: without it nothing above would mean anything."""
    with built_world().copy() as world:
        assert judged(world, preflight, world.flags()).code == 0
        assert judged(world, pretrain, world.flags()).code == 0
        assert judged(world, load_tool("generate"), ["--load", "run", *SAMPLING]).code == 0
        assert judged(world, preflight, world.flags(teacher="nowhere")).code == 2
