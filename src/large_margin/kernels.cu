// The margin layer on the GPU: what is left beside cuBLAS's products.
//
// Forward: a kernel behind the product finds each sample's coefficients of
// correction.rs and puts the margin on its target logit; beside that, a block a
// tile of samples sorts these by class, for the backward pass.
// Backward: a kernel before the products folds a into the target entries of
// the top gradient and sums up, over each class of a tile, what its row of dW
// gets; one behind them puts the entries back and adds to each row of dx its x
// and to each row of dW its w. Neither kernel can do the other's work, as the
// products stand between them. All sums are made in a fixed order and no float
// is added atomically, so two runs give the same bits.
//
// Rows of x, w and dx are read by as many threads as have one batch of loads
// of them each, up to a warp; a row's scalars are a lane's work, for up to 32
// rows a warp at once. Where that leaves too few warps, a block reads a row
// (Team).
//
// THREADS, WARP, TILE, WAYS, LOAD, LOADS and the sizes of structs come from
// src/cuda/layout.rs.

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

// The factor as one number; 0 where it has none of ordinary size.
template <typename Dtype>
static __device__ Dtype Product(const Factor& factor) {
  const double ratio = factor.numerator / factor.denominator;
  const Dtype product = static_cast<Dtype>(factor.value * ratio);
  return InRange<double>(fabs(ratio)) && InRange<Dtype>(fabs(product))
      ? product : 0;
}

template <int V, typename Dtype>
static __device__ void AddBatches(Dtype* __restrict__ y, Dtype product,
    const Dtype* __restrict__ v, int length, int lanes) {
  const int count = length / V;
  for (int i = Rank(lanes); i < count; i += LOADS * lanes) {
    Batch<Dtype, V> vs, ys;
    vs.Load(v, i, lanes, count);
    ys.Load(y, i, lanes, count);
    for (int j = 0; j < LOADS; ++j) {
      for (int k = 0; k < V; ++k) {
        ys.vectors[j].v[k] += product * vs.vectors[j].v[k];
      }
    }
    ys.Store(y, i, lanes, count);
  }
}

// y += product v, for rows of `length`.
template <typename Dtype>
static __device__ void AddProduct(Dtype* y, Dtype product, const Dtype* v,
    int length, int lanes) {
  if (Aligned(v, length) && Aligned(y, length)) {
    AddBatches<LOAD / sizeof(Dtype)>(y, product, v, length, lanes);
  } else {
    AddBatches<1>(y, product, v, length, lanes);
  }
}

// y += factor v, where the factor is no number of ordinary size: the ratio of
// the norms may leave the range of double. v / denominator does not, and 0
// stays 0.
template <typename Dtype>
static __device__ void AddFactor(Dtype* __restrict__ y, const Factor& factor,
    const Dtype* __restrict__ v, int length, int lanes) {
  if (factor.value == 0) { return; }
  for (int i = Rank(lanes); i < length; i += lanes) {
    const double vi = v[i];
    if (vi == 0) { continue; }
    y[i] += static_cast<Dtype>(
        vi / factor.denominator * factor.value * factor.numerator);
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

// k of the paper's psi: how many of the borders cos(j pi / m) are at or above
// the lane's c. A lane has a border, for all.
static __device__ int Segment(double c, int margin) {
  const int lane = threadIdx.x % WARP;
  int k = 0;
  for (int first = 1; first < margin; first += WARP) {
    const double border = cospi(static_cast<double>(first + lane) / margin);
    const int left = margin - first;
    for (int j = 0; j < left && j < WARP; ++j) {
      k += c <= __shfl_sync(FULL_MASK, border, j);
    }
  }
  return k;
}

// The coefficients of a sample with the target logit f, on which it puts the
// margin.
template <typename Dtype>
static __device__ Coefficients PutMargin(double f, const Pair& norms, double c,
    int k, int margin, double lambda, Dtype* logit) {
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
  Coefficients of;
  of.a = (dpsi - 1) * share;
  of.b = (psi - c * dpsi) * share;
  of.x = norms.x;
  of.w = norms.w;
  return of;
}

// The team's samples: their coefficients, and the margin on their target
// logits. A lane's own sample is the first and its number; with other lanes it
// reads the rows of each.
//
// bad_label, in host memory that the device can write, gets the number of a
// sample with a label that is no class in its upper half and the label, as
// float, in the lower. One store, so the halves belong together.
template <typename Dtype>
static __device__ void ForwardSamples(int first, int num_samples,
    const Team& team, const Labels& of, int num_features, int margin,
    double lambda, const Dtype* __restrict__ x,
    const Dtype* __restrict__ labels, const Dtype* __restrict__ w,
    Dtype* __restrict__ logits, Coefficients* __restrict__ coefficients,
    volatile unsigned long long* bad_label) {
  const int lane = threadIdx.x % WARP;
  const int sample = first + lane;
  int y = NO_CLASS;
  if (lane < team.rows && sample < num_samples) {
    const double label = labels[sample];
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
  unsigned scaled = __ballot_sync(FULL_MASK,
      !InRange<Dtype>(squares.x) || !InRange<Dtype>(squares.w));
  for (; scaled != 0; scaled &= scaled - 1) {
    const int row = __ffs(scaled) - 1;
    const Pair found = ScaledNorms(x_row(row),
        w_row(__shfl_sync(FULL_MASK, y, row)), num_features, team.Most());
    if (lane == row) { norms = found; }
  }

  if (!team.Tells()) { return; }
  const bool usable = Usable(norms.x) && Usable(norms.w) && isfinite(f);
  const double c =
      usable ? fmin(1.0, fmax(-1.0, f / norms.x / norms.w)) : 0.0;
  const int k = Segment(c, margin);
  if (!has_class) { return; }
  // |w| stays where |x| is no use: the class's other samples may use it.
  coefficients[sample] = usable
      ? PutMargin(f, norms, c, k, margin, lambda, logit)
      : Coefficients{0, 0, 0, norms.w};
}

// The first num_tiles blocks sort, which takes longest; the others have the
// samples.
template <typename Dtype>
static __device__ void Forward(int num_samples, int num_tiles,
    const Team& team, const Labels& of, int num_features, int margin,
    double lambda, const Dtype* x, const Dtype* labels, const Dtype* w,
    Dtype* logits, Coefficients* coefficients, Key* keys,
    volatile unsigned long long* bad_label) {
  const int block = blockIdx.x;
  if (block < num_tiles) {
    MakeKeys(num_samples, of, labels, block, keys);
  } else {
    ForwardSamples(team.First(block - num_tiles), num_samples, team, of,
        num_features, margin, lambda, x, labels, w, logits, coefficients,
        bad_label);
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

// A thread a place among the keys. Puts g (1 + a) in the place of the target
// entry g of `diff`, which it keeps in `entries`. Where the keys are sorted,
// sums[place] becomes the sum of g b |x| over the samples of its class
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
      entries[place] = g;
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

// The team's places among the keys, a lane's own being the first and its
// number: puts their samples' target entries back and adds to their rows of
// dx, which may be null.
template <typename Dtype>
static __device__ void BackwardSamples(int first, int num_samples,
    int num_classes, int num_features, const Team& team,
    const Dtype* __restrict__ x,
    const Coefficients* __restrict__ coefficients,
    const Key* __restrict__ keys, const Dtype* __restrict__ entries,
    Dtype* __restrict__ diff, Dtype* __restrict__ dx) {
  const int lane = threadIdx.x % WARP;
  const int place = first + lane;
  const Key key = lane < team.rows ? KeyAt(keys, num_samples, place) : ~Key(0);
  // By a lane that has read the key and whose sample has an angle.
  int sample = -1;
  Factor factor = {0, 1, 1};
  if (ClassOf(key) != NO_CLASS) {
    const Coefficients of = coefficients[SampleOf(key)];
    if (of.x != 0) {
      sample = SampleOf(key);
      const Dtype entry = entries[place];
      if (team.Tells()) {
        diff[static_cast<size_t>(sample) * num_classes + ClassOf(key)] = entry;
      }
      factor = {entry * of.b, of.w, of.x};
    }
  }
  if (!dx) { return; }
  const Dtype product = Product<Dtype>(factor);
  for (int row = 0; row < team.rows; row += team.AtOnce()) {
    const int read = row + team.Among();
    const int read_sample = __shfl_sync(FULL_MASK, sample, read);
    const Dtype read_product = __shfl_sync(FULL_MASK, product, read);
    const size_t at = static_cast<size_t>(read_sample) * num_features;
    if (read_product != 0) {
      AddProduct(dx + at, read_product, x + at, num_features, team.lanes);
    } else if (read_sample >= 0) {
      const Coefficients of = coefficients[read_sample];
      const Factor apart = {entries[first + read] * of.b, of.w, of.x};
      AddFactor(dx + at, apart, x + at, num_features, team.lanes);
    }
  }
}

// The same places: adds to the row of dW of each class whose first key is at
// one of them.
template <typename Dtype>
static __device__ void BackwardClasses(int first, int num_samples,
    int num_features, const Team& team, const Dtype* __restrict__ w,
    const Coefficients* __restrict__ coefficients,
    const Key* __restrict__ keys, const double* __restrict__ sums,
    Dtype* __restrict__ dw) {
  const int lane = threadIdx.x % WARP;
  const int lanes = team.Most();
  const int own = first + lane;
  const Key key = lane < team.rows ? KeyAt(keys, num_samples, own) : ~Key(0);
  unsigned begin = __ballot_sync(FULL_MASK, ClassOf(key) != NO_CLASS
      && (own == 0 || ClassOf(keys[own - 1]) != ClassOf(key)));
  for (; begin != 0; begin &= begin - 1) {
    const int source = __ffs(begin) - 1;
    const int place = first + source;
    const int y = __shfl_sync(FULL_MASK, ClassOf(key), source);
    const int sample = __shfl_sync(FULL_MASK, SampleOf(key), source);
    // The class ends in the block of Fold that it begins in, or goes on.
    double sum = sums[place];
    const int next = (place / THREADS + 1) * THREADS;
    if (ClassOf(KeyAt(keys, num_samples, next)) == y) {
      Pair more = {0, 0};
      for (long long i = next
          + static_cast<long long>(Rank(lanes)) * THREADS;
          i < num_samples && ClassOf(keys[i]) == y; i += lanes * THREADS) {
        more.w += sums[i];
      }
      sum += JoinRow<Add>(more, lanes).w;
    }
    const Factor factor = {sum, 1, coefficients[sample].w};
    const Dtype product = Product<Dtype>(factor);
    const size_t at = static_cast<size_t>(y) * num_features;
    if (product != 0) {
      AddProduct(dw + at, product, w + at, num_features, lanes);
    } else {
      AddFactor(dw + at, factor, w + at, num_features, lanes);
    }
  }
}

// A grid's first row of blocks has the samples, its second the classes.
template <typename Dtype>
static __device__ void Backward(int num_samples, int num_classes,
    int num_features, const Team& team, const Dtype* x, const Dtype* w,
    const Coefficients* coefficients, const Key* keys, const Dtype* entries,
    const double* sums, Dtype* diff, Dtype* dx, Dtype* dw) {
  const int first = team.First(blockIdx.x);
  if (blockIdx.y == 0) {
    BackwardSamples(first, num_samples, num_classes, num_features, team, x,
        coefficients, keys, entries, diff, dx);
  } else {
    BackwardClasses(first, num_samples, num_features, team, w, coefficients,
        keys, sums, dw);
  }
}

// Without __launch_bounds__: with it, nvcc spills, to fit in more blocks.
#define KERNEL extern "C" __global__ void

#define KERNELS(Dtype, suffix) \
  KERNEL large_margin_forward_##suffix(int num_samples, int num_tiles, \
      Team team, Labels of, int num_features, int margin, double lambda, \
      const Dtype* __restrict__ x, const Dtype* __restrict__ labels, \
      const Dtype* __restrict__ w, Dtype* __restrict__ logits, \
      Coefficients* __restrict__ coefficients, Key* __restrict__ keys, \
      unsigned long long* bad_label) { \
    Forward<Dtype>(num_samples, num_tiles, team, of, num_features, margin, \
        lambda, x, labels, w, logits, coefficients, keys, bad_label); \
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
      int num_features, Team team, const Dtype* __restrict__ x, \
      const Dtype* __restrict__ w, \
      const Coefficients* __restrict__ coefficients, \
      const Key* __restrict__ keys, const Dtype* __restrict__ entries, \
      const double* __restrict__ sums, Dtype* __restrict__ diff, \
      Dtype* __restrict__ dx, Dtype* __restrict__ dw) { \
    Backward<Dtype>(num_samples, num_classes, num_features, team, x, w, \
        coefficients, keys, entries, sums, diff, dx, dw); \
  }

KERNELS(float, f32)
KERNELS(double, f64)
