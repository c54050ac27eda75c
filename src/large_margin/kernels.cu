// The margin layer on the GPU: what is left beside cuBLAS's products, which see
// the gradient of the logits as it is.
//
// Forward: a kernel behind the product finds each sample's coefficients of
// correction.rs and puts the margin on its target logit; beside that, blocks
// sort the samples of a tile each by class, for the backward pass.
// Backward: a kernel behind the products adds what the margin changes: g a w
// and a multiple of x to each row of dx, g a x and a multiple of w to each row
// of dW. One kernel a pass, as a launch alone takes as long as these do where
// M is small. All sums are made in a fixed order and no float is added
// atomically, so two runs give the same bits.
//
// For each sample, rows of x, w and dx are read by as many threads as have one
// batch of loads of them each, up to a warp; a row's scalars are a lane's work,
// for up to 32 rows a warp at once. Where that leaves too few warps, a block
// reads a row (Team).
//
// For the classes, the sorted samples are cut into chunks (Cut). A thread has
// the same columns of all rows of x in a chunk, and adds up those of a class. A
// class that goes on beyond its chunk leaves its sums to whichever of its
// chunks comes last, which adds up all of them.
//
// THREADS, WARP, TILE, PLACES, WAYS, LOAD, LOADS and the sizes of structs come
// from src/cuda/layout.rs.

#define FULL_MASK 0xffffffffu

// What the backward pass needs of a sample with a class, g being the gradient
// of its target logit.
struct alignas(16) Coefficients {
  double a;  // times g, of w in dx and of x in dw, beside InnerProduct's g
  double b;  // times g |w|/|x| of x in dx, times g |x|/|w| of w in dw
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

// How many threads read a row, and how many rows a warp has: `lanes` is a
// power of 2, and so is `rows`, a multiple of WARP / lanes and no more than
// WARP. Where a block reads a row, it has THREADS lanes and that row alone.
struct Team {
  int lanes;
  int rows;

  __device__ bool IsBlock() const { return lanes > WARP; }
  // The first row of the thread's warp.
  __device__ int First(int block) const {
    if (IsBlock()) { return block; }
    return (block * (THREADS / WARP) + threadIdx.x / WARP) * rows;
  }
  __device__ int Shift() const { return __ffs(lanes) - 1; }
  // Rows of a warp that are read at once, and the lane's among them.
  __device__ int AtOnce() const { return IsBlock() ? 1 : WARP >> Shift(); }
  __device__ int Among() const { return threadIdx.x % WARP >> Shift(); }
  // Whether what the thread finds of its row is not another warp's, too.
  __device__ bool Tells() const { return !IsBlock() || threadIdx.x < WARP; }
  // The threads that all read one row, if the warp has it alone.
  __device__ int Most() const { return IsBlock() ? THREADS : WARP; }
};
static_assert(sizeof(Team) == TEAM, "src/cuda/layout.rs");

// How the rows of dW are shared out. A chunk is `places` neighbours of the
// sorted samples, and `lanes` neighbouring threads, a power of 2, have as many
// loads of a row's columns; where a row has more, `columns` blocks have it. A
// block has no more than PLACES places.
struct Cut {
  int places;   // a power of 2, a multiple of LOADS
  int lanes;
  int columns;
  int wide;     // whether a load is of LOAD bytes, or of a value

  __device__ int Chunks() const { return THREADS / lanes; }  // of a block
};
static_assert(sizeof(Cut) == CUT, "src/cuda/layout.rs");

// The thread's place among those of a row.
static __device__ int Rank(int lanes) { return threadIdx.x & (lanes - 1); }

// V neighbours, as one load brings them.
template <typename Dtype, int V>
struct alignas(sizeof(Dtype) * V) Vector {
  Dtype v[V];
};

// What a thread has of a row at once: all loads of it are under way before the
// first is waited for.
template <typename Dtype, int V>
struct Batch {
  Vector<Dtype, V> vectors[LOADS];

  // Vectors `first`, `first` + `step` and so on; 0 from vector `count` on.
  __device__ void Load(const Dtype* from, int first, int step, int count) {
    for (int j = 0; j < LOADS; ++j) {
      const int at = first + j * step;
      vectors[j] = Vector<Dtype, V>();
      if (at < count) {
        vectors[j] = reinterpret_cast<const Vector<Dtype, V>*>(from)[at];
      }
    }
  }
  __device__ void Store(Dtype* to, int first, int step, int count) const {
    for (int j = 0; j < LOADS; ++j) {
      const int at = first + j * step;
      if (at < count) {
        reinterpret_cast<Vector<Dtype, V>*>(to)[at] = vectors[j];
      }
    }
  }
};

// Whether rows of `length` values from `rows` on can be read by vectors.
template <typename Dtype>
static __device__ bool Aligned(const Dtype* rows, int length) {
  return reinterpret_cast<size_t>(rows) % LOAD == 0
      && length % (LOAD / sizeof(Dtype)) == 0;
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

// The join over the threads of a row, in each of them. All threads of the warp
// take part, or of the block.
template <typename How>
static __device__ Pair JoinRow(Pair p, int lanes) {
  for (int distance = (lanes < WARP ? lanes : WARP) / 2; distance > 0;
      distance /= 2) {
    p.x = How::Join(p.x, __shfl_xor_sync(FULL_MASK, p.x, distance));
    p.w = How::Join(p.w, __shfl_xor_sync(FULL_MASK, p.w, distance));
  }
  if (lanes <= WARP) { return p; }
  __shared__ Pair warps[THREADS / WARP];
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

// Whether a value has all the digits of Dtype, and so have its terms, if they
// are squares.
template <typename Dtype>
static __device__ bool InRange(double positive) {
  const double least = sizeof(Dtype) == sizeof(double) ? 1e-290 : 1e-30;
  return positive > least && !isinf(positive);  // false for NaN as well
}

template <int V, typename Dtype>
static __device__ Pair SumSquares(const Dtype* __restrict__ x,
    const Dtype* __restrict__ w, int length, int lanes) {
  const int count = length / V;
  Pair all = {0, 0};
  for (int i = Rank(lanes); i < count; i += LOADS * lanes) {
    Batch<Dtype, V> xs, ws;
    xs.Load(x, i, lanes, count);
    ws.Load(w, i, lanes, count);
    Dtype of_x = 0, of_w = 0;
    for (int j = 0; j < LOADS; ++j) {
      for (int k = 0; k < V; ++k) {
        of_x += xs.vectors[j].v[k] * xs.vectors[j].v[k];
        of_w += ws.vectors[j].v[k] * ws.vectors[j].v[k];
      }
    }
    all.x += of_x;
    all.w += of_w;
  }
  return all;
}

// The squared norms of rows x and w. A batch of float is summed in float: few
// GPUs are fast in double.
template <typename Dtype>
static __device__ Pair Squares(const Dtype* x, const Dtype* w, int length,
    int lanes) {
  return JoinRow<Add>(Aligned(x, length) && Aligned(w, length)
      ? SumSquares<LOAD / sizeof(Dtype)>(x, w, length, lanes)
      : SumSquares<1>(x, w, length, lanes), lanes);
}

// The norms of rows x and w, whose squares may leave the range of Dtype.
template <typename Dtype>
static __device__ Pair ScaledNorms(const Dtype* __restrict__ x,
    const Dtype* __restrict__ w, int length, int lanes) {
  Pair largest = {0, 0};
  for (int i = Rank(lanes); i < length; i += lanes) {
    largest.x = fmax(largest.x, fabs(static_cast<double>(x[i])));
    largest.w = fmax(largest.w, fabs(static_cast<double>(w[i])));
  }
  largest = JoinRow<Max>(largest, lanes);
  // A norm that is no use as a divisor is returned as it is.
  const Pair scale = {Usable(largest.x) ? largest.x : 1,
      Usable(largest.w) ? largest.w : 1};
  Pair sum = {0, 0};
  for (int i = Rank(lanes); i < length; i += lanes) {
    const double of_x = x[i] / scale.x;
    const double of_w = w[i] / scale.w;
    sum.x += of_x * of_x;
    sum.w += of_w * of_w;
  }
  sum = JoinRow<Add>(sum, lanes);
  return Pair{scale.x * sqrt(sum.x), scale.w * sqrt(sum.w)};
}

// value * (numerator / denominator), of a row whose norm is the denominator;
// row.rs has the same.
struct Factor {
  double value, numerator, denominator;
};

// value * ratio; 0 where one of them has no ordinary size.
template <typename Dtype>
static __device__ Dtype Product(double value, double ratio) {
  const Dtype product = static_cast<Dtype>(value * ratio);
  return InRange<double>(fabs(ratio)) && InRange<Dtype>(fabs(product))
      ? product : 0;
}

// factor * v, where the factor is no number of ordinary size: the ratio of the
// norms may leave the range of double. v / denominator does not, and 0 stays 0.
template <typename Dtype>
static __device__ Dtype Apart(const Factor& factor, Dtype v) {
  if (factor.value == 0 || v == 0) { return 0; }
  return static_cast<Dtype>(
      v / factor.denominator * factor.value * factor.numerator);
}

// dx += of_x x + of_w w, for rows of `length`.
template <int V, typename Dtype>
static __device__ void AddBatches(Dtype* __restrict__ dx, Dtype of_x,
    const Dtype* __restrict__ x, Dtype of_w, const Dtype* __restrict__ w,
    int length, int lanes) {
  const int count = length / V;
  for (int i = Rank(lanes); i < count; i += LOADS * lanes) {
    Batch<Dtype, V> xs, ws, sums;
    xs.Load(x, i, lanes, count);
    ws.Load(w, i, lanes, count);
    sums.Load(dx, i, lanes, count);
    for (int j = 0; j < LOADS; ++j) {
      for (int k = 0; k < V; ++k) {
        sums.vectors[j].v[k] += of_x * xs.vectors[j].v[k]
            + of_w * ws.vectors[j].v[k];
      }
    }
    sums.Store(dx, i, lanes, count);
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

// How many of `count` numbers, a multiple of 4, are below a bound.
static __device__ int CountBelow(const unsigned* numbers, int count,
    unsigned bound) {
  int below = 0;
  for (int i = 0; i < count; i += 4) {
    const Vector<unsigned, 4> four =
        *reinterpret_cast<const Vector<unsigned, 4>*>(numbers + i);
    for (int k = 0; k < 4; ++k) { below += four.v[k] < bound; }
  }
  return below;
}

// Leaves the block's THREADS samples in `keys`, each at its place among the
// sorted keys of its tile: behind the tile's samples of lower classes, and
// those of its class that come before it.
template <typename Dtype>
static __device__ void MakeKeys(int num_samples, const Labels& of,
    const Dtype* __restrict__ labels, int block, Key* __restrict__ keys) {
  // Above all classes, and then of no sample.
  const unsigned none = 0x7fffffff, padding = 0xffffffff;
  __shared__ Vector<unsigned, 4> fours[TILE / 4];
  unsigned* const tile = fours[0].v;
  const int sample = block * THREADS + threadIdx.x;
  const int first = sample - sample % TILE;
  const int left = num_samples - first;
  const int here = left < TILE ? left : TILE;
  const int padded = (here + 3) / 4 * 4;
  for (int i = threadIdx.x; i < padded; i += THREADS) {
    tile[i] = padding;
    if (i >= here) { continue; }
    const double label = labels[first + i];
    tile[i] = of.Valid(label) && !of.Ignored(label)
        ? static_cast<unsigned>(label) : none;
  }
  __syncthreads();
  const int own = sample - first;
  if (own >= here) { return; }
  const unsigned y = tile[own];
  // All samples before the warp's count if they are of its class, none behind.
  const int begin = own - own % WARP;
  const int end = begin + WARP < padded ? begin + WARP : padded;
  int place = first + CountBelow(tile, begin, y + 1)
      + CountBelow(tile + end, padded - end, y);
  for (int i = begin; i < end; ++i) { place += tile[i] < y + (i < own); }
  keys[place] = Key(static_cast<unsigned>(
      y == none ? NO_CLASS : static_cast<int>(y))) << 32
      | static_cast<unsigned>(sample);
}

// The border of psi's segments j - 1 and j.
static __device__ double Border(int j, int margin) {
  return cospi(static_cast<double>(j) / margin);
}

// k of the paper's psi: how many of the borders are at or above the lane's c.
// A lane has a border, for all: the first ones are given.
static __device__ int Segment(double c, int margin, double border) {
  int k = 0;
  for (int first = 1; first < margin; first += WARP) {
    const int left = margin - first;
    for (int j = 0; j < left && j < WARP; ++j) {
      k += c <= __shfl_sync(FULL_MASK, border, j);
    }
    if (left > WARP) {
      border = Border(first + WARP + threadIdx.x % WARP, margin);
    }
  }
  return k;
}

// The coefficients of a sample with the target logit f, on which it puts the
// margin.
template <typename Dtype>
static __device__ Coefficients PutMargin(double f, const Pair& norms, double c,
    int k, int margin, double share, Dtype* logit) {
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
  double margin_logit = norms.x * norms.w * psi;
  if (!isfinite(margin_logit)) {
    // A psi of 0 must not meet a product that has overflowed.
    margin_logit = fmin(norms.x, norms.w) * psi * fmax(norms.x, norms.w);
  }
  *logit = static_cast<Dtype>(f + (margin_logit - f) * share);
  Coefficients of;
  of.a = (dpsi - 1) * share;
  of.b = (psi - c * dpsi) * share;
  of.x = norms.x;
  of.w = norms.w;
  return of;
}

// The team's samples: their coefficients, the classes of those whose margin
// has an effect, and the margin on their target logits. A lane's own sample is
// the first and its number; with other lanes it reads the rows of each.
//
// bad_label, in host memory that the device can write, gets the number of a
// sample with a label that is no class in its upper half and the label, as
// float, in the lower. One store, so the halves belong together.
template <typename Dtype>
static __device__ void ForwardSamples(int first, int num_samples,
    const Team& team, const Labels& of, int num_features, int margin,
    double share, const Dtype* __restrict__ x,
    const Dtype* __restrict__ labels, const Dtype* __restrict__ w,
    Dtype* __restrict__ logits, Coefficients* __restrict__ coefficients,
    int* __restrict__ classes, volatile unsigned long long* bad_label) {
  const int lane = threadIdx.x % WARP;
  const int sample = first + lane;
  const bool has_sample = lane < team.rows && sample < num_samples;
  const double label = has_sample ? labels[sample] : Dtype(0);
  // Before the label is waited for.
  const double border = Border(lane + 1, margin);
  int y = NO_CLASS;
  if (has_sample) {
    if (of.Valid(label) && !of.Ignored(label)) {
      y = static_cast<int>(label);
    } else if (!of.Ignored(label) && team.Tells()) {
      *bad_label = static_cast<unsigned long long>(sample) << 32
          | __float_as_uint(static_cast<float>(label));
    }
  }
  if (margin == 1) { return; }

  const bool has_class = y != NO_CLASS;
  Dtype* const logit = logits + static_cast<long long>(sample) * of.num_classes
      + y;
  // Where a block reads the row, its joins keep this before the write below.
  const double f = has_class ? *logit : Dtype(0);
  // Those of no sample or class are not read.
  const auto x_row = [&](int row) {
    return x + static_cast<long long>(first + row) * num_features;
  };
  const auto w_row = [&](int of_class) {
    return w + static_cast<long long>(of_class) * num_features;
  };
  Pair squares = {1, 1};
  for (int row = 0; row < team.rows; row += team.AtOnce()) {
    const int read = row + team.Among();
    const int read_y = __shfl_sync(FULL_MASK, y, read);
    const Pair found = Squares(x_row(read), w_row(read_y),
        read_y == NO_CLASS ? 0 : num_features, team.lanes);
    // To the lane whose sample it is.
    const int from = lane * team.lanes % WARP;
    const Pair own = {__shfl_sync(FULL_MASK, found.x, from),
        __shfl_sync(FULL_MASK, found.w, from)};
    if (has_class && row <= lane && lane < row + team.AtOnce()) {
      squares = own;
    }
  }
  Pair norms = {sqrt(squares.x), sqrt(squares.w)};
  const bool is_scaled =
      !InRange<Dtype>(squares.x) || !InRange<Dtype>(squares.w);
  unsigned scaled = __ballot_sync(FULL_MASK, is_scaled);
  for (; scaled != 0; scaled &= scaled - 1) {
    const int row = __ffs(scaled) - 1;
    const Pair found = ScaledNorms(x_row(row),
        w_row(__shfl_sync(FULL_MASK, y, row)), num_features, team.Most());
    if (lane == row) { norms = found; }
  }

  if (!team.Tells()) { return; }
  const bool usable = Usable(norms.x) && Usable(norms.w) && isfinite(f);
  // Norms that are not scaled have a product in the range of double.
  const double cosine =
      is_scaled ? f / norms.x / norms.w : f / (norms.x * norms.w);
  const double c = usable ? fmin(1.0, fmax(-1.0, cosine)) : 0.0;
  const int k = Segment(c, margin, border);
  if (has_sample) { classes[sample] = has_class && usable ? y : NO_CLASS; }
  if (!has_class) { return; }
  // |w| stays where |x| is no use: the class's other samples may use it.
  coefficients[sample] = usable
      ? PutMargin(f, norms, c, k, margin, share, logit)
      : Coefficients{0, 0, 0, norms.w};
}

// The first num_sorts blocks sort; the others have the samples. counters[i]
// becomes 0, for the backward pass.
template <typename Dtype>
static __device__ void Forward(int num_samples, int num_sorts,
    const Team& team, const Labels& of, int num_features, int margin,
    double share, const Dtype* x, const Dtype* labels, const Dtype* w,
    Dtype* logits, Coefficients* coefficients, int* classes, Key* keys,
    int num_counters, int* counters, volatile unsigned long long* bad_label) {
  const int block = blockIdx.x;
  if (block < num_sorts) {
    for (int i = block * THREADS + threadIdx.x; i < num_counters;
        i += num_sorts * THREADS) {
      counters[i] = 0;
    }
    MakeKeys(num_samples, of, labels, block, keys);
  } else {
    ForwardSamples(team.First(block - num_sorts), num_samples, team, of,
        num_features, margin, share, x, labels, w, logits, coefficients,
        classes, bad_label);
  }
}

// Merges each WAYS neighbouring sorted runs of `from`, which are `run` long, a
// power of 2, but for the last: a key's place is the number of keys before it
// in all of these. The searches advance together, so that their loads overlap.
static __device__ void Merge(int num_samples, int run,
    const Key* __restrict__ from, Key* __restrict__ to) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= num_samples) { return; }
  const Key key = from[i];
  const int own = i / run;
  const int first = (own - own % WAYS) * run;
  int before[WAYS] = {};
  for (int step = run; step > 0; step /= 2) {
    Key last[WAYS];
    for (int way = 0; way < WAYS; ++way) {
      const long long at =
          first + static_cast<long long>(way) * run + before[way] + step - 1;
      last[way] = before[way] + step <= run && at < num_samples
          ? from[at] : ~Key(0);
    }
    for (int way = 0; way < WAYS; ++way) {
      if (last[way] < key) { before[way] += step; }
    }
  }
  int place = first;
  for (int way = 0; way < WAYS; ++way) { place += before[way]; }
  to[place] = key;
}

// The key at a place, one without a class behind the last.
static __device__ Key KeyAt(const Key* __restrict__ keys, int num_samples,
    int place) {
  return place < num_samples ? keys[place] : ~Key(0);
}

// Adds to the team's rows of dx, of which a lane's own is the first and its
// number.
template <typename Dtype>
static __device__ void AddToSamples(int first, int num_samples,
    int num_classes, int num_features, const Team& team,
    const Dtype* __restrict__ x, const Dtype* __restrict__ w,
    const Coefficients* __restrict__ coefficients,
    const int* __restrict__ classes, const Dtype* __restrict__ diff,
    Dtype* __restrict__ dx) {
  const int lane = threadIdx.x % WARP;
  const int sample = first + lane;
  int y = NO_CLASS;
  if (lane < team.rows && sample < num_samples) { y = classes[sample]; }
  Dtype of_x = 0, of_w = 0;
  if (y != NO_CLASS) {
    const Coefficients of = coefficients[sample];
    const Dtype g = diff[static_cast<size_t>(sample) * num_classes + y];
    of_w = static_cast<Dtype>(g * of.a);
    of_x = Product<Dtype>(g * of.b, of.w / of.x);
  }
  for (int row = 0; row < team.rows; row += team.AtOnce()) {
    const int read = row + team.Among();
    const int read_y = __shfl_sync(FULL_MASK, y, read);
    const Dtype read_of_x = __shfl_sync(FULL_MASK, of_x, read);
    const Dtype read_of_w = __shfl_sync(FULL_MASK, of_w, read);
    if (read_y == NO_CLASS) { continue; }
    const size_t at = static_cast<size_t>(first + read) * num_features;
    const Dtype* const x_row = x + at;
    const Dtype* const w_row = w + static_cast<size_t>(read_y) * num_features;
    if (read_of_x != 0 && Aligned(x_row, num_features)
        && Aligned(w_row, num_features) && Aligned(dx + at, num_features)) {
      AddBatches<LOAD / sizeof(Dtype)>(dx + at, read_of_x, x_row, read_of_w,
          w_row, num_features, team.lanes);
      continue;
    }
    AddBatches<1>(dx + at, read_of_x, x_row, read_of_w, w_row, num_features,
        team.lanes);
    if (read_of_x == 0) {
      const Coefficients of = coefficients[first + read];
      const Dtype g =
          diff[static_cast<size_t>(first + read) * num_classes + read_y];
      const Factor factor = {g * of.b, of.w, of.x};
      // A thread has the values that it has written above.
      for (int i = Rank(team.lanes); i < num_features; i += team.lanes) {
        dx[at + i] += Apart(factor, x_row[i]);
      }
    }
  }
}

// The first place of a sorted range of keys whose key is at or above a bound;
// `end` if there is none. Found by a warp, a key a lane at once.
static __device__ int LowerBound(const Key* __restrict__ keys, int begin,
    int end, Key bound) {
  while (begin < end) {
    const int step = (end - begin + WARP - 1) / WARP;
    const long long last =
        begin + static_cast<long long>(threadIdx.x % WARP + 1) * step - 1;
    const unsigned below =
        __ballot_sync(FULL_MASK, last < end && keys[last] < bound);
    // The lanes below are the first ones.
    begin += step * __popc(below);
    if (begin + step - 1 < end) { end = begin + step - 1; }
  }
  return begin;
}

// Chunks, both included; none if last is -1.
struct Range {
  int first;
  int last;
};

static __device__ Key LeastKey(int of_class) {
  return Key(static_cast<unsigned>(of_class)) << 32;
}

// Where a chunk leaves the sums of classes that it shares with others: of the
// one that began before it, and of the one that begins in it and goes on.
enum { kBegun = 0, kBegins = 1, kShared = 2 };

// What a block knows of its places, a sample each in the order of the keys, and
// of its chunks: which ones share their classes.
template <typename Dtype>
struct Places {
  int classes[PLACES];
  int samples[PLACES];
  Dtype of_x[PLACES];      // g a
  double terms[PLACES];    // g b |x|
  double inverses[PLACES];  // 1 / |w|
  Range ranges[PLACES / LOADS][kShared];
};

// The block's, whatever its loads are.
template <typename Dtype>
static __device__ Places<Dtype>* SharedPlaces() {
  __shared__ Places<Dtype> places;
  return &places;
}

// A sum over samples of a class: of g a x, in the thread's columns, and of
// g b |x|.
template <typename Dtype, int V>
struct ClassSum {
  Vector<Dtype, V> of_x;
  double terms;

  // dw, some columns of a row, with what the sum brings; w is the same of W,
  // and `of` has |w|.
  __device__ Vector<Dtype, V> AddTo(Vector<Dtype, V> dw,
      const Vector<Dtype, V>& w, double inverse, const Coefficients& of) const {
    const Dtype of_w = Product<Dtype>(terms, inverse);
    if (of_w != 0) {
      for (int k = 0; k < V; ++k) { dw.v[k] += of_x.v[k] + of_w * w.v[k]; }
    } else {
      // w of no sample with an angle may not be finite.
      const Factor factor = {terms, 1, of.w};
      for (int k = 0; k < V; ++k) {
        dw.v[k] += of_x.v[k] + Apart(factor, w.v[k]);
      }
    }
    return dw;
  }
};

// Some columns of the rows of dW to which a block adds.
//
// partials, partial_terms and counters have room for each chunk, by columns of
// blocks: kShared rows of x and kShared numbers, and a counter that is 0 and is
// left so: of the chunks, sharing the class that begins in it, that are done.
template <typename Dtype, int V>
struct ClassAdder {
  typedef Vector<Dtype, V> Values;
  const Cut& cut;
  int num_samples, num_classes, num_features;
  const Dtype* __restrict__ x;
  const Dtype* __restrict__ w;
  const Coefficients* __restrict__ coefficients;
  const Key* __restrict__ keys;
  const Dtype* __restrict__ diff;
  Dtype* __restrict__ dw;
  Dtype* partials;
  double* partial_terms;
  int* counters;
  int block;

  __device__ void Add() const {
    ReadPlaces();
    FindShared();
    __syncthreads();
    AddChunk();
    if (__syncthreads_or(Shares(kBegun) || Shares(kBegins))) { AddShared(); }
  }

 private:
  __device__ Places<Dtype>& At() const { return *SharedPlaces<Dtype>(); }
  // Which of the blocks' columns the block has, and of these the thread's.
  __device__ int Columns() const { return block % cut.columns; }
  __device__ int Column() const {
    return Columns() * cut.lanes + Rank(cut.lanes);
  }
  __device__ bool HasColumn() const { return Column() < num_features / V; }
  __device__ int FirstChunk() const {
    return block / cut.columns * cut.Chunks();
  }
  // The thread's chunk among the block's.
  __device__ int Own() const { return threadIdx.x / cut.lanes; }
  __device__ bool Shares(int slot) const {
    return At().ranges[Own()][slot].last >= 0;
  }
  __device__ size_t Row(size_t number) const {
    return number * num_features + static_cast<size_t>(Column()) * V;
  }
  __device__ const Values& Of(const Dtype* matrix, size_t row) const {
    return *reinterpret_cast<const Values*>(matrix + Row(row));
  }
  __device__ Values& Of(Dtype* matrix, size_t row) const {
    return *reinterpret_cast<Values*>(matrix + Row(row));
  }
  // A chunk's among the partials.
  __device__ static size_t Slot(int chunk, int slot) {
    return static_cast<size_t>(chunk) * kShared + slot;
  }
  __device__ double& Terms(size_t slot) const {
    return partial_terms[slot * cut.columns + Columns()];
  }

  __device__ int ClassAt(int place) const {
    return place < 0 ? NO_CLASS : ClassOf(KeyAt(keys, num_samples, place));
  }
  // How many of the next WARP chunks have a class, too: a lane looks at each,
  // at its nearest place, from `place` on and `step` apart. By a warp.
  __device__ int CountNext(int of_class, int place, int step) const {
    const int y = ClassAt(place + static_cast<int>(threadIdx.x % WARP) * step);
    return __popc(
        __ballot_sync(FULL_MASK, of_class != NO_CLASS && y == of_class));
  }

  // Finds the chunks that share the class in which one of the block's begins
  // or ends, a chunk a warp. It starts with the last warps, as ReadPlaces keeps
  // the first ones waiting.
  __device__ void FindShared() const {
    const int warp = (THREADS - 1 - threadIdx.x) / WARP;
    for (int i = warp; i < cut.Chunks(); i += THREADS / WARP) {
      const int chunk = FirstChunk() + i;
      const int begin = chunk * cut.places, end = begin + cut.places;
      const int head = ClassAt(begin), tail = ClassAt(end - 1);
      const int before = CountNext(head, begin - 1, -cut.places);
      const int behind = CountNext(tail, end, cut.places);
      Range begun = {chunk - before, chunk}, begins = {chunk, chunk + behind};
      if (before == WARP) {
        const int first = LowerBound(keys, 0, begin, LeastKey(head));
        begun.first = first / cut.places;
      }
      if (behind == WARP) {
        const int past = LowerBound(keys, end, num_samples, LeastKey(tail + 1));
        begins.last = (past - 1) / cut.places;
      }
      const bool is_one = head == tail;
      if (is_one) { begun.last = begins.last; }
      if (threadIdx.x % WARP != 0) { continue; }
      const Range none = {chunk, -1};
      Range* const ranges = At().ranges[i];
      ranges[kBegun] = before != 0 ? begun : none;
      // That of a class with all of the chunk is already there.
      ranges[kBegins] =
          behind != 0 && !(is_one && before != 0) ? begins : none;
    }
  }

  // The scalars of the block's places, one a thread.
  __device__ void ReadPlaces() const {
    Places<Dtype>& at = At();
    for (int i = threadIdx.x; i < cut.Chunks() * cut.places; i += THREADS) {
      const Key key = KeyAt(keys, num_samples, FirstChunk() * cut.places + i);
      const int y = ClassOf(key);
      at.classes[i] = y;
      at.samples[i] = SampleOf(key);
      at.of_x[i] = 0;
      at.terms[i] = 0;
      at.inverses[i] = 0;
      if (y == NO_CLASS) { continue; }
      const size_t sample = SampleOf(key);
      const Coefficients of = coefficients[sample];
      at.inverses[i] = 1 / of.w;
      if (of.x == 0) { continue; }
      const Dtype g = diff[sample * num_classes + y];
      at.of_x[i] = static_cast<Dtype>(g * of.a);
      at.terms[i] = g * of.b * of.x;
    }
  }

  // The thread's columns of its chunk: to dW the sums of classes that the chunk
  // has alone, to the partials those of others.
  __device__ void AddChunk() const {
    const Places<Dtype>& at = At();
    const int begin = Own() * cut.places;
    const int last = begin + cut.places - 1;
    const int begun = Shares(kBegun) ? at.classes[begin] : NO_CLASS;
    const int begins = Shares(kBegins) ? at.classes[last] : NO_CLASS;
    ClassSum<Dtype, V> sum = {};
    for (int from = begin; from <= last; from += LOADS) {
      Values xs[LOADS], ws[LOADS], sums[LOADS];
      bool ends[LOADS], is_whole[LOADS];
      for (int j = 0; j < LOADS; ++j) {
        const int i = from + j;
        const int y = at.classes[i];
        ends[j] = y != NO_CLASS && (i == last || at.classes[i + 1] != y);
        is_whole[j] = ends[j] && y != begun && y != begins;
        xs[j] = ws[j] = sums[j] = Values();
        if (HasColumn() && at.of_x[i] != 0) { xs[j] = Of(x, at.samples[i]); }
        if (HasColumn() && is_whole[j]) {
          ws[j] = Of(w, y);
          sums[j] = Of(dw, y);
        }
      }
      for (int j = 0; j < LOADS; ++j) {
        const int i = from + j;
        for (int k = 0; k < V; ++k) {
          sum.of_x.v[k] += at.of_x[i] * xs[j].v[k];
        }
        sum.terms += at.terms[i];
        if (!ends[j]) { continue; }
        const int y = at.classes[i];
        if (is_whole[j] && HasColumn()) {
          Of(dw, y) = sum.AddTo(sums[j], ws[j], at.inverses[i],
              coefficients[at.samples[i]]);
        } else if (!is_whole[j]) {
          const size_t slot =
              Slot(FirstChunk() + Own(), y == begun ? kBegun : kBegins);
          if (HasColumn()) { Of(partials, slot) = sum.of_x; }
          if (Rank(cut.lanes) == 0) { Terms(slot) = sum.terms; }
        }
        sum = ClassSum<Dtype, V>();
      }
    }
  }

  // Whether all others of the chunks that share a class are done.
  __device__ bool ArrivesLast(const Range& range) const {
    int* const counter = counters
        + static_cast<size_t>(range.first) * cut.columns + Columns();
    // What the block has written is seen before its arrival, and what the
    // others have written behind theirs.
    __threadfence();
    if (atomicAdd(counter, 1) != range.last - range.first) { return false; }
    atomicExch(counter, 0);
    __threadfence();
    return true;
  }

  // The thread's columns of the sums that some of the chunks have left: each as
  // many behind the last as the block has chunks.
  __device__ ClassSum<Dtype, V> SumOfOwn(const Range& range) const {
    ClassSum<Dtype, V> sum = {};
    for (int from = range.first + Own(); from <= range.last;
        from += LOADS * cut.Chunks()) {
      Values of_x[LOADS];
      double terms[LOADS];
      for (int j = 0; j < LOADS; ++j) {
        const int chunk = from + j * cut.Chunks();
        of_x[j] = Values();
        terms[j] = 0;
        if (chunk > range.last) { continue; }
        const size_t slot =
            Slot(chunk, chunk == range.first ? kBegins : kBegun);
        if (HasColumn()) { of_x[j] = Of(partials, slot); }
        terms[j] = Terms(slot);
      }
      for (int j = 0; j < LOADS; ++j) {
        for (int k = 0; k < V; ++k) { sum.of_x.v[k] += of_x[j].v[k]; }
        sum.terms += terms[j];
      }
    }
    return sum;
  }

  // Arrives for the classes that the block's chunks share, and adds to dW what
  // all chunks have left where the block is the last of them.
  __device__ void AddShared() const {
    __shared__ Values of_x[THREADS];
    __shared__ double terms[THREADS];
    const int slots = cut.Chunks() * kShared;
    Range* const ranges = At().ranges[0];
    for (int i = threadIdx.x; i < slots; i += THREADS) {
      if (ranges[i].last >= 0 && !ArrivesLast(ranges[i])) {
        ranges[i].last = -1;
      }
    }
    __syncthreads();
    for (int i = 0; i < slots; ++i) {
      const Range range = ranges[i];
      if (range.last < 0) { continue; }
      const int chunk = i / kShared, slot = i % kShared;
      const int place =
          chunk * cut.places + (slot == kBegun ? 0 : cut.places - 1);
      const int y = At().classes[place];
      const bool adds = Own() == 0 && HasColumn();
      const Values w_row = adds ? Of(w, y) : Values();
      const Values dw_row = adds ? Of(dw, y) : Values();
      ClassSum<Dtype, V> sum = SumOfOwn(range);
      of_x[threadIdx.x] = sum.of_x;
      terms[threadIdx.x] = sum.terms;
      __syncthreads();
      if (adds) {
        for (int other = 1; other < cut.Chunks(); ++other) {
          const int thread = other * cut.lanes + threadIdx.x;
          for (int k = 0; k < V; ++k) { sum.of_x.v[k] += of_x[thread].v[k]; }
          sum.terms += terms[thread];
        }
        Of(dw, y) = sum.AddTo(dw_row, w_row, At().inverses[place],
            coefficients[At().samples[place]]);
      }
      __syncthreads();  // before the sums of the next class
    }
  }
};

// The first class_blocks blocks have the classes, the others the samples.
template <typename Dtype>
static __device__ void Backward(int num_samples, int num_classes,
    int num_features, int class_blocks, const Team& team, const Cut& cut,
    const Dtype* x, const Dtype* w, const Coefficients* coefficients,
    const int* classes, const Key* keys, const Dtype* diff, Dtype* dx,
    Dtype* dw, Dtype* partials, double* partial_terms, int* counters) {
  const int block = blockIdx.x;
  if (block >= class_blocks) {
    AddToSamples(team.First(block - class_blocks), num_samples, num_classes,
        num_features, team, x, w, coefficients, classes, diff, dx);
  } else if (cut.wide) {
    ClassAdder<Dtype, LOAD / sizeof(Dtype)>{cut, num_samples, num_classes,
        num_features, x, w, coefficients, keys, diff, dw, partials,
        partial_terms, counters, block}.Add();
  } else {
    ClassAdder<Dtype, 1>{cut, num_samples, num_classes, num_features, x, w,
        coefficients, keys, diff, dw, partials, partial_terms, counters,
        block}.Add();
  }
}

// Without __launch_bounds__: with it, nvcc spills, to fit in more blocks.
#define KERNEL extern "C" __global__ void

#define KERNELS(Dtype, suffix) \
  KERNEL large_margin_forward_##suffix(int num_samples, int num_sorts, \
      Team team, Labels of, int num_features, int margin, double share, \
      const Dtype* __restrict__ x, const Dtype* __restrict__ labels, \
      const Dtype* __restrict__ w, Dtype* __restrict__ logits, \
      Coefficients* __restrict__ coefficients, int* __restrict__ classes, \
      Key* __restrict__ keys, int num_counters, int* __restrict__ counters, \
      unsigned long long* bad_label) { \
    Forward<Dtype>(num_samples, num_sorts, team, of, num_features, margin, \
        share, x, labels, w, logits, coefficients, classes, keys, \
        num_counters, counters, bad_label); \
  } \
  KERNEL large_margin_merge_##suffix(int num_samples, int run, \
      const Key* __restrict__ from, Key* __restrict__ to) { \
    Merge(num_samples, run, from, to); \
  } \
  KERNEL large_margin_backward_##suffix(int num_samples, int num_classes, \
      int num_features, int class_blocks, Team team, Cut cut, \
      const Dtype* __restrict__ x, const Dtype* __restrict__ w, \
      const Coefficients* __restrict__ coefficients, \
      const int* __restrict__ classes, const Key* __restrict__ keys, \
      const Dtype* __restrict__ diff, Dtype* __restrict__ dx, \
      Dtype* __restrict__ dw, Dtype* partials, double* partial_terms, \
      int* counters) { \
    Backward<Dtype>(num_samples, num_classes, num_features, class_blocks, \
        team, cut, x, w, coefficients, classes, keys, diff, dx, dw, partials, \
        partial_terms, counters); \
  }

KERNELS(float, f32)
KERNELS(double, f64)
