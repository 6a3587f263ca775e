#!/usr/bin/env bash
# Scan, stop for a person if too much is flagged, else train on what was kept.
#
#   examples/pipeline.sh SHARDS TRUSTED RUN TRAIN_COMMAND...
#
# The training command gets the path of a file with one kept shard a line as its last argument.
set -euo pipefail

if (($# < 4)); then
    echo "usage: $0 SHARDS TRUSTED RUN TRAIN_COMMAND..." >&2
    exit 2
fi
shards=$1 trusted=$2 run=${3%/}
shift 3

# Well above alpha: a clean corpus has up to alpha flagged.
code=0
sanitize scan "$shards" --trusted "$trusted" --out "$run" --alpha 0.1 --fail-on 0.2 || code=$?
if ((code == 5)); then
    echo "too much is flagged; look at $run/report.html before training" >&2
fi
if ((code != 0)); then
    exit "$code"
fi

# The list belongs beside the run folder, which sanitize keeps for itself.
list=$run.kept.txt
find "$(realpath "$run")/kept" -type f -name '*.t*' | sort >"$list"
exec "$@" "$list"
