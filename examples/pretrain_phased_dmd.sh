#!/usr/bin/env bash
''':'
# Phased DMD in Megatron's style. Without flags it is the quickstart: the bundled tiny teacher, on CPU.
#
#   bash examples/pretrain_phased_dmd.sh [flags]                 checks the input, then starts the ranks of this machine
#   torchrun [options] examples/pretrain_phased_dmd.sh [flags]   the same file, run once per rank (Python, at the end);
#                                                                with --no-python each rank comes through here
#
# Flags win over the recipe; --config FILE, or RECIPE, chooses another one. It may be called from any folder: relative
# paths are taken from where you stand, but for those in the project's own recipes, which are the project's. How many
# ranks there are and where they meet: see megatron_pdmd/launch.py. The environment is the one that is activated, else the
# project's .venv.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -z "${VIRTUAL_ENV:-}" ] && [ -x "$ROOT/.venv/bin/python" ] && PATH="$ROOT/.venv/bin:$PATH"

TRAINING_ARGS=(--config "${RECIPE:-$ROOT/examples/recipes/tiny_wan.yaml}" "$@")

# A rank that torchrun --no-python started: the job is launched already.
if [ -n "${TORCHELASTIC_RUN_ID:-}" ]; then
    exec python -m megatron_pdmd.pretrain "${TRAINING_ARGS[@]}"
fi
exec python -m megatron_pdmd.launch "${TRAINING_ARGS[@]}"
'''

import sys
from pathlib import Path

from megatron_pdmd.pretrain import main

if __name__ == "__main__":
    recipe = Path(__file__).parent / "recipes" / "tiny_wan.yaml"
    sys.exit(main(["--config", str(recipe), *sys.argv[1:]]))
