// The margin layer on the GPU: what is left beside cuBLAS's products.
//
// One kernel a direction, a block a sample. Both use the coefficients of
// src/large_margin/mod.rs. All sums are made in a fixed order and no float is
// added atomically, so two runs give the same bits.

// Threads of a block; src/large_margin/gpu.rs launches as many.
#define THREADS 128
#define WARP 32
// Columns of dW that a thread keeps in registers at once.
#define COLUMNS 4
#define FULL_MASK 0xffffffffu

// What the backward pass needs of a sample.
struct Coefficients {
  double a;  // of w in dx, of x in dw
  double b;  // times |w|/|x| of x in dx, times |x|/|w| of w in dw
  double x;  // |x|
  double w;  // |w|
};

// The class of a sample that the margin leaves alone.
#define NO_TARGET (-1)

// A value of the sample's features and one of its class weights.
struct Pair {
  double x;
  double w;
};

struct Add {
  static __device__ double Join(double a, double b) { return a + b; }
};
struct Max {
  static __device__ double Join(double a, double b) { return fmax(a, b); }
};

// The join over the block, in every thread.
template <typename How>
static __device__ Pair JoinBlock(Pair p) {
  __shared__ Pair warps[THREADS / WARP];
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    p.x = How::Join(p.x, __shfl_down_sync(FULL_MASK, p.x, offset));
    p.w = How::Join(p.w, __shfl_down_sync(FULL_MASK, p.w, offset));
  }
  if (threadIdx.x % WARP == 0) { warps[threadIdx.x / WARP] = p; }
  __syncthreads();
  p = warps[0];
  for (int i = 1; i < THREADS / WARP; ++i) {
    p.x = How::Join(p.x, warps[i].x);
    p.w = How::Join(p.w, warps[i].w);
  }
  // Before a later join overwrites what the slowest still reads.
  __syncthreads();
  return p;
}

static __device__ bool Usable(double norm) {
  return norm > 0 && !isinf(norm);  // false for NaN as well
}

// Whether the root of a sum of squares is accurate.
static __device__ bool InRange(double squares) {
  return squares > 1e-290 && !isinf(squares);  // false for NaN as well
}

// The Euclidean norms of x and w, in every thread.
template <typename Dtype>
static __device__ Pair Norms(const Dtype* x, const Dtype* w, int length) {
  Pair sum = {0, 0};
  for (int i = threadIdx.x; i < length; i += THREADS) {
    const double xi = x[i];
    const double wi = w[i];
    sum.x += xi * xi;
    sum.w += wi * wi;
  }
  sum = JoinBlock<Add>(sum);
  // Squares of float neither overflow nor vanish in double. Those of double
  // may: once more, scaled.
  if (sizeof(Dtype) == sizeof(double)
      && !(InRange(sum.x) && InRange(sum.w))) {
    Pair largest = {0, 0};
    for (int i = threadIdx.x; i < length; i += THREADS) {
      largest.x = fmax(largest.x, fabs(static_cast<double>(x[i])));
      largest.w = fmax(largest.w, fabs(static_cast<double>(w[i])));
    }
    largest = JoinBlock<Max>(largest);
    if (!Usable(largest.x) || !Usable(largest.w)) { return largest; }
    sum.x = 0;
    sum.w = 0;
    for (int i = threadIdx.x; i < length; i += THREADS) {
      const double xi = x[i] / largest.x;
      const double wi = w[i] / largest.w;
      sum.x += xi * xi;
      sum.w += wi * wi;
    }
    sum = JoinBlock<Add>(sum);
    sum.x = largest.x * sqrt(sum.x);
    sum.w = largest.w * sqrt(sum.w);
    return sum;
  }
  sum.x = sqrt(sum.x);
  sum.w = sqrt(sum.w);
  return sum;
}

// value * numerator / denominator * v. The ratio of the norms may leave the
// range of double for v of denormal norm; v / denominator does not.
template <typename Dtype>
static __device__ Dtype Scaled(double factor, double value, double numerator,
    double denominator, Dtype v) {
  return static_cast<Dtype>(isinf(factor)
      ? value * numerator * (v / denominator) : factor * v);
}

// Finds the class of each sample and puts the margin on its target logit.
//
// bad_label, in host memory that the device can write, gets the number of a
// sample with a label that is no class in its upper half and the label, as
// float, in the lower. One store, so the halves belong together.
template <typename Dtype>
static __device__ void Forward(int num_classes, int num_features, int margin,
    double lambda, int has_ignore_label, int ignore_label, const Dtype* x,
    const Dtype* labels, const Dtype* w, Dtype* logits,
    Coefficients* coefficients, int* classes,
    volatile unsigned long long* bad_label) {
  const int sample = blockIdx.x;
  const double label = labels[sample];
  const bool ignored = has_ignore_label && label == ignore_label;
  const bool valid = label >= 0 && label < num_classes
      && label == floor(label);
  if (ignored || !valid || margin == 1) {
    if (threadIdx.x == 0) {
      classes[sample] = NO_TARGET;
      if (!ignored && !valid) {
        *bad_label = static_cast<unsigned long long>(sample) << 32
            | __float_as_uint(static_cast<float>(label));
      }
    }
    return;
  }

  const int y = static_cast<int>(label);
  x += static_cast<size_t>(sample) * num_features;
  w += static_cast<size_t>(y) * num_features;
  Dtype* logit = logits + static_cast<size_t>(sample) * num_classes + y;
  const double f = *logit;
  // The barriers inside also keep the read of f before the write below.
  const Pair norms = Norms(x, w, num_features);
  if (!Usable(norms.x) || !Usable(norms.w) || isinf(f) || isnan(f)) {
    if (threadIdx.x == 0) { classes[sample] = NO_TARGET; }
    return;
  }
  const double c = fmin(1.0, fmax(-1.0, f / norms.x / norms.w));
  // k of the paper's psi: the borders cos(j pi / m) at or above c.
  int k = 0;
  for (int first = 1; first < margin; first += THREADS) {
    const int j = first + threadIdx.x;
    k += __syncthreads_count(
        j < margin && c <= cospi(static_cast<double>(j) / margin));
  }
  if (threadIdx.x != 0) { return; }

  // Chebyshev's recurrence: t becomes T_m(c), u becomes U_{m-1}(c).
  double t_before = 1, t = c, u_before = 0, u = 1;
  for (int i = 1; i < margin; ++i) {
    const double t_next = 2 * c * t - t_before;
    const double u_next = 2 * c * u - u_before;
    t_before = t;
    t = t_next;
    u_before = u;
    u = u_next;
  }
  const double sign = k % 2 == 0 ? 1 : -1;
  const double psi = sign * t - 2.0 * k;
  const double dpsi = sign * margin * u;
  const double share = 1 / (1 + lambda);
  *logit = static_cast<Dtype>(f + (norms.x * norms.w * psi - f) * share);
  Coefficients result;
  result.a = (dpsi - 1) * share;
  result.b = (psi - c * dpsi) * share;
  result.x = norms.x;
  result.w = norms.w;
  coefficients[sample] = result;
  classes[sample] = y;
}

// Whether a sample before this one has the class y.
static __device__ bool HasEarlier(const int* classes, int y) {
  for (int end = blockIdx.x; end > 0; end -= THREADS) {
    const int j = end - 1 - static_cast<int>(threadIdx.x);
    if (__syncthreads_or(j >= 0 && classes[j] == y)) { return true; }
  }
  return false;
}

// Adds to dx and, in the block of the first sample of a class, to the dW row
// of that class. dx and dw may be null: not wanted.
template <typename Dtype>
static __device__ void Backward(int num_samples, int num_classes,
    int num_features, const Dtype* top_diff, const Dtype* x, const Dtype* w,
    const Coefficients* coefficients, const int* classes, Dtype* dx,
    Dtype* dw) {
  const int sample = blockIdx.x;
  const int y = classes[sample];
  if (y == NO_TARGET) { return; }
  const Dtype* w_y = w + static_cast<size_t>(y) * num_features;

  if (dx) {
    const double g =
        top_diff[static_cast<size_t>(sample) * num_classes + y];
    if (g != 0) {
      const Coefficients of = coefficients[sample];
      const Dtype cross = static_cast<Dtype>(g * of.a);
      const double factor = g * of.b * (of.w / of.x);
      const size_t row = static_cast<size_t>(sample) * num_features;
      for (int i = threadIdx.x; i < num_features; i += THREADS) {
        dx[row + i] += cross * w_y[i]
            + Scaled(factor, g * of.b, of.w, of.x, x[row + i]);
      }
    }
  }
  if (!dw || HasEarlier(classes, y)) { return; }

  // The samples of this class among THREADS in a row, in order, with what
  // multiplies x, and w / |w|, for each.
  __shared__ int members[THREADS];
  __shared__ Dtype cross[THREADS];
  __shared__ double own[THREADS];
  __shared__ int warp_members[THREADS / WARP];
  const double norm_w = coefficients[sample].w;
  const int warp = threadIdx.x / WARP;
  const unsigned lanes_below = (1u << (threadIdx.x % WARP)) - 1;
  for (int base = 0; base < num_features; base += COLUMNS * THREADS) {
    Dtype sums[COLUMNS] = {};
    double own_sum = 0;
    for (int first = sample; first < num_samples; first += THREADS) {
      const int j = first + threadIdx.x;
      Dtype g = 0;
      if (j < num_samples && classes[j] == y) {
        g = top_diff[static_cast<size_t>(j) * num_classes + y];
      }
      const bool member = g != 0;
      const unsigned votes = __ballot_sync(FULL_MASK, member);
      if (threadIdx.x % WARP == 0) { warp_members[warp] = __popc(votes); }
      __syncthreads();
      int count = 0;
      int place = __popc(votes & lanes_below);
      for (int i = 0; i < THREADS / WARP; ++i) {
        if (i < warp) { place += warp_members[i]; }
        count += warp_members[i];
      }
      if (member) {
        members[place] = j;
        const Coefficients of = coefficients[j];
        cross[place] = static_cast<Dtype>(g * of.a);
        own[place] = g * of.b * of.x;
      }
      // The next round overwrites these only after its first barrier, which
      // every thread reaches when it has read them.
      __syncthreads();
      for (int i = 0; i < count; ++i) {
        const Dtype* x_j =
            x + static_cast<size_t>(members[i]) * num_features + base;
        own_sum += own[i];
        for (int r = 0; r < COLUMNS; ++r) {
          const int column = r * THREADS + threadIdx.x;
          if (base + column < num_features) {
            sums[r] += cross[i] * x_j[column];
          }
        }
      }
    }
    for (int r = 0; r < COLUMNS; ++r) {
      const int column = base + r * THREADS + threadIdx.x;
      if (column < num_features) {
        dw[static_cast<size_t>(y) * num_features + column] +=
            sums[r] + static_cast<Dtype>(own_sum * (w_y[column] / norm_w));
      }
    }
  }
}

#define KERNELS(Dtype, suffix) \
  extern "C" __global__ void large_margin_forward_##suffix(int num_classes, \
      int num_features, int margin, double lambda, int has_ignore_label, \
      int ignore_label, const Dtype* x, const Dtype* labels, const Dtype* w, \
      Dtype* logits, Coefficients* coefficients, int* classes, \
      unsigned long long* bad_label) { \
    Forward<Dtype>(num_classes, num_features, margin, lambda, \
        has_ignore_label, ignore_label, x, labels, w, logits, coefficients, \
        classes, bad_label); \
  } \
  extern "C" __global__ void large_margin_backward_##suffix(int num_samples, \
      int num_classes, int num_features, const Dtype* top_diff, \
      const Dtype* x, const Dtype* w, const Coefficients* coefficients, \
      const int* classes, Dtype* dx, Dtype* dw) { \
    Backward<Dtype>(num_samples, num_classes, num_features, top_diff, x, w, \
        coefficients, classes, dx, dw); \
  }

KERNELS(float, f32)
KERNELS(double, f64)
