"""Rehearses recipes on GPUs that are not there, with models of which only the configuration is there.

    python tools/dry_run_recipes.py [--recipes examples/recipes/*.yaml] [--ranks 64] [--json FILE]

Each recipe runs as `--dry-run` runs it, with a teacher's folder of its model's published shape and prompts of the right
size made for the purpose. Prints the peak of each and its largest moment; GB are 10^9 bytes.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_pdmd.arguments import from_here, load_recipe
from megatron_pdmd.config import Config
from megatron_pdmd.data.prompts import PromptEmbeddings
from megatron_pdmd.errors import parse_options, user_errors
from megatron_pdmd.files.whole import check_file_destination, write_json
from megatron_pdmd.limits import LIMITS, check_limits, check_range
from megatron_pdmd.models.wan.config import WAN_PRESETS
from megatron_pdmd.planning.skeleton import preset_folder

# Published pipelines with two experts, and the noise level at which they change.
BOUNDARIES = {"wan2.2-t2v-a14b": 0.875, "wan2.2-i2v-a14b": 0.9}
RECIPES = Path(__file__).parents[1] / "examples" / "recipes"


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Rehearses recipes and prints what each holds on a GPU."""

    # Recipes; all of examples/recipes where none is named.
    recipes: tuple[Path, ...] = ()
    # Ranks of the job; the tiny recipe takes as many as its batch divides over.
    ranks: int = 64
    # JSON file for every recipe's report.
    json: Path | None = field(default=None)


def main() -> int:
    with user_errors():
        options = parse_options(RecipeOptions, __doc__.splitlines()[0])
        check_range("--ranks", options.ranks, 1, LIMITS["dry_run"].most)
        if options.json:
            check_file_destination(options.json, "--json")
        recipes = options.recipes or tuple(sorted(RECIPES.glob("*.yaml")))
        configs = {recipe: from_here(load_recipe(recipe), recipe) for recipe in recipes}
        return rehearse(configs, options)


def rehearse(configs: dict[Path, Config], options: RecipeOptions) -> int:
    """Rehearses each recipe in a process of its own; returns 0, or the exit code of the first that ended otherwise."""
    reports = {}
    with tempfile.TemporaryDirectory() as folder:
        for recipe, config in configs.items():
            place = Path(folder) / recipe.stem
            place.mkdir()
            print(f"{recipe.name}: rehearsing", flush=True)
            command = [sys.executable, "-m", "megatron_pdmd.pretrain", *arguments_for(recipe, config, place, options)]
            ended = subprocess.run(command, capture_output=True, text=True)
            if ended.returncode:
                print(f"{recipe}: {ended.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                return ended.returncode
            reports[recipe.name] = json.loads((place / "report.json").read_text())
    Console(width=120).print(table_of(reports))
    if options.json:
        write_json(options.json, reports)
    return 0


def arguments_for(recipe: Path, config: Config, place: Path, options: RecipeOptions) -> list[str]:
    """The flags that rehearse a recipe, its teacher and prompts made in a folder where they are not at hand.

    Raises:
        ValueError: the teacher is neither there nor a model whose shape is known.
    """
    check_limits(config)
    if config.model.teacher is None:
        raise ValueError(f"{recipe}: names no teacher; add 'model: {{teacher: FOLDER}}'")
    layout = config.parallel
    share = layout.tensor_model_parallel_size * layout.context_parallel_size * layout.pipeline_model_parallel_size
    data = min(options.ranks // share, config.training.global_batch_size // config.training.micro_batch_size)
    flags = ["--config", str(recipe), "--dry-run", str(data * share), "--json", str(place / "report.json")]
    if config.model.teacher.is_dir():
        return flags
    name = next((name for name in WAN_PRESETS if config.model.teacher.name.lower().startswith(name)), None)
    if name is None:
        raise ValueError(f"{recipe}: teacher {config.model.teacher} is not there; known are {', '.join(WAN_PRESETS)}")
    model = WAN_PRESETS[name]
    teacher = preset_folder(place / "teacher", model, boundary_ratio=BOUNDARIES.get(name))
    text = torch.zeros(2, config.data.prompt_length, model.text_dim, dtype=torch.bfloat16)
    PromptEmbeddings(("one prompt", "another"), (text,), text[0]).save(place / "prompts")
    return [*flags, "--teacher", str(teacher), "--prompts", str(place / "prompts")]


def table_of(reports: dict[str, dict]) -> Table:
    """Peak bytes of each recipe and the moment that needs most."""
    table = Table(title="GB of tensors on a GPU, rank 0")
    for name in ("recipe", "ranks", "TP x CP x DP x PP", "peak", "in", "seconds"):
        table.add_column(name, justify="left" if name in ("recipe", "in") else "right")
    for recipe, report in reports.items():
        layout = " x ".join(str(report["layout"][axis]) for axis in ("tensor", "context", "data", "pipeline"))
        largest = max(report["moments"], key=lambda moment: moment["peak_bytes"])
        peak = f"{report['peak_bytes'] / 1e9:.1f}"
        table.add_row(recipe, str(report["ranks"]), layout, peak, largest["name"], f"{report['seconds']:.0f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
