#!/usr/bin/env bash
''':'
# Phased DMD in Megatron's style. Without flags it is the quickstart: the bundled tiny teacher, on CPU.
#
#   bash examples/pretrain_phased_dmd.sh [flags]                 checks the input, then launches torchrun itself
#   torchrun [options] examples/pretrain_phased_dmd.sh [flags]   the same file, run once per rank (Python, at the end);
#                                                                with --no-python each rank comes through here
#
# Flags win over the recipe; --config FILE chooses another one. Paths are taken from the project's root. The environment
# is the one that is activated, else the project's .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/torchrun ] && PATH="$PWD/.venv/bin:$PATH"

GPUS=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
NUM_NODES=${NUM_NODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29500}
RECIPE=${RECIPE:-examples/recipes/tiny_wan.yaml}

TRAINING_ARGS=(--config "$RECIPE" "$@")

# A rank that torchrun --no-python started: the job is launched already.
if [ -n "${TORCHELASTIC_RUN_ID:-}" ]; then
    exec python examples/pretrain_phased_dmd.sh "${TRAINING_ARGS[@]}"
fi

# Questions are answered by one process.
case " $* " in
    *" --help "* | *" -h "* | *" --print-config "*) exec python -m megatron_pdmd.preflight "${TRAINING_ARGS[@]}" ;;
    *" --dry-run "* | *" --dry-run="*) exec python -m megatron_pdmd.pretrain "${TRAINING_ARGS[@]}" ;;
esac

# Bad input ends here, in one process, with one line and exit code 2. Where RANKS_PER_NODE is not given it also answers
# how many ranks the batch divides over: on three GPUs two.
ASKED=()
[ -n "${RANKS_PER_NODE:-}" ] || ASKED=(--available-ranks $((GPUS > 0 ? GPUS : 2)) --nodes "$NUM_NODES")
FITTING=$(python -m megatron_pdmd.preflight ${ASKED[@]+"${ASKED[@]}"} "${TRAINING_ARGS[@]}")
RANKS_PER_NODE=${RANKS_PER_NODE:-$FITTING}

DISTRIBUTED_ARGS=(--nproc-per-node "$RANKS_PER_NODE" --nnodes "$NUM_NODES")
if [ "$NUM_NODES" -gt 1 ]; then
    DISTRIBUTED_ARGS+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
else
    DISTRIBUTED_ARGS+=(--standalone)
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Seconds that torchrun leaves a rank after SIGTERM, to finish what it is at and save. Its default of 30 is less than a
# large model needs for either.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-1800}
exec torchrun "${DISTRIBUTED_ARGS[@]}" examples/pretrain_phased_dmd.sh "${TRAINING_ARGS[@]}"
'''

import sys
from pathlib import Path

from megatron_pdmd.pretrain import main

if __name__ == "__main__":
    recipe = Path(__file__).parent / "recipes" / "tiny_wan.yaml"
    sys.exit(main(["--config", str(recipe), *sys.argv[1:]]))
