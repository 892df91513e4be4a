"""Who may import whom, read from the source; see the table in CONTRIBUTING.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND = {"config", "pdmd_kernels"}
GROUND |= {"errors", "files", "limits", "options", "environment"}
MAY_IMPORT = {
    "pdmd_kernels": set(),
    "config": {"options"},
    "errors": {"files", "options"},
    "files": {"limits"},
    "limits": set(),
    "options": {"limits"},
    "environment": {"limits"},
    "launch": {"environment", "errors"},
    "diffusion": {"config", "pdmd_kernels"},
    "parallel": {"config", "errors", "environment"},
    "distillation": {"config", "pdmd_kernels", "diffusion", "parallel"},
    "models": {"config", "pdmd_kernels", "parallel", "files", "limits"},
}
STANDING_ABOVE = {"data", "conversion", "evaluation", "planning"}
BELOW = {*GROUND, "diffusion", "distillation", "models", "parallel"}
MAY_IMPORT |= {name: BELOW | STANDING_ABOVE for name in STANDING_ABOVE}
MAY_IMPORT["arguments"] = {"config", "errors", "files", "limits", "options", "environment"}
MAY_IMPORT["training"] = BELOW | STANDING_ABOVE | {"arguments"}
MAY_IMPORT["preflight"] = MAY_IMPORT["training"] | {"training"}
MAY_IMPORT["pretrain"] = MAY_IMPORT["preflight"] | {"preflight"}
MAY_IMPORT["dry_run"] = MAY_IMPORT["pretrain"] | {"pretrain"}

# Optional packages stay behind one door each.
ONE_FILE_EACH = {
    "transformer_engine": {"megatron_pdmd/models/layers/transformer_engine.py"},
    "apex": {"megatron_pdmd/training/optimizers/optimizer.py"},
    "flash_attn": {"megatron_pdmd/models/layers/flash_attention.py"},
    "transformers": {"megatron_pdmd/data/text_encoder.py"},
    "wandb": {"megatron_pdmd/training/logs/wandb_log.py"},
}


# The one unpickler, of the index of a checkpoint: it knows the index's classes alone.
UNPICKLERS = {"megatron_pdmd/training/checkpoints/torch_dist.py": {"pickle.Unpickler", "pickle.UnpicklingError"}}


def sources() -> list[Path]:
    return sorted([*ROOT.glob("megatron_pdmd/**/*.py"), *ROOT.glob("kernels/pdmd_kernels/**/*.py")])


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(module: str) -> str | None:
    """The project's part that a module belongs to: `megatron_pdmd.models.lora` -> `models`."""
    names = module.split(".")
    if names[0] == "pdmd_kernels":
        return "pdmd_kernels"
    return names[1] if names[0] == "megatron_pdmd" and len(names) > 1 else None


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_what_stands_below(path: Path) -> None:
    relative = path.relative_to(ROOT)
    part = "pdmd_kernels" if relative.parts[0] == "kernels" else relative.with_suffix("").parts[1]
    for module in imported_modules(path):
        other = part_of(module)
        if part == "__init__" or other in (None, part):
            continue
        assert other in MAY_IMPORT[part], f"{relative} imports {module}: {part} may not know {other}"


@pytest.mark.parametrize("package", sorted(ONE_FILE_EACH))
def test_optional_packages_are_imported_in_one_file(package: str) -> None:
    importers = {
        str(path.relative_to(ROOT))
        for path in sources()
        if any(module.split(".")[0] == package for module in imported_modules(path))
    }
    assert importers <= ONE_FILE_EACH[package]


def test_nothing_is_unpickled() -> None:
    for path in [*sources(), *ROOT.glob("tools/*.py"), *ROOT.glob("examples/**/*.py")]:
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        pickles = {m for m in imported_modules(path) if m.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib")}
        assert pickles <= UNPICKLERS.get(str(path.relative_to(ROOT)), set()), path
        assert "load" not in names or "torch.load" not in path.read_text(encoding="utf-8"), path
