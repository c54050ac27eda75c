// The margin layer on the GPU: what is left beside cuBLAS's products.
//
// Forward: a kernel behind the product, a block a sample, finds the
// coefficients of correction.rs and puts the margin on the target logit.
// Backward: a kernel before the products folds a into the target entries of
// the top gradient and sorts the samples by class; one behind them puts the
// entries back and adds to each row of dx its x and, a block a class, to each
// row of dW its w. All sums are made in a fixed order and no float is added
// atomically, so two runs give the same bits.
//
// THREADS, TILE and COEFFICIENTS come from src/cuda/layout.rs.

#define WARP 32
#define FULL_MASK 0xffffffffu

// What the backward pass needs of a sample.
struct Coefficients {
  double a;  // what the target entry grows by, times itself
  double b;  // times |w|/|x| of x in dx, times |x|/|w| of w in dw
  double x;  // |x|
  double w;  // |w|
};
static_assert(sizeof(Coefficients) == COEFFICIENTS, "src/cuda/layout.rs");

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

// Whether a value has all its digits.
static __device__ bool InRange(double positive) {
  return positive > 1e-290 && !isinf(positive);  // false for NaN as well
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

// value * (numerator / denominator), of a row v whose norm is the denominator;
// row.rs has the same.
struct Factor {
  double value, numerator, denominator;

  // The product with v, an element. The ratio of the norms may leave the range
  // of double; v / denominator does not, and 0 stays 0.
  __device__ double Times(double v) const {
    const double ratio = numerator / denominator;
    const double product = value * ratio;
    if (InRange(fabs(ratio)) && InRange(fabs(product))) { return product * v; }
    return v == 0 ? 0 : v / denominator * value * numerator;
  }
};

// Finds the class of each sample, as class_of in mod.rs does, and puts the
// margin on its target logit.
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
  double margin_logit = norms.x * norms.w * psi;
  if (!isfinite(margin_logit)) {
    // A psi of 0 must not meet a product that has overflowed.
    margin_logit = fmin(norms.x, norms.w) * psi * fmax(norms.x, norms.w);
  }
  *logit = static_cast<Dtype>(f + (margin_logit - f) * share);
  Coefficients result;
  result.a = (dpsi - 1) * share;
  result.b = (psi - c * dpsi) * share;
  result.x = norms.x;
  result.w = norms.w;
  coefficients[sample] = result;
  classes[sample] = y;
}

typedef unsigned long long Key;

// Sorts a block's `count` keys, a power of 2, by a bitonic network.
static __device__ void SortTile(Key* keys, int count) {
  for (int run = 2; run <= count; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < count / 2; i += THREADS) {
        const int low = i / distance * 2 * distance + i % distance;
        const Key a = keys[low];
        const Key b = keys[low + distance];
        const bool rising = (low & run) == 0;
        if ((a > b) == rising) {
          keys[low] = b;
          keys[low + distance] = a;
        }
      }
    }
  }
  __syncthreads();
}

// Puts g (1 + a) in the place of the target entries g of `diff`, which it keeps
// in `entries`. A block has TILE samples; unless keys is null it leaves them
// there sorted: the class in the upper half, the sample in the lower.
template <typename Dtype>
static __device__ void Fold(int num_samples, int num_classes,
    const Coefficients* coefficients, const int* classes, Dtype* diff,
    Dtype* entries, Key* keys) {
  __shared__ Key tile[TILE];
  const int first = blockIdx.x * TILE;
  const int left = num_samples - first;
  const int here = left < TILE ? left : TILE;
  int count = 1;
  while (count < here) { count *= 2; }
  for (int i = threadIdx.x; i < count; i += THREADS) {
    // Behind all others: no sample, and samples without a target.
    tile[i] = ~Key(0);
    if (i >= here) { continue; }
    const int sample = first + i;
    const int y = classes[sample];
    tile[i] = Key(static_cast<unsigned>(y)) << 32
        | static_cast<unsigned>(sample);
    if (y == NO_TARGET) { continue; }
    Dtype* const entry = diff + static_cast<size_t>(sample) * num_classes + y;
    entries[sample] = *entry;
    *entry = static_cast<Dtype>(*entry * (1 + coefficients[sample].a));
  }
  if (!keys) { return; }
  SortTile(tile, count);
  for (int i = threadIdx.x; i < here; i += THREADS) {
    keys[first + i] = tile[i];
  }
}

// Merges neighbouring sorted runs of `from`, each `run` long but for the last:
// a key's place is its own in its run plus the keys before it in the other.
static __device__ void Merge(int num_samples, int run, const Key* from,
    Key* to) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= num_samples) { return; }
  const Key key = from[i];
  const int own = i / run * run;
  const int both = i / run / 2 * 2 * run;
  const int other = own == both ? both + run : both;
  // The first key of the other run that is not before this one.
  int low = other < num_samples ? other : num_samples;
  int high = num_samples - low < run ? num_samples : low + run;
  const int begin = low;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (from[middle] < key) { low = middle + 1; } else { high = middle; }
  }
  to[both + (i - own) + (low - begin)] = key;
}

// Puts the block's target entry back and adds to its rows, unless null: to the
// sample's of dx and, where the block's key is the first of a class, to the
// class's of dW.
template <typename Dtype>
static __device__ void Backward(int num_samples, int num_classes,
    int num_features, const Dtype* x, const Dtype* w,
    const Coefficients* coefficients, const int* classes,
    const Dtype* entries, const Key* keys, Dtype* diff, Dtype* dx, Dtype* dw) {
  const int sample = blockIdx.x;
  const int y = classes[sample];
  if (y != NO_TARGET) {
    const Dtype entry = entries[sample];
    if (threadIdx.x == 0) {
      diff[static_cast<size_t>(sample) * num_classes + y] = entry;
    }
    const Coefficients of = coefficients[sample];
    const Factor factor = {entry * of.b, of.w, of.x};
    if (dx && factor.value != 0) {
      const size_t row = static_cast<size_t>(sample) * num_features;
      for (int i = threadIdx.x; i < num_features; i += THREADS) {
        dx[row + i] += static_cast<Dtype>(factor.Times(x[row + i]));
      }
    }
  }
  if (!dw) { return; }

  const int place = blockIdx.x;
  const int target = static_cast<int>(keys[place] >> 32);
  if (target == NO_TARGET
      || (place > 0 && static_cast<int>(keys[place - 1] >> 32) == target)) {
    return;
  }
  Pair sum = {0, 0};
  for (int i = place + threadIdx.x; i < num_samples; i += THREADS) {
    const Key key = keys[i];
    if (static_cast<int>(key >> 32) != target) { break; }
    const unsigned j = static_cast<unsigned>(key);
    sum.w += entries[j] * coefficients[j].b * coefficients[j].x;
  }
  sum = JoinBlock<Add>(sum);
  const unsigned j = static_cast<unsigned>(keys[place]);
  const Factor factor = {sum.w, 1, coefficients[j].w};
  if (factor.value == 0) { return; }
  const size_t row = static_cast<size_t>(target) * num_features;
  for (int i = threadIdx.x; i < num_features; i += THREADS) {
    dw[row + i] += static_cast<Dtype>(factor.Times(w[row + i]));
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
  extern "C" __global__ void large_margin_fold_##suffix(int num_samples, \
      int num_classes, const Coefficients* coefficients, const int* classes, \
      Dtype* diff, Dtype* entries, Key* keys) { \
    Fold<Dtype>(num_samples, num_classes, coefficients, classes, diff, \
        entries, keys); \
  } \
  extern "C" __global__ void large_margin_merge_##suffix(int num_samples, \
      int run, const Key* from, Key* to) { \
    Merge(num_samples, run, from, to); \
  } \
  extern "C" __global__ void large_margin_backward_##suffix(int num_samples, \
      int num_classes, int num_features, const Dtype* x, const Dtype* w, \
      const Coefficients* coefficients, const int* classes, \
      const Dtype* entries, const Key* keys, Dtype* diff, Dtype* dx, \
      Dtype* dw) { \
    Backward<Dtype>(num_samples, num_classes, num_features, x, w, \
        coefficients, classes, entries, keys, diff, dx, dw); \
  }

KERNELS(float, f32)
KERNELS(double, f64)
