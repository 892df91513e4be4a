"""The five metrics tell real clips from each way of failing."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from megatron_pdmd.evaluation.clip_classifier import ClipClassifier, load_classifier
from megatron_pdmd.evaluation.moving_digits import all_motions
from megatron_pdmd.evaluation.moving_digits_report import clip_features, evaluate_clips, frechet_noise_floor, real_clips

PROMPTS = [motion.prompt for motion in all_motions()] * 4
KEYS = {"digit_accuracy", "direction_accuracy", "speed_error", "diversity", "frechet_distance"}


@pytest.fixture(scope="module")
def clips(digits) -> torch.Tensor:
    return real_clips(PROMPTS, *digits, seed=0)


@pytest.fixture(scope="module")
def measure(classifier, digits):
    """Clips -> their metrics, against another set of real clips."""
    real_features = clip_features(classifier, real_clips(PROMPTS, *digits, seed=1))
    return lambda clips: evaluate_clips(clips, PROMPTS, classifier, real_features)


@pytest.fixture(scope="module")
def real(measure, clips) -> dict[str, float]:
    return measure(clips)


def test_real_clips_are_read_right(real, classifier, digits):
    assert set(real) == KEYS
    assert real["digit_accuracy"] > 0.9
    assert real["direction_accuracy"] == 1
    assert real["speed_error"] < 0.1
    floor = frechet_noise_floor(PROMPTS, *digits, classifier, seed=2)
    assert 1 / 3 < real["frechet_distance"] / floor < 3, "two draws of the same distance"


def test_clips_that_ignore_their_prompts(measure, clips, real):
    order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(0))
    shuffled = measure(clips[order])
    assert abs(shuffled["digit_accuracy"] - 0.1) < 3 * (0.1 * 0.9 / len(clips)) ** 0.5, "within 3 sigma of chance"
    assert abs(shuffled["direction_accuracy"] - 0.25) < 3 * (0.25 * 0.75 / len(clips)) ** 0.5
    assert shuffled["diversity"] > 2 * real["diversity"]
    assert shuffled["frechet_distance"] == pytest.approx(real["frechet_distance"]), "a set has no order"


def test_frozen_and_reversed_clips(measure, clips, real):
    frozen = measure(clips[:, :, :1].expand_as(clips))
    assert frozen["direction_accuracy"] == 0
    assert frozen["speed_error"] == pytest.approx(1)
    assert frozen["frechet_distance"] > 3 * real["frechet_distance"]
    assert measure(clips.flip(2))["direction_accuracy"] == 0


def test_collapsed_clips(measure, clips, real):
    one_for_each_prompt = clips[:80].repeat(4, 1, 1, 1, 1)
    collapsed = measure(one_for_each_prompt)
    assert collapsed["diversity"] == 0
    assert collapsed["frechet_distance"] > 2 * real["frechet_distance"]


def test_noise_is_far_from_real(measure, clips, real):
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    measured = measure(noise)
    assert measured["frechet_distance"] > 100 * real["frechet_distance"]
    assert measured["direction_accuracy"] < 0.25


def test_values_beyond_the_range_count_as_they_are_shown(measure, clips):
    spread = measure(torch.where(clips.abs() == 1, clips * 3, clips))
    assert spread == measure(clips)


def test_real_clips_follow_the_seed(digits):
    assert torch.equal(real_clips(PROMPTS[:8], *digits, seed=3), real_clips(PROMPTS[:8], *digits, seed=3))
    assert not torch.equal(real_clips(PROMPTS[:8], *digits, seed=3), real_clips(PROMPTS[:8], *digits, seed=4))


def test_batches_do_not_change_features(classifier, clips):
    whole = clip_features(classifier, clips)
    torch.testing.assert_close(whole[250:], clip_features(classifier, clips[250:]))
    assert whole.shape == (len(clips), classifier.clip_features.out_features)


def test_a_prompt_each_has_no_diversity(classifier, clips):
    measured = evaluate_clips(clips[:80], PROMPTS[:80], classifier, clip_features(classifier, clips))
    assert set(measured) == KEYS
    assert measured["diversity"] is None


@pytest.mark.parametrize(
    ("samples", "prompts", "message"),
    [
        (torch.zeros(2, 3, 5, 16, 16), PROMPTS[:2], "not clips of moving digits"),
        (torch.zeros(2, 1, 5, 16, 16), PROMPTS[:3], "as many prompts"),
        (torch.full((2, 1, 5, 16, 16), torch.nan), PROMPTS[:2], "2 of 2 samples hold NaN"),
        (torch.zeros(1, 1, 5, 16, 16), ["a cat"], "'a cat' is not a prompt"),
    ],
)
def test_clips_that_cannot_be_measured(samples, prompts, message):
    with pytest.raises(ValueError, match=message):
        evaluate_clips(samples, prompts, ClipClassifier(), torch.zeros(2, 64))


def test_classifier_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_classifier(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("nothing")
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        load_classifier(tmp_path / "text.safetensors")
    save_file({"digit.bias": torch.zeros(10)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        load_classifier(tmp_path / "other.safetensors")
    state = ClipClassifier().state_dict()
    for value, words in ((torch.full((10,), torch.nan), "not finite"), (torch.zeros(10).long(), "expected floating")):
        save_file(state | {"digit.bias": value}, tmp_path / "spoilt.safetensors")
        with pytest.raises(ValueError, match=f"spoilt.safetensors: tensor 'digit.bias' .*{words}"):
            load_classifier(tmp_path / "spoilt.safetensors")


def test_a_classifier_on_another_device_measures_clips_of_the_cpu(other_device, clips, real, classifier, digits):
    """A stand-in for a GPU, with a GPU's refusal of tensors that lie elsewhere."""
    with other_device.OtherDevice(), torch.no_grad():
        moved = copy.deepcopy(classifier).to(other_device.DEVICE)
        real_features = clip_features(moved, real_clips(PROMPTS, *digits, seed=1))
        assert real_features.device == other_device.DEVICE
        with pytest.raises(RuntimeError, match="same device"):
            moved(clips)
        assert evaluate_clips(clips, PROMPTS, moved, real_features) == real
        assert evaluate_clips(clips.to(other_device.DEVICE), PROMPTS, moved, real_features.cpu()) == real
