# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154  # for those who source it
# Stages of tests, one after the other, whether or not an earlier one failed:
# each with its output on the screen and in a log of its own, and a table at the
# end. Sourced after myexamples/common.sh; $total may say how many there are.

stages=()    # "RESULT|SECONDS|NAME|WORDS", in their order
closings=()  # what the test runners ended with
passed=0     # single tests
failed=0
skipped=0
number=0

# stages_in FOLDER: where the logs go; nobody else works there.
stages_in() {
  logs=$1
  one_at_a_time "$logs/.lock"
  rm -f -- "$logs"/*.log
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

# sum_of LOG PATTERN: the sum of the numbers before the words of a closing
# line.
sum_of() {
  { grep -Eo -- "$2" "$1" || true; } | tr -dc '0-9\n' |
    awk '{ sum += $1 } END { print sum + 0 }'
}

announce() {  # WORDS
  number=$((number + 1))
  say "[$number/$total] $1"
}

# A command of a stage that this machine cannot run ends in `cannot_run WHY`.
cannot_run() { echo "$*" >"$logs/.why"; }

# stage NAME PATTERN COMMAND...: runs a command. PATTERN finds the closing lines
# of its test runner, which count its tests; without one, the stage counts as
# one test.
stage() {
  local name=$1 pattern=$2 log line status start=$SECONDS closing=''
  local result=passed good=0 bad=0 left=0
  shift 2
  log=$logs/${name//[^a-zA-Z0-9]/-}.log
  announce "$name"
  rm -f -- "$logs/.why"
  # A pipeline's part is a subshell: a `die` ends the stage and not the run.
  set +e
  "$@" 2>&1 | tee -- "$log"
  status=${PIPESTATUS[0]}
  set -e
  if [ -e "$logs/.why" ] && [ "$status" -eq 0 ]; then
    skipped=$((skipped + 1))
    stages+=("SKIPPED|$((SECONDS - start))|$name|$(cat "$logs/.why")")
    return
  fi
  if [ -n "$pattern" ]; then
    # Colours would hide the words from the patterns.
    sed 's/\x1b\[[0-9;]*m//g' "$log" | { grep -E -- "$pattern" || true; } \
      >"$logs/.closing"
    good=$(sum_of "$logs/.closing" '[0-9]+ passed|PASSED +\] [0-9]+')
    bad=$(sum_of "$logs/.closing" '[0-9]+ (failed|errors?)|FAILED +\] [0-9]+')
    left=$(sum_of "$logs/.closing" '[0-9]+ (skipped|ignored)')
    closing="$good passed, $bad failed"
    while IFS= read -r line; do
      closings+=("$name: $line")
    done <"$logs/.closing"
    rm -f -- "$logs/.closing"
    if [ "$status" -eq 0 ] && [ "$good" -eq 0 ]; then
      closing="ran no test"
      status=1
    fi
  else
    [ "$status" -ne 0 ] || good=1
  fi
  if [ "$status" -ne 0 ]; then
    result=FAILED
    # A runner that broke down has counted nothing.
    [ "$bad" -gt 0 ] || bad=1
    say "$name failed (exit status $status); its log is $(rel "$log")"
  fi
  passed=$((passed + good))
  failed=$((failed + bad))
  skipped=$((skipped + left))
  stages+=("$result|$((SECONDS - start))|$name|$closing")
}

# skip NAME WHY: a stage that this machine cannot run.
skip() {
  announce "$1: SKIPPED, $2"
  skipped=$((skipped + 1))
  stages+=("SKIPPED|0|$1|$2")
}

# The table. Returns 1 where a test failed.
results() {
  local line result seconds name closing
  say "results, in $((SECONDS / 60)) min $((SECONDS % 60)) s; the logs are in \
$(rel "$logs")"
  printf '%s\n' "${closings[@]}"
  for line in "${stages[@]}"; do
    IFS='|' read -r result seconds name closing <<<"$line"
    line=$(printf '%-8s %5d s  %-34s %s' "$result" "$seconds" "$name" "$closing")
    printf '%s\n' "${line%"${line##*[! ]}"}"
  done
  printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
  [ "$failed" -eq 0 ]
}

closing_of_cargo='^test result: '
closing_of_gtest='^\[  (PASSED|FAILED)  \] [0-9]+ tests?[.,]'
closing_of_pytest='^=+ .*[0-9]+ (passed|failed|errors?|skipped).* in [0-9.]+s'
