// LargeMarginInnerProduct's GPU path, from the bridge to the kernels, against
// its CPU path.

#include <algorithm>
#include <cstring>
#include <limits>
#include <thread>

#include "harness.hpp"

namespace {

enum Field {
  kNumOutput = 1, kBase = 5, kGamma = 6, kMargin = 10, kIgnore = 11
};

constexpr int kIgnoreLabel = -7;
const double kNan = std::numeric_limits<double>::quiet_NaN();
const double kInf = std::numeric_limits<double>::infinity();

template <typename Dtype>
struct Problem {
  std::string name;
  int samples, features, classes, margin;
  double lambda;
  std::vector<Dtype> x, w, labels, g, plain_g;

  Problem(int m, int k, int n, int margin, double lambda)
      : samples(m), features(k), classes(n), margin(margin), lambda(lambda) {
    Noise noise(m * 7919 + k * 31 + n);
    x = noise.Vector<Dtype>(size_t(m) * k);
    w = noise.Vector<Dtype>(size_t(n) * k);
    g = noise.Vector<Dtype>(size_t(m) * n);
    plain_g = noise.Vector<Dtype>(g.size());
    labels.resize(m);
    for (Dtype& label : labels) { label = floor((noise() + 1) / 2 * n); }
    name = std::string(sizeof(Dtype) == 4 ? "f32" : "f64") + " M "
        + std::to_string(m) + " K " + std::to_string(k) + " N "
        + std::to_string(n) + " m " + std::to_string(margin);
  }

  Param LayerParam() const {
    return Param().Int(kNumOutput, classes).Float(kBase, float(lambda))
        .Int(kMargin, margin).Int(kIgnore, kIgnoreLabel);
  }
  Dtype* Row(std::vector<Dtype>* matrix, int row) const {
    return matrix->data() + size_t(row) * features;
  }
};

template <typename Dtype>
struct Outcome {
  // diff: the gradient of the logits, which backward leaves as it was.
  std::vector<Dtype> logits, plain, dx, dw, diff;
  bool operator==(const Outcome& other) const {
    const auto same = [](const std::vector<Dtype>& a,
        const std::vector<Dtype>& b) {
      return a.size() == b.size() && (a.empty()
          || memcmp(a.data(), b.data(), a.size() * sizeof(Dtype)) == 0);
    };
    return same(logits, other.logits) && same(plain, other.plain)
        && same(dx, other.dx) && same(dw, other.dw)
        && same(diff, other.diff);
  }
};

// What a test leaves out; and whether features, weights and their gradients
// begin one value behind a boundary of the widest load.
struct Wanted {
  bool labels = true, plain = true, dx = true, dw = true, plain_diff = false;
  bool x_off = false, w_off = false;
};

using RustLayer = rust::Box<lsoftmax::LargeMarginInnerProduct>;

template <typename Dtype>
class Layer {
 public:
  explicit Layer(const Problem<Dtype>& p)
      : p_(p), rust_(lsoftmax::new_large_margin(p.LayerParam().Bytes())) {}

  // Both passes; dW has something in it before.
  Outcome<Dtype> Cpu(Wanted wanted = {}) {
    Outcome<Dtype> out = Prepare(wanted);
    CpuForward(wanted, &out);
    CpuBackward(wanted, &out);
    return out;
  }

  // The same, queued on the device and waited for at the end.
  Outcome<Dtype> Gpu(Wanted wanted = {}) {
    Outcome<Dtype> out = Prepare(wanted);
    const std::pair<bool, std::vector<Dtype>*> moved[] = {{wanted.x_off, &x_},
        {wanted.x_off && wanted.dx, &out.dx}, {wanted.w_off, &w_},
        {wanted.w_off && wanted.dw, &out.dw}};
    for (const auto& blob : moved) {
      if (blob.first) { blob.second->insert(blob.second->begin(), 0); }
    }
    GpuForward(wanted, &out);
    GpuBackward(wanted, &out);
    Synchronize();
    for (const auto& blob : moved) {
      if (blob.first) { blob.second->erase(blob.second->begin()); }
    }
    return out;
  }

  Outcome<Dtype> Prepare(Wanted wanted) {
    const int32_t shape[] = {p_.samples, p_.features};
    const lsoftmax::MarginSizes sizes = lsoftmax::reshape(*rust_,
        rust::Slice<const int32_t>(shape, 2), wanted.labels,
        rust::Slice<const int32_t>(shape, 1));
    // What forward must overwrite holds NaN; what backward adds to, values.
    Outcome<Dtype> out;
    const Dtype old = std::numeric_limits<Dtype>::quiet_NaN();
    out.logits.assign(p_.g.size(), old);
    if (wanted.plain) { out.plain.assign(p_.g.size(), old); }
    if (wanted.dx) { out.dx.assign(p_.x.size(), old); }
    if (wanted.dw) { out.dw = Noise(5).Vector<Dtype>(p_.w.size()); }
    out.diff = p_.g;
    scratch_.assign(sizes.device_bytes, 0xff);
    x_ = p_.x;
    w_ = p_.w;
    return out;
  }
  void CpuForward(Wanted wanted, Outcome<Dtype>* out) {
    wanted.x_off = wanted.w_off = false;
    Forward(lsoftmax::Memory::Host, CpuBlas(), wanted, out);
  }
  void CpuBackward(Wanted wanted, Outcome<Dtype>* out) {
    wanted.x_off = wanted.w_off = false;
    Backward(lsoftmax::Memory::Host, CpuBlas(), wanted, out);
  }
  void GpuForward(Wanted wanted, Outcome<Dtype>* out) {
    Forward(lsoftmax::Memory::Device, DeviceBlas(), wanted, out);
  }
  void GpuBackward(Wanted wanted, Outcome<Dtype>* out) {
    Backward(lsoftmax::Memory::Device, DeviceBlas(), wanted, out);
  }

  // As the shim does.
  void Forward(lsoftmax::Memory memory, const lsoftmax::Blas& blas,
      Wanted wanted, Outcome<Dtype>* out) {
    lsoftmax::MarginForward pass{};
    pass.memory = memory;
    pass.dtype = TypeOf<Dtype>();
    pass.features = View(x_, At(wanted.x_off));
    if (wanted.labels) { pass.labels = View(p_.labels); }
    pass.weights = View(w_, At(wanted.w_off));
    pass.logits = MutableView(out->logits);
    pass.plain = MutableView(out->plain);
    pass.scratch = MutableView(scratch_);
    lsoftmax::forward(*rust_, blas, pass);
  }
  void Backward(lsoftmax::Memory memory, const lsoftmax::Blas& blas,
      Wanted wanted, Outcome<Dtype>* out) {
    lsoftmax::MarginBackward pass{};
    pass.memory = memory;
    pass.dtype = TypeOf<Dtype>();
    pass.logits_diff = MutableView(out->diff);
    if (wanted.plain_diff) { pass.plain_diff = View(p_.plain_g); }
    pass.features = View(x_, At(wanted.x_off));
    pass.weights = View(w_, At(wanted.w_off));
    if (wanted.dx) {
      pass.features_diff = MutableView(out->dx, At(wanted.x_off));
    }
    if (wanted.dw) {
      pass.weights_diff = MutableView(out->dw, At(wanted.w_off));
    }
    pass.scratch = MutableView(scratch_);
    lsoftmax::backward(*rust_, blas, pass);
  }

  // Bytes by which a blob is moved.
  static size_t At(bool off) { return off ? sizeof(Dtype) : 0; }

  const Problem<Dtype>& p_;
  RustLayer rust_;
  std::vector<uint8_t> scratch_;
  std::vector<Dtype> x_, w_;  // as the device has them
};

double Norm(const double* v, int n) {
  double largest = 0, sum = 0;
  for (int i = 0; i < n; ++i) { largest = fmax(largest, fabs(v[i])); }
  if (largest == 0 || !std::isfinite(largest)) { return largest; }
  for (int i = 0; i < n; ++i) { sum += v[i] / largest * (v[i] / largest); }
  return largest * sqrt(sum);
}

// Rounding errors grow with the terms of a sum, not with the sum: the bounds
// are a few units of the last place of the terms of each row.
template <typename Dtype>
void Compare(const Problem<Dtype>& p, const Outcome<Dtype>& cpu,
    const Outcome<Dtype>& gpu, const std::string& what) {
  const int m = p.samples, k = p.features, n = p.classes;
  const double unit = 8 * std::numeric_limits<Dtype>::epsilon();
  const double tiny = 4 * std::numeric_limits<Dtype>::denorm_min();
  const double steep = 2.0 * p.margin * p.margin;
  const auto norms = [k](const std::vector<Dtype>& matrix, int rows) {
    const std::vector<double> v(matrix.begin(), matrix.end());
    std::vector<double> norm(rows);
    for (int i = 0; i < rows; ++i) {
      norm[i] = Norm(v.data() + size_t(i) * k, k);
      if (!std::isfinite(norm[i])) { norm[i] = 1; }
    }
    return norm;
  };
  const std::vector<double> x = norms(p.x, m), w = norms(p.w, n);
  std::vector<double> dx(m), dw(n, 1.0);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      const double g = fabs(p.g[size_t(i) * n + j])
          + fabs(p.plain_g[size_t(i) * n + j]);
      if (!std::isfinite(g)) { continue; }
      const double by = p.labels[i] == j ? 1 + 2 * steep : 1;
      dx[i] += g * w[j] * by;
      dw[j] += g * x[i] * by;
    }
  }
  const auto rows = [&](const std::vector<Dtype>& a,
      const std::vector<Dtype>& b, int columns, const char* matrix,
      const std::function<double(int, int)>& size) {
    Check(a.size() == b.size(), what + matrix);
    for (size_t i = 0; i < a.size(); ++i) {
      const int row = int(i / columns), column = int(i % columns);
      if (Agree(a[i], b[i], unit * size(row, column) + tiny)) { continue; }
      return Check(false, p.name + " " + what + ": " + matrix + "["
          + std::to_string(row) + "," + std::to_string(column) + "] is "
          + Text(a[i]) + " on the CPU, " + Text(b[i]) + " on the GPU");
    }
  };
  rows(cpu.logits, gpu.logits, n, "logits",
      [&](int i, int j) { return x[i] * w[j] * steep; });
  rows(cpu.plain, gpu.plain, n, "plain logits",
      [&](int, int) { return 0.0; });
  rows(cpu.dx, gpu.dx, k, "dx", [&](int i, int) { return dx[i]; });
  rows(cpu.dw, gpu.dw, k, "dw", [&](int j, int) { return dw[j]; });
  for (const Outcome<Dtype>* outcome : {&cpu, &gpu}) {
    Check(outcome->diff.size() == p.g.size() && (p.g.empty()
        || memcmp(outcome->diff.data(), p.g.data(),
            p.g.size() * sizeof(Dtype)) == 0),
        p.name + " " + what + ": the gradient of the logits has changed");
  }
}

template <typename Dtype>
void Run(const Problem<Dtype>& p, const std::string& what,
    Wanted wanted = {}) {
  Compare(p, Layer<Dtype>(p).Cpu(wanted), Layer<Dtype>(p).Gpu(wanted), what);
}

template <typename Dtype>
void RunTwice(const Problem<Dtype>& p, const std::string& what) {
  Layer<Dtype> cpu(p), gpu(p);
  const Outcome<Dtype> device = gpu.Gpu();
  Compare(p, cpu.Cpu(), device, what);
  // The threads run in another order now.
  Check(device == gpu.Gpu(), p.name + " " + what
      + ": a second run gives other bits");
}

template <typename Dtype>
void Shapes() {
  const int shapes[][3] = {{1, 1, 1}, {1, 1, 5}, {3, 1, 7}, {5, 2, 1},
      {7, 33, 3}, {129, 40, 11}, {9, 513, 4}, {10, 127, 200}};
  const double lambdas[] = {0, 5, 1000};
  int turn = 0;
  for (const auto& s : shapes) {
    const int margin = turn % 8 + 1;
    Problem<Dtype> p(s[0], s[1], s[2], margin, lambdas[turn++ % 3]);
    RunTwice(p, "random labels");
    for (int i = 0; i < s[0]; ++i) { p.labels[i] = Dtype(s[2] - 1); }
    Run(p, "one label");
    for (int i = 0; i < s[0]; ++i) {
      p.labels[i] = Dtype(i % 3 == 1 ? kIgnoreLabel : i % s[2]);
    }
    Run(p, "labels in turn, some ignored");
  }
}

// Sizes around those of warps, blocks, vectors and tiles, of each axis. What
// many samples meet does not look at their values: float will do.
template <typename Dtype>
void Borders() {
  for (const int size : {1, 3, 4, 5, 31, 32, 33, 127, 128, 129, 255, 256, 257,
      511, 512, 513, 1023, 1024, 1025}) {
    Run(Problem<Dtype>(3, size, 2, 4, 1), "border of K");
    Run(Problem<Dtype>(4, 2, size, 3, 1), "border of N");
    if (size < 200 || (sizeof(Dtype) == 4 && (size < 300 || size > 1000))) {
      Run(Problem<Dtype>(size, 2, size < 1000 ? 3 : 1000, 2, 0), "border of M");
    }
  }
}

// How many lanes read a row and how many rows a warp has, around each border:
// of K by vectors and by single values, and of M. A block reads a row where
// there are less than 1024 that a warp could not have under way at once.
template <typename Dtype>
void Teams() {
  const int batch = 64 / sizeof(Dtype);  // values of a lane, by vectors
  for (int lanes = 1; lanes <= 32; lanes *= 2) {
    for (const int k : {lanes * batch, lanes * batch + 4, lanes * 4 + 1}) {
      // Of several warps: the last one has less than all its rows, or none.
      for (const int m : {1, 32 / lanes + 1, 128 / lanes + 1}) {
        Run(Problem<Dtype>(m, k, 3, 4, 1), "a team's border");
      }
    }
  }
}

// Warps that read their rows by turns, two or one at once; lanes that read a
// row by several batches; keys that are merged twice; and chunks of 8, of 16
// and of 32 places, with one class and with a few.
void ManyRows() {
  const int shapes[][3] = {{4100, 132, 2}, {2049, 260, 1}, {1024, 516, 2},
      {8300, 1, 3}, {5000, 132, 9}, {9000, 132, 1}, {9000, 132, 9},
      {9000, 260, 2}};
  for (const auto& s : shapes) {
    Problem<float> p(s[0], s[1], s[2], 4, 1);
    for (int i = 0; i < s[0]; i += 7) { p.labels[i] = kIgnoreLabel; }
    Run(p, "many rows");
  }
  Problem<float> p(1500, 20, 2, 4, 1);
  std::fill(p.labels.begin(), p.labels.end(), 1.f);
  Run(p, "one label of many samples");
}

// Classes that begin and end beside the borders of chunks, which have 4 places
// here, and of blocks, which have up to 256; one class of a few chunks, and of
// many; and rows that several blocks share, by vectors and by single values.
template <typename Dtype>
void Runs() {
  for (const int run : {3, 4, 5, 8, 63, 64, 65, 127, 128, 255, 257}) {
    for (const int k : {2, 20}) {
      Problem<Dtype> p(390, k, 390 / run + 1, 4, 1);
      for (int i = 0; i < p.samples; ++i) { p.labels[i] = Dtype(i / run); }
      RunTwice(p, "runs of " + std::to_string(run));
    }
  }
  for (const int k : {1, 37, 517, 1040, 2052}) {
    Problem<Dtype> p(70, k, 4, 4, 1);
    for (int i = 0; i < p.samples; ++i) {
      p.labels[i] = Dtype(i < 9 ? 0 : i < 30 ? 1 : 3);
    }
    RunTwice(p, "shared rows");
  }
}

// Rows that cannot be read by vectors, though their length would do.
template <typename Dtype>
void Misaligned() {
  const Problem<Dtype> p(9, 36, 5, 4, 1);
  for (int off = 1; off < 4; ++off) {
    Wanted wanted;
    wanted.x_off = off & 1;
    wanted.w_off = off & 2;
    Run(p, "misaligned " + std::to_string(off), wanted);
  }
}

// More samples than a block sorts: runs of classes over several tiles. A second
// backward pass finds what the first has merged.
void ManySamples() {
  Problem<float> p(2100, 2, 7, 3, 1);
  for (int i = 0; i < p.samples; ++i) {
    p.labels[i] = float(i % 5 == 0 ? kIgnoreLabel : i % 3 ? 3 : i * 31 % 7);
  }
  Layer<float> layer(p);
  const Outcome<float> out = layer.Gpu();
  Compare(p, Layer<float>(p).Cpu(), out, "many samples, some ignored");
  Outcome<float> again = out;
  again.dw = Noise(5).Vector<float>(p.w.size());
  layer.GpuBackward({}, &again);
  Synchronize();
  Check(again == out, p.name + ": a second backward pass gives other bits");
}

// Every segment of psi, its borders, and both ends.
template <typename Dtype>
void Angles() {
  for (int margin = 1; margin <= 8; ++margin) {
    const int borders = 4 * margin + 1;
    Problem<Dtype> p(borders, 2, 2, margin, 0.5);
    for (int i = 0; i < borders; ++i) {
      const double theta = M_PI * i / (borders - 1);
      const double turned = theta + atan2(p.w[1], p.w[0]);
      p.labels[i] = 0;
      p.x[2 * i] = Dtype((i + 1) * cos(turned));
      p.x[2 * i + 1] = Dtype((i + 1) * sin(turned));
    }
    Run(p, "angles");
  }
  for (const int margin : {129, 1000}) {
    Run(Problem<Dtype>(5, 3, 2, margin, 1), "large margin");
  }
}

template <typename Dtype>
void Extremes() {
  const Dtype least = std::numeric_limits<Dtype>::denorm_min();
  const Dtype largest = std::numeric_limits<Dtype>::max();
  const std::pair<const char*, std::function<void(Problem<Dtype>*)>> edits[] = {
      {"zero sample", [](auto* p) {
        std::fill_n(p->Row(&p->x, 3), p->features, Dtype(0)); }},
      {"zero class", [](auto* p) {
        std::fill_n(p->Row(&p->w, 1), p->features, Dtype(0)); }},
      {"all zero", [](auto* p) {
        std::fill(p->x.begin(), p->x.end(), Dtype(0));
        std::fill(p->w.begin(), p->w.end(), Dtype(0)); }},
      {"denormal samples", [=](auto* p) {
        for (int i = 0; i < 3 * p->features; ++i) {
          p->x[i] = least * floor(p->x[i] * 100); } }},
      {"denormal class", [=](auto* p) {
        for (int i = 0; i < p->features; ++i) {
          p->Row(&p->w, 2)[i] = least * floor(p->w[i] * 100); } }},
      {"small and large samples", [=](auto* p) {
        for (int i = 0; i < p->features; ++i) {
          p->Row(&p->x, 0)[i] *= sqrt(largest) / 100;
          p->Row(&p->x, 1)[i] /= sqrt(largest); } }},
      {"samples whose squares leave the range", [=](auto* p) {
        for (int i = 0; i < p->features; ++i) {
          p->Row(&p->x, 0)[i] *= largest / 1e8f;
          p->Row(&p->x, 1)[i] /= largest / 1e8f; } }},
      {"NaN in a sample", [](auto* p) { p->x[p->features] = Dtype(kNan); }},
      {"infinity in a sample", [](auto* p) { p->x[1] = Dtype(kInf); }},
      {"NaN in a class", [](auto* p) { p->w[p->features] = Dtype(kNan); }},
      {"infinity in a class", [](auto* p) { p->w[1] = Dtype(-kInf); }},
      {"zero gradient", [](auto* p) {
        std::fill(p->g.begin(), p->g.end(), Dtype(0)); }},
      {"zero target gradients", [](auto* p) {
        for (int i = 0; i < p->samples; i += 2) {
          p->g[i * p->classes + int(p->labels[i])] = 0; } }},
      {"NaN gradient", [](auto* p) {
        p->g[p->classes + int(p->labels[1])] = Dtype(kNan); }},
  };
  for (const auto& edit : edits) {
    // Read by some lanes of a warp, by one, and by a block.
    const int shapes[][2] = {{37, 1}, {37, 4}, {8, 4}, {516, 4}};
    for (const auto& s : shapes) {
      Problem<Dtype> p(12, s[0], 5, s[1], 0.25);
      edit.second(&p);
      Run(p, edit.first);
    }
  }
}

template <typename Dtype>
void LeftOut() {
  const Problem<Dtype> p(11, 19, 6, 4, 2), by_blocks(3, 516, 2, 4, 2);
  for (int mask = 0; mask < 32; ++mask) {
    Wanted wanted;
    wanted.labels = mask & 1;
    wanted.plain = mask & 2;
    wanted.dx = mask & 4;
    wanted.dw = mask & 8;
    wanted.plain_diff = mask & 16;
    Run(p, "with parts left out, " + std::to_string(mask), wanted);
    Run(by_blocks, "with parts left out, " + std::to_string(mask), wanted);
  }
  Run(Problem<Dtype>(0, 5, 3, 4, 1), "no sample");
  Run(Problem<Dtype>(4, 0, 3, 4, 1), "no feature");
}

// A batch size that changes, and lambda that falls with the passes.
template <typename Dtype>
void Passes() {
  Problem<Dtype> p(150, 9, 4, 3, 7);
  const Param param = Param().Int(kNumOutput, 4).Float(kBase, 7)
      .Float(kGamma, 0.5f).Int(kMargin, 3);
  Layer<Dtype> cpu(p), gpu(p);
  cpu.rust_ = lsoftmax::new_large_margin(param.Bytes());
  gpu.rust_ = lsoftmax::new_large_margin(param.Bytes());
  double lambda = 7;
  for (const int samples : {150, 3, 0, 149}) {
    p.samples = samples;
    p.x.resize(size_t(samples) * 9, Dtype(0.5));
    p.labels.resize(samples, Dtype(1));
    p.g.resize(size_t(samples) * 4, Dtype(0.25));
    p.plain_g.resize(p.g.size());
    Compare(p, cpu.Cpu(), gpu.Gpu(), "pass of " + std::to_string(samples));
    Check(gpu.rust_->lambda() < lambda, "lambda does not fall");
    Check(gpu.rust_->lambda() == cpu.rust_->lambda(), "another lambda");
    lambda = gpu.rust_->lambda();
  }
}

// One kernel forward and two backward; no allocation, no synchronisation, no
// copy that nobody asked for.
void DriverCalls() {
  const Problem<float> p(20, 8, 5, 2, 1);
  {
    Layer<float> layer(p);
    layer.Gpu();
    Wanted wanted;
    wanted.plain = false;
    for (int i = 0; i < 3; ++i) {
      Outcome<float> out = layer.Prepare(wanted);
      const std::string forward =
          CallsOf([&] { layer.GpuForward(wanted, &out); });
      Check(forward == "cuLaunchKernel ", "forward calls " + forward);
      const std::string backward =
          CallsOf([&] { layer.GpuBackward(wanted, &out); });
      Check(backward == "cuLaunchKernel ",
          "backward calls " + backward);
      Synchronize();
    }
    Outcome<float> out = layer.Prepare({});
    const std::string with_plain =
        CallsOf([&] { layer.GpuForward({}, &out); });
    Check(with_plain == "cuMemcpyDtoDAsync_v2 cuLaunchKernel ",
        "forward with plain logits calls " + with_plain);
    Synchronize();
    Check(STANDIN(standin_host_bytes)() == 8, "host memory of the layer");
  }
  Check(STANDIN(standin_host_bytes)() == 0, "host memory leaks");
  // More tiles than one are merged, by eights.
  const int merges[][2] = {{1024, 0}, {1025, 1}, {8192, 1}, {8193, 2}};
  for (const auto& m : merges) {
    const Problem<float> many(m[0], 1, 1, 2, 1);
    Layer<float> layer(many);
    Outcome<float> out = layer.Prepare({});
    layer.GpuForward({}, &out);
    const std::string calls =
        CallsOf([&] { layer.GpuBackward({}, &out); });
    Check(calls.size() == (1 + m[1]) * sizeof("cuLaunchKernel"),
        many.name + ": backward calls " + calls);
    Synchronize();
  }

  Layer<float> second(p);
  const std::string calls = CallsOf([&] { second.Gpu(); });
  Check(calls.find("cuModuleLoadData") == std::string::npos,
      "a second layer loads the kernels again: " + calls);
}

template <typename Dtype>
void BadLabels(int samples, int features) {
  const double bad[] = {-1, 5, 0.5, kNan, kInf, -kInf, 1e30};
  for (const double label : bad) {
    Problem<Dtype> p(samples, features, 5, 4, 1);
    const int at = samples - 6;
    p.labels[at] = Dtype(label);
    Problem<Dtype> ignored = p;
    ignored.labels[at] = kIgnoreLabel;
    Layer<Dtype> layer(p);
    Outcome<Dtype> out = layer.Prepare({});
    layer.GpuForward({}, &out);
    Check(ErrorOf([&] { layer.GpuBackward({}, &out); }).empty(),
        "an error before the device has run");
    Synchronize();
    Compare(p, Layer<Dtype>(ignored).Cpu(), out, "samples beside a bad label");

    char printed[32];
    snprintf(printed, sizeof(printed), "%g", label);
    if (label == 1e30) { snprintf(printed, sizeof(printed), "10000000"); }
    if (std::isnan(label)) { snprintf(printed, sizeof(printed), "NaN"); }
    const std::string backward =
        ErrorOf([&] { layer.GpuBackward({}, &out); });
    CheckSays(backward, {"sample " + std::to_string(at),
        std::string("label ") + printed, "[0, 5)", "-7"});
    Check(backward == ErrorOf([&] { layer.GpuForward({}, &out); }),
        "forward and backward report a bad label differently");

    // In the last batch: no later pass would report it.
    Layer<Dtype> last(p);
    out = last.Prepare({});
    last.GpuForward({}, &out);
    Check(ErrorOf([&] { lsoftmax::finish(*last.rust_); }) == backward,
        "the last batch's bad label is not reported at the end");
  }
  {
    const Problem<Dtype> good(samples, features, 5, 4, 1);
    Layer<Dtype> layer(good);
    Check(ErrorOf([&] { lsoftmax::finish(*layer.rust_); }).empty(),
        "an error at the end of a layer that never ran");
    layer.Gpu();
    Check(ErrorOf([&] { lsoftmax::finish(*layer.rust_); }).empty(),
        "an error at the end of a layer without bad labels");
  }
  Problem<Dtype> p(samples, features, 5, 1, 1);
  for (Dtype& label : p.labels) { label = Dtype(5); }
  Layer<Dtype> layer(p);
  layer.Gpu();
  CheckSays(ErrorOf([&] { layer.Gpu(); }), {"sample ", "label 5 "});
}

// The line for the log is that of the CPU's pass, and no pass asks the driver
// for more because of it.
template <typename Dtype>
void Diagnoses() {
  Problem<Dtype> p(150, 9, 7, 3, 2);
  p.labels[3] = Dtype(kIgnoreLabel);
  std::fill_n(p.Row(&p.x, 5), 9, Dtype(0));
  p.x[9 * 8] = Dtype(kNan);
  Layer<Dtype> cpu(p), gpu(p);
  const auto diagnose = [&p](const Layer<Dtype>& layer,
      const Outcome<Dtype>& out) {
    if (!layer.rust_->diagnosis_is_due()) { return std::string("none"); }
    lsoftmax::MarginDiagnosis pass{};
    pass.dtype = TypeOf<Dtype>();
    pass.features = View(p.x);
    pass.labels = View(p.labels);
    pass.weights = View(p.w);
    pass.logits = View(out.logits);
    return std::string(lsoftmax::diagnose(*layer.rust_, pass));
  };
  cpu.rust_->log_every("2");
  gpu.rust_->log_every("2");
  for (int pass = 1; pass < 5; ++pass) {
    const std::string line = diagnose(cpu, cpu.Cpu());
    Outcome<Dtype> out = gpu.Prepare({});
    const std::string calls = CallsOf([&] { gpu.GpuForward({}, &out); });
    Check(pass == 1 || calls == "cuMemcpyDtoDAsync_v2 cuLaunchKernel ",
        "a forward pass that is diagnosed calls " + calls);
    Synchronize();
    const std::string of_gpu = diagnose(gpu, out);
    Check(of_gpu == line, p.name + ": '" + of_gpu + "' and not " + line);
    CheckSays(line, pass % 2 == 0 ? std::vector<std::string>{"none"}
        : std::vector<std::string>{"pass " + std::to_string(pass)
            + ", lambda = 2, samples = 147, ignored = 1, zero = 1, "
            "not_finite = 1, angle_mean = "});
    if (pass == 3) {
      // At hand at once: the device has been waited for.
      p.labels[7] = Dtype(7);
      CheckSays(ErrorOf([&] { diagnose(gpu, out); }), {"sample 7: label 7"});
      p.labels[7] = Dtype(0);
    }
  }
}

// A class whose first sample in a batch has no angle: the others need the norm
// of its weights all the same.
template <typename Dtype>
void UnusableFirst() {
  Problem<Dtype> p(7, 6, 3, 4, 1);
  for (int i = 0; i < p.samples; ++i) { p.labels[i] = Dtype(i % 2); }
  std::fill_n(p.Row(&p.x, 0), p.features, Dtype(0));
  Run(p, "zero first");
  std::fill_n(p.Row(&p.x, 1), p.features, Dtype(kInf));
  Run(p, "infinity first");
  // Of double, whose squares leave its range, the norms are scaled.
  for (int i = 0; i < p.features; ++i) {
    p.Row(&p.w, 0)[i] *= std::numeric_limits<Dtype>::min() * 1e3;
  }
  Run(p, "zero first, of a small class");
}

// A layer that goes from the GPU to the CPU, and a net that trains on the one
// and is tested on the other: what the CPU computes after a pass on the GPU is
// what it computes after one of its own.
template <typename Dtype>
void MixedModes() {
  const Problem<Dtype> p(20, 8, 5, 4, 3);
  const Param param = Param().Int(kNumOutput, 5).Float(kBase, 7)
      .Float(kGamma, 0.5f).Int(kMargin, 4).Int(kIgnore, kIgnoreLabel);
  Layer<Dtype> cpu(p), mixed(p);
  cpu.rust_ = lsoftmax::new_large_margin(param.Bytes());
  mixed.rust_ = lsoftmax::new_large_margin(param.Bytes());
  Wanted test;
  test.labels = false;
  const Outcome<Dtype> on_cpu = cpu.Cpu(), on_gpu = mixed.Gpu();
  Compare(p, on_cpu, on_gpu, "before the switch");
  Check(cpu.Cpu() == mixed.Cpu(), p.name
      + ": a pass on the CPU differs after one on the GPU");
  Compare(p, cpu.Cpu(), mixed.Gpu(), "back on the GPU");
  Check(cpu.rust_->lambda() == mixed.rust_->lambda(), "another lambda");
  Check(cpu.Cpu(test) == mixed.Cpu(test), p.name
      + ": a test on the CPU differs after training on the GPU");
}

// What one mode left behind is nothing to the other.
void Modes() {
  const Problem<float> p(20, 8, 5, 2, 1);
  Layer<float> layer(p);
  Outcome<float> out = layer.Prepare({});
  CheckSays(ErrorOf([&] { layer.GpuBackward({}, &out); }),
      {"backward without a forward"});
  layer.CpuForward({}, &out);
  CheckSays(ErrorOf([&] { layer.GpuBackward({}, &out); }),
      {"backward in GPU mode after a forward pass in CPU mode"});
  layer.GpuForward({}, &out);
  Synchronize();
  CheckSays(ErrorOf([&] { layer.CpuBackward({}, &out); }),
      {"backward in CPU mode after a forward pass in GPU mode"});
  layer.GpuBackward({}, &out);
  Synchronize();
}

// A layer that ends while its kernels are queued: they have run when its
// mailbox goes.
void Ending() {
  const Problem<float> p(20, 8, 5, 2, 1);
  Outcome<float> out;
  {
    Layer<float> layer(p);
    out = layer.Prepare({});
    layer.GpuForward({}, &out);
    const std::string calls = CallsOf([&] {
      // Another thread, of another device, ends it.
      std::thread([&] {
        UseDevice(1);
        const RustLayer ended = std::move(layer.rust_);
      }).join();
    });
    Check(calls.find("cuStreamSynchronize cuCtxSetCurrent cuMemFreeHost ")
        != std::string::npos, "the end calls " + calls);
    layer.rust_ = lsoftmax::new_large_margin(p.LayerParam().Bytes());
  }
  Check(out.logits[0] == out.logits[0], "the kernels have not run");
  Check(STANDIN(standin_host_bytes)() == 0, "host memory leaks at the end");
}

// A layer that outlives its device's contexts: nothing is read of what they had.
void Reset() {
  Problem<float> p(20, 8, 5, 2, 1);
  p.labels[3] = 7;
  {
    Layer<float> layer(p);
    layer.Gpu();
    STANDIN(standin_reset)(true);
    Check(ErrorOf([&] { lsoftmax::finish(*layer.rust_); }).empty(),
        "news of a device that is gone");
  }
  STANDIN(standin_reset)(false);
  UseDevice(0);
}

// A context that a library has made and left current, which the CUDA runtime
// then works in: the layers do so too, and leave it current.
void ContextOfALibrary() {
  const Problem<float> p(20, 8, 5, 2, 1);
  Layer<float> cpu(p), gpu(p);
  Compare(p, cpu.Cpu(), gpu.Gpu(), "in the primary context");
  void *made = nullptr, *now = nullptr;
  InDriver<int(void**, unsigned, int)>("cuCtxCreate_v2")(&made, 0, 0);
  {
    Layer<float> cpu(p), gpu(p);
    Compare(p, cpu.Cpu(), gpu.Gpu(), "in a library's context");
    InDriver<int(void**)>("cuCtxGetCurrent")(&now);
    Check(now == made, "a pass has made another context current");
  }
  UseDevice(0);
  Compare(p, cpu.Cpu(), gpu.Gpu(), "in the primary context again");
}

// Every driver call of a first pass, failing once on a device of its own.
void DriverErrors() {
  const Problem<float> p(3, 4, 5, 2, 1);
  UseDevice(2);
  const std::string calls = CallsOf([&] { Layer<float>(p).Gpu(); });
  int device = 3;
  for (size_t begin = 0, end; begin < calls.size(); begin = end + 1) {
    end = calls.find(' ', begin);
    const std::string function = calls.substr(begin, end - begin);
    // What a freed layer cannot report, and what only fails with its caller.
    if (function == "cuMemFreeHost" || function == "cuStreamSynchronize"
        || function == "cuCtxGetCurrent" || function == "cuCtxSetCurrent") {
      continue;
    }
    const bool seen =
        (" " + calls.substr(0, begin)).find(" " + function + " ")
            != std::string::npos;
    if (seen) { continue; }
    UseDevice(device++);
    Layer<float> layer(p);
    Outcome<float> out = layer.Prepare({});
    STANDIN(standin_fail)(function.c_str(), 719);
    const std::string message =
        ErrorOf([&] { layer.GpuForward({}, &out); });
    CheckSays(message, {"CUDA: cannot ", "CUDA_ERROR_LAUNCH_FAILED"});
    Check(message.find("internal error") == std::string::npos,
        function + " panics: " + message);
    Synchronize();
    // A driver that has recovered serves the same layer.
    Compare(p, Layer<float>(p).Cpu(), layer.Gpu(),
        "after a failed " + function);
  }
  Check(device > 7, "only these calls can fail: " + calls);

  UseDevice(device++);
  STANDIN(standin_fail)("cuModuleLoadData", 209);
  CheckSays(ErrorOf([&] { Layer<float>(p).Gpu(); }),
      {"architecture", "CUDA_ERROR_NO_BINARY_FOR_GPU"});
  InDriver<int(void*)>("cuCtxSetCurrent")(nullptr);
  CheckSays(ErrorOf([&] {
    Layer<float> layer(p);
    Outcome<float> out = layer.Prepare({});
    layer.GpuForward({}, &out);
  }), {"CUDA: cannot find the context of Caffe"});
  UseDevice(0);
}

// A thread a device, as Caffe trains on many GPUs.
void Devices() {
  std::vector<std::thread> threads;
  for (int device = 0; device < 2; ++device) {
    threads.emplace_back([device] {
      UseDevice(device);
      const Problem<float> p(40 + device, 10, 3 + device, 4, 1);
      Layer<float> cpu(p), gpu(p);
      for (int i = 0; i < 10; ++i) {
        Compare(p, cpu.Cpu(), gpu.Gpu(), "threads");
      }
    });
  }
  for (std::thread& thread : threads) { thread.join(); }
}

// On a machine without a driver: CPU mode works, GPU mode says what is wrong.
void NoDriver() {
  const Problem<float> p(3, 4, 5, 2, 1);
  Layer<float> layer(p);
  layer.Cpu();
  Outcome<float> out = layer.Prepare({});
  CheckSays(ErrorOf([&] { layer.GpuForward({}, &out); }),
      {"libcuda", "install the driver", "solver_mode: CPU"});
}

template <typename Dtype>
void RunAll() {
  Shapes<Dtype>();
  Borders<Dtype>();
  Teams<Dtype>();
  Misaligned<Dtype>();
  UnusableFirst<Dtype>();
  Angles<Dtype>();
  Extremes<Dtype>();
  LeftOut<Dtype>();
  Passes<Dtype>();
  BadLabels<Dtype>(140, 6);
  Diagnoses<Dtype>();
  MixedModes<Dtype>();
}

}  // namespace

int main(int argc, char** argv) {
  return Main(argc, argv, NoDriver, [] {
    RunAll<float>();
    RunAll<double>();
    Runs<float>();
    Runs<double>();
    ManyRows();
    ManySamples();
    BadLabels<float>(9, 516);
    DriverCalls();
    DriverErrors();
    Devices();
    Modes();
    Ending();
    ContextOfALibrary();
    Reset();
  });
}
