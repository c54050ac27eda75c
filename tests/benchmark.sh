#!/usr/bin/env bash
# Times the layers beside Caffe's own and prints a table. A time limit is no
# test: the exit status says whether it could measure, not what it measured.
#
# Usage: tests/benchmark.sh   ($CAFFE_ROOT is honoured)
# shellcheck source=SCRIPTDIR/../myexamples/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../myexamples/common.sh"

(( ! $# )) || bad_usage "unknown argument $1"
# shellcheck disable=SC2119  # without options
build_caffe
say "timing; leave the machine alone for the next few minutes"
exec "$PYTHON" tests/benchmark/benchmark.py "$CAFFE"
