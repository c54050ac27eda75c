#!/usr/bin/env bash
# Softmax against large margins on the quick net, each over several seeds:
# builds and gets what is missing, then runs compare_margins.py, whose options
# it takes.
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

# shellcheck disable=SC2119  # without options
build_caffe
"$ROOT/myexamples/mnist/create_mnist.sh"
one_at_a_time "$ROOT/myexamples/mnist/comparison/.lock"
say "training on $(mnist_name)"
"$PYTHON" "$ROOT/myexamples/mnist/compare_margins.py" "$@"
