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

// Threads of a block, and the layout of a block that reduces columns;
// src/batch_norm/gpu.rs launches as many.
#define THREADS 256
#define WARP 32
#define ROWS (THREADS / WARP)
#define FULL_MASK 0xffffffffu
// Values whose moments are taken in registers before they are merged.
#define GROUP 8

// How a bottom's values lie and how a reduction is cut.
struct Shape {
  int samples;    // N
  int channels;   // C
  int positions;  // S
  int parts;      // of a block's values
};

// Mean and sum of squared distances from it, of count values; or, in a
// backward pass, sum of g in mean and sum of g x_hat in m2.
struct Partial {
  double count;
  double mean;
  double m2;
};

// What a pass over the values needs of a channel.
struct Channel {
  double mean;
  double inv_std;
  double sum_g;
  double sum_g_x_hat;
};

// ---- Values ----

// As many values as one load brings.
template <typename Dtype, int V>
struct alignas(sizeof(Dtype) * V) Vector {
  Dtype v[V];
};

// The mean in two parts: x - high - low keeps the digits of x where the mean
// has more of them than Dtype.
template <typename Dtype>
struct Whitening {
  Dtype high;
  Dtype low;
  Dtype inv_std;
};

// With x_is_hat, x has been normalised already.
template <typename Dtype>
static __device__ Whitening<Dtype> GetWhitening(const Channel& c,
    bool x_is_hat) {
  Whitening<Dtype> w;
  w.high = x_is_hat ? Dtype(0) : static_cast<Dtype>(c.mean);
  w.low = x_is_hat ? Dtype(0)
      : static_cast<Dtype>(c.mean - static_cast<double>(w.high));
  w.inv_std = x_is_hat ? Dtype(1) : static_cast<Dtype>(c.inv_std);
  return w;
}

template <typename Dtype>
static __device__ Dtype XHat(Dtype x, const Whitening<Dtype>& w) {
  return ((x - w.high) - w.low) * w.inv_std;
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

// Collects the moments of the values that a thread sees.
template <typename Dtype>
struct Moments {
  Partial sum;
  Dtype group[GROUP];
  int pending;

  __device__ Moments() : pending(0) {
    sum.count = 0;
    sum.mean = 0;
    sum.m2 = 0;
  }
  __device__ void Add(Dtype x) {
    // Shifted in, so that the compiler can keep the group in registers.
    for (int i = GROUP - 1; i > 0; --i) { group[i] = group[i - 1]; }
    group[0] = x;
    if (++pending == GROUP) { Flush(); }
  }
  __device__ Partial Finish() {
    Flush();
    return sum;
  }

 private:
  __device__ void Flush() {
    if (pending == 0) { return; }
    // All relative to one value of the group: far from zero the differences
    // keep the digits that the values have not.
    Dtype mean = 0;
    for (int i = 0; i < GROUP; ++i) {
      if (i < pending) { mean += group[i] - group[0]; }
    }
    mean /= pending;
    double m2 = 0;
    for (int i = 0; i < GROUP; ++i) {
      const double distance = i < pending ? (group[i] - group[0]) - mean : 0;
      m2 += distance * distance;
    }
    Partial more;
    more.count = pending;
    more.mean = static_cast<double>(group[0]) + mean;
    more.m2 = m2;
    Merge(&sum, more);
    pending = 0;
  }
};

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
    long long* first, long long* end) {
  *first = all * blockIdx.y / shape.parts;
  *end = all * (blockIdx.y + 1) / shape.parts;
}

// Calls see(offset of V values) for what a thread reads of a channel's
// segments, which follow one another for this purpose, in its part.
template <int V, typename See>
static __device__ void ForSegments(const Shape& shape, int channel, See see) {
  const int length = shape.positions / V;
  long long i, end;
  PartRange(shape, static_cast<long long>(shape.samples) * length, &i, &end);
  i += threadIdx.x;
  const size_t sample = static_cast<size_t>(shape.channels) * shape.positions;
  const size_t start = static_cast<size_t>(channel) * shape.positions;
  // One division; then sample and position are stepped.
  long long n = i / length;
  int position = static_cast<int>(i % length);
  for (; i < end; i += THREADS) {
    see(n * sample + start + static_cast<size_t>(position) * V);
    n += THREADS / length;
    position += THREADS % length;
    if (position >= length) {
      position -= length;
      ++n;
    }
  }
}

// Calls see(offset) for what a thread reads of its column in its part.
template <typename See>
static __device__ void ForColumn(const Shape& shape, See see) {
  const size_t columns = static_cast<size_t>(shape.channels) * shape.positions;
  const size_t column = static_cast<size_t>(blockIdx.x) * WARP
      + threadIdx.x % WARP;
  if (column >= columns) { return; }
  long long n, end;
  PartRange(shape, shape.samples, &n, &end);
  for (n += threadIdx.x / WARP; n < end; n += ROWS) {
    see(n * columns + column);
  }
}

template <typename Dtype, int V>
static __device__ Vector<Dtype, V> Load(const Dtype* from, size_t at) {
  return *reinterpret_cast<const Vector<Dtype, V>*>(from + at);
}

template <typename Dtype, int V>
static __device__ void SegmentMoments(const Shape& shape, const Dtype* x,
    Partial* partials) {
  Moments<Dtype> moments;
  ForSegments<V>(shape, blockIdx.x, [&](size_t at) {
    const Vector<Dtype, V> values = Load<Dtype, V>(x, at);
    for (int i = 0; i < V; ++i) { moments.Add(values.v[i]); }
  });
  const Partial all = JoinBlock<JoinMoments>(moments.Finish());
  if (threadIdx.x == 0) {
    partials[static_cast<size_t>(blockIdx.y) * shape.channels + blockIdx.x] =
        all;
  }
}

template <typename Dtype>
static __device__ void ColumnMoments(const Shape& shape, const Dtype* x,
    Partial* partials) {
  Moments<Dtype> moments;
  ForColumn(shape, [&](size_t at) { moments.Add(x[at]); });
  const Partial all = JoinRows<JoinMoments>(moments.Finish());
  const size_t columns = static_cast<size_t>(shape.channels) * shape.positions;
  const size_t column = static_cast<size_t>(blockIdx.x) * WARP + threadIdx.x;
  if (threadIdx.x < WARP && column < columns) {
    partials[blockIdx.y * columns + column] = all;
  }
}

// Adds g and g x_hat to a thread's sums.
template <typename Dtype>
static __device__ void AddGradient(Dtype g, Dtype x,
    const Whitening<Dtype>& whitening, Partial* sums) {
  sums->mean += g;
  sums->m2 += static_cast<double>(g) * XHat(x, whitening);
}

template <typename Dtype, int V>
static __device__ void SegmentGradients(const Shape& shape, const Dtype* g,
    const Dtype* x, bool x_is_hat, const Channel* channels,
    Partial* partials) {
  const Whitening<Dtype> whitening =
      GetWhitening<Dtype>(channels[blockIdx.x], x_is_hat);
  Partial sums = {0, 0, 0};
  ForSegments<V>(shape, blockIdx.x, [&](size_t at) {
    const Vector<Dtype, V> gs = Load<Dtype, V>(g, at);
    const Vector<Dtype, V> xs = Load<Dtype, V>(x, at);
    for (int i = 0; i < V; ++i) {
      AddGradient(gs.v[i], xs.v[i], whitening, &sums);
    }
  });
  sums = JoinBlock<JoinSums>(sums);
  if (threadIdx.x == 0) {
    partials[static_cast<size_t>(blockIdx.y) * shape.channels + blockIdx.x] =
        sums;
  }
}

template <typename Dtype>
static __device__ void ColumnGradients(const Shape& shape, const Dtype* g,
    const Dtype* x, bool x_is_hat, const Channel* channels,
    Partial* partials) {
  const size_t columns = static_cast<size_t>(shape.channels) * shape.positions;
  const size_t column = static_cast<size_t>(blockIdx.x) * WARP
      + threadIdx.x % WARP;
  const size_t channel = column < columns ? column / shape.positions : 0;
  const Whitening<Dtype> whitening =
      GetWhitening<Dtype>(channels[channel], x_is_hat);
  Partial sums = {0, 0, 0};
  ForColumn(shape, [&](size_t at) {
    AddGradient(g[at], x[at], whitening, &sums);
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
    Dtype* moving_inv_std, Channel* channels) {
  Partial all;
  const int c = JoinParts<JoinMoments>(shape, width, partials, &all);
  if (c < 0) { return; }
  const double inv_std = 1 / sqrt(all.m2 / all.count + eps);
  channels[c].mean = all.mean;
  channels[c].inv_std = inv_std;
  moving_mean[c] = static_cast<Dtype>(
      momentum * moving_mean[c] + (1 - momentum) * all.mean);
  moving_inv_std[c] = static_cast<Dtype>(
      momentum * moving_inv_std[c] + (1 - momentum) * inv_std);
}

template <typename Dtype>
static __device__ void FinishGradients(const Shape& shape, int width,
    const Partial* partials, Dtype* slope_diff, Dtype* bias_diff,
    Channel* channels) {
  Partial all;
  const int c = JoinParts<JoinSums>(shape, width, partials, &all);
  if (c < 0) { return; }
  channels[c].sum_g = all.mean;
  channels[c].sum_g_x_hat = all.m2;
  if (slope_diff) { slope_diff[c] += static_cast<Dtype>(all.m2); }
  if (bias_diff) { bias_diff[c] += static_cast<Dtype>(all.mean); }
}

// The moving statistics as those of this pass.
template <typename Dtype>
static __device__ void TakeMoving(int num_channels, const Dtype* moving_mean,
    const Dtype* moving_inv_std, Channel* channels) {
  const int c = blockIdx.x * THREADS + threadIdx.x;
  if (c < num_channels) {
    channels[c].mean = moving_mean[c];
    channels[c].inv_std = moving_inv_std[c];
  }
}

// ---- Passes over all values ----

// Calls see(channel, offset of V neighbours, all of that channel) for each
// vector of the bottom, several a thread, so that loads overlap.
template <int V, typename See>
static __device__ void ForAll(const Shape& shape, See see) {
  const unsigned length = shape.positions / V;
  const size_t vectors = static_cast<size_t>(shape.samples) * shape.channels
      * length;
  const size_t stride = static_cast<size_t>(gridDim.x) * THREADS;
  for (size_t i = static_cast<size_t>(blockIdx.x) * THREADS + threadIdx.x;
       i < vectors; i += stride) {
    // A blob has less than 2^31 values.
    const unsigned row = static_cast<unsigned>(i) / length;
    see(row % static_cast<unsigned>(shape.channels), i * V);
  }
}

// y and, unless null, x_hat. x and y may be the same memory.
template <typename Dtype, int V>
static __device__ void Normalize(const Shape& shape, const Channel* channels,
    const Dtype* slope, const Dtype* bias, const Dtype* x, Dtype* y,
    Dtype* x_hat) {
  ForAll<V>(shape, [&](unsigned c, size_t at) {
    const Whitening<Dtype> whitening =
        GetWhitening<Dtype>(channels[c], false);
    const Dtype slope_c = slope[c];
    const Dtype bias_c = bias[c];
    const Vector<Dtype, V> values = Load<Dtype, V>(x, at);
    Vector<Dtype, V> hats, result;
    for (int i = 0; i < V; ++i) {
      hats.v[i] = XHat(values.v[i], whitening);
      result.v[i] = hats.v[i] * slope_c + bias_c;
    }
    if (x_hat) { *reinterpret_cast<Vector<Dtype, V>*>(x_hat + at) = hats; }
    *reinterpret_cast<Vector<Dtype, V>*>(y + at) = result;
  });
}

// dx. g and dx may be the same memory. Without by_batch the statistics are
// the moving ones, which no sample changes, and x is not read.
template <typename Dtype, int V>
static __device__ void PassDown(const Shape& shape, const Channel* channels,
    const Dtype* slope, const Dtype* g, const Dtype* x, bool x_is_hat,
    bool by_batch, Dtype* dx) {
  const double share =
      1 / (static_cast<double>(shape.samples) * shape.positions);
  ForAll<V>(shape, [&](unsigned c, size_t at) {
    const Channel channel = channels[c];
    const Dtype factor = static_cast<Dtype>(slope[c] * channel.inv_std);
    const Vector<Dtype, V> gs = Load<Dtype, V>(g, at);
    Vector<Dtype, V> result;
    if (by_batch) {
      const Whitening<Dtype> whitening =
          GetWhitening<Dtype>(channel, x_is_hat);
      const Dtype mean_g = static_cast<Dtype>(channel.sum_g * share);
      const Dtype mean_g_x_hat =
          static_cast<Dtype>(channel.sum_g_x_hat * share);
      const Vector<Dtype, V> xs = Load<Dtype, V>(x, at);
      for (int i = 0; i < V; ++i) {
        result.v[i] = factor
            * ((gs.v[i] - mean_g) - XHat(xs.v[i], whitening) * mean_g_x_hat);
      }
    } else {
      for (int i = 0; i < V; ++i) { result.v[i] = factor * gs.v[i]; }
    }
    *reinterpret_cast<Vector<Dtype, V>*>(dx + at) = result;
  });
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
      const Channel* channels, Partial* partials) { \
    SegmentGradients<Dtype, V>(shape, g, x, x_is_hat, channels, partials); \
  } \
  extern "C" __global__ void bn_normalize_##suffix(Shape shape, \
      const Channel* channels, const Dtype* slope, const Dtype* bias, \
      const Dtype* x, Dtype* y, Dtype* x_hat) { \
    Normalize<Dtype, V>(shape, channels, slope, bias, x, y, x_hat); \
  } \
  extern "C" __global__ void bn_pass_down_##suffix(Shape shape, \
      const Channel* channels, const Dtype* slope, const Dtype* g, \
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
      const Channel* channels, Partial* partials) { \
    ColumnGradients<Dtype>(shape, g, x, x_is_hat, channels, partials); \
  } \
  extern "C" __global__ void bn_finish_moments_##suffix(Shape shape, \
      int width, double momentum, double eps, const Partial* partials, \
      Dtype* moving_mean, Dtype* moving_inv_std, Channel* channels) { \
    FinishMoments<Dtype>(shape, width, momentum, eps, partials, moving_mean, \
        moving_inv_std, channels); \
  } \
  extern "C" __global__ void bn_finish_gradients_##suffix(Shape shape, \
      int width, const Partial* partials, Dtype* slope_diff, \
      Dtype* bias_diff, Channel* channels) { \
    FinishGradients<Dtype>(shape, width, partials, slope_diff, bias_diff, \
        channels); \
  } \
  extern "C" __global__ void bn_take_moving_##suffix(int num_channels, \
      const Dtype* moving_mean, const Dtype* moving_inv_std, \
      Channel* channels) { \
    TakeMoving<Dtype>(num_channels, moving_mean, moving_inv_std, channels); \
  }

KERNELS(float, f32)
KERNELS(double, f64)
VECTOR_KERNELS(float, f32, 1)
VECTOR_KERNELS(double, f64, 1)
VECTOR_KERNELS(float, vec_f32, 4)
VECTOR_KERNELS(double, vec_f64, 2)
