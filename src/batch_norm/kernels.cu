// The BN layer on the GPU: bound by memory, so by the number of passes.
//
// Forward reads x for the statistics, then reads x and writes y. Backward
// reads g and x for two sums, then reads both and writes dx. A reduction has
// two stages, both in a fixed order: a channel's values are cut into parts of a
// block each, so that few channels fill the device too, and a warp a channel
// joins the parts.
//
// A channel's S values of one sample lie together. Where S is long, a block
// reduces segments of one channel (Segments). Where S is short, the values of a
// sample are a row of a matrix and a warp reads 32 neighbouring columns
// (Columns); a channel then has S columns to join.
//
// Moments are sums like any other: of D and of D^2, D being a value's distance
// from a reference that is one of the values. With their mean at m, the squared
// distances from it are sum D^2 - n (r - m)^2, and no less than the reference's
// own, (r - m)^2: of n values, the difference of two sums in double loses no
// more than n units of the last place, however far from zero the values lie.
// Threads and parts join as the formula of Chan, Golub and LeVeque has it: sums
// move to a common reference, by products alone. Only a block's mean takes a
// division.

// THREADS, WARP, LOAD, PASS, GROUP and the sizes of structs come from
// src/cuda/layout.rs. GROUP is what a thread reads at once, so that its loads
// overlap, and reduces in registers, in float, before double comes in: few
// GPUs are fast in double.

// Of a block that reduces columns.
#define ROWS (THREADS / WARP)
#define FULL_MASK 0xffffffffu

// What no integer division is needed for: n / divisor, for n below 2^31.
struct Divisor {
  unsigned divisor;
  unsigned magic;
  unsigned shift;
};

static __device__ unsigned Divide(unsigned n, const Divisor& by) {
  return by.divisor == 1 ? n : __umulhi(n, by.magic) >> by.shift;
}

// How a bottom's values lie and how a reduction is cut.
struct Shape {
  int samples;    // N
  int channels;   // C
  int positions;  // S
  int width;      // columns of a channel that are reduced apart
  int parts;      // of a block's values
  int part;       // values of each part but the last: of a channel, or a column
  int last;       // values of the last part
  Divisor by_length;    // S, in vectors of the kernels that load some
  Divisor by_channels;  // C
};
static_assert(sizeof(Shape) == SHAPE, "src/cuda/layout.rs");

// Two sums. Of a forward pass: of D and of D^2, and as what a part leaves, its
// mean and the sum of squared distances from it. Of a backward pass: of g and
// of g x_hat.
struct alignas(16) Pair {
  double first;
  double second;
};
static_assert(sizeof(Pair) == PAIR, "src/cuda/layout.rs");

// What normalises a channel. The mean is in two parts: x - high - low keeps the
// digits of x where the mean has more of them than Dtype. One load, or two of
// double, brings it.
template <typename Dtype>
struct alignas(16) Statistics {
  Dtype high;
  Dtype low;
  Dtype inv_std;
  Dtype unused;
};
static_assert(sizeof(Statistics<double>) == STATISTICS * sizeof(double),
    "src/cuda/layout.rs");

// Means over a channel that its dx needs.
template <typename Dtype>
struct alignas(2 * sizeof(Dtype)) Means {
  Dtype g;
  Dtype g_x_hat;
};
static_assert(sizeof(Means<double>) == MEANS * sizeof(double),
    "src/cuda/layout.rs");

// ---- Values ----

// As many values as one load brings.
template <typename Dtype, int V>
struct alignas(sizeof(Dtype) * V) Vector {
  Dtype v[V];
};

template <typename Dtype>
static __device__ Dtype XHat(Dtype x, const Statistics<Dtype>& of) {
  return ((x - of.high) - of.low) * of.inv_std;
}

// The channel's statistics; where x has been normalised already, those that
// leave it as it is.
template <typename Dtype>
static __device__ Statistics<Dtype> Of(
    const Statistics<Dtype>* __restrict__ channels, size_t channel,
    bool x_is_hat) {
  Statistics<Dtype> of = channels[channel];
  if (x_is_hat) {
    of.high = 0;
    of.low = 0;
    of.inv_std = 1;
  }
  return of;
}

template <typename Dtype, int V>
static __device__ Vector<Dtype, V> Load(const Dtype* from, size_t at) {
  return *reinterpret_cast<const Vector<Dtype, V>*>(from + at);
}

// The first `loads` vectors of V values each of a group, at offsets `at`.
template <typename Dtype, int V>
static __device__ void LoadGroup(const Dtype* __restrict__ from,
    const unsigned (&at)[GROUP / V], int loads, Dtype (&values)[GROUP]) {
  for (int j = 0; j < GROUP / V; ++j) {
    Vector<Dtype, V> vector = {};
    if (j < loads) { vector = Load<Dtype, V>(from, at[j]); }
    for (int i = 0; i < V; ++i) { values[j * V + i] = vector.v[i]; }
  }
}

// ---- Sums over a thread's values ----

// The sum of a group's terms, which are overwritten.
static __device__ float Total(float (&terms)[GROUP]) {
  for (int half = GROUP / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) { terms[i] += terms[i + half]; }
  }
  return terms[0];
}

// The sums of D and D^2 over x, from the thread's first value. Add takes the
// `loads` vectors of a group; AddWide takes one, in double alone.
template <typename Dtype>
struct Moments {
  struct Sums {
    Pair of;
    double reference;
    int count;

    // Those of D and D^2 from another reference.
    __device__ Pair From(double other) const {
      const double distance = reference - other;
      Pair moved;
      moved.first = of.first + count * distance;
      moved.second = of.second
          + distance * (2 * of.first + count * distance);
      // Squares that have overflowed are no less than that elsewhere.
      if (isfinite(moved.first) && !isfinite(moved.second)) {
        moved.second = INFINITY;
      }
      return moved;
    }
  };
  const Dtype* x;

  template <int V>
  __device__ void Add(const unsigned (&at)[GROUP / V], int loads,
      Sums* sums) const {
    Dtype values[GROUP];
    LoadGroup<Dtype, V>(x, at, loads, values);
    if (sums->count == 0) { sums->reference = values[0]; }
    sums->count += loads * V;
    AddGroup(values, loads * V, sums->reference, &sums->of);
  }
  template <int V>
  __device__ void AddWide(unsigned at, Sums* sums) const {
    const Vector<Dtype, V> vector = Load<Dtype, V>(x, at);
    if (sums->count == 0) { sums->reference = vector.v[0]; }
    sums->count += V;
    for (int i = 0; i < V; ++i) {
      AddValue(vector.v[i], sums->reference, &sums->of);
    }
  }

 private:
  static __device__ void AddValue(double value, double reference, Pair* of) {
    const double distance = value - reference;
    of->first += distance;
    of->second += distance * distance;
  }
  static __device__ void AddGroup(const double (&values)[GROUP], int count,
      double reference, Pair* of) {
    for (int i = 0; i < GROUP; ++i) {
      if (i < count) { AddValue(values[i], reference, of); }
    }
  }
  static __device__ void AddGroup(const float (&values)[GROUP], int count,
      double reference, Pair* of) {
    // All relative to one value of the group: far from zero the differences
    // keep the digits that the values have not.
    float terms[GROUP];
    for (int i = 0; i < GROUP; ++i) {
      terms[i] = i < count ? values[i] - values[0] : 0;
    }
    const float mean = Total(terms) / count;
    for (int i = 0; i < GROUP; ++i) {
      const float distance = (values[i] - values[0]) - mean;
      terms[i] = i < count ? distance * distance : 0;
    }
    const double distance = (values[0] - reference) + mean;
    of->first += count * distance;
    of->second += Total(terms) + count * (distance * distance);
  }
};

// The sums of g and g x_hat, likewise.
template <typename Dtype>
struct Gradients {
  struct Sums {
    Pair of;
  };
  const Dtype* g;
  const Dtype* x;
  Statistics<Dtype> statistics;

  template <int V>
  __device__ void Add(const unsigned (&at)[GROUP / V], int loads,
      Sums* sums) const {
    Dtype gs[GROUP], xs[GROUP];
    LoadGroup<Dtype, V>(g, at, loads, gs);
    LoadGroup<Dtype, V>(x, at, loads, xs);
    AddGroup(gs, xs, loads * V, &sums->of);
  }
  template <int V>
  __device__ void AddWide(unsigned at, Sums* sums) const {
    const Vector<Dtype, V> gs = Load<Dtype, V>(g, at);
    const Vector<Dtype, V> xs = Load<Dtype, V>(x, at);
    for (int i = 0; i < V; ++i) {
      AddValue(gs.v[i], XHat(xs.v[i], statistics), &sums->of);
    }
  }

 private:
  static __device__ void AddValue(double value, double x_hat, Pair* of) {
    of->first += value;
    of->second += value * x_hat;
  }
  __device__ void AddGroup(const double (&gs)[GROUP],
      const double (&xs)[GROUP], int count, Pair* of) const {
    for (int i = 0; i < GROUP; ++i) {
      if (i < count) { AddValue(gs[i], XHat(xs[i], statistics), of); }
    }
  }
  __device__ void AddGroup(const float (&gs)[GROUP], const float (&xs)[GROUP],
      int count, Pair* of) const {
    float terms[GROUP];
    for (int i = 0; i < GROUP; ++i) {
      terms[i] = i < count ? gs[i] * XHat(xs[i], statistics) : 0;
    }
    of->second += Total(terms);
    for (int i = 0; i < GROUP; ++i) { terms[i] = i < count ? gs[i] : 0; }
    of->first += Total(terms);
  }
};

// ---- Reductions ----

// Values of the block's part, of a channel or of a column.
static __device__ unsigned PartSize(const Shape& shape, int part) {
  return part == shape.parts - 1 ? shape.last : shape.part;
}

// Calls see(offsets, loads) for groups of `loads` vectors of V values each
// that a thread reads of a channel's segments, which follow one another for
// this purpose, in its part. A blob has less than 2^31 values.
template <int V, typename See>
static __device__ void ForSegments(const Shape& shape, See see) {
  const unsigned length = shape.positions / V;
  const unsigned first = blockIdx.y * (shape.part / V);
  const unsigned end = first + PartSize(shape, blockIdx.y) / V;
  const unsigned sample = static_cast<unsigned>(shape.channels)
      * shape.positions;
  const unsigned start = blockIdx.x * shape.positions;
  unsigned i = first + threadIdx.x;
  // One division; then sample and position are stepped.
  unsigned n = Divide(i, shape.by_length);
  unsigned position = i - n * length;
  const unsigned samples_a_step = Divide(THREADS, shape.by_length);
  const unsigned positions_a_step = THREADS - samples_a_step * length;
  const auto next = [&] {
    const unsigned at = n * sample + start + position * V;
    i += THREADS;
    n += samples_a_step;
    position += positions_a_step;
    if (position >= length) {
      position -= length;
      ++n;
    }
    return at;
  };
  unsigned at[GROUP / V];
  while (i + (GROUP / V - 1) * THREADS < end) {
    for (int j = 0; j < GROUP / V; ++j) { at[j] = next(); }
    see(at, GROUP / V);
  }
  if (i < end) {
    int loads = 0;
    for (int j = 0; j < GROUP / V; ++j) {
      loads += i < end;
      at[j] = next();
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
  const unsigned first = blockIdx.y * shape.part;
  const unsigned end = first + PartSize(shape, blockIdx.y);
  unsigned n = first + threadIdx.x / WARP;
  unsigned at[GROUP];
  for (; n + (GROUP - 1) * ROWS < end; n += GROUP * ROWS) {
    for (int j = 0; j < GROUP; ++j) {
      at[j] = (n + j * ROWS) * columns + column;
    }
    see(at, GROUP);
  }
  if (n < end) {
    int loads = 0;
    for (int j = 0; j < GROUP; ++j, n += ROWS) {
      at[j] = n * columns + column;
      loads += n < end;
    }
    see(at, loads);
  }
}

static __device__ bool Finite(const Pair& p) {
  return isfinite(p.first) && isfinite(p.second);
}

static __device__ void Add(Pair* all, const Pair& more) {
  all->first += more.first;
  all->second += more.second;
}

// The sum over a warp, in lane 0.
static __device__ Pair JoinWarp(Pair p) {
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    Pair other;
    other.first = __shfl_down_sync(FULL_MASK, p.first, offset);
    other.second = __shfl_down_sync(FULL_MASK, p.second, offset);
    Add(&p, other);
  }
  return p;
}

// The sum over a block, in thread 0; and in all, whether all were finite.
static __device__ bool JoinBlock(Pair* p) {
  __shared__ Pair warps[THREADS / WARP];
  const bool bad = !Finite(*p);
  *p = JoinWarp(*p);
  if (threadIdx.x % WARP == 0) { warps[threadIdx.x / WARP] = *p; }
  const bool all = !__syncthreads_or(bad);
  if (threadIdx.x == 0) {
    for (int i = 1; i < THREADS / WARP; ++i) { Add(p, warps[i]); }
  }
  return all;
}

// The sum over the rows of a block that reduces columns, in row 0; and in all,
// whether all were finite.
static __device__ bool JoinRows(Pair* p) {
  __shared__ Pair rows[ROWS][WARP];
  const int lane = threadIdx.x % WARP;
  const int row = threadIdx.x / WARP;
  rows[row][lane] = *p;
  const bool all = !__syncthreads_or(!Finite(*p));
  if (row == 0) {
    for (int i = 1; i < ROWS; ++i) { Add(p, rows[i][lane]); }
  }
  return all;
}

// What a block reduces of its part: its channel's segments, by loads of V
// values, or 32 columns. Join leaves sums to some threads, each of a column;
// Share gives what such a thread has to all of its column.
template <int V>
struct Segments {
  enum { kValues = V };
  template <typename See>
  static __device__ void For(const Shape& shape, See see) {
    ForSegments<V>(shape, see);
  }
  static __device__ unsigned Column() { return blockIdx.x; }
  static __device__ unsigned Channel(const Shape&) { return Column(); }
  // Where the part's first value of the column lies.
  static __device__ unsigned First(const Shape& shape) {
    const unsigned first = blockIdx.y * (shape.part / V);
    const unsigned n = Divide(first, shape.by_length);
    const unsigned position = (first - n * (shape.positions / V)) * V;
    return (n * shape.channels + blockIdx.x) * shape.positions + position;
  }
  static __device__ bool Join(Pair* p) { return JoinBlock(p); }
  static __device__ bool HasSum() { return threadIdx.x == 0; }
  static __device__ double Share(double value) {
    __shared__ double shared;
    if (HasSum()) { shared = value; }
    __syncthreads();
    return shared;
  }
};
struct Columns {
  enum { kValues = 1 };
  template <typename See>
  static __device__ void For(const Shape& shape, See see) {
    ForColumn(shape, see);
  }
  static __device__ unsigned Column() {
    return blockIdx.x * WARP + threadIdx.x % WARP;
  }
  static __device__ unsigned Channel(const Shape& shape) {
    return Column() / shape.positions;
  }
  static __device__ unsigned First(const Shape& shape) {
    return blockIdx.y * shape.part * shape.channels * shape.positions
        + Column();
  }
  static __device__ bool Join(Pair* p) { return JoinRows(p); }
  static __device__ bool HasSum() { return threadIdx.x < WARP; }
  static __device__ double Share(double value) {
    __shared__ double shared[WARP];
    if (HasSum()) { shared[threadIdx.x] = value; }
    __syncthreads();
    return shared[threadIdx.x % WARP];
  }
};

// The thread's sums.
template <typename Over, typename Terms>
static __device__ typename Terms::Sums Sum(const Shape& shape,
    const Terms& terms) {
  enum { kLoads = GROUP / Over::kValues };
  typename Terms::Sums sums = {};
  Over::For(shape, [&](const unsigned (&at)[kLoads], int loads) {
    terms.template Add<Over::kValues>(at, loads, &sums);
  });
  return sums;
}

// The same where squares and sums of float have left its range: in double. It
// stands behind the loop that all blocks run, where few registers are in use.
// Inside, it cost them a third of their warps; as a call, stores of all that
// it takes by reference.
template <typename Over, typename Terms>
static __device__ typename Terms::Sums SumWide(const Shape& shape,
    const Terms& terms) {
  enum { kLoads = GROUP / Over::kValues };
  __syncthreads();  // the slowest still reads what the next join overwrites
  typename Terms::Sums sums = {};
  Over::For(shape, [&](const unsigned (&at)[kLoads], int loads) {
    for (int j = 0; j < kLoads; ++j) {
      if (j < loads) { terms.template AddWide<Over::kValues>(at[j], &sums); }
    }
  });
  return sums;
}

// Mean and sum of squared distances from it, of the sums of D and D^2.
static __device__ Pair MeanAndM2(double reference, double count,
    const Pair& sums) {
  const double distance = sums.first / count;
  const double m2 = sums.second - sums.first * distance;
  Pair result;
  result.first = reference + distance;
  result.second = m2 < 0 ? 0 : m2;  // rounding took it there
  if (!isfinite(distance)) {
    // Of values that are not finite: no number that could pass for one.
    result.first = result.second = nan("");
  } else if (isinf(sums.second)) {
    result.second = sums.second;
  }
  return result;
}

// Joins the sums of the column's threads, from the reference that is left.
template <typename Dtype, typename Over>
static __device__ bool JoinMoments(const typename Moments<Dtype>::Sums& sums,
    double count, double* reference, Pair* all) {
  if (sizeof(Dtype) == sizeof(double)) {
    // Of a value, the mean is within a few hundred standard deviations; of the
    // mean, within none: of float nobody would see the difference.
    *all = sums.From(*reference);
    Over::Join(all);
    *reference = Over::Share(*reference + all->first / count);
  }
  *all = sums.From(*reference);
  return Over::Join(all);
}

template <typename Dtype, typename Over>
static __device__ void PartMoments(const Shape& shape,
    const Dtype* __restrict__ x, Pair* __restrict__ partials) {
  const size_t columns = static_cast<size_t>(shape.channels) * shape.width;
  const unsigned column = Over::Column();
  const double count = PartSize(shape, blockIdx.y);
  const Moments<Dtype> moments = {x};
  typename Moments<Dtype>::Sums sums = Sum<Over>(shape, moments);
  // Loaded here and not above: a loop would begin with waiting for it.
  double reference = column < columns ? x[Over::First(shape)] : Dtype(0);
  Pair all;
  if (!JoinMoments<Dtype, Over>(sums, count, &reference, &all)
      && sizeof(Dtype) < sizeof(double)) {
    sums = SumWide<Over>(shape, moments);
    JoinMoments<Dtype, Over>(sums, count, &reference, &all);
  }
  if (Over::HasSum() && column < columns) {
    partials[blockIdx.y * columns + column] = MeanAndM2(reference, count, all);
  }
}

template <typename Dtype, typename Over>
static __device__ void PartGradients(const Shape& shape,
    const Dtype* __restrict__ g, const Dtype* __restrict__ x, bool x_is_hat,
    const Statistics<Dtype>* __restrict__ channels,
    Pair* __restrict__ partials) {
  const size_t columns = static_cast<size_t>(shape.channels) * shape.width;
  const unsigned column = Over::Column();
  const Gradients<Dtype> gradients = {g, x,
      Of(channels, column < columns ? Over::Channel(shape) : 0, x_is_hat)};
  Pair all = Sum<Over>(shape, gradients).of;
  if (!Over::Join(&all) && sizeof(Dtype) < sizeof(double)) {
    all = SumWide<Over>(shape, gradients).of;
    Over::Join(&all);
  }
  if (Over::HasSum() && column < columns) {
    partials[blockIdx.y * columns + column] = all;
  }
}

// Calls see(partial, part) for the partials of a channel that a lane joins.
template <typename See>
static __device__ void ForPartials(const Shape& shape, int channel,
    const Pair* __restrict__ partials, See see) {
  const unsigned width = shape.width;
  partials += static_cast<size_t>(channel) * width;
  const size_t row = static_cast<size_t>(shape.channels) * width;
  const unsigned lane = threadIdx.x % WARP;
  unsigned part = lane / width;
  unsigned column = lane % width;
  const unsigned parts_a_step = WARP / width;
  const unsigned columns_a_step = WARP % width;
  while (part < static_cast<unsigned>(shape.parts)) {
    see(partials[part * row + column], part);
    part += parts_a_step;
    column += columns_a_step;
    if (column >= width) {
      column -= width;
      ++part;
    }
  }
}

template <typename Dtype>
static __device__ void FinishMoments(const Shape& shape, double momentum,
    double eps, const Pair* __restrict__ partials, Dtype* moving_mean,
    Dtype* moving_inv_std, Statistics<Dtype>* channels,
    volatile unsigned long long* constant_channel) {
  const int c = blockIdx.x * ROWS + threadIdx.x / WARP;
  if (c >= shape.channels) { return; }
  const double reference =
      partials[static_cast<size_t>(c) * shape.width].first;
  Pair sums = {0, 0};
  ForPartials(shape, c, partials, [&](const Pair& part, unsigned number) {
    const double count = PartSize(shape, number);
    const double distance = part.first - reference;
    sums.first += count * distance;
    sums.second += part.second + count * (distance * distance);
  });
  sums = JoinWarp(sums);
  if (threadIdx.x % WARP != 0) { return; }
  const double count = static_cast<double>(shape.samples) * shape.positions;
  const Pair all = MeanAndM2(reference, count, sums);
  if (all.second == 0) { *constant_channel = c; }
  const double inv_std = 1 / sqrt(all.second / count + eps);
  Statistics<Dtype> of;
  of.high = static_cast<Dtype>(all.first);
  of.low = static_cast<Dtype>(all.first - static_cast<double>(of.high));
  of.inv_std = static_cast<Dtype>(inv_std);
  of.unused = 0;
  channels[c] = of;
  moving_mean[c] = static_cast<Dtype>(
      momentum * moving_mean[c] + (1 - momentum) * all.first);
  moving_inv_std[c] = static_cast<Dtype>(
      momentum * moving_inv_std[c] + (1 - momentum) * inv_std);
}

template <typename Dtype>
static __device__ void FinishGradients(const Shape& shape,
    const Pair* __restrict__ partials, Dtype* slope_diff, Dtype* bias_diff,
    Means<Dtype>* means) {
  const int c = blockIdx.x * ROWS + threadIdx.x / WARP;
  if (c >= shape.channels) { return; }
  Pair sums = {0, 0};
  ForPartials(shape, c, partials,
      [&](const Pair& part, unsigned) { Add(&sums, part); });
  sums = JoinWarp(sums);
  if (threadIdx.x % WARP != 0) { return; }
  const double share =
      1 / (static_cast<double>(shape.samples) * shape.positions);
  Means<Dtype> of;
  of.g = static_cast<Dtype>(sums.first * share);
  of.g_x_hat = static_cast<Dtype>(sums.second * share);
  means[c] = of;
  if (slope_diff) { slope_diff[c] += static_cast<Dtype>(sums.second); }
  if (bias_diff) { bias_diff[c] += static_cast<Dtype>(sums.first); }
}

// The moving statistics as those of this pass.
template <typename Dtype>
static __device__ void TakeMoving(int num_channels,
    const Dtype* __restrict__ moving_mean,
    const Dtype* __restrict__ moving_inv_std, Statistics<Dtype>* channels) {
  const int c = blockIdx.x * THREADS + threadIdx.x;
  if (c < num_channels) {
    Statistics<Dtype> of;
    of.high = moving_mean[c];
    of.low = 0;
    of.inv_std = moving_inv_std[c];
    of.unused = 0;
    channels[c] = of;
  }
}

// ---- Passes over all values ----

// The vectors of V neighbours, each in one channel, that are a thread's. The
// blocks go from the last values to the first: what the reduction before them
// has read last is in the L2 cache still.
template <typename Dtype, int V>
struct Place {
  enum { kVectors = PASS / sizeof(Dtype) / V };
  const Shape& shape;
  unsigned first;
  int vectors;

  // A blob has less than 2^31 values.
  explicit __device__ Place(const Shape& shape) : shape(shape), vectors(0) {
    const unsigned block = gridDim.x - 1 - blockIdx.x;
    first = block * (THREADS * kVectors) + threadIdx.x;
    const unsigned all = static_cast<unsigned>(shape.samples) * shape.channels
        * (static_cast<unsigned>(shape.positions) / V);
    for (int j = 0; j < kVectors; ++j) { vectors += first + j * THREADS < all; }
  }
  __device__ unsigned At(int j) const { return (first + j * THREADS) * V; }
  __device__ unsigned Channel(int j) const {
    const unsigned row = Divide(first + j * THREADS, shape.by_length);
    return row - Divide(row, shape.by_channels) * shape.channels;
  }
  // All before the first store: they may not change places, and overlap.
  __device__ void LoadAll(const Dtype* from,
      Vector<Dtype, V> (&values)[kVectors]) const {
    for (int j = 0; j < kVectors; ++j) {
      if (j < vectors) { values[j] = Load<Dtype, V>(from, At(j)); }
    }
  }
  __device__ void Store(Dtype* to, int j,
      const Vector<Dtype, V>& values) const {
    *reinterpret_cast<Vector<Dtype, V>*>(to + At(j)) = values;
  }
};

// y and, unless null, x_hat. x and y may be the same memory.
template <typename Dtype, int V>
static __device__ void Normalize(const Shape& shape,
    const Statistics<Dtype>* __restrict__ channels,
    const Dtype* __restrict__ slope, const Dtype* __restrict__ bias,
    const Dtype* x, Dtype* y, Dtype* x_hat) {
  const Place<Dtype, V> place(shape);
  Vector<Dtype, V> values[place.kVectors];
  place.LoadAll(x, values);
  for (int j = 0; j < place.kVectors; ++j) {
    if (j >= place.vectors) { break; }
    const unsigned c = place.Channel(j);
    const Statistics<Dtype> of = channels[c];
    const Dtype slope_c = slope[c];
    const Dtype bias_c = bias[c];
    Vector<Dtype, V> hats, result;
    for (int i = 0; i < V; ++i) {
      hats.v[i] = XHat(values[j].v[i], of);
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
    const Statistics<Dtype>* __restrict__ channels,
    const Means<Dtype>* __restrict__ means, const Dtype* __restrict__ slope,
    const Dtype* g, const Dtype* x, bool x_is_hat, bool by_batch, Dtype* dx) {
  const Place<Dtype, V> place(shape);
  Vector<Dtype, V> gs[place.kVectors], xs[place.kVectors];
  place.LoadAll(g, gs);
  if (by_batch) { place.LoadAll(x, xs); }
  for (int j = 0; j < place.kVectors; ++j) {
    if (j >= place.vectors) { break; }
    const unsigned c = place.Channel(j);
    Statistics<Dtype> of = channels[c];
    const Dtype factor = slope[c] * of.inv_std;
    Vector<Dtype, V> result;
    if (by_batch) {
      of = Of(channels, c, x_is_hat);
      const Means<Dtype> mean = means[c];
      for (int i = 0; i < V; ++i) {
        result.v[i] = factor * ((gs[j].v[i] - mean.g)
            - XHat(xs[j].v[i], of) * mean.g_x_hat);
      }
    } else {
      for (int i = 0; i < V; ++i) { result.v[i] = factor * gs[j].v[i]; }
    }
    place.Store(dx, j, result);
  }
}

// Kernels that load vectors exist for the widest load and for single values;
// by columns there are only single values. What `in place` may make one memory
// is not __restrict__. Without __launch_bounds__: with it, nvcc spills on some
// architectures, to fit in more blocks.
#define KERNEL extern "C" __global__ void

#define VECTOR_KERNELS(Dtype, suffix, V) \
  KERNEL bn_segment_moments_##suffix(Shape shape, \
      const Dtype* __restrict__ x, Pair* __restrict__ partials) { \
    PartMoments<Dtype, Segments<V> >(shape, x, partials); \
  } \
  KERNEL bn_segment_gradients_##suffix(Shape shape, \
      const Dtype* __restrict__ g, const Dtype* __restrict__ x, int x_is_hat, \
      const Statistics<Dtype>* __restrict__ channels, \
      Pair* __restrict__ partials) { \
    PartGradients<Dtype, Segments<V> >(shape, g, x, x_is_hat, channels, \
        partials); \
  } \
  KERNEL bn_normalize_##suffix(Shape shape, \
      const Statistics<Dtype>* __restrict__ channels, \
      const Dtype* __restrict__ slope, const Dtype* __restrict__ bias, \
      const Dtype* x, Dtype* y, Dtype* x_hat) { \
    Normalize<Dtype, V>(shape, channels, slope, bias, x, y, x_hat); \
  } \
  KERNEL bn_pass_down_##suffix(Shape shape, \
      const Statistics<Dtype>* __restrict__ channels, \
      const Means<Dtype>* __restrict__ means, \
      const Dtype* __restrict__ slope, const Dtype* g, const Dtype* x, \
      int x_is_hat, int by_batch, Dtype* dx) { \
    PassDown<Dtype, V>(shape, channels, means, slope, g, x, x_is_hat, \
        by_batch, dx); \
  }

#define KERNELS(Dtype, suffix) \
  KERNEL bn_column_moments_##suffix(Shape shape, \
      const Dtype* __restrict__ x, Pair* __restrict__ partials) { \
    PartMoments<Dtype, Columns>(shape, x, partials); \
  } \
  KERNEL bn_column_gradients_##suffix(Shape shape, \
      const Dtype* __restrict__ g, const Dtype* __restrict__ x, int x_is_hat, \
      const Statistics<Dtype>* __restrict__ channels, \
      Pair* __restrict__ partials) { \
    PartGradients<Dtype, Columns>(shape, g, x, x_is_hat, channels, partials); \
  } \
  KERNEL bn_finish_moments_##suffix(Shape shape, double momentum, \
      double eps, const Pair* __restrict__ partials, Dtype* moving_mean, \
      Dtype* moving_inv_std, Statistics<Dtype>* channels, \
      unsigned long long* constant_channel) { \
    FinishMoments<Dtype>(shape, momentum, eps, partials, moving_mean, \
        moving_inv_std, channels, constant_channel); \
  } \
  KERNEL bn_finish_gradients_##suffix(Shape shape, \
      const Pair* __restrict__ partials, Dtype* slope_diff, \
      Dtype* bias_diff, Means<Dtype>* means) { \
    FinishGradients<Dtype>(shape, partials, slope_diff, bias_diff, means); \
  } \
  KERNEL bn_take_moving_##suffix(int num_channels, \
      const Dtype* __restrict__ moving_mean, \
      const Dtype* __restrict__ moving_inv_std, \
      Statistics<Dtype>* channels) { \
    TakeMoving<Dtype>(num_channels, moving_mean, moving_inv_std, channels); \
  }

KERNELS(float, f32)
KERNELS(double, f64)
VECTOR_KERNELS(float, f32, 1)
VECTOR_KERNELS(double, f64, 1)
VECTOR_KERNELS(float, vec_f32, 4)
VECTOR_KERNELS(double, vec_f64, 2)
