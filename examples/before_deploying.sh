#!/usr/bin/env bash
# Audit a checkpoint: let it pass, or repair it and audit what the repair wrote. Never touches the original.
#
#   examples/before_deploying.sh CHECKPOINT TRUSTED OUT [OPTION...]
#
# OUT is a folder, OPTIONs are those that both commands take, such as --arch torchvision:resnet18. The last line of
# stdout is the checkpoint that no backdoor was found in. Exit code 5: one was found, and what to look at is said.
set -euo pipefail

if (($# < 3)); then
    echo "usage: $0 CHECKPOINT TRUSTED OUT [OPTION...]" >&2
    exit 2
fi
checkpoint=$1 trusted=$2 out=${3%/}
shift 3

audit() {
    sanitize inspect "$1" --trusted "$trusted" --out "$2" --fail-on backdoor "${@:3}"
}

code=0
audit "$checkpoint" "$out/as-it-came" "$@" || code=$?
if ((code == 0)); then
    echo "$checkpoint"
fi
if ((code != 5)); then
    exit "$code"
fi

fixed=$out/repaired-$(basename "$checkpoint")
sanitize repair "$checkpoint" --trusted "$trusted" --out "$fixed" "$@"
if [[ ! -e $fixed ]]; then
    echo "no repair within the allowed loss of accuracy; see $out/as-it-came/report.html" >&2
    exit 5
fi
audit "$fixed" "$out/repaired" "$@" || code=$?
