#!/usr/bin/env bash
# Let a checkpoint pass in which no backdoor is found; of any other write a repaired copy, for a person to decide on.
#
#   examples/before_deploying.sh CHECKPOINT TRUSTED OUT [OPTION...]
#
# OUT is a folder. Options are those that both commands take, such as --arch torchvision:resnet18. Exit code 0: no
# class stands out, which does not prove the model clean; 5: one does, or there is no verdict. The repaired copy is not
# inspected again: a repair unlearns what `inspect` looks for, so that passing would say little about what is left.
set -euo pipefail

if (($# < 3)); then
    echo "usage: $0 CHECKPOINT TRUSTED OUT [OPTION...]" >&2
    exit 2
fi
checkpoint=$1 trusted=$2 out=${3%/}
shift 3

code=0
sanitize inspect "$checkpoint" --trusted "$trusted" --out "$out" --fail-on backdoor "$@" || code=$?
if ((code == 5)); then
    echo "do not deploy $checkpoint: look at $out/report.html, and at what the repair says it cost" >&2
    fixed=$out/repaired-$(basename "$checkpoint")
    sanitize repair "$checkpoint" --trusted "$trusted" --out "$fixed" "$@" || echo "the repair failed" >&2
fi
exit "$code"
