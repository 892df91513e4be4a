"""Measures samples written by tools/generate.py: five numbers for the moving-digits task.

    python tools/evaluate.py --samples DIR --save FILE.json
    python tools/evaluate.py --samples STUDENT_DIR --reference TEACHER_DIR --save FILE.json

Diversity and Frechet distance are in units of the bundled classifier's features. By default samples are compared with
as many real clips, drawn from handwriting that no training saw; the table's `real` column is another such set, so its
Frechet distance is the noise floor at this number of samples.
"""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_pdmd.errors import parse_options, user_errors
from megatron_pdmd.evaluation.clip_classifier import load_classifier
from megatron_pdmd.evaluation.heldout_digits import load_heldout_digits
from megatron_pdmd.evaluation.moving_digits_report import clip_features, evaluate_clips, real_clips
from megatron_pdmd.evaluation.run_files import all_finite
from megatron_pdmd.evaluation.run_report import evaluation_table
from megatron_pdmd.evaluation.samples import load_samples
from megatron_pdmd.files.whole import check_file_destination, write_json
from megatron_pdmd.limits import check_limits

TINY_WAN = Path(__file__).resolve().parents[1] / "examples" / "tiny_wan"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measures samples against their prompts and against real clips or other samples."""

    samples: Path
    """Folder with samples.safetensors and prompts.txt."""
    save: Path
    """JSON file for the metrics."""
    reference: Path | None = None
    """Another samples folder to compare with instead of real clips."""
    json: Path | None = None
    """JSON file for the printed table: the metrics of samples and reference."""
    classifier: Path = TINY_WAN / "classifier.safetensors"
    """The network that reads clips."""
    digits: Path = TINY_WAN / "heldout_digits.png"
    """The handwriting of real clips."""
    seed: int = 0
    """Draws the real clips."""


def evaluate(options: EvaluateOptions) -> dict[str, dict[str, float | None]]:
    """The metrics of `samples`, and of the `reference` or `real` clips they are compared with.

    Raises:
        ValueError: a file is missing or does not hold what it should.
    """
    clips, prompts = load_samples(options.samples)
    classifier = load_classifier(options.classifier)
    if options.reference is None:
        digits = load_heldout_digits(options.digits)
        against = clip_features(classifier, real_clips(prompts, *digits, seed=options.seed))
        other_real = real_clips(prompts, *digits, seed=options.seed + 1)
        other = {"real": evaluate_clips(other_real, prompts, classifier, against)}
    else:
        reference, reference_prompts = load_samples(options.reference)
        against = clip_features(classifier, reference)
        other = {"reference": evaluate_clips(reference, reference_prompts, classifier, against)}
    return {"samples": evaluate_clips(clips, prompts, classifier, against), **other}


def main(arguments: list[str] | None = None) -> None:
    with user_errors():
        options = parse_options(EvaluateOptions, __doc__, arguments)
        check_limits(options)
        for flag, path in (("--save", options.save), ("--json", options.json)):
            if path is not None:
                check_file_destination(path, flag)
        table = evaluate(options)
        if not all_finite(table):
            raise ValueError(f"{options.samples}: a metric is not finite; are --classifier and samples what they were?")
        others = {name: values for name, values in table.items() if name != "samples"}
        write_json(options.save, {**table["samples"], **others})
        if options.json is not None:
            write_json(options.json, table)
        Console().print(evaluation_table(table, title=str(options.samples)))


if __name__ == "__main__":
    main()
