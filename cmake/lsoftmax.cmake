# Builds the Rust library of the LargeMarginInnerProduct and BN layers and
# links it into libcaffe. caffe_patch/apply.sh puts the line that includes this
# file into Caffe's CMakeLists.txt, before its subdirectories.

get_filename_component(LSOFTMAX_ROOT "${CMAKE_CURRENT_LIST_FILE}" PATH)
get_filename_component(LSOFTMAX_ROOT "${LSOFTMAX_ROOT}" PATH)

# ---[ A cargo that is new enough, or the reason why there is none
execute_process(COMMAND "${LSOFTMAX_ROOT}/cmake/find_cargo.sh"
                OUTPUT_VARIABLE __lsoftmax_cargo ERROR_VARIABLE __lsoftmax_why
                OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT __lsoftmax_cargo)
  message(FATAL_ERROR "The LargeMarginInnerProduct and BN layers:\n"
                      "${__lsoftmax_why}")
endif()
message(STATUS "Rust library of L-Softmax: ${__lsoftmax_cargo}/cargo")

# ---[ The library, built by cargo on each make; cargo knows what is old
set(LSOFTMAX_TARGET_DIR "${PROJECT_BINARY_DIR}/lsoftmax")
set(LSOFTMAX_LIBRARY "${LSOFTMAX_TARGET_DIR}/release/liblsoftmax.a")

# The bridge's C++ must come from the compiler of Caffe.
set(__lsoftmax_env "CARGO_TARGET_DIR=${LSOFTMAX_TARGET_DIR}"
                   "CXX=${CMAKE_CXX_COMPILER}")
set(__lsoftmax_features "")
if(HAVE_CUDA)
  string(REPLACE ";" " " __lsoftmax_archs "${NVCC_FLAGS_EXTRA}")
  list(APPEND __lsoftmax_env "LSOFTMAX_NVCC=${CUDA_NVCC_EXECUTABLE}"
                             "LSOFTMAX_NVCC_FLAGS=${__lsoftmax_archs}")
  if(CUDA_HOST_COMPILER)
    list(APPEND __lsoftmax_env "NVCC_CCBIN=${CUDA_HOST_COMPILER}")
  endif()
  set(__lsoftmax_features --features cuda)
endif()

add_custom_target(lsoftmax
  COMMAND ${CMAKE_COMMAND} -E env ${__lsoftmax_env}
          "${LSOFTMAX_ROOT}/cmake/find_cargo.sh" build --release --locked
          ${__lsoftmax_features}
  BYPRODUCTS "${LSOFTMAX_LIBRARY}"
  COMMENT "Building the Rust library of LargeMarginInnerProduct and BN"
  VERBATIM)

# Every target of Caffe waits for these: the bridge's headers exist before the
# layers are compiled.
list(APPEND external_project_dependencies lsoftmax)

# System directories come last: a header of the tree's own wins.
include_directories(SYSTEM "${LSOFTMAX_TARGET_DIR}/cxxbridge"
                           "${LSOFTMAX_ROOT}/include")

# ---[ The link
# A shared libcaffe swallows the library and hides its symbols. Whoever links
# an installed static libcaffe needs the library as well.
set(__lsoftmax_link "$<BUILD_INTERFACE:${LSOFTMAX_LIBRARY}>")
if(NOT APPLE)
  set(__lsoftmax_link "$<BUILD_INTERFACE:-Wl,--exclude-libs,liblsoftmax.a>"
                      "${__lsoftmax_link}")
endif()
if(NOT BUILD_SHARED_LIBS)
  # The policy that Caffe's old minimum leaves off drops INSTALL_INTERFACE.
  cmake_policy(SET CMP0022 NEW)
  set(__lsoftmax_lib_dir lib)
  if(CMAKE_INSTALL_LIBDIR)
    set(__lsoftmax_lib_dir "${CMAKE_INSTALL_LIBDIR}")
  endif()
  install(FILES "${LSOFTMAX_LIBRARY}" DESTINATION "${__lsoftmax_lib_dir}")
  set(__lsoftmax_installed "${__lsoftmax_lib_dir}/liblsoftmax.a")
  list(APPEND __lsoftmax_link
       "$<INSTALL_INTERFACE:$<INSTALL_PREFIX>/${__lsoftmax_installed}>")
endif()

# Caffe's list has PRIVATE and PUBLIC in it since 1.0; CMake does not mix lists
# with and without.
list(FIND Caffe_LINKER_LIBS PUBLIC __lsoftmax_keywords)
if(__lsoftmax_keywords EQUAL -1)
  list(APPEND Caffe_LINKER_LIBS ${__lsoftmax_link})
else()
  list(APPEND Caffe_LINKER_LIBS PRIVATE ${__lsoftmax_link})
endif()
