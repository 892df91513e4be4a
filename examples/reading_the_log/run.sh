#!/usr/bin/env bash
# The runs and figures of docs/reading_the_log.md: a healthy run and two that fail, on the bundled tiny teacher.
#
#   bash examples/reading_the_log/run.sh        about two minutes a run on two idle cores; runs/reading_the_log/
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[ -x .venv/bin/python ] && PATH="$PWD/.venv/bin:$PATH"
RUNS=runs/reading_the_log

COMMON=(--train-iters 15,60 --log-interval 1 --eval-interval 5 --sample-prompts 3 --save-interval 0 --task none --no-export)

bash examples/pretrain_phased_dmd.sh --save $RUNS/healthy "${COMMON[@]}"
bash examples/pretrain_phased_dmd.sh --save $RUNS/fast "${COMMON[@]}" --lr 2e-2
bash examples/pretrain_phased_dmd.sh --save $RUNS/slow "${COMMON[@]}" --fake-updates 1 --fake-lr 2.5e-5

LABELLED=("healthy=$RUNS/healthy" "generator's rate x 10=$RUNS/fast" "fake score too slow=$RUNS/slow")
for figure in evaluations score-gap sheets; do
    python tools/plot_log.py --figure $figure --runs "${LABELLED[@]}" --save "docs/images/log_${figure//-/_}.png"
done
