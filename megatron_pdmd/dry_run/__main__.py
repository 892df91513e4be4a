"""`python -m megatron_pdmd.planning.fake_cuda megatron_pdmd.dry_run [flags]`, which `--dry-run` starts."""

import sys

from megatron_pdmd.dry_run.rehearsal import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
