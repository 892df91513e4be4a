"""Whose run a folder holds."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_pdmd.config import (
    CheckpointConfig,
    Config,
    LoggingConfig,
    MethodConfig,
    OptimizerConfig,
    TrainingConfig,
)
from megatron_pdmd.training.run_folders.run_folder import check_run_folder, claim_run_folder, differing_fields


def config(save: Path, load: Path | None = None, **changes) -> Config:
    return replace(Config(checkpoint=CheckpointConfig(save=save, load=load)), **changes)


def test_a_new_folder_an_empty_one_and_the_runs_own_are_accepted(tmp_path):
    ours = config(tmp_path / "run")
    check_run_folder(ours)
    (tmp_path / "run").mkdir()
    check_run_folder(ours)
    claim_run_folder(ours)
    check_run_folder(ours)


@pytest.mark.parametrize(
    "changes",
    [
        {"training": TrainingConfig(train_iters=(2000,), micro_batch_size=4, exit_interval=3)},
        {"logging": LoggingConfig(log_interval=1)},
        {"method": MethodConfig(phase=2)},
    ],
)
def test_how_a_run_is_run_watched_or_prolonged_may_change(tmp_path, changes):
    claim_run_folder(config(tmp_path))
    check_run_folder(config(tmp_path, **changes))


@pytest.mark.parametrize("flag", ["--save", "--load"])
def test_another_configuration_is_refused_and_every_difference_named(tmp_path, flag):
    claim_run_folder(config(tmp_path / "run"))
    changes = {"training": TrainingConfig(seed=7), "method": MethodConfig(num_steps=3, phase_steps=(1, 2))}
    places = (tmp_path / "run", None) if flag == "--save" else (tmp_path / "new", tmp_path / "run")
    with pytest.raises(ValueError) as refused:
        check_run_folder(config(*places, **changes))
    message = str(refused.value)
    assert message.startswith(f"{flag} {tmp_path / 'run'}: holds another run: ") and "\n" not in message
    for words in (
        "--seed is 7 here, 42 there",
        "--num-steps is 3 here, 4 there",
        "--phase-steps is 1,2 here, 2,2 there",
    ):
        assert words in message
    assert message.count(" here, ") == 3


def test_what_is_not_taken_from_a_run_may_differ_from_it(tmp_path):
    claim_run_folder(config(tmp_path / "run"))
    for free, changes in (
        ({"load_optim": False}, {"optimizer": OptimizerConfig(lr=1.0, adam_beta1=0.9)}),
        ({"finetune": True}, {"optimizer": OptimizerConfig(lr=1.0), "training": TrainingConfig(seed=7, bf16=True)}),
    ):
        options = CheckpointConfig(save=tmp_path / "new", load=tmp_path / "run")
        with pytest.raises(ValueError, match=r"--load .*holds another run: --lr is 1\.0 here"):
            check_run_folder(Config(checkpoint=options, **changes))
        check_run_folder(Config(checkpoint=replace(options, **free), **changes))
    with pytest.raises(ValueError, match="--seed is 7 here"):
        options = CheckpointConfig(save=tmp_path / "new", load=tmp_path / "run", load_optim=False)
        check_run_folder(Config(checkpoint=options, training=TrainingConfig(seed=7)))


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"--save .*: not empty and not a run's folder"):
        check_run_folder(config(tmp_path))
    with pytest.raises(ValueError, match=r"--save .*thesis.tex is a file"):
        check_run_folder(config(tmp_path / "thesis.tex"))
    with pytest.raises(ValueError, match=r"--load .*: no run there \(config.yaml is missing\)"):
        check_run_folder(config(tmp_path / "new", tmp_path))
    with pytest.raises(ValueError, match=r"--load .*nowhere: no run there"):
        check_run_folder(config(tmp_path / "new", tmp_path / "nowhere"))


def test_a_damaged_config_of_a_run_is_one_line_that_names_it(tmp_path):
    claim_run_folder(config(tmp_path))
    (tmp_path / "config.yaml").write_text("training: [")
    with pytest.raises(ValueError, match=r"config.yaml: not valid YAML") as refused:
        check_run_folder(config(tmp_path))
    assert "\n" not in str(refused.value)


def test_equal_configurations_do_not_differ(tmp_path):
    assert differing_fields(config(tmp_path), config(tmp_path / "elsewhere")) == []
