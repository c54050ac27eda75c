// BN's GPU path, from the bridge to the kernels, against its CPU path.

#include <algorithm>
#include <cstring>
#include <limits>

#include "harness.hpp"

namespace {

enum Field { kMomentum = 3, kEps = 4, kFrozen = 5 };

constexpr double kEpsValue = 1e-5;
const double kNan = std::numeric_limits<double>::quiet_NaN();
const double kInf = std::numeric_limits<double>::infinity();

// Blobs that begin one value behind a boundary of the widest load.
enum Off { kX = 1, kY = 2, kG = 4, kDx = 8, kXHat = 16 };

// How a layer is used.
struct Mode {
  bool train = true, frozen = false, in_place = false;
  bool dx = true, dslope = true, dbias = true;
  int off = 0;

  bool by_batch() const { return train && !frozen; }
  // As the shim decides it.
  bool keeps_x_hat() const {
    return in_place && (by_batch() || (!frozen && (dslope || dbias)));
  }
};

template <typename Dtype>
struct Problem {
  std::string name;
  int samples, channels, positions;
  std::vector<Dtype> x, g, slope, bias, moving_mean, moving_inv_std;

  Problem(int n, int c, int s) : samples(n), channels(c), positions(s) {
    Noise noise(n * 7919 + c * 31 + s);
    x = noise.Vector<Dtype>(size_t(n) * c * s);
    g = noise.Vector<Dtype>(x.size());
    slope = noise.Vector<Dtype>(c);
    bias = noise.Vector<Dtype>(c);
    moving_mean = noise.Vector<Dtype>(c);
    moving_inv_std = noise.Vector<Dtype>(c);
    for (Dtype& value : moving_inv_std) { value = std::fabs(value) + 1; }
    name = std::string(sizeof(Dtype) == 4 ? "f32" : "f64") + " N "
        + std::to_string(n) + " C " + std::to_string(c) + " S "
        + std::to_string(s);
  }
  int ChannelOf(size_t i) const { return int(i / positions % channels); }
};

template <typename Dtype>
struct Outcome {
  // In place, y and dx take the memory of x and g.
  std::vector<Dtype> y, x_hat, dx, dslope, dbias, moving_mean, moving_inv_std;

  std::vector<Dtype> Outcome::* const members[7] = {&Outcome::y,
      &Outcome::x_hat, &Outcome::dx, &Outcome::dslope, &Outcome::dbias,
      &Outcome::moving_mean, &Outcome::moving_inv_std};
  bool operator==(const Outcome& other) const {
    return std::all_of(std::begin(members), std::end(members), [&](auto m) {
      const auto &a = this->*m, &b = other.*m;
      return a.size() == b.size() && (a.empty()
          || memcmp(a.data(), b.data(), a.size() * sizeof(Dtype)) == 0);
    });
  }
};

template <typename Dtype>
class Layer {
 public:
  Layer(const Problem<Dtype>& p, Mode mode) : p_(p), mode_(mode),
      rust_(lsoftmax::new_batch_norm(Param().Float(kMomentum, 0.75f)
          .Float(kEps, float(kEpsValue)).Int(kFrozen, mode.frozen).Bytes(),
          mode.train)) {}

  Outcome<Dtype> Cpu() {
    Outcome<Dtype> out = Prepare();
    CpuForward(&out);
    CpuBackward(&out);
    return out;
  }

  Outcome<Dtype> Gpu() {
    Outcome<Dtype> out = Prepare();
    const std::pair<Off, std::vector<Dtype>*> moved[] = {{kX, &x_},
        {kY, &out.y}, {kG, &g_}, {kDx, &out.dx}, {kXHat, &out.x_hat}};
    const auto moves = [&](const auto& blob) {
      return mode_.off & blob.first && !blob.second->empty();
    };
    for (const auto& blob : moved) {
      if (moves(blob)) { blob.second->insert(blob.second->begin(), 0); }
    }
    GpuForward(&out);
    GpuBackward(&out);
    Synchronize();
    for (const auto& blob : moved) {
      if (moves(blob)) { blob.second->erase(blob.second->begin()); }
    }
    return out;
  }

  Outcome<Dtype> Prepare() {
    const int32_t shape[] = {p_.samples, p_.channels, p_.positions};
    const lsoftmax::BnSizes sizes =
        lsoftmax::reshape(*rust_, rust::Slice<const int32_t>(shape, 3));
    const Dtype old = std::numeric_limits<Dtype>::quiet_NaN();
    Outcome<Dtype> out;
    if (mode_.in_place) {
      out.y = p_.x;
      out.dx = p_.g;
    } else {
      out.y.assign(p_.x.size(), old);
      if (mode_.dx) { out.dx.assign(p_.x.size(), old); }
    }
    if (mode_.keeps_x_hat()) { out.x_hat.assign(p_.x.size(), old); }
    // The shim asks a frozen layer for none.
    if (mode_.dslope && !mode_.frozen) {
      out.dslope = Noise(5).Vector<Dtype>(p_.channels);
    }
    if (mode_.dbias && !mode_.frozen) {
      out.dbias = Noise(6).Vector<Dtype>(p_.channels);
    }
    out.moving_mean = p_.moving_mean;
    out.moving_inv_std = p_.moving_inv_std;
    scratch_.assign(sizes.device_bytes, 0xff);
    x_ = p_.x;
    g_ = p_.g;
    return out;
  }
  void CpuForward(Outcome<Dtype>* out) {
    Forward(lsoftmax::Memory::Host, out);
  }
  void CpuBackward(Outcome<Dtype>* out) {
    Backward(lsoftmax::Memory::Host, out);
  }
  void GpuForward(Outcome<Dtype>* out) {
    Forward(lsoftmax::Memory::Device, out);
  }
  void GpuBackward(Outcome<Dtype>* out) {
    Backward(lsoftmax::Memory::Device, out);
  }

  // As the shim does.
  void Forward(lsoftmax::Memory memory, Outcome<Dtype>* out) {
    lsoftmax::BnForward pass{};
    pass.memory = memory;
    pass.dtype = TypeOf<Dtype>();
    pass.bottom = mode_.in_place ? View(out->y, At(kY, memory))
        : View(x_, At(kX, memory));
    pass.slope = View(p_.slope);
    pass.bias = View(p_.bias);
    if (mode_.by_batch()) {
      pass.update_mean = MutableView(out->moving_mean);
      pass.update_inv_std = MutableView(out->moving_inv_std);
    } else {
      // Constant: the bridge has no way to write them.
      pass.moving_mean = View(out->moving_mean);
      pass.moving_inv_std = View(out->moving_inv_std);
    }
    pass.top = MutableView(out->y, At(kY, memory));
    pass.x_hat = MutableView(out->x_hat, At(kXHat, memory));
    pass.scratch = MutableView(scratch_);
    lsoftmax::forward(*rust_, pass);
  }
  void Backward(lsoftmax::Memory memory, Outcome<Dtype>* out) {
    lsoftmax::BnBackward pass{};
    pass.memory = memory;
    pass.dtype = TypeOf<Dtype>();
    pass.top_diff = mode_.in_place ? View(out->dx, At(kDx, memory))
        : View(g_, At(kG, memory));
    pass.x = mode_.in_place ? View(out->x_hat, At(kXHat, memory))
        : View(x_, At(kX, memory));
    pass.slope = View(p_.slope);
    if (mode_.dx) {
      pass.bottom_diff = MutableView(out->dx, At(kDx, memory));
    }
    pass.slope_diff = MutableView(out->dslope);
    pass.bias_diff = MutableView(out->dbias);
    pass.scratch = MutableView(scratch_);
    lsoftmax::backward(*rust_, pass);
  }

  // Bytes by which a blob is moved, on the device.
  size_t At(Off blob, lsoftmax::Memory memory) const {
    return memory == lsoftmax::Memory::Device && mode_.off & blob
        ? sizeof(Dtype) : 0;
  }

  const Problem<Dtype>& p_;
  const Mode mode_;
  rust::Box<lsoftmax::BatchNorm> rust_;
  std::vector<uint8_t> scratch_;
  std::vector<Dtype> x_, g_;  // as the device has them
};

// The bounds are those of x known to a few units of its last place, which the
// normalisation magnifies, and of sums to a few of their terms'.
template <typename Dtype>
void Compare(const Problem<Dtype>& p, const Mode& mode,
    const Outcome<Dtype>& cpu, const Outcome<Dtype>& gpu,
    const std::string& what) {
  const double unit = 16 * std::numeric_limits<Dtype>::epsilon();
  const double values = std::max(1, p.samples * p.positions);
  struct Sizes {
    double x = 0, g = 0, g_max = 0, mean = 0, m2 = 0, inv_std = 0, hat = 0;
  };
  std::vector<Sizes> channels(p.channels);
  for (size_t i = 0; i < p.x.size(); ++i) {
    Sizes& c = channels[p.ChannelOf(i)];
    c.x = std::max(c.x, std::fabs(double(p.x[i])));
    c.g += std::fabs(p.g[i]);
    c.g_max = std::max(c.g_max, std::fabs(double(p.g[i])));
    c.mean += p.x[i] / values;
  }
  for (size_t i = 0; i < p.x.size(); ++i) {
    Sizes& c = channels[p.ChannelOf(i)];
    c.m2 += (p.x[i] - c.mean) * (p.x[i] - c.mean);
  }
  for (int i = 0; i < p.channels; ++i) {
    Sizes& c = channels[i];
    c.inv_std = 1 / std::sqrt(c.m2 / values + kEpsValue);
    if (!mode.by_batch()) {
      c.inv_std = p.moving_inv_std[i];
      c.mean = p.moving_mean[i];
    }
    c.hat = (c.x + std::fabs(c.mean)) * c.inv_std;
  }

  const auto check = [&](std::vector<Dtype> Outcome<Dtype>::* member,
      const char* blob, const std::function<double(int, const Sizes&)>& bound) {
    const std::vector<Dtype> &a = cpu.*member, &b = gpu.*member;
    Check(a.size() == b.size(), what + blob);
    for (size_t i = 0; i < a.size(); ++i) {
      const int c = a.size() == size_t(p.channels) ? int(i) : p.ChannelOf(i);
      const double tolerance = unit * (bound(c, channels[c])
          + std::fabs(double(a[i])));
      if (Agree(a[i], b[i], tolerance)) { continue; }
      return Check(false, p.name + (mode.in_place ? " in place " : " ")
          + (mode.by_batch() ? "by batch " : "by moving ") + what + ": " + blob
          + "[" + std::to_string(i) + "] is " + Text(a[i]) + " on the CPU, "
          + Text(b[i]) + " on the GPU, tolerance " + Text(tolerance));
    }
  };
  using O = Outcome<Dtype>;
  check(&O::moving_mean, "moving mean",
      [](int, const Sizes& c) { return c.x; });
  // Of float values, the sums are made in double.
  check(&O::moving_inv_std, "moving inv_std", [](int, const Sizes& c) {
    return c.inv_std * (sizeof(Dtype) == 4 ? 1 : 1 + c.hat); });
  check(&O::x_hat, "x_hat", [](int, const Sizes& c) { return c.hat; });
  check(&O::y, "y", [&](int i, const Sizes& c) {
    return std::fabs(p.slope[i]) * c.hat + std::fabs(p.bias[i]); });
  check(&O::dslope, "dslope",
      [](int, const Sizes& c) { return 1 + c.g * (1 + c.hat); });
  check(&O::dbias, "dbias", [](int, const Sizes& c) { return 1 + c.g; });
  check(&O::dx, "dx", [&](int i, const Sizes& c) {
    const double mean = c.g / values;
    return std::fabs(p.slope[i]) * c.inv_std
        * (c.g_max + mean + 3 * c.hat * c.hat * mean); });
}

template <typename Dtype>
void Run(const Problem<Dtype>& p, const Mode& mode, const std::string& what) {
  Compare(p, mode, Layer<Dtype>(p, mode).Cpu(), Layer<Dtype>(p, mode).Gpu(),
      what);
}

template <typename Dtype>
void RunTwice(const Problem<Dtype>& p, const Mode& mode,
    const std::string& what) {
  Layer<Dtype> cpu(p, mode), gpu(p, mode);
  const Outcome<Dtype> device = gpu.Gpu();
  Compare(p, mode, cpu.Cpu(), device, what);
  // The threads run in another order now.
  Check(device == gpu.Gpu(), p.name + " " + what
      + ": a second run gives other bits");
}

std::vector<Mode> Modes() {
  std::vector<Mode> modes(6);
  for (int i = 0; i < 6; ++i) {
    modes[i].in_place = i % 2;
    modes[i].train = i / 2 != 1;
    modes[i].frozen = i / 2 == 2;
  }
  return modes;
}

// Few and many channels, short and long segments, and shapes whose reduction
// is cut into several parts.
template <typename Dtype>
void Shapes() {
  const int shapes[][3] = {{1, 1, 1}, {2, 3, 1}, {7, 5, 4}, {33, 3, 9},
      {4, 2, 31}, {3, 4, 32}, {2, 3, 33}, {5, 2, 100}, {1, 2, 1000},
      {150, 40, 1}, {300, 2, 3}, {3, 1, 2731}, {20, 2, 256}, {2, 300, 2}};
  for (const auto& s : shapes) {
    const Problem<Dtype> p(s[0], s[1], s[2]);
    for (const Mode& mode : Modes()) {
      if (mode.by_batch()) {
        RunTwice(p, mode, "shape");
      } else {
        Run(p, mode, "shape");
      }
    }
  }
}

// Sizes around those of warps, blocks, vectors and a thread's group, of each
// axis. The modes take turns. What many channels meet does not look at their
// values: float will do.
template <typename Dtype>
void Borders() {
  const std::vector<Mode> modes = Modes();
  size_t turn = 0;
  for (const int size : {1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255,
      256, 257, 1023, 1024, 1025, 2047, 2048, 2049}) {
    const int shapes[][3] = {{1, 1, size}, {3, 2, size}, {size, 1, 1},
        {size, 3, 3}, {2, size, 1}, {2, size > 300 ? 1 : size, 5}};
    for (const auto& s : shapes) {
      if (s[1] > 300 && (sizeof(Dtype) > 4 || s[1] > 2000)) { continue; }
      const Problem<Dtype> p(s[0], s[1], s[2]);
      Run(p, modes[turn++ % modes.size()], "border");
    }
  }
}

// Blobs that cannot be read by vectors, though their rows could be.
template <typename Dtype>
void Misaligned() {
  for (Mode mode : Modes()) {
    for (const int off : {1, 2, 4, 8, 16, 31}) {
      for (const int positions : {4, 36}) {
        const Problem<Dtype> p(5, 3, positions);
        mode.off = off;
        Run(p, mode, "misaligned " + std::to_string(off));
      }
    }
  }
}

template <typename Dtype>
void Extremes() {
  const Dtype largest = std::numeric_limits<Dtype>::max();
  const std::pair<const char*, std::function<void(Problem<Dtype>*)>> edits[] = {
      {"one value", [](auto* p) {
        std::fill(p->x.begin(), p->x.end(), Dtype(1000.25)); }},
      {"a mean far from zero", [](auto* p) {
        for (Dtype& x : p->x) { x = x / 16 + 1000; } }},
      // What distances are measured from. Of double it costs digits.
      {"a first value far from the others", [](auto* p) {
        for (int c = 0; c < p->channels; ++c) {
          p->x[c * p->positions] = sizeof(Dtype) == 4 ? 1e6 : 10; } }},
      {"large values", [=](auto* p) {
        for (Dtype& x : p->x) { x *= std::sqrt(largest); } }},
      // Sums of float that leave its range on the way.
      {"values near the largest", [=](auto* p) {
        if (sizeof(Dtype) == 4) { for (Dtype& x : p->x) { x *= largest / 4; } }
      }},
      {"gradients near the largest", [=](auto* p) {
        if (sizeof(Dtype) == 4) { for (Dtype& g : p->g) { g *= largest / 4; } }
      }},
      {"denormal values", [](auto* p) {
        for (Dtype& x : p->x) {
          x *= std::numeric_limits<Dtype>::min() / 4; } }},
      {"NaN", [](auto* p) { p->x[p->x.size() / 2] = Dtype(kNan); }},
      {"infinity", [](auto* p) { p->x[p->x.size() / 2] = Dtype(kInf); }},
      {"NaN gradient", [](auto* p) { p->g[1] = Dtype(kNan); }},
      {"zero gradient", [](auto* p) {
        std::fill(p->g.begin(), p->g.end(), Dtype(0)); }},
  };
  for (const auto& edit : edits) {
    for (const int positions : {3, 36, 37}) {
      Problem<Dtype> p(9, 3, positions);
      edit.second(&p);
      for (const Mode& mode : Modes()) {
        // Without the batch's statistics, one way to load is like another.
        if (mode.by_batch() || positions == 3) { Run(p, mode, edit.first); }
      }
    }
  }
}

template <typename Dtype>
void LeftOut() {
  for (Mode mode : Modes()) {
    for (int mask = 0; mask < 8; ++mask) {
      mode.dx = mask & 1;
      mode.dslope = mask & 2;
      mode.dbias = mask & 4;
      Run(Problem<Dtype>(4, 3, 5), mode,
          "with parts left out, " + std::to_string(mask));
    }
    Run(Problem<Dtype>(0, 3, 5), mode, "no sample");
    Run(Problem<Dtype>(4, 3, 0), mode, "no position");
  }
}

// A batch size that changes.
template <typename Dtype>
void Passes() {
  for (const Mode& mode : Modes()) {
    Problem<Dtype> p(200, 3, 2);
    Layer<Dtype> cpu(p, mode), gpu(p, mode);
    for (const int samples : {200, 3, 0, 129}) {
      p.samples = samples;
      p.x.resize(size_t(samples) * 6, Dtype(0.5));
      p.g.resize(p.x.size(), Dtype(0.25));
      Compare(p, mode, cpu.Cpu(), gpu.Gpu(),
          "pass of " + std::to_string(samples));
    }
  }
}

// A net that trains on the GPU and is tested on the CPU, and one layer that
// goes from one to the other: what the CPU makes of it is what it makes of its
// own training.
template <typename Dtype>
void MixedModes() {
  const Problem<Dtype> p(6, 3, 40);
  const Mode train;
  Mode test;
  test.train = false;
  Layer<Dtype> cpu(p, train), gpu(p, train);
  const Outcome<Dtype> on_cpu = cpu.Cpu(), on_gpu = gpu.Gpu();
  Compare(p, train, on_cpu, on_gpu, "before the test net");
  const auto tested = [&](const Outcome<Dtype>& trained) {
    Problem<Dtype> moved = p;
    moved.moving_mean = trained.moving_mean;
    moved.moving_inv_std = trained.moving_inv_std;
    return Layer<Dtype>(moved, test).Cpu();
  };
  Compare(p, test, tested(on_cpu), tested(on_gpu), "a test net after training");
  Check(gpu.Cpu() == cpu.Cpu(), p.name
      + ": a pass on the CPU differs after one on the GPU");
  Compare(p, train, cpu.Cpu(), gpu.Gpu(), "back on the GPU");
}

// Kernels alone: no allocation, no synchronisation, no copy.
void DriverCalls() {
  const Problem<float> p(6, 3, 40);
  const std::string launch = "cuLaunchKernel ";
  for (const Mode& mode : Modes()) {
    Layer<float> layer(p, mode);
    layer.Gpu();
    Outcome<float> out = layer.Prepare();
    const std::string forward = CallsOf([&] { layer.GpuForward(&out); });
    Check(forward == launch + launch + (mode.by_batch() ? launch : ""),
        "forward calls " + forward);
    const std::string backward = CallsOf([&] { layer.GpuBackward(&out); });
    Check(backward == launch + (mode.frozen ? "" : launch + launch),
        "backward calls " + backward);
    Synchronize();

    STANDIN(standin_fail)("cuLaunchKernel", 700);
    CheckSays(ErrorOf([&] { layer.GpuForward(&out); }),
        {"CUDA: cannot launch a kernel", "CUDA_ERROR_ILLEGAL_ADDRESS"});
    STANDIN(standin_fail)("cuLaunchKernel", 700);
    CheckSays(ErrorOf([&] { layer.GpuBackward(&out); }),
        {"CUDA: cannot launch a kernel", "CUDA_ERROR_ILLEGAL_ADDRESS"});
    Synchronize();
  }
  Layer<float> layer(p, {});
  Outcome<float> out = layer.Prepare();
  CheckSays(ErrorOf([&] { layer.GpuBackward(&out); }),
      {"backward without a forward"});
  layer.CpuForward(&out);
  CheckSays(ErrorOf([&] { layer.GpuBackward(&out); }),
      {"backward in GPU mode after a forward pass in CPU mode"});
  layer.GpuForward(&out);
  Synchronize();
  CheckSays(ErrorOf([&] { layer.CpuBackward(&out); }),
      {"backward in CPU mode after a forward pass in GPU mode"});
  layer.GpuBackward(&out);
  Synchronize();
  Check(lsoftmax::constant_channel(*layer.rust_) == -1,
      "a constant channel where there is none");
  Problem<float> constant = p;
  for (size_t i = 0; i < constant.x.size(); ++i) {
    if (constant.ChannelOf(i) == 1) { constant.x[i] = 0.25f; }
  }
  Layer<float> warned(constant, {});
  warned.Gpu();
  Check(lsoftmax::constant_channel(*warned.rust_) == 1,
      "a constant channel is not found");
}

// On a machine without a driver: CPU mode works, GPU mode says what is wrong.
void NoDriver() {
  const Problem<float> p(6, 3, 4);
  Layer<float> layer(p, {});
  layer.Cpu();
  Outcome<float> out = layer.Prepare();
  CheckSays(ErrorOf([&] { layer.GpuForward(&out); }),
      {"libcuda", "install the driver", "solver_mode: CPU"});
}

template <typename Dtype>
void RunAll() {
  Shapes<Dtype>();
  Borders<Dtype>();
  Misaligned<Dtype>();
  Extremes<Dtype>();
  LeftOut<Dtype>();
  Passes<Dtype>();
  MixedModes<Dtype>();
}

}  // namespace

int main(int argc, char** argv) {
  return Main(argc, argv, NoDriver, [] {
    RunAll<float>();
    RunAll<double>();
    DriverCalls();
  });
}
