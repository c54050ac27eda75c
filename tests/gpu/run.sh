#!/bin/sh
# Starts run.py, in the folder that tests/gpu/bundle.sh packs, in a Python 3.
# Usage: run.sh [OPTION...] [PART [WORD...]]; run.sh --help lists the parts.
for python in python3 /usr/bin/python3 python; do
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 6))' 2> /dev/null; then
    exec "$python" -B "$(dirname -- "$0")/run.py" "$@"
  fi
done
echo "run.sh: error: there is no Python 3 on this machine" >&2
exit 1
