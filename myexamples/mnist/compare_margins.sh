#!/usr/bin/env bash
# Softmax against large margins on the quick net, each over several seeds:
# builds and gets what is missing, then runs compare_margins.py, whose options
# it takes.
helper=myexamples/mnist/compare_margins.py
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

here=$ROOT/myexamples/mnist
# shellcheck disable=SC2119  # without options
build_caffe
"$here/create_mnist.sh"
case " $* " in *' --validation '*) "$here/create_validation.sh" ;; esac
need_plots
"$PYTHON" -c 'import scipy.stats' 2>/dev/null ||
  need_packages "the statistics" python3-scipy
one_at_a_time "$here/comparison/.lock"
say "training on $(mnist_name)"
exec "$PYTHON" "$helper" "$@"
