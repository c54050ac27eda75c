// The BN layer on the GPU: bound by memory, so by the number of passes.
//
// Forward reads x for the statistics, then reads x and writes y. Backward
// reads g and x for two sums, then reads both and writes dx. A reduction has
// two stages, both in a fixed order: a channel's values are cut into parts of a
// block each, so that few channels fill the device too, and a warp a channel
// joins the parts. Statistics merge by the formula of Chan, Golub and LeVeque,
// as on the CPU.
//
// A channel's S values of one sample lie together. Where S is long, a block
// reduces segments of one channel (Segments). Where S is short, the rows of a
// sample are columns of a matrix and a warp reads 32 neighbouring columns
// (Columns); a channel then has S columns to join.

// THREADS, WARP, LOAD and the sizes of structs come from src/cuda/layout.rs.

// Of a block that reduces columns.
#define ROWS (THREADS / WARP)
#define FULL_MASK 0xffffffffu
// Values that a thread reads at once, so that its loads overlap, and reduces in
// registers, in Dtype, before double comes in: few GPUs are fast in double.
#define GROUP 16

// How a bottom's values lie and how a reduction is cut.
struct Shape {
  int samples;    // N
  int channels;   // C
  int positions;  // S
  int parts;      // of a block's values
};
static_assert(sizeof(Shape) == SHAPE, "src/cuda/layout.rs");

// Mean and sum of squared distances from it, of count values; or, in a
// backward pass, sum of g in mean and sum of g x_hat in m2.
struct Partial {
  double count;
  double mean;
  double m2;
};
static_assert(sizeof(Partial) == PARTIAL, "src/cuda/layout.rs");

// What a pass over the values needs of a channel. The mean is in two parts:
// x - high - low keeps the digits of x where the mean has more of them than
// Dtype.
template <typename Dtype>
struct Channel {
  Dtype high;
  Dtype low;
  Dtype inv_std;
  Dtype mean_g;
  Dtype mean_g_x_hat;
};
static_assert(sizeof(Channel<double>) == CHANNEL * sizeof(double),
    "src/cuda/layout.rs");

// ---- Values ----

// As many values as one load brings.
template <typename Dtype, int V>
struct alignas(sizeof(Dtype) * V) Vector {
  Dtype v[V];
};

template <typename Dtype>
static __device__ Dtype XHat(Dtype x, const Channel<Dtype>& c) {
  return ((x - c.high) - c.low) * c.inv_std;
}

// The channel's coefficients; where x has been normalised already, those that
// leave it as it is.
template <typename Dtype>
static __device__ Channel<Dtype> Of(const Channel<Dtype>* channels,
    size_t channel, bool x_is_hat) {
  Channel<Dtype> c = channels[channel];
  if (x_is_hat) {
    c.high = 0;
    c.low = 0;
    c.inv_std = 1;
  }
  return c;
}

template <typename Dtype, int V>
static __device__ Vector<Dtype, V> Load(const Dtype* from, size_t at) {
  return *reinterpret_cast<const Vector<Dtype, V>*>(from + at);
}

// The first `loads` vectors of V values each of a group, at offsets `at`.
template <typename Dtype, int V>
static __device__ void LoadGroup(const Dtype* from,
    const unsigned (&at)[GROUP / V], int loads, Dtype (&values)[GROUP]) {
  for (int j = 0; j < GROUP / V; ++j) {
    Vector<Dtype, V> vector = {};
    if (j < loads) { vector = Load<Dtype, V>(from, at[j]); }
    for (int i = 0; i < V; ++i) { values[j * V + i] = vector.v[i]; }
  }
}

// ---- Reductions ----

static __device__ void Merge(Partial* all, const Partial& more) {
  if (more.count == 0) { return; }
  const double count = all->count + more.count;
  const double distance = more.mean - all->mean;
  const double share = more.count / count;
  all->mean += distance * share;
  all->m2 += more.m2 + distance * distance * all->count * share;
  all->count = count;
}

// The sum of a group's terms, which are overwritten.
template <typename Sum>
static __device__ Sum Total(Sum (&terms)[GROUP]) {
  for (int half = GROUP / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) { terms[i] += terms[i + half]; }
  }
  return terms[0];
}

static __device__ bool Finite(double value) {
  return !isinf(value) && !isnan(value);
}

// The moments of the first `loads` vectors of a group, made in Sum.
template <typename Sum, int V, typename Dtype>
static __device__ Partial MomentsIn(const Dtype (&x)[GROUP], int loads) {
  // All relative to one value of the group: far from zero the differences
  // keep the digits that the values have not.
  Sum terms[GROUP];
  for (int i = 0; i < GROUP; ++i) {
    terms[i] = i / V < loads ? static_cast<Sum>(x[i]) - x[0] : Sum(0);
  }
  const Sum mean = Total(terms) / (loads * V);
  for (int i = 0; i < GROUP; ++i) {
    const Sum distance = (static_cast<Sum>(x[i]) - x[0]) - mean;
    terms[i] = i / V < loads ? distance * distance : Sum(0);
  }
  Partial group;
  group.count = loads * V;
  group.mean = static_cast<double>(x[0]) + mean;
  group.m2 = Total(terms);
  return group;
}

template <int V, typename Dtype>
static __device__ Partial GroupMoments(const Dtype (&x)[GROUP], int loads) {
  const Partial group = MomentsIn<Dtype, V>(x, loads);
  // Squares and sums of float may leave its range, but not that of double.
  if (sizeof(Dtype) < sizeof(double) && !Finite(group.m2)) {
    return MomentsIn<double, V>(x, loads);
  }
  return group;
}

// The sums of g and g x_hat over the first `loads` vectors of a group, with
// products and sums in Sum.
template <typename Sum, int V, typename Dtype>
static __device__ Partial GradientsIn(const Dtype (&g)[GROUP],
    const Dtype (&x)[GROUP], const Channel<Dtype>& channel, int loads) {
  Partial group;
  Sum terms[GROUP];
  for (int i = 0; i < GROUP; ++i) {
    terms[i] = i / V < loads ? static_cast<Sum>(g[i]) : Sum(0);
  }
  group.mean = Total(terms);
  for (int i = 0; i < GROUP; ++i) {
    terms[i] = i / V < loads
        ? static_cast<Sum>(g[i]) * XHat(x[i], channel) : Sum(0);
  }
  group.m2 = Total(terms);
  return group;
}

template <int V, typename Dtype>
static __device__ Partial GroupGradients(const Dtype (&g)[GROUP],
    const Dtype (&x)[GROUP], const Channel<Dtype>& channel, int loads) {
  const Partial group = GradientsIn<Dtype, V>(g, x, channel, loads);
  if (sizeof(Dtype) < sizeof(double)
      && !(Finite(group.mean) && Finite(group.m2))) {
    return GradientsIn<double, V>(g, x, channel, loads);
  }
  return group;
}

static __device__ Partial ShuffleDown(const Partial& p, int offset) {
  Partial other;
  other.count = __shfl_down_sync(FULL_MASK, p.count, offset);
  other.mean = __shfl_down_sync(FULL_MASK, p.mean, offset);
  other.m2 = __shfl_down_sync(FULL_MASK, p.m2, offset);
  return other;
}

// What joins two partials: moments merge, sums add.
struct JoinMoments {
  static __device__ void Join(Partial* all, const Partial& more) {
    Merge(all, more);
  }
};
struct JoinSums {
  static __device__ void Join(Partial* all, const Partial& more) {
    all->mean += more.mean;
    all->m2 += more.m2;
  }
};

// The join over a warp, in lane 0.
template <typename How>
static __device__ Partial JoinWarp(Partial p) {
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    How::Join(&p, ShuffleDown(p, offset));
  }
  return p;
}

// The join over a block, in thread 0.
template <typename How>
static __device__ Partial JoinBlock(Partial p) {
  __shared__ Partial warps[THREADS / WARP];
  p = JoinWarp<How>(p);
  if (threadIdx.x % WARP == 0) { warps[threadIdx.x / WARP] = p; }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < THREADS / WARP; ++i) { How::Join(&p, warps[i]); }
  }
  return p;
}

// The join over the rows of a block that reduces columns, in row 0.
template <typename How>
static __device__ Partial JoinRows(Partial p) {
  __shared__ Partial rows[ROWS][WARP];
  const int lane = threadIdx.x % WARP;
  const int row = threadIdx.x / WARP;
  rows[row][lane] = p;
  __syncthreads();
  if (row == 0) {
    for (int i = 1; i < ROWS; ++i) { How::Join(&p, rows[i][lane]); }
  }
  return p;
}

// Where part blockIdx.y of `all` begins and ends.
static __device__ void PartRange(const Shape& shape, long long all,
    unsigned* first, unsigned* end) {
  *first = static_cast<unsigned>(all * blockIdx.y / shape.parts);
  *end = static_cast<unsigned>(all * (blockIdx.y + 1) / shape.parts);
}

// Calls see(offsets, loads) for groups of `loads` vectors of V values each
// that a thread reads of a channel's segments, which follow one another for
// this purpose, in its part. A blob has less than 2^31 values.
template <int V, typename See>
static __device__ void ForSegments(const Shape& shape, int channel, See see) {
  const unsigned length = shape.positions / V;
  unsigned i, end;
  PartRange(shape, static_cast<long long>(shape.samples) * length, &i, &end);
  i += threadIdx.x;
  const unsigned sample = static_cast<unsigned>(shape.channels)
      * shape.positions;
  const unsigned start = static_cast<unsigned>(channel) * shape.positions;
  // One division; then sample and position are stepped.
  unsigned n = i / length;
  unsigned position = i % length;
  while (i < end) {
    unsigned at[GROUP / V];
    int loads = 0;
    for (int j = 0; j < GROUP / V; ++j, i += THREADS) {
      at[j] = n * sample + start + position * V;
      loads += i < end;
      n += THREADS / length;
      position += THREADS % length;
      if (position >= length) {
        position -= length;
        ++n;
      }
    }
    see(at, loads);
  }
}

// Calls see(offsets, loads) for groups of values that a thread reads of its
// column in its part.
template <typename See>
static __device__ void ForColumn(const Shape& shape, See see) {
  const unsigned columns = static_cast<unsigned>(shape.channels)
      * shape.positions;
  const unsigned column = blockIdx.x * WARP + threadIdx.x % WARP;
  if (column >= columns) { return; }
  unsigned n, end;
  PartRange(shape, shape.samples, &n, &end);
  n += threadIdx.x / WARP;
  while (n < end) {
    unsigned at[GROUP];
    int loads = 0;
    for (int j = 0; j < GROUP; ++j, n += ROWS) {
      at[j] = n * columns + column;
      loads += n < end;
    }
    see(at, loads);
  }
}

template <typename Dtype, int V>
static __device__ void SegmentMoments(const Shape& shape, const Dtype* x,
    Partial* partials) {
  Partial all = {0, 0, 0};
  ForSegments<V>(shape, blockIdx.x,
      [&](const unsigned (&at)[GROUP / V], int loads) {
    Dtype values[GROUP];
    LoadGroup<Dtype, V>(x, at, loads, values);
    Merge(&all, GroupMoments<V>(values, loads));
  });
  all = JoinBlock<JoinMoments>(all);
  if (threadIdx.x == 0) {
    partials[static_cast<size_t>(blockIdx.y) * shape.channels + blockIdx.x] =
        all;
  }
}

template <typename Dtype>
static __device__ void ColumnMoments(const Shape& shape, const Dtype* x,
    Partial* partials) {
  Partial all = {0, 0, 0};
  ForColumn(shape, [&](const unsigned (&at)[GROUP], int loads) {
    Dtype values[GROUP];
    LoadGroup<Dtype, 1>(x, at, loads, values);
    Merge(&all, GroupMoments<1>(values, loads));
  });
  all = JoinRows<JoinMoments>(all);
  const size_t columns = static_cast<size_t>(shape.channels) * shape.positions;
  const size_t column = static_cast<size_t>(blockIdx.x) * WARP + threadIdx.x;
  if (threadIdx.x < WARP && column < columns) {
    partials[blockIdx.y * columns + column] = all;
  }
}

template <typename Dtype, int V>
static __device__ void SegmentGradients(const Shape& shape, const Dtype* g,
    const Dtype* x, bool x_is_hat, const Channel<Dtype>* channels,
    Partial* partials) {
  const Channel<Dtype> channel = Of(channels, blockIdx.x, x_is_hat);
  Partial sums = {0, 0, 0};
  ForSegments<V>(shape, blockIdx.x,
      [&](const unsigned (&at)[GROUP / V], int loads) {
    Dtype gs[GROUP], xs[GROUP];
    LoadGroup<Dtype, V>(g, at, loads, gs);
    LoadGroup<Dtype, V>(x, at, loads, xs);
    JoinSums::Join(&sums, GroupGradients<V>(gs, xs, channel, loads));
  });
  sums = JoinBlock<JoinSums>(sums);
  if (threadIdx.x == 0) {
    partials[static_cast<size_t>(blockIdx.y) * shape.channels + blockIdx.x] =
        sums;
  }
}

template <typename Dtype>
static __device__ void ColumnGradients(const Shape& shape, const Dtype* g,
    const Dtype* x, bool x_is_hat, const Channel<Dtype>* channels,
    Partial* partials) {
  const size_t columns = static_cast<size_t>(shape.channels) * shape.positions;
  const size_t column = static_cast<size_t>(blockIdx.x) * WARP
      + threadIdx.x % WARP;
  const Channel<Dtype> channel = Of(channels,
      column < columns ? column / shape.positions : 0, x_is_hat);
  Partial sums = {0, 0, 0};
  ForColumn(shape, [&](const unsigned (&at)[GROUP], int loads) {
    Dtype gs[GROUP], xs[GROUP];
    LoadGroup<Dtype, 1>(g, at, loads, gs);
    LoadGroup<Dtype, 1>(x, at, loads, xs);
    JoinSums::Join(&sums, GroupGradients<1>(gs, xs, channel, loads));
  });
  sums = JoinRows<JoinSums>(sums);
  if (threadIdx.x < WARP && column < columns) {
    partials[blockIdx.y * columns + column] = sums;
  }
}

// The join of a channel's partials, in lane 0 of its warp: of each part the
// `width` ones of the channel. Negative where the warp has no channel.
template <typename How>
static __device__ int JoinParts(const Shape& shape, int width,
    const Partial* partials, Partial* all) {
  const int channel = blockIdx.x * ROWS + threadIdx.x / WARP;
  if (channel >= shape.channels) { return -1; }
  const int lane = threadIdx.x % WARP;
  const size_t row = static_cast<size_t>(shape.channels) * width;
  const size_t start = static_cast<size_t>(channel) * width;
  Partial sum = {0, 0, 0};
  for (int i = lane; i < shape.parts * width; i += WARP) {
    How::Join(&sum, partials[i / width * row + start + i % width]);
  }
  *all = JoinWarp<How>(sum);
  return lane == 0 ? channel : -1;
}

template <typename Dtype>
static __device__ void FinishMoments(const Shape& shape, int width,
    double momentum, double eps, const Partial* partials, Dtype* moving_mean,
    Dtype* moving_inv_std, Channel<Dtype>* channels,
    volatile unsigned long long* constant_channel) {
  Partial all;
  const int c = JoinParts<JoinMoments>(shape, width, partials, &all);
  if (c < 0) { return; }
  if (all.m2 == 0) { *constant_channel = c; }
  const double inv_std = 1 / sqrt(all.m2 / all.count + eps);
  const Dtype high = static_cast<Dtype>(all.mean);
  channels[c].high = high;
  channels[c].low =
      static_cast<Dtype>(all.mean - static_cast<double>(high));
  channels[c].inv_std = static_cast<Dtype>(inv_std);
  moving_mean[c] = static_cast<Dtype>(
      momentum * moving_mean[c] + (1 - momentum) * all.mean);
  moving_inv_std[c] = static_cast<Dtype>(
      momentum * moving_inv_std[c] + (1 - momentum) * inv_std);
}

template <typename Dtype>
static __device__ void FinishGradients(const Shape& shape, int width,
    const Partial* partials, Dtype* slope_diff, Dtype* bias_diff,
    Channel<Dtype>* channels) {
  Partial all;
  const int c = JoinParts<JoinSums>(shape, width, partials, &all);
  if (c < 0) { return; }
  const double share =
      1 / (static_cast<double>(shape.samples) * shape.positions);
  channels[c].mean_g = static_cast<Dtype>(all.mean * share);
  channels[c].mean_g_x_hat = static_cast<Dtype>(all.m2 * share);
  if (slope_diff) { slope_diff[c] += static_cast<Dtype>(all.m2); }
  if (bias_diff) { bias_diff[c] += static_cast<Dtype>(all.mean); }
}

// The moving statistics as those of this pass.
template <typename Dtype>
static __device__ void TakeMoving(int num_channels, const Dtype* moving_mean,
    const Dtype* moving_inv_std, Channel<Dtype>* channels) {
  const int c = blockIdx.x * THREADS + threadIdx.x;
  if (c < num_channels) {
    channels[c].high = moving_mean[c];
    channels[c].low = 0;
    channels[c].inv_std = moving_inv_std[c];
  }
}

// ---- Passes over all values ----

// The vectors of V neighbours, each in one channel, that are a thread's.
template <typename Dtype, int V>
struct Place {
  enum { kVectors = LOAD / sizeof(Dtype) / V };
  unsigned at[kVectors];
  unsigned channel[kVectors];
  int vectors;

  // A blob has less than 2^31 values.
  explicit __device__ Place(const Shape& shape) : vectors(0) {
    const unsigned length = shape.positions / V;
    const unsigned channels = shape.channels;
    unsigned i = blockIdx.x * (THREADS * kVectors) + threadIdx.x;
    for (int j = 0; j < kVectors; ++j, i += THREADS) {
      const unsigned row = i / length;
      at[j] = i * V;
      channel[j] = row % channels;
      vectors += row < channels * shape.samples;
    }
  }
  // All before the first store: they may not change places, and overlap.
  __device__ void LoadAll(const Dtype* from,
      Vector<Dtype, V> (&values)[kVectors]) const {
    for (int j = 0; j < kVectors; ++j) {
      if (j < vectors) { values[j] = Load<Dtype, V>(from, at[j]); }
    }
  }
  __device__ void Store(Dtype* to, int j,
      const Vector<Dtype, V>& values) const {
    *reinterpret_cast<Vector<Dtype, V>*>(to + at[j]) = values;
  }
};

// y and, unless null, x_hat. x and y may be the same memory.
template <typename Dtype, int V>
static __device__ void Normalize(const Shape& shape,
    const Channel<Dtype>* channels, const Dtype* slope, const Dtype* bias,
    const Dtype* x, Dtype* y, Dtype* x_hat) {
  const Place<Dtype, V> place(shape);
  Vector<Dtype, V> values[place.kVectors];
  place.LoadAll(x, values);
  for (int j = 0; j < place.kVectors; ++j) {
    if (j >= place.vectors) { break; }
    const unsigned c = place.channel[j];
    const Channel<Dtype> channel = channels[c];
    const Dtype slope_c = slope[c];
    const Dtype bias_c = bias[c];
    Vector<Dtype, V> hats, result;
    for (int i = 0; i < V; ++i) {
      hats.v[i] = XHat(values[j].v[i], channel);
      result.v[i] = hats.v[i] * slope_c + bias_c;
    }
    if (x_hat) { place.Store(x_hat, j, hats); }
    place.Store(y, j, result);
  }
}

// dx. g and dx may be the same memory. Without by_batch the statistics are
// the moving ones, which no sample changes, and x is not read.
template <typename Dtype, int V>
static __device__ void PassDown(const Shape& shape,
    const Channel<Dtype>* channels, const Dtype* slope, const Dtype* g,
    const Dtype* x, bool x_is_hat, bool by_batch, Dtype* dx) {
  const Place<Dtype, V> place(shape);
  Vector<Dtype, V> gs[place.kVectors], xs[place.kVectors];
  place.LoadAll(g, gs);
  if (by_batch) { place.LoadAll(x, xs); }
  for (int j = 0; j < place.kVectors; ++j) {
    if (j >= place.vectors) { break; }
    const unsigned c = place.channel[j];
    const Dtype factor = slope[c] * channels[c].inv_std;
    Vector<Dtype, V> result;
    if (by_batch) {
      const Channel<Dtype> channel = Of(channels, c, x_is_hat);
      for (int i = 0; i < V; ++i) {
        result.v[i] = factor * ((gs[j].v[i] - channel.mean_g)
            - XHat(xs[j].v[i], channel) * channel.mean_g_x_hat);
      }
    } else {
      for (int i = 0; i < V; ++i) { result.v[i] = factor * gs[j].v[i]; }
    }
    place.Store(dx, j, result);
  }
}

// Kernels that load vectors exist for the widest load and for single values;
// by columns there are only single values.
#define VECTOR_KERNELS(Dtype, suffix, V) \
  extern "C" __global__ void bn_segment_moments_##suffix(Shape shape, \
      const Dtype* x, Partial* partials) { \
    SegmentMoments<Dtype, V>(shape, x, partials); \
  } \
  extern "C" __global__ void bn_segment_gradients_##suffix(Shape shape, \
      const Dtype* g, const Dtype* x, int x_is_hat, \
      const Channel<Dtype>* channels, Partial* partials) { \
    SegmentGradients<Dtype, V>(shape, g, x, x_is_hat, channels, partials); \
  } \
  extern "C" __global__ void bn_normalize_##suffix(Shape shape, \
      const Channel<Dtype>* channels, const Dtype* slope, const Dtype* bias, \
      const Dtype* x, Dtype* y, Dtype* x_hat) { \
    Normalize<Dtype, V>(shape, channels, slope, bias, x, y, x_hat); \
  } \
  extern "C" __global__ void bn_pass_down_##suffix(Shape shape, \
      const Channel<Dtype>* channels, const Dtype* slope, const Dtype* g, \
      const Dtype* x, int x_is_hat, int by_batch, Dtype* dx) { \
    PassDown<Dtype, V>(shape, channels, slope, g, x, x_is_hat, by_batch, \
        dx); \
  }

#define KERNELS(Dtype, suffix) \
  extern "C" __global__ void bn_column_moments_##suffix(Shape shape, \
      const Dtype* x, Partial* partials) { \
    ColumnMoments<Dtype>(shape, x, partials); \
  } \
  extern "C" __global__ void bn_column_gradients_##suffix(Shape shape, \
      const Dtype* g, const Dtype* x, int x_is_hat, \
      const Channel<Dtype>* channels, Partial* partials) { \
    ColumnGradients<Dtype>(shape, g, x, x_is_hat, channels, partials); \
  } \
  extern "C" __global__ void bn_finish_moments_##suffix(Shape shape, \
      int width, double momentum, double eps, const Partial* partials, \
      Dtype* moving_mean, Dtype* moving_inv_std, Channel<Dtype>* channels, \
      unsigned long long* constant_channel) { \
    FinishMoments<Dtype>(shape, width, momentum, eps, partials, moving_mean, \
        moving_inv_std, channels, constant_channel); \
  } \
  extern "C" __global__ void bn_finish_gradients_##suffix(Shape shape, \
      int width, const Partial* partials, Dtype* slope_diff, \
      Dtype* bias_diff, Channel<Dtype>* channels) { \
    FinishGradients<Dtype>(shape, width, partials, slope_diff, bias_diff, \
        channels); \
  } \
  extern "C" __global__ void bn_take_moving_##suffix(int num_channels, \
      const Dtype* moving_mean, const Dtype* moving_inv_std, \
      Channel<Dtype>* channels) { \
    TakeMoving<Dtype>(num_channels, moving_mean, moving_inv_std, channels); \
  }

KERNELS(float, f32)
KERNELS(double, f64)
VECTOR_KERNELS(float, f32, 1)
VECTOR_KERNELS(double, f64, 1)
VECTOR_KERNELS(float, vec_f32, 4)
VECTOR_KERNELS(double, vec_f64, 2)
