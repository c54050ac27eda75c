# Builds the Rust library of the LargeMarginInnerProduct and BN layers and
# links it into libcaffe. caffe_patch/apply.sh puts the lines that set
# LSOFTMAX_ROOT and include this file into Caffe's Makefile, after
# Makefile.config. Make takes no blank in the name of a target, so these are
# relative to the tree; the project's path may have one.

# The Makefile names its build directory below; this is the same rule.
ifeq ($(DEBUG), 1)
LSOFTMAX_BUILD_DIR := $(or $(DEBUG_BUILD_DIR),.$(BUILD_DIR)_debug)
else
LSOFTMAX_BUILD_DIR := $(or $(RELEASE_BUILD_DIR),.$(BUILD_DIR)_release)
endif
LSOFTMAX_TARGET_DIR := $(LSOFTMAX_BUILD_DIR)/lsoftmax
LSOFTMAX_LIBRARY := $(LSOFTMAX_TARGET_DIR)/release/liblsoftmax.a

# cargo knows what is old and leaves the library alone otherwise.
.PHONY: lsoftmax_always
lsoftmax_always:
$(LSOFTMAX_LIBRARY): lsoftmax_always
	@ echo CARGO $@
	$(Q)CXX="$(CXX)" CARGO_TARGET_DIR="$(abspath $(LSOFTMAX_TARGET_DIR))" \
		$(LSOFTMAX_CUDA_ENV) "$(LSOFTMAX_ROOT)/cmake/find_cargo.sh" \
		build --release --locked $(LSOFTMAX_FEATURES)

ifneq ($(CPU_ONLY), 1)
LSOFTMAX_FEATURES := --features cuda
LSOFTMAX_CUDA_ENV = LSOFTMAX_NVCC=$(CUDA_DIR)/bin/nvcc \
	LSOFTMAX_NVCC_FLAGS="$(CUDA_ARCH)" NVCC_CCBIN="$(CXX)"
endif

# Our sources need the bridge's headers. A new library compiles them again, and
# that links libcaffe again: Make does not look at the archives of a link.
LSOFTMAX_OBJS := $(patsubst %.cpp,$(LSOFTMAX_BUILD_DIR)/%.o, \
	$(shell cd "$(LSOFTMAX_ROOT)" && find src/caffe -name '*.cpp'))
$(LSOFTMAX_OBJS): $(LSOFTMAX_LIBRARY)
# System directories come last: a header of the tree's own wins.
$(LSOFTMAX_OBJS): private CXXFLAGS += \
	-isystem $(LSOFTMAX_TARGET_DIR)/cxxbridge -isystem "$(LSOFTMAX_ROOT)/include"

# A shared libcaffe swallows the library and hides its symbols. Whoever links
# the static libcaffe needs the library as well.
ifneq ($(shell uname -s), Darwin)
LDFLAGS += -Wl,--exclude-libs,liblsoftmax.a
endif
LDFLAGS += $(LSOFTMAX_LIBRARY)

# The first target of the Makefile stays the one that a bare make builds.
.DEFAULT_GOAL :=
