#!/usr/bin/env bash
# Installs, uses and removes a package of `cmake/build_caffe.sh --deb`.
#
# Usage: try_package.sh FOLDER
#
# For bare_machine.py, as root in a Debian that is there for this alone: FOLDER
# has caffe.deb, solver.prototxt and the train.prototxt that it names. Removes
# what is left of the package from the system, or fails.
set -euo pipefail
if [[ ${1:--h} == -* ]]; then sed -n '2,/^[^#]/ s/^# \?//p' "$0"; exit; fi
set -x
cd -- "$1"

# What stands for Debian's package has to give way.
mkdir -p other/DEBIAN
printf '%s\n' 'Package: caffe-cpu' 'Version: 1.0.0' 'Architecture: all' \
  'Maintainer: nobody <root@localhost>' 'Description: gives way' \
  > other/DEBIAN/control
dpkg-deb --build other
dpkg --install other.deb
apt-get -qq update
apt-get -qq -y install --no-install-recommends ./caffe.deb
# shellcheck disable=SC2016  # dpkg-query's own
status=$(dpkg-query -W -f '${db:Status-Status}' caffe-cpu || true)
[[ $status != installed ]]

grep -q '^The crate rayon .* (MIT OR Apache-2.0)$' \
  /usr/share/doc/caffe-lsoftmax/copyright
if ldd /usr/bin/caffe | grep 'not found'; then exit 1; fi
GLOG_logtostderr=1 /usr/bin/caffe train --solver=solver.prototxt 2>&1 | tee train.log
grep -q 'Optimization Done' train.log
python3 - <<'PYTHON'
import glob

import caffe

assert caffe.__file__ == "/usr/lib/python3/dist-packages/caffe/__init__.py"
model, = glob.glob("*_iter_200.caffemodel")
net = caffe.Net("train.prototxt", model, caffe.TRAIN)
accuracy = sum(float(net.forward()["accuracy"]) for _ in range(10)) / 10
print("accuracy of the trained net in pycaffe: %.3f" % accuracy)
assert accuracy > 0.9
PYTHON

dpkg -L caffe-lsoftmax > files
apt-get -qq -y purge caffe-lsoftmax
while IFS= read -r path; do
  if [[ -e $path && ! -d $path || -L $path ]]; then
    echo "$path is still there"
    exit 1
  fi
done < files
find / -xdev \( -path "$PWD" -o -path /home -o -path /var/log -o -path /proc \
  -o -path /var/cache/apt \) -prune -o -iname '*caffe*' -print | tee left
[[ ! -s left ]]
