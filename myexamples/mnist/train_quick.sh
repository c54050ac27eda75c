#!/usr/bin/env bash
# From nothing to a trained large-margin softmax on real images, on the CPU:
# builds Caffe, gets the images, trains a small net for some minutes.
#
# Usage: myexamples/mnist/train_quick.sh
#
# May be stopped (Ctrl-C) and run again: it goes on where it was. Ends with the
# test accuracy, a plot and the model, all in myexamples/mnist/quick_snapshot.
# $CAFFE_ROOT names a Caffe to use instead of build/caffe.
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

[ $# -eq 0 ] || bad_usage "unknown argument $1"
here=$ROOT/myexamples/mnist
solver=$here/quick_solver.prototxt
out=$here/quick_snapshot
iterations=$(sed -n 's/^max_iter: *//p' "$solver")
model=${out}/quick_iter_$iterations.caffemodel

# shellcheck disable=SC2119  # without options
build_caffe
"$here/create_mnist.sh"
need_plots
dataset=$(mnist_name)

# An earlier version did not note which images a net was trained on.
on_these_images() {
  local had
  had=$(cat "$out/dataset.txt" 2>/dev/null) || return 0
  [ "$had" = "$dataset" ] ||
    die "$(rel "$out") was trained on $had: move it away to train on $dataset"
}

one_at_a_time "$out/.lock"
if came_to_end "$out/train.log" && is_whole "$model"; then
  on_these_images
  say "the net is trained already; to train it anew, $(move_away "$out")"
else
  state=$(last_snapshot "$out")
  options=()
  if [ -n "$state" ]; then
    on_these_images
    say "going on with an earlier training from $(rel "$state")"
    options=(--snapshot="$state")
  else
    { echo "$dataset" >"$out/dataset.txt"; } 2>/dev/null ||
      die "cannot write $(rel "$out/dataset.txt"): is the disk full?"
  fi
  say "training on $dataset: $iterations iterations"
  # The net's matrix products are too small to share: one thread is faster.
  export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}
  train "$solver" "$out" "${options[@]}" ||
    die "stopped before the end; run this again to go on from there"
  # Caffe does not notice a full disk that takes all but the last few hundred
  # bytes of a file.
  is_whole "$model" ||
    die "the net could not be written: make room and run this again"
fi
# The same net for programs without the plugin.
deploy=$(rel "$out/deploy")
[ "$deploy/deploy.caffemodel" -nt "$model" ] ||
  "$PYTHON" "$ROOT/myexamples/export_deploy.py" --force -o "$deploy" \
    "$(rel "$here/quick_train_test.prototxt")" "$model" | tail -n 1 ||
  say "the net could not be exported (its error is above)"
images=$(rel "$here/data/t10k-images-idx3-ubyte")
if [ "$deploy/deploy.caffemodel" -nt "$model" ] && [ -e "$images" ] &&
    "$PYTHON" -c 'import cv2' 2>/dev/null; then
  "$PYTHON" "$ROOT/myexamples/classify.py" "$deploy" "$images:0" || true
fi

say "testing $(rel "$model")"
accuracy=$(model_accuracy "$solver" "$model" "$out/test.log")
say "done: large-margin softmax (m = 4) on $dataset"
echo "test accuracy: $accuracy after $iterations iterations"
"$PYTHON" "$ROOT/myexamples/plot_training.py" "$out/train.log" \
  -o "$out/training.png" -t "LeNet with large-margin softmax on $dataset" |
  sed '/^test accuracy:/d'
echo "model: $model"
