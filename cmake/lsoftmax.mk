# Builds the Rust library of the LargeMarginInnerProduct and BN layers and
# links it into libcaffe. caffe_patch/apply.sh puts the line that includes this
# file into Caffe's Makefile, after Makefile.config.

LSOFTMAX_ROOT := $(patsubst %/cmake/lsoftmax.mk,%,$(lastword $(MAKEFILE_LIST)))
ifeq ($(wildcard $(LSOFTMAX_ROOT)/Cargo.toml),)
$(error Make cannot use the layers of a project whose path has blanks in it; \
	move it, and run its caffe_patch/apply.sh again)
endif

# The Makefile names its build directory below; this is the same rule.
ifeq ($(DEBUG), 1)
LSOFTMAX_BUILD_DIR := $(or $(DEBUG_BUILD_DIR),.$(BUILD_DIR)_debug)
else
LSOFTMAX_BUILD_DIR := $(or $(RELEASE_BUILD_DIR),.$(BUILD_DIR)_release)
endif
LSOFTMAX_TARGET_DIR := $(abspath $(LSOFTMAX_BUILD_DIR))/lsoftmax
LSOFTMAX_LIBRARY := $(LSOFTMAX_TARGET_DIR)/release/liblsoftmax.a

# The first cargo that is new enough, where lsoftmax.cmake looks for it too.
LSOFTMAX_RUST := $(shell sed -n 's/^rust-version *= *"\(.*\)"/\1/p' \
	$(LSOFTMAX_ROOT)/Cargo.toml)
LSOFTMAX_CARGO_DIR := $(firstword $(foreach dir, \
	$(subst :, ,$(PATH)) $(or $(CARGO_HOME),$(HOME)/.cargo)/bin \
	$(HOME)/.cargo/bin \
	$(wildcard /usr/lib/rust-*/bin), $(if $(wildcard $(dir)/cargo), \
	$(shell cd $(LSOFTMAX_ROOT) && $(dir)/cargo --version 2> /dev/null | \
	  awk -v dir=$(dir) -v minimum=$(LSOFTMAX_RUST) '{ \
	    split($$2, has, "."); split(minimum, need, "."); \
	    if (has[1] > need[1] || has[1] == need[1] && has[2] >= need[2]) \
	      print dir }'))))

# cargo knows what is old and leaves the library alone otherwise.
.PHONY: lsoftmax_always
lsoftmax_always:
$(LSOFTMAX_LIBRARY): lsoftmax_always
	@ if [ -z "$(LSOFTMAX_CARGO_DIR)" ]; then \
		echo "LargeMarginInnerProduct and BN need Rust $(LSOFTMAX_RUST)" \
			"or newer; its cargo was not found on the PATH, in" \
			"~/.cargo/bin or in /usr/lib/rust-*/bin." \
			"Debian 12: apt-get install cargo-web rustc-web." \
			"Elsewhere: rustup, or your distribution's cargo." >&2; \
		exit 1; \
	fi
	@ echo CARGO $@
	$(Q)MAKEFLAGS= PATH="$(LSOFTMAX_CARGO_DIR):$$PATH" CXX="$(CXX)" \
		CARGO_TARGET_DIR=$(LSOFTMAX_TARGET_DIR) $(LSOFTMAX_CUDA_ENV) \
		cargo build --release --locked \
		--manifest-path $(LSOFTMAX_ROOT)/Cargo.toml $(LSOFTMAX_FEATURES)

ifneq ($(CPU_ONLY), 1)
LSOFTMAX_FEATURES := --features cuda
LSOFTMAX_CUDA_ENV = LSOFTMAX_NVCC=$(CUDA_DIR)/bin/nvcc \
	LSOFTMAX_NVCC_FLAGS="$(CUDA_ARCH)" NVCC_CCBIN="$(CXX)"
endif

# The layers need the bridge's headers. A new library compiles them again, and
# that links libcaffe again: Make does not look at the archives of a link.
LSOFTMAX_OBJS := $(patsubst $(LSOFTMAX_ROOT)/%.cpp, \
	$(LSOFTMAX_BUILD_DIR)/%.o, \
	$(wildcard $(LSOFTMAX_ROOT)/src/caffe/layers/*.cpp))
$(LSOFTMAX_OBJS): $(LSOFTMAX_LIBRARY)
# System directories come last: a header of the tree's own wins.
$(LSOFTMAX_OBJS): private CXXFLAGS += \
	-isystem $(LSOFTMAX_TARGET_DIR)/cxxbridge -isystem $(LSOFTMAX_ROOT)/include

# A shared libcaffe swallows the library and hides its symbols. Whoever links
# the static libcaffe needs the library as well.
ifneq ($(shell uname -s), Darwin)
LDFLAGS += -Wl,--exclude-libs,liblsoftmax.a
endif
LDFLAGS += $(LSOFTMAX_LIBRARY)

# The first target of the Makefile stays the one that a bare make builds.
.DEFAULT_GOAL :=
