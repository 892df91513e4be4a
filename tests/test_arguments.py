"""Flags and recipes: what is read, what wins, and what is refused in one line that names it."""

import dataclasses
import math
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from megatron_pdmd.arguments import load_recipe, parse_arguments, to_yaml
from megatron_pdmd.config import (
    CommandLine,
    Config,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from megatron_pdmd.limits import LIMITS

RECIPES = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.yaml"))
NEEDED = ["--teacher", "models/wan", "--prompts", "prompts.txt"]


def refusal(arguments: list[str]) -> str:
    with pytest.raises(ValueError) as refused:
        parse_arguments(arguments)
    message = str(refused.value)
    assert "\n" not in message and not set(message) & set("│╭╮╰╯─")
    return message


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_without_flags_the_defaults_stand():
    config, launch = parse_arguments(NEEDED)
    assert config == Config(model=ModelConfig(Path("models/wan")), data=DataConfig(Path("prompts.txt")))
    assert not launch.print_config


def test_flags_reach_their_fields_in_any_spelling():
    numbers = ["--micro_batch_size", "2", "--global-batch-size=8", "--phase-steps", "1,3", "--guidance-scale=1,4.5"]
    others = ["--bf16", "--no-export", "--lr", "1e-3", "--negative-prompt", "", "--fake-experts", "single"]
    config, _ = parse_arguments([*NEEDED, *numbers, *others])
    assert (config.training.micro_batch_size, config.training.global_batch_size) == (2, 8)
    assert config.method.phase_steps == (1, 3) and config.method.guidance_scale == (1.0, 4.5)
    assert config.training.bf16 and not config.checkpoint.export
    assert config.optimizer.lr == 1e-3 and config.method.fake_experts == "single"


def test_the_last_flag_wins():
    config, _ = parse_arguments([*NEEDED, "--seed", "1", "--seed", "2"])
    assert config.training.seed == 2


def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults(tmp_path):
    recipe = write(tmp_path / "a.yaml", "training: {seed: 5, micro_batch_size: 4}\nmethod:\n  phase_steps: [1, 3]\n")
    for arguments in (["--config", str(recipe), "--seed", "6"], ["--seed", "6", f"--config={recipe}"]):
        config, _ = parse_arguments([*NEEDED, *arguments])
        assert (config.training.seed, config.training.micro_batch_size) == (6, 4)
        assert config.method.phase_steps == (1, 3) and config.training.global_batch_size == 64


def test_print_config_is_recognised_and_prints_what_can_be_read_back(tmp_path):
    config, launch = parse_arguments([*NEEDED, "--print-config", "--train-iters", "3,4"])
    assert launch.print_config
    assert load_recipe(write(tmp_path / "a.yaml", to_yaml(config))) == config


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_project_are_valid_and_make_the_round_trip(recipe, tmp_path):
    config, _ = parse_arguments(["--config", str(recipe), *NEEDED])
    assert load_recipe(write(tmp_path / "a.yaml", to_yaml(config))) == config


def test_the_round_trip_keeps_every_field(tmp_path):
    """Each field set to something else than its default."""

    def changed(value):
        if dataclasses.is_dataclass(value):
            return dataclasses.replace(
                value, **{f.name: changed(getattr(value, f.name)) for f in dataclasses.fields(value)}
            )
        other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v / 3 + 1e-7, tuple: lambda v: (*v, 1)}
        return other.get(type(value), lambda v: v)(value)

    config = changed(Config())
    assert config != Config()
    config = dataclasses.replace(config, data=DataConfig(Path("a b/ü: #.txt"), negative_prompt="no: 'x' # yes\n- ü"))
    assert load_recipe(write(tmp_path / "a.yaml", to_yaml(config))) == config
    assert yaml.safe_load(to_yaml(config))["data"]["prompts"] == "a b/ü: #.txt"


def test_recipes_take_numbers_as_people_write_them(tmp_path):
    text = "optimizer: {lr: 5e-5, fake_lr: 1}\ntraining: {train_iters: 30, seed: 7.0}\nmethod: {phase_steps: '1,3'}\n"
    config = load_recipe(write(tmp_path / "a.yaml", text))
    assert config.optimizer == OptimizerConfig(lr=5e-5, fake_lr=1.0)
    assert config.training == TrainingConfig(train_iters=(30,), seed=7)
    assert config.method == MethodConfig(phase_steps=(1, 3))


def test_whole_numbers_are_exact_and_decimal(tmp_path):
    for text, seed in (("9007199254740993", 2**53 + 1), ("+5", 5), ("'7'", 7), ("-0", 0), ("010", 10), ("'010'", 10)):
        recipe = write(tmp_path / "a.yaml", f"training: {{seed: {text}}}\n")
        assert load_recipe(recipe).training.seed == seed
        assert parse_arguments([*NEEDED, f"--seed={text.strip(chr(39))}"])[0].training.seed == seed


def test_an_empty_recipe_is_the_defaults(tmp_path):
    assert load_recipe(write(tmp_path / "a.yaml", "")) == Config()


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [("--micro-batchsize", "--micro-batch-size"), ("--guidance", "--guidance-scale"), ("--no-exprt", "--no-export")],
)
def test_an_unknown_flag_is_refused_with_the_nearest_known_one(flag, nearest):
    assert refusal([*NEEDED, flag, "1"]) == f"unknown flag '{flag}'; did you mean '{nearest}'?"


def test_a_flag_like_none_points_to_the_help():
    assert refusal([*NEEDED, "--zzzzzzzz=3"]) == "unknown flag '--zzzzzzzz'; see --help"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training: {micro_batchsize: 1}", "training: unknown key 'micro_batchsize'; did you mean 'micro_batch_size'?"),
        ("trainig: {seed: 1}", "unknown key 'trainig'; did you mean 'training'?"),
        ("training: 3", "training: expected keys below it, got 3"),
        ("- training", "expected sections such as 'training:', got list"),
        ("training: {seed: many}", "training: seed: expected a whole number, got 'many'"),
        ("training: {seed: 1.5}", "training: seed: expected a whole number, got 1.5"),
        ("training: {seed: .inf}", "training: seed: expected a whole number, got inf"),
        ("training: {seed: true}", "training: seed: expected a whole number, got True"),
        ("training: {seed: null}", "training: seed: expected a whole number, got null"),
        ("training: {bf16: 1}", "training: bf16: expected true or false, got 1"),
        ("optimizer: {lr: fast}", "optimizer: lr: expected a finite number, got 'fast'"),
        ("optimizer: {lr: false}", "optimizer: lr: expected a finite number, got False"),
        ("data: {negative_prompt: no}", "data: negative_prompt: expected a text, got False"),
        ("model: {teacher: 3}", "model: teacher: expected a path, its names of up to 255 bytes, got 3"),
        ("method: {phase_steps: [1, x]}", "method: phase_steps: expected a whole number, got 'x'"),
        ("method: {generator: half}", "method: generator: 'half' is not one of lora, full"),
        ("method: {guidance_scale: .nan}", "method: guidance_scale: expected a finite number, got nan"),
        ("method: {guidance_scale: [1, .inf]}", "method: guidance_scale: expected a finite number, got inf"),
        ("optimizer: {lr: 1.0e+999}", "optimizer: lr: expected a finite number, got inf"),
        ("training: {seed: 0x10}", "training: seed: expected a whole number, got '0x10'"),
        ("training: {seed: 1_000}", "training: seed: expected a whole number, got '1_000'"),
        ("training: {seed: 1:30}", "training: seed: expected a whole number, got '1:30'"),
        ("training: {seed: 9007199254740993.0}", "training: seed: expected a whole number"),
        ("training: {seed: ٣}", "training: seed: expected a whole number"),
        ("training:", "training: expected keys below it, got nothing"),
        ("7: {seed: 1}", "unknown key '7'"),
        ("data: {negative_prompt: null}", "data: negative_prompt: expected a text, got null"),
        ("data: {negative_prompt: 5}", "data: negative_prompt: expected a text, got 5"),
        ('data: {negative_prompt: "\\ud800"}', "data: negative_prompt: expected a text"),
        ('checkpoint: {save: "a\\0b"}', "checkpoint: save: expected a path"),
        ("checkpoint: {save: null}", "checkpoint: save: expected a path, its names of up to 255 bytes, got null"),
        ("method: {phase_steps: null}", "method: phase_steps: expected a whole number, got null"),
        ("method: {generator: null}", "method: generator: null is not one of lora, full"),
        ("logging: {timing_log_level: true}", "logging: timing_log_level: True is not one of 0, 1, 2"),
        ("training: {bf16: 'true'}", "training: bf16: expected true or false, got 'true'"),
        ("training: {seed: 1, seed: 2}", "'seed' is given twice"),
        ("training: &a {seed: 1}\nmethod: *a", "alias '*a'"),
        ("training: [", "not valid YAML"),
        ("training: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_bad_recipe_is_refused_by_file_and_key(text, words, tmp_path):
    recipe = write(tmp_path / "bad.yaml", text)
    message = refusal([*NEEDED, "--config", str(recipe)])
    assert str(recipe) in message and words in message


def test_a_recipe_that_cannot_be_read_is_refused(tmp_path):
    assert "no such file" in refusal(["--config", str(tmp_path / "none.yaml")])
    assert "not a file" in refusal(["--config", str(tmp_path)])
    (tmp_path / "latin.yaml").write_bytes("data: {negative_prompt: ü}".encode("latin-1"))
    assert "latin.yaml: is not UTF-8" in refusal(["--config", str(tmp_path / "latin.yaml")])
    assert refusal(["--config"]) == "--config: name a YAML file"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", "many"], ["--seed", "many"]),
        (["--seed"], ["--seed"]),
        (["--phase-steps", "1,,2"], ["--phase-steps: expected a whole number, got ''"]),
        (["--guidance-scale", "a"], ["--guidance-scale"]),
        (["--generator", "half"], ["--generator", "half"]),
        (["--bf16", "yes"], ["yes"]),
        (["stray"], ["stray"]),
        (["--bf16=true"], ["--bf16 takes no value"]),
        (["--seed="], ["--seed: expected a whole number, got ''"]),
        (["--seed", "--bf16"], ["Missing value for argument '--seed'"]),
        (["--seed", "1_000"], ["--seed", "'1_000'"]),
        (["--seed", " 5"], ["--seed", "' 5'"]),
        (["--seed", "٣"], ["--seed", "'٣'"]),
        (["--seed", "9" * 5000], ["--seed: expected a whole number, got '999", "..."]),
        (["--lr", "1e999"], ["--lr: expected a finite number, got '1e999'"]),
        (["--guidance-scale", "nan"], ["--guidance-scale: expected a finite number, got 'nan'"]),
        (["--guidance-scale", "1,-inf"], ["--guidance-scale: expected a finite number, got '-inf'"]),
        (["--save", ""], ["--save: expected a path, its names of up to 255 bytes, got ''"]),
        (["--save", "\udcff"], ["--save: expected a path"]),
        (["--timing-log-level", "01"], ["--timing-log-level: '01' is not one of 0, 1, 2"]),
        (["--config="], ["--config: name a YAML file"]),
        (["-x"], ["-x"]),
        (["--"], ["unknown flag '--'"]),
        (["@file"], ["@file"]),
    ],
)
def test_a_bad_value_is_refused_by_its_flag(arguments, words):
    message = refusal([*NEEDED, *arguments])
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-steps", "5"], "--phase-steps 2,2: 2 positive numbers must add up to --num-steps 5"),
        (["--phase-steps", "4,0"], "--phase-steps 4,0: each must lie in [1, 1000]"),
        (["--phase", "3"], "--phase 3: --phase-steps names 2 phases"),
        (["--phase", "-1"], "--phase -1: must lie in [0, 1000]"),
        (["--train-iters", "1,2,3"], "--train-iters"),
        (["--train-iters", "0"], "--train-iters"),
        (["--guidance-scale", "1,2,3"], "--guidance-scale"),
        (["--ema-decay", "1"], "--ema-decay 1.0: must lie in [0, 1)"),
        (["--generator", "full", "--bf16", "--ema-decay", "0.9"], "--ema-decay with --generator full and --bf16"),
        (["--fixed-timestep", "1"], "--fixed-timestep 1.0"),
        (["--timestep-margin", "0.5"], "--timestep-margin 0.5: must lie in [0, 0.5)"),
        (["--adam-beta1", "1"], "--adam-beta1"),
        (["--lr", "0"], "--lr 0.0: must lie in (0, 10]"),
        (["--lr", "nan"], "--lr: expected a finite number, got 'nan'"),
        (["--fake-lr", "inf"], "--fake-lr: expected a finite number, got 'inf'"),
        (["--weight-decay", "-0.1"], "--weight-decay -0.1: must lie in [0, 100]"),
        (["--micro-batch-size", "0"], "--micro-batch-size 0"),
        (["--teacher-steps", "0"], "--teacher-steps 0"),
        (["--clips", "0"], "--clips 0"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--sample-interval", "-5"], "--sample-interval -5"),
        (["--seed", "-1"], "--seed -1"),
        (["--task", "moving_digits"], "--task moving_digits: --task-folder"),
        (["--overlap-param-gather"], "--overlap-param-gather: only --use-distributed-optimizer gathers weights"),
        (["--finetune"], "--finetune: says what to take from --load, which is not given"),
        (["--no-load-optim"], "--no-load-optim: says what to take from --load, which is not given"),
        (["--clip-grad", "-1"], "--clip-grad -1.0: must lie in [0, 1000000000000]"),
        (["--min-lr", "1"], "--min-lr 1.0: must lie between 0 and --lr 5e-05"),
        (["--fake-min-lr", "-1"], "--fake-min-lr -1.0: must lie in [0, 1]"),
        (["--fake-lr-warmup-init", "1e-6"], "--fake-lr-warmup-init 1e-06: must lie between 0 and --fake-lr 4e-07"),
        (["--lr-warmup-init", "nan"], "--lr-warmup-init: expected a finite number, got 'nan'"),
        (["--lr-warmup-iters", "-2"], "--lr-warmup-iters -2: must lie in [0, 10000000]"),
        (["--fake-lr-decay-iters", "-2"], "--fake-lr-decay-iters -2: must lie in [0, 10000000]"),
        (["--lr-warmup-iters", "1000"], "--lr-warmup-iters 1000: must be less than a phase's --train-iters 1000"),
        (
            ["--fake-lr-warmup-iters", "9", "--fake-lr-decay-iters", "9"],
            "--fake-lr-warmup-iters 9: must be less than --fake-lr-decay-iters 9",
        ),
        (
            ["--fake-warmup", "3", "--fake-lr-warmup-iters", "9"],
            "--fake-lr-warmup-iters 9: the rate of the first iteration, with all updates of --fake-warmup, would be 0",
        ),
        (["--lr-decay-style", "step"], "--lr-decay-style"),
        (["--lr", "1e38"], "--lr 1e+38: must lie in (0, 10]"),
        (["--guidance-scale", "1,-1"], "--guidance-scale 1.0,-1.0: each must lie in [0, 100]"),
        (["--num-steps", "1000000000"], "--num-steps 1000000000: must lie in [1, 1000]"),
        (["--train-iters", "1000000000"], "--train-iters 1000000000: must lie in [1, 10000000]"),
        (["--seed", str(2**63)], f"--seed {2**63}: must lie in [0, {2**63 - 1}]"),
        (["--dry-run", str(10**12)], f"--dry-run {10**12}: must lie in [0, 16384]"),
        (["--phase-steps", ",".join(["1"] * 10**6)], "...: 1000000 positive numbers must add up to --num-steps 4"),
        (["--timing-log-level", "3"], "--timing-log-level"),
        (["--pipeline-schedule", "1f1b"], "--pipeline-schedule"),
        (["--pipeline-model-parallel-size", "0"], "--pipeline-model-parallel-size 0: must lie in [1, 4096]"),
        (["--pipeline-layer-split", "2,0"], "--pipeline-layer-split 2,0: each must lie in [1, 4096]"),
        (["--pipeline-layer-split", ""], "--pipeline-layer-split: expected a whole number, got ''"),
        (["--pipeline-live-microbatches", "-1"], "--pipeline-live-microbatches -1: must lie in [0, 1048576]"),
        (["--wandb-exp-name", "a"], "--wandb-exp-name a: nothing goes to wandb without --wandb-project"),
        (["--wandb-save-dir", "a"], "--wandb-save-dir a: nothing goes to wandb without --wandb-project"),
        (["--distributed-timeout-minutes", "0"], "--distributed-timeout-minutes 0.0: must lie in (0, 10080]"),
    ],
)
def test_what_cannot_work_is_refused_by_its_flag(arguments, words):
    assert words in refusal([*NEEDED, *arguments])


def test_every_number_has_its_limits():
    numbers = [
        field.name
        for section in get_type_hints(CommandLine).values()
        for field in dataclasses.fields(section)
        if get_type_hints(section)[field.name] in (int, float, tuple[int, ...], tuple[float, ...])
    ]
    assert len(numbers) > 50 and set(numbers) == set(LIMITS)
    assert all(limits.most < math.inf for limits in LIMITS.values())


def test_numbers_at_their_limits_are_taken_and_all_beyond_are_refused():
    for name, limits in LIMITS.items():
        flag = f"--{name.replace('_', '-')}"
        for beyond in (limits.least - 1, limits.most + 1):
            assert refusal([*NEEDED, flag, str(beyond)]).startswith(f"{flag} {beyond}")


def test_paths_of_the_projects_recipes_are_the_projects_from_anywhere(tmp_path, monkeypatch):
    recipe = RECIPES[0].parent / "tiny_wan.yaml"
    monkeypatch.chdir(RECIPES[0].parents[2])
    config, _ = parse_arguments(["--config", str(recipe)])
    assert (config.model.teacher, config.checkpoint.save) == (Path("examples/tiny_wan"), Path("runs/quickstart"))
    monkeypatch.chdir(tmp_path)
    config, _ = parse_arguments(["--config", str(recipe), "--save", "runs/x"])
    assert config.model.teacher == RECIPES[0].parents[1] / "tiny_wan"
    assert config.checkpoint.save == Path("runs/x")
    own = write(tmp_path / "own.yaml", "model: {teacher: models/wan}\ndata: {prompts: prompts.txt}\n")
    assert parse_arguments(["--config", str(own)])[0].model.teacher == Path("models/wan")


def test_teacher_and_prompts_are_needed():
    assert refusal([]).startswith("--teacher: name")
    assert refusal(NEEDED[:2]).startswith("--prompts: name")


def test_help_lists_every_flag_and_exits_with_zero(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    fields = [field.name for section in dataclasses.fields(Config) for field in dataclasses.fields(section.type)]
    assert len(fields) == len(set(fields)), "two sections share a flag"
    assert all(f"--{name.replace('_', '-')}" in shown for name in fields)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dry-run", "-1"], r"--dry-run -1: must lie in \[0, 16384\]"),
        (["--dry-run", "4", "--dry-run-rank", "4"], r"--dry-run-rank 4: must lie in \[0, 4\)"),
        (["--dry-run-rank", "1"], "--dry-run-rank: belongs to --dry-run"),
        (["--json", "report.json"], "--json: belongs to --dry-run"),
    ],
)
def test_refuses_a_dry_run_that_cannot_be(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments([*NEEDED, *flags])


def test_help_names_the_recipe_and_what_a_launch_can_do(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--config", "--print-config", "--dry-run", "--dry-run-rank", "--json"))
