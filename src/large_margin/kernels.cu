// The margin layer on the GPU: what is left beside cuBLAS's products.
//
// Forward: a kernel behind the product. A block a sample finds the coefficients
// of correction.rs and puts the margin on the target logit; beside them, a
// block a tile of samples sorts these by class, for the backward pass.
// Backward: a kernel before the products folds a into the target entries of
// the top gradient and sums up, over each class of a tile, what its row of dW
// gets; one behind them puts the entries back and adds to each row of dx its x
// and to each row of dW its w. Neither kernel can do the other's work, as the
// products stand between them. All sums are made in a fixed order and no float
// is added atomically, so two runs give the same bits.
//
// THREADS, TILE, LOAD and COEFFICIENTS come from src/cuda/layout.rs.

#define WARP 32
#define FULL_MASK 0xffffffffu

// What the backward pass needs of a sample with a class.
struct alignas(16) Coefficients {
  double a;  // what the target entry grows by, times itself
  double b;  // times |w|/|x| of x in dx, times |x|/|w| of w in dw
  double x;  // |x|; 0 where the margin leaves the sample alone
  double w;  // |w|
};
static_assert(sizeof(Coefficients) == COEFFICIENTS, "src/cuda/layout.rs");

// The class of a sample that has none.
#define NO_CLASS (-1)

// The class in the upper half, the sample in the lower: sorted, the samples of
// a class follow one another, and those without one come last.
typedef unsigned long long Key;

static __device__ int ClassOf(Key key) { return static_cast<int>(key >> 32); }
static __device__ int SampleOf(Key key) {
  return static_cast<int>(static_cast<unsigned>(key));
}

// As many values as one load brings.
template <typename Dtype>
struct alignas(LOAD) Vector {
  enum { kValues = LOAD / sizeof(Dtype) };
  Dtype v[kValues];
};

// Whether rows of `length` values from `rows` on can be read by vectors.
template <typename Dtype>
static __device__ bool Aligned(const Dtype* rows, int length) {
  return reinterpret_cast<size_t>(rows) % LOAD == 0
      && length % Vector<Dtype>::kValues == 0;
}

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

// The sum, over the elements that are a thread's, of what `term` makes of an
// element of x and one of w.
template <typename How, typename Dtype, typename Term>
static __device__ Pair OverRows(const Dtype* __restrict__ x,
    const Dtype* __restrict__ w, int length, Term term) {
  Pair all = {0, 0};
  const auto join = [&](Dtype xi, Dtype wi) {
    const Pair one = term(static_cast<double>(xi), static_cast<double>(wi));
    all.x = How::Join(all.x, one.x);
    all.w = How::Join(all.w, one.w);
  };
  if (Aligned(x, length) && Aligned(w, length)) {
    const int kValues = Vector<Dtype>::kValues;
    const auto* const xs = reinterpret_cast<const Vector<Dtype>*>(x);
    const auto* const ws = reinterpret_cast<const Vector<Dtype>*>(w);
    for (int i = threadIdx.x; i < length / kValues; i += THREADS) {
      const Vector<Dtype> xi = xs[i];
      const Vector<Dtype> wi = ws[i];
      for (int j = 0; j < kValues; ++j) { join(xi.v[j], wi.v[j]); }
    }
  } else {
    for (int i = threadIdx.x; i < length; i += THREADS) { join(x[i], w[i]); }
  }
  return JoinBlock<How>(all);
}

// The Euclidean norms of x and w, in every thread.
template <typename Dtype>
static __device__ Pair Norms(const Dtype* x, const Dtype* w, int length) {
  Pair sum = OverRows<Add>(x, w, length, [](double xi, double wi) {
    return Pair{xi * xi, wi * wi};
  });
  // Squares of float neither overflow nor vanish in double. Those of double
  // may: once more, scaled.
  if (sizeof(Dtype) == sizeof(double)
      && !(InRange(sum.x) && InRange(sum.w))) {
    const Pair largest = OverRows<Max>(x, w, length, [](double xi, double wi) {
      return Pair{fabs(xi), fabs(wi)};
    });
    // A norm that is no use as a divisor is returned as it is.
    const Pair scale = {Usable(largest.x) ? largest.x : 1,
        Usable(largest.w) ? largest.w : 1};
    sum = OverRows<Add>(x, w, length, [&](double xi, double wi) {
      xi /= scale.x;
      wi /= scale.w;
      return Pair{xi * xi, wi * wi};
    });
    return Pair{scale.x * sqrt(sum.x), scale.w * sqrt(sum.w)};
  }
  return Pair{sqrt(sum.x), sqrt(sum.w)};
}

// value * (numerator / denominator), of a row whose norm is the denominator;
// row.rs has the same.
struct Factor {
  double value, numerator, denominator;
};

// y += factor v, element by element, for rows of `length`. The ratio of the
// norms may leave the range of double; v / denominator does not, and 0 stays 0.
template <typename Dtype>
static __device__ void AddScaled(Dtype* __restrict__ y, const Factor& factor,
    const Dtype* __restrict__ v, int length) {
  if (factor.value == 0) { return; }
  const double ratio = factor.numerator / factor.denominator;
  const double product = factor.value * ratio;
  if (!InRange(fabs(ratio)) || !InRange(fabs(product))) {
    for (int i = threadIdx.x; i < length; i += THREADS) {
      const double vi = v[i];
      if (vi == 0) { continue; }
      y[i] += static_cast<Dtype>(
          vi / factor.denominator * factor.value * factor.numerator);
    }
    return;
  }
  if (Aligned(v, length) && Aligned(y, length)) {
    const int kValues = Vector<Dtype>::kValues;
    const auto* const vs = reinterpret_cast<const Vector<Dtype>*>(v);
    auto* const ys = reinterpret_cast<Vector<Dtype>*>(y);
    for (int i = threadIdx.x; i < length / kValues; i += THREADS) {
      const Vector<Dtype> vi = vs[i];
      Vector<Dtype> yi = ys[i];
      for (int j = 0; j < kValues; ++j) {
        yi.v[j] += static_cast<Dtype>(product * vi.v[j]);
      }
      ys[i] = yi;
    }
  } else {
    for (int i = threadIdx.x; i < length; i += THREADS) {
      y[i] += static_cast<Dtype>(product * v[i]);
    }
  }
}

// How labels name classes; class_of in mod.rs is the same.
struct Labels {
  int num_classes;
  int has_ignore_label;
  int ignore_label;

  __device__ bool Ignored(double label) const {
    return has_ignore_label && label == ignore_label;
  }
  __device__ bool Valid(double label) const {
    return label >= 0 && label < num_classes && label == floor(label);
  }
};

// Sorts a block's `count` keys, a power of 2, by a bitonic network.
static __device__ void SortTile(Key* keys, int count) {
  for (int run = 2; run <= count; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < count / 2; i += THREADS) {
        const int low = 2 * i - (i & (distance - 1));
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

// Leaves the keys of samples TILE * number and on in `keys`, sorted.
template <typename Dtype>
static __device__ void MakeKeys(int num_samples, const Labels& of,
    const Dtype* __restrict__ labels, int number, Key* __restrict__ keys) {
  __shared__ Key tile[TILE];
  const int first = number * TILE;
  const int left = num_samples - first;
  const int here = left < TILE ? left : TILE;
  int count = 1;
  while (count < here) { count *= 2; }
  for (int i = threadIdx.x; i < count; i += THREADS) {
    tile[i] = ~Key(0);  // behind all others: no sample
    if (i >= here) { continue; }
    const double label = labels[first + i];
    const int y = of.Valid(label) && !of.Ignored(label)
        ? static_cast<int>(label) : NO_CLASS;
    tile[i] = Key(static_cast<unsigned>(y)) << 32
        | static_cast<unsigned>(first + i);
  }
  SortTile(tile, count);
  for (int i = threadIdx.x; i < here; i += THREADS) {
    keys[first + i] = tile[i];
  }
}

// The block's sample: its coefficients, and the margin on its target logit.
//
// bad_label, in host memory that the device can write, gets the number of a
// sample with a label that is no class in its upper half and the label, as
// float, in the lower. One store, so the halves belong together.
template <typename Dtype>
static __device__ void ForwardSample(int sample, const Labels& of,
    int num_features, int margin, double lambda, const Dtype* __restrict__ x,
    const Dtype* __restrict__ labels, const Dtype* __restrict__ w,
    Dtype* __restrict__ logits, Coefficients* __restrict__ coefficients,
    volatile unsigned long long* bad_label) {
  const double label = labels[sample];
  if (of.Ignored(label)) { return; }
  if (!of.Valid(label)) {
    if (threadIdx.x == 0) {
      *bad_label = static_cast<unsigned long long>(sample) << 32
          | __float_as_uint(static_cast<float>(label));
    }
    return;
  }
  if (margin == 1) { return; }

  const int y = static_cast<int>(label);
  x += static_cast<size_t>(sample) * num_features;
  w += static_cast<size_t>(y) * num_features;
  Dtype* const logit = logits + static_cast<size_t>(sample) * of.num_classes
      + y;
  const double f = *logit;
  // The barriers inside also keep the read of f before the write below.
  const Pair norms = Norms(x, w, num_features);
  if (!Usable(norms.x) || !Usable(norms.w) || !isfinite(f)) {
    // |w| stays: the class's other samples may use it.
    if (threadIdx.x == 0) { coefficients[sample] = {0, 0, 0, norms.w}; }
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
}

// The first num_tiles blocks sort, which takes longest; then a block a sample.
template <typename Dtype>
static __device__ void Forward(int num_samples, int num_tiles,
    const Labels& of, int num_features, int margin, double lambda,
    const Dtype* x, const Dtype* labels, const Dtype* w, Dtype* logits,
    Coefficients* coefficients, Key* keys,
    volatile unsigned long long* bad_label) {
  const int block = blockIdx.x;
  if (block < num_tiles) {
    MakeKeys(num_samples, of, labels, block, keys);
  } else {
    ForwardSample(block - num_tiles, of, num_features, margin, lambda, x,
        labels, w, logits, coefficients, bad_label);
  }
}

// Merges neighbouring sorted runs of `from`, each `run` long but for the last:
// a key's place is its own in its run plus the keys before it in the other.
static __device__ void Merge(int num_samples, int run,
    const Key* __restrict__ from, Key* __restrict__ to) {
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

// The key at a place, one without a class behind the last.
static __device__ Key KeyAt(const Key* __restrict__ keys, int num_samples,
    int place) {
  return place < num_samples ? keys[place] : ~Key(0);
}

// A thread a place among the keys. Puts g (1 + a) in the place of the target
// entry g of `diff`, which it keeps in `entries`, by sample. Where the keys are
// sorted, sums[place] becomes the sum of g b |x| over the samples of its class
// from this place to the block's last.
template <typename Dtype>
static __device__ void Fold(int num_samples, int num_classes,
    const Coefficients* __restrict__ coefficients,
    const Key* __restrict__ keys, Dtype* __restrict__ diff,
    Dtype* __restrict__ entries, double* __restrict__ sums) {
  __shared__ double terms[2][THREADS];
  __shared__ int classes[THREADS];
  const int thread = threadIdx.x;
  const int place = blockIdx.x * THREADS + thread;
  const Key key = KeyAt(keys, num_samples, place);
  const int y = ClassOf(key);
  double sum = 0;
  if (y != NO_CLASS) {
    const int sample = SampleOf(key);
    const Coefficients of = coefficients[sample];
    if (of.x != 0) {
      Dtype* const entry = diff + static_cast<size_t>(sample) * num_classes + y;
      const Dtype g = *entry;
      entries[sample] = g;
      *entry = static_cast<Dtype>(g * (1 + of.a));
      sum = g * of.b * of.x;
    }
  }
  classes[thread] = y;
  int now = 0;
  for (int distance = 1; distance < THREADS; distance *= 2) {
    terms[now][thread] = sum;
    __syncthreads();
    const int other = thread + distance;
    if (other < THREADS && classes[other] == y) { sum += terms[now][other]; }
    now = 1 - now;  // so that no barrier is needed before the next store
  }
  if (place < num_samples) { sums[place] = sum; }
}

// The block's place among the keys: puts its sample's target entry back and
// adds to the sample's row of dx, or, as a block of the grid's second row, to
// the row of dW of its class, if it is the first of it. dx may be null.
template <typename Dtype>
static __device__ void Backward(int num_samples, int num_classes,
    int num_features, const Dtype* __restrict__ x, const Dtype* __restrict__ w,
    const Coefficients* __restrict__ coefficients,
    const Key* __restrict__ keys, const Dtype* __restrict__ entries,
    const double* __restrict__ sums, Dtype* __restrict__ diff,
    Dtype* __restrict__ dx, Dtype* __restrict__ dw) {
  const int place = blockIdx.x;
  const Key key = keys[place];
  const int y = ClassOf(key);
  if (y == NO_CLASS) { return; }
  const int sample = SampleOf(key);
  const size_t x_row = static_cast<size_t>(sample) * num_features;
  const size_t w_row = static_cast<size_t>(y) * num_features;
  if (blockIdx.y == 0) {
    const Coefficients of = coefficients[sample];
    if (of.x == 0) { return; }
    const Dtype entry = entries[sample];
    if (threadIdx.x == 0) {
      diff[static_cast<size_t>(sample) * num_classes + y] = entry;
    }
    if (dx) {
      const Factor factor = {entry * of.b, of.w, of.x};
      AddScaled(dx + x_row, factor, x + x_row, num_features);
    }
    return;
  }
  if (place > 0 && ClassOf(keys[place - 1]) == y) { return; }
  // The class ends in the block of Fold that it begins in, or goes on.
  double sum = sums[place];
  const int next = (place / THREADS + 1) * THREADS;
  if (ClassOf(KeyAt(keys, num_samples, next)) == y) {
    Pair more = {0, 0};
    for (long long i = next + static_cast<long long>(threadIdx.x) * THREADS;
        i < num_samples && ClassOf(keys[i]) == y; i += THREADS * THREADS) {
      more.w += sums[i];
    }
    sum += JoinBlock<Add>(more).w;
  }
  const Factor factor = {sum, 1, coefficients[sample].w};
  AddScaled(dw + w_row, factor, w + w_row, num_features);
}

// Without __launch_bounds__: with it, nvcc spills, to fit in more blocks.
#define KERNEL extern "C" __global__ void

#define KERNELS(Dtype, suffix) \
  KERNEL large_margin_forward_##suffix(int num_samples, int num_tiles, \
      Labels of, int num_features, int margin, double lambda, \
      const Dtype* __restrict__ x, const Dtype* __restrict__ labels, \
      const Dtype* __restrict__ w, Dtype* __restrict__ logits, \
      Coefficients* __restrict__ coefficients, Key* __restrict__ keys, \
      unsigned long long* bad_label) { \
    Forward<Dtype>(num_samples, num_tiles, of, num_features, margin, lambda, \
        x, labels, w, logits, coefficients, keys, bad_label); \
  } \
  KERNEL large_margin_merge_##suffix(int num_samples, int run, \
      const Key* __restrict__ from, Key* __restrict__ to) { \
    Merge(num_samples, run, from, to); \
  } \
  KERNEL large_margin_fold_##suffix(int num_samples, int num_classes, \
      const Coefficients* __restrict__ coefficients, \
      const Key* __restrict__ keys, Dtype* __restrict__ diff, \
      Dtype* __restrict__ entries, double* __restrict__ sums) { \
    Fold<Dtype>(num_samples, num_classes, coefficients, keys, diff, entries, \
        sums); \
  } \
  KERNEL large_margin_backward_##suffix(int num_samples, int num_classes, \
      int num_features, const Dtype* __restrict__ x, \
      const Dtype* __restrict__ w, \
      const Coefficients* __restrict__ coefficients, \
      const Key* __restrict__ keys, const Dtype* __restrict__ entries, \
      const double* __restrict__ sums, Dtype* __restrict__ diff, \
      Dtype* __restrict__ dx, Dtype* __restrict__ dw) { \
    Backward<Dtype>(num_samples, num_classes, num_features, x, w, \
        coefficients, keys, entries, sums, diff, dx, dw); \
  }

KERNELS(float, f32)
KERNELS(double, f64)
