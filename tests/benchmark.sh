#!/usr/bin/env bash
# Times the layers beside Caffe's own and prints a table. A time limit is no
# test: the exit status says whether it could measure, not what it measured.
set -euo pipefail
unset CDPATH

case ${1:-} in
  '') ;;
  *)
    echo "Usage: tests/benchmark.sh   (\$CAFFE_ROOT is honoured)" >&2
    [[ $1 == -h || $1 == --help ]] || exit 2
    exit 0 ;;
esac

# shellcheck source=SCRIPTDIR/../myexamples/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../myexamples/common.sh"

# shellcheck disable=SC2119  # without options
build_caffe
say "timing; leave the machine alone for the next few minutes"
exec "$PYTHON" tests/benchmark/benchmark.py "$CAFFE"
