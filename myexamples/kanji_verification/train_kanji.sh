#!/usr/bin/env bash
# Softmax against large margins by verification with many classes: trains on
# 800 kanji in many typefaces, compares pairs of others. Builds, gets and draws
# what is missing, then runs kanji_verification.py, whose options it takes.
helper=myexamples/kanji_verification/kanji_verification.py
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

here=$ROOT/myexamples/kanji_verification

# shellcheck disable=SC2119  # without options
build_caffe
"$PYTHON" -c 'import sklearn' 2>/dev/null ||
  need_packages "the ROC curves" python3-sklearn
need_plots
"$PYTHON" -c 'import PIL' 2>/dev/null ||
  need_packages "the drawings" python3-pil
one_at_a_time "$here/runs/.lock"
if [ -e "$here/drawn" ]; then
  say "the characters are ready in $(rel "$here/drawn")"
else
  "$here/get_typefaces.sh"
  say "drawing the characters"
  "$PYTHON" "$here/draw_characters.py" "$here/data" "$here/drawn"
fi
# One thread for each net is faster, also when it is judged.
export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}
export RAYON_NUM_THREADS=${RAYON_NUM_THREADS:-1}
say "training on $(cat "$here/drawn/train_lmdb/dataset.txt")"
exec "$PYTHON" "$helper" "$@"
