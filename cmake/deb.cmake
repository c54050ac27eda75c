# The Debian package caffe-lsoftmax, for cpack: what cmake/install.sh has put
# together below $LSOFTMAX_STAGE.

set(__stage "$ENV{LSOFTMAX_STAGE}")

file(STRINGS "$ENV{LSOFTMAX_CARGO_TOML}" __version REGEX "^version *=" LIMIT_COUNT 1)
string(REGEX REPLACE "^[^\"]*\"([^\"]*)\".*" "\\1" CPACK_PACKAGE_VERSION "${__version}")

set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME caffe-lsoftmax)
set(CPACK_PACKAGE_FILE_NAME caffe-lsoftmax)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_INSTALLED_DIRECTORIES "${__stage}" /)
set(CPACK_PACKAGING_INSTALL_PREFIX /)
set(CPACK_PACKAGE_DIRECTORY "${__stage}.deb")

set(CPACK_DEBIAN_PACKAGE_MAINTAINER "$ENV{DEBFULLNAME} <$ENV{DEBEMAIL}>")
if("$ENV{DEBFULLNAME}" STREQUAL "" OR "$ENV{DEBEMAIL}" STREQUAL "")
  set(CPACK_DEBIAN_PACKAGE_MAINTAINER "the lsoftmax authors <root@localhost>")
endif()
set(CPACK_DEBIAN_PACKAGE_SECTION science)
set(CPACK_DEBIAN_PACKAGE_PRIORITY optional)
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY
    "Caffe with large-margin softmax, for the CPU")
set(CPACK_PACKAGE_DESCRIPTION
"BVLC Caffe, a framework for deep learning, with the layers
LargeMarginInnerProduct (large-margin softmax, L-Softmax) and BN (batch
normalization): the command caffe with the other tools, the C++ library with
its headers, and pycaffe for python3.")

# ---[ What belongs to a system with it, and what not
# Whoever has it has what caffe-cpu brings; the library has another name.
set(CPACK_DEBIAN_PACKAGE_PROVIDES
    "caffe-cpu, caffe-tools-cpu, libcaffe-cpu-dev, python3-caffe-cpu")
set(__others "")
foreach(__kind cpu cuda)
  list(APPEND __others caffe-${__kind} caffe-tools-${__kind}
       libcaffe-${__kind}1 libcaffe-${__kind}-dev python3-caffe-${__kind})
endforeach()
string(REPLACE ";" ", " __others "${__others}")
set(CPACK_DEBIAN_PACKAGE_CONFLICTS "${__others}")
set(CPACK_DEBIAN_PACKAGE_REPLACES "${__others}")

# The module is of one python3.
string(REPLACE " " ";" __python "$ENV{LSOFTMAX_PYTHON}")
list(GET __python 0 __major)
list(GET __python 1 __minor)
math(EXPR __next "${__minor} + 1")
set(CPACK_DEBIAN_PACKAGE_DEPENDS
    "python3 (>= ${__major}.${__minor}~), python3 (<< ${__major}.${__next}), python3-numpy, python3-protobuf, python3-scipy, python3-six, python3-skimage")
set(CPACK_DEBIAN_PACKAGE_RECOMMENDS "python3-pydot")
set(CPACK_DEBIAN_PACKAGE_SUGGESTS
    "libboost-dev, libgflags-dev, libgoogle-glog-dev, libhdf5-dev, libopencv-dev, libprotobuf-dev")
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
file(GLOB __libraries "${__stage}/usr/lib/*/libcaffe.so")
get_filename_component(__libraries "${__libraries}" PATH)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS_PRIVATE_DIRS "${__libraries}")
set(CPACK_DEBIAN_PACKAGE_GENERATE_SHLIBS ON)

# ---[ The linker's cache; byte code, which the package's removal takes along
file(WRITE "${__stage}.deb/triggers" "activate-noawait ldconfig\n")
file(WRITE "${__stage}.deb/postinst" "#!/bin/sh
set -e
if [ \"$1\" = configure ]; then py3compile -p caffe-lsoftmax; fi
")
file(WRITE "${__stage}.deb/prerm" "#!/bin/sh
set -e
py3clean -p caffe-lsoftmax
")
set(CPACK_DEBIAN_PACKAGE_CONTROL_STRICT_PERMISSION ON)
set(CPACK_DEBIAN_PACKAGE_CONTROL_EXTRA "${__stage}.deb/triggers"
    "${__stage}.deb/postinst" "${__stage}.deb/prerm")
