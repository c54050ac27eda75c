#!/usr/bin/env bash
# Trains nets with 2-D features for m = 1, 2, 3, 4 over several seeds on the
# CPU and draws the features, as on the front page of the paper: builds and
# gets what is missing, then runs mnist_2d.py, whose options it takes.
helper=myexamples/mnist_2d/mnist_2d.py
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

# shellcheck disable=SC2119  # without options
build_caffe
"$ROOT/myexamples/mnist/create_mnist.sh"
need_plots
one_at_a_time "$ROOT/myexamples/mnist_2d/runs/.lock"
# One thread for each net is faster, also when the features are drawn.
export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}
export RAYON_NUM_THREADS=${RAYON_NUM_THREADS:-1}
say "training on $(mnist_name)"
exec "$PYTHON" "$helper" "$@"
