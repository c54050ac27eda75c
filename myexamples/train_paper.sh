# shellcheck shell=bash
# Trains one of the paper's nets; made for a GPU.
#
# Usage: myexamples/mnist/train_mnist.sh [--cpu] [OPTION...]
#        myexamples/cifar10/train_cifar10.sh [--cpu] [OPTION...]
#        myexamples/cifar10+/train_cifar10+.sh [--cpu] [OPTION...]
#
# The last is the net for CIFAR-10 with random crops and mirroring.
#
#   --cpu            train on the CPU; without it, a Caffe that has no GPU to
#                    use says how long that takes
#   --gpu=0          another GPU, or several (0,1)
#   --snapshot=FILE  go on from a .solverstate of an earlier training
#   --weights=FILE   begin with the weights of a .caffemodel
#
# These and what else there is of options but --solver go to `caffe train`.
#
# shellcheck disable=SC2154  # what these three scripts set: $name, the folder
# of $solver, the $shape of an image, and $get, which gets the data.
help_from=${BASH_SOURCE[0]}
# shellcheck source=SCRIPTDIR/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# read_options [OPTION...]: sets $options to those of `caffe train`. Ends the
# script where the training needs a GPU, and there is none that Caffe can use.
cpu_solver=
options=()
read_options() {
  local words why cpu='' name
  while [ $# -gt 0 ]; do
    name=${1#-}
    name=--${name#-}
    case $1 in
      --cpu | -cpu) cpu=1 ;;
      -*=*) options+=("$name") ;;
      -*)
        # What gflags takes for a value, too.
        if [ $# -gt 1 ] && [[ $2 != -* ]]; then
          name+=$(printf '=%s' "$2")
          shift
        fi
        options+=("$name") ;;
      *) bad_usage "unknown argument $1" ;;
    esac
    [[ $name != --solver && $name != --solver=* ]] ||
      bad_usage "--solver is $(rel "$solver") here"
    shift
  done
  [ -x "$CAFFE" ] || die "$CAFFE is missing: run cmake/build_caffe.sh first"
  ! grep -q '^ *solver_mode: *CPU' "$solver" || return 0
  if [ -n "$cpu" ]; then
    [[ "${options[*]}" != *--gpu* ]] || die "--cpu and --gpu exclude each other"
    cpu_solver=1
    return
  fi
  words=$("$CAFFE" device_query --gpu=0 2>&1) && return
  why="Caffe finds no GPU that it can use here"
  [[ $words != *CPU-only* ]] ||
    why="this Caffe is built without CUDA (cmake/build_caffe.sh --cuda)"
  say "timing the net on the CPU"
  words=$("$PYTHON" "$ROOT/myexamples/cpu_hours.py" "$CAFFE" "$solver" \
    "${shape[@]}") || words='many'
  die "the training is made for a GPU, and $why; with --cpu it takes about\
 $words hours on this machine"
}

train_paper() {  # DIR
  local dir=$1 state
  one_at_a_time "$dir/.lock"
  need_plots
  state=$(last_snapshot "$dir")
  [[ " ${options[*]}" == *' --snapshot='* || -z $state ]] ||
    die "$(rel "$dir") has an earlier training: go on with\
 --snapshot=$(rel "$state"), or $(move_away "$dir")"
  if [ -n "$cpu_solver" ]; then
    { grep -v '^ *solver_mode:' "$solver"; echo "solver_mode: CPU"; } \
      >"$dir/cpu_solver.prototxt"
    solver=$dir/cpu_solver.prototxt
  fi
  train "$solver" "$dir" "${options[@]}" ||
    die "stopped before the end; go on from there with\
 --snapshot=$(rel "$state")"
  "$PYTHON" "$ROOT/myexamples/plot_training.py" "$dir/train.log" \
    -o "$dir/training.png"
  say "done: the snapshots are in $(rel "$dir")"
}

solver=$ROOT/myexamples/$name/$solver
read_options "$@"
"$ROOT/myexamples/$get"
train_paper "${solver%_solver.prototxt}_snapshot"
