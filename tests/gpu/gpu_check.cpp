// What a GPU is asked beyond the gtests: do the layers compute what they
// compute on the CPU, and the same each time, and how long do they take beside
// Caffe's own?
//
//   gpu_check device                       the GPU, or what is wrong with it
//   gpu_check parity margin|bn float|double
//   gpu_check repeat margin float|double   the same bits each time?
//   gpu_check time margin M K N [ROUNDS]   beside InnerProduct without bias
//   gpu_check time bn|bn_in_place N C H W [ROUNDS]
//                                          beside BatchNorm and Scale
//   gpu_check time cudnn N C H W [ROUNDS]  BN beside cuDNN's
//   gpu_check profile margin M K N
//   gpu_check profile bn|bn_in_place N C H W
//                                          one pass for a profiler to see
//
// device and time print an object of JSON. With a Caffe for the CPU alone all
// of it runs there, for a rehearsal.

#include <google/protobuf/text_format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "caffe/caffe.hpp"
#include "caffe/util/benchmark.hpp"

#ifndef CPU_ONLY
// Of libcudart, in a header that not every toolkit has.
extern "C" cudaError_t CUDARTAPI cudaProfilerStart(void);
extern "C" cudaError_t CUDARTAPI cudaProfilerStop(void);
#endif

namespace {

using caffe::Blob;
using caffe::Caffe;
using std::string;
using std::vector;

#ifdef CPU_ONLY
const Caffe::Brew kMode = Caffe::CPU;
#else
const Caffe::Brew kMode = Caffe::GPU;
#endif

int failures = 0;

const char kMargin[] = "type: 'LargeMarginInnerProduct' phase: TRAIN "
    "largemargin_inner_product_param { %s }";

string Format(const char* format, const string& value) {
  string text(format);
  return text.replace(text.find("%s"), 2, value);
}

template <typename Dtype>
caffe::shared_ptr<caffe::Layer<Dtype> > NewLayer(const string& text) {
  caffe::LayerParameter param;
  CHECK(google::protobuf::TextFormat::ParseFromString(text, &param)) << text;
  return caffe::LayerRegistry<Dtype>::CreateLayer(param);
}

template <typename Dtype>
void Fill(Blob<Dtype>* blob, Dtype scale, bool diff) {
  Dtype* const values =
      diff ? blob->mutable_cpu_diff() : blob->mutable_cpu_data();
  caffe::caffe_rng_uniform<Dtype>(blob->count(), -scale, scale, values);
}

// A layer with blobs of its own.
template <typename Dtype>
struct Rig {
  Rig(const string& text, const vector<int>& shape, int classes,
      bool in_place = false)
      : layer(NewLayer<Dtype>(text)), x(shape) {
    bottom.push_back(&x);
    down.push_back(true);
    Fill(&x, Dtype(1), false);
    if (classes > 0) {
      labels.Reshape(vector<int>(1, shape[0]));
      for (int i = 0; i < labels.count(); ++i) {
        // Each label some times, in no order.
        labels.mutable_cpu_data()[i] = (i * 7919ll + i / 3) % classes;
      }
      bottom.push_back(&labels);
      down.push_back(false);
    }
    top.push_back(in_place ? &x : &y);
    layer->SetUp(bottom, top);
    Fill(top[0], Dtype(1), true);
  }
  void Run() {
    layer->Forward(bottom, top);
    layer->Backward(top, down, bottom);
  }
  caffe::shared_ptr<caffe::Layer<Dtype> > layer;
  Blob<Dtype> x, labels, y;
  vector<Blob<Dtype>*> bottom, top;
  vector<bool> down;
};

// ---- Parity ----

// The largest difference is measured by the largest value: rounding errors
// grow with the terms of a sum.
template <typename Dtype>
void Compare(const string& what, const Blob<Dtype>& a, const Blob<Dtype>& b,
    bool diff) {
  const Dtype* const p = diff ? a.cpu_diff() : a.cpu_data();
  const Dtype* const q = diff ? b.cpu_diff() : b.cpu_data();
  double largest = 0, apart = 0;
  for (int i = 0; i < a.count(); ++i) {
    largest = std::max(largest, std::fabs(static_cast<double>(p[i])));
    const double d = std::fabs(static_cast<double>(p[i]) - q[i]);
    apart = std::isnan(d) ? INFINITY : std::max(apart, d);
  }
  const double tolerance = sizeof(Dtype) == sizeof(float) ? 1e-4 : 1e-11;
  if (apart > tolerance * largest) {
    ++failures;
    std::printf("FAILED: %s differs by %g, its values reach %g\n",
        what.c_str(), apart, largest);
  }
}

template <typename Dtype>
void Parity(const string& text, const vector<int>& shape, int classes,
    bool in_place = false) {
  const string what = text + (sizeof(Dtype) == 4 ? ", float, " : ", double, ")
      + (in_place ? "in place, " : "") + Blob<int>(shape).shape_string()
      + ": ";
  Caffe::set_mode(Caffe::CPU);
  Rig<Dtype> cpu(text, shape, classes, in_place);
  Rig<Dtype> gpu(text, shape, classes, in_place);
  gpu.x.CopyFrom(cpu.x);
  gpu.top[0]->CopyFrom(*cpu.top[0], true);
  const vector<caffe::shared_ptr<Blob<Dtype> > >& cpu_params =
      cpu.layer->blobs();
  const vector<caffe::shared_ptr<Blob<Dtype> > >& gpu_params =
      gpu.layer->blobs();
  for (size_t i = 0; i < cpu_params.size(); ++i) {
    gpu_params[i]->CopyFrom(*cpu_params[i]);
    Fill(cpu_params[i].get(), Dtype(1), true);
    gpu_params[i]->CopyFrom(*cpu_params[i], true);
  }
  cpu.Run();
  Caffe::set_mode(kMode);
  gpu.Run();
  Compare(what + "top", *cpu.top[0], *gpu.top[0], false);
  Compare(what + "bottom gradient", cpu.x, gpu.x, true);
  for (size_t i = 0; i < cpu_params.size(); ++i) {
    const string blob = "blob " + caffe::format_int(static_cast<int>(i));
    Compare(what + blob, *cpu_params[i], *gpu_params[i], false);
    Compare(what + blob + " gradient", *cpu_params[i], *gpu_params[i], true);
  }
}

vector<int> Shape(int a, int b, int c = -1, int d = -1) {
  vector<int> shape;
  for (const int size : {a, b, c, d}) {
    if (size >= 0) { shape.push_back(size); }
  }
  return shape;
}

template <typename Dtype>
void MarginParity() {
  // The last three: a block a row, and warps that have more rows than they
  // read at once.
  const int sizes[][3] = {{1, 1, 1}, {3, 2, 5}, {129, 33, 17}, {7, 700, 3},
      {64, 128, 1}, {300, 40, 10}, {60, 1024, 7}, {2100, 260, 5},
      {9000, 132, 3}};
  for (const auto& s : sizes) {
    for (int margin = 1; margin <= 5; ++margin) {
      Parity<Dtype>(Format(kMargin, "num_output: " + caffe::format_int(s[2])
          + " margin: " + caffe::format_int(margin)
          + " base: 3 weight_filler { type: 'xavier' }"),
          Shape(s[0], s[1]), s[2]);
    }
  }
}

template <typename Dtype>
void BatchNormParity() {
  const vector<int> shapes[] = {Shape(1, 3), Shape(130, 70), Shape(5, 3, 4, 2),
      Shape(8, 5, 7, 9), Shape(4, 3, 32, 32), Shape(2, 300, 3, 3)};
  const char* const layers[] = {
      "type: 'BN' phase: TRAIN", "type: 'BN' phase: TEST",
      "type: 'BN' phase: TRAIN bn_param { frozen: true }",
      "type: 'BN' phase: TRAIN bn_param { slope_filler { type: 'uniform' "
      "min: 0.5 max: 2 } bias_filler { type: 'uniform' min: -1 max: 1 } }"};
  for (const vector<int>& shape : shapes) {
    for (const char* layer : layers) {
      Parity<Dtype>(layer, shape, 0);
      Parity<Dtype>(layer, shape, 0, true);
    }
  }
}

template <typename Dtype>
void ParityOf(const string& layer) {
  if (layer == "margin") {
    MarginParity<Dtype>();
  } else {
    BatchNormParity<Dtype>();
  }
}

// ---- Repeats ----

string ClassesOf(int classes) {
  return "num_output: " + caffe::format_int(classes)
      + " weight_filler { type: 'xavier' }";
}

// The layer that is repeated, timed and profiled.
string MarginOf(int classes) {
  return Format(kMargin, ClassesOf(classes) + " type: QUADRUPLE base: 10");
}

// What it is compared with.
string InnerProductOf(int classes) {
  return "type: 'InnerProduct' phase: TRAIN inner_product_param { "
      "bias_term: false " + ClassesOf(classes) + " }";
}

template <typename Dtype>
vector<Dtype> Values(const Dtype* values, int count) {
  return vector<Dtype>(values, values + count);
}

// The sums of a class that several blocks share are made by the one that comes
// last, of what the others have left in memory: whichever it is, and whatever
// its caches hold, the bits are the same. No tool of CUDA's sees whether a fence
// is missing.
template <typename Dtype>
void Repeat(const string& text, const vector<int>& shape, int classes) {
  const int times = kMode == Caffe::GPU ? 300 : 3;
  Rig<Dtype> rig(text, shape, classes);
  Blob<Dtype>* const weights = rig.layer->blobs()[0].get();
  vector<vector<Dtype> > first;
  int others = 0;
  for (int i = 0; i < times; ++i) {
    caffe::caffe_set(weights->count(), Dtype(0), weights->mutable_cpu_diff());
    rig.Run();
    const vector<vector<Dtype> > now = {
        Values(rig.y.cpu_data(), rig.y.count()),
        Values(rig.x.cpu_diff(), rig.x.count()),
        Values(weights->cpu_diff(), weights->count())};
    if (i == 0) { first = now; }
    others += now != first;
  }
  if (others > 0) {
    ++failures;
    std::printf("FAILED: %s, %s: %d of %d passes give other bits than the "
        "first\n", text.c_str(), rig.x.shape_string().c_str(), others, times);
  }
}

template <typename Dtype>
void MarginRepeat() {
  // Classes that go on over many blocks: a chunk a block, some of a block's
  // columns each, and several chunks a block.
  const int sizes[][3] = {{512, 512, 3}, {2000, 2048, 2}, {5000, 33, 7}};
  for (const auto& s : sizes) {
    Repeat<Dtype>(MarginOf(s[2]), Shape(s[0], s[1]), s[2]);
    // Where this one fails, it is cuBLAS.
    Repeat<Dtype>(InnerProductOf(s[2]), Shape(s[0], s[1]), 0);
  }
}

// ---- Benchmark ----

// Milliseconds of `repeats` calls of run, by the device's clock.
template <typename Run>
float Milliseconds(int repeats, const Run& run) {
  caffe::Timer timer;
  timer.Start();
  for (int i = 0; i < repeats; ++i) { run(); }
  return timer.MicroSeconds() / 1000;
}

double Median(vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

struct Times {
  double ours, theirs;  // medians, in milliseconds a call
  double more;
  double ratio, least, most;
};

// Turns of one and the other, so that both see the same clocks. A ratio and a
// difference are those of neighbours.
template <typename Ours, typename Theirs>
Times Alternate(int rounds, const Ours& ours, const Theirs& theirs) {
  const float kRoundMs = 40;
  Milliseconds(3, ours);
  Milliseconds(3, theirs);
  const float once = Milliseconds(5, theirs) / 5;
  const int repeats = std::max(3, std::min(2000,
      static_cast<int>(kRoundMs / std::max(once, 1e-3f))));
  vector<double> a, b, more, ratios;
  for (int i = 0; i < rounds; ++i) {
    a.push_back(Milliseconds(repeats, ours) / repeats);
    b.push_back(Milliseconds(repeats, theirs) / repeats);
    more.push_back(a.back() - b.back());
    ratios.push_back(a.back() / b.back());
  }
  Times times;
  times.ours = Median(a);
  times.theirs = Median(b);
  times.more = Median(more);
  times.ratio = Median(ratios);
  times.least = *std::min_element(ratios.begin(), ratios.end());
  times.most = *std::max_element(ratios.begin(), ratios.end());
  return times;
}

// rest: more fields of the object, with a comma before them.
void PrintTimes(const Times& times, int rounds, const string& rest) {
  std::printf("{\"ours_ms\": %.6g, \"theirs_ms\": %.6g, \"more_ms\": %.6g, "
      "\"ratio\": %.6g, \"ratio_min\": %.6g, \"ratio_max\": %.6g, "
      "\"rounds\": %d%s}\n", times.ours, times.theirs, times.more,
      times.ratio, times.least, times.most, rounds, rest.c_str());
}

// Bytes of the device's memory in use.
double UsedMemory() {
#ifdef CPU_ONLY
  return 0;
#else
  size_t free, total;
  CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return static_cast<double>(total - free);
#endif
}

void TimeMargin(int samples, int features, int classes, int rounds) {
  const string margin = MarginOf(classes);
  const string inner_product = InnerProductOf(classes);
  const vector<int> shape = Shape(samples, features);
  // The first run takes memory for the device, for cuBLAS and for modules.
  { Rig<float>(inner_product, shape, 0).Run(); }
  { Rig<float>(margin, shape, classes).Run(); }
  const double before = UsedMemory();
  Rig<float> theirs(inner_product, shape, 0);
  theirs.Run();
  const double between = UsedMemory();
  Rig<float> ours(margin, shape, classes);
  ours.Run();
  const double extra = UsedMemory() - between - (between - before);
  const Times times = Alternate(rounds, [&] { ours.Run(); },
      [&] { theirs.Run(); });
  char rest[64];
  std::snprintf(rest, sizeof(rest), ", \"extra_bytes\": %.0f", extra);
  PrintTimes(times, rounds, rest);
}

// Bytes a millisecond, read and written, of a copy on the device.
double CopySpeed() {
#ifdef CPU_ONLY
  const size_t bytes = 16 << 20;
  vector<char> from(bytes), to(bytes);
  const auto copy = [&] { std::memcpy(&to[0], &from[0], bytes); };
#else
  const size_t bytes = 256 << 20;
  void *from, *to;
  CUDA_CHECK(cudaMalloc(&from, bytes));
  CUDA_CHECK(cudaMalloc(&to, bytes));
  CUDA_CHECK(cudaMemset(from, 0, bytes));
  const auto copy = [&] {
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, 0));
  };
#endif
  Milliseconds(5, copy);
  vector<double> times;
  for (int i = 0; i < 15; ++i) { times.push_back(Milliseconds(5, copy) / 5); }
#ifndef CPU_ONLY
  CUDA_CHECK(cudaFree(from));
  CUDA_CHECK(cudaFree(to));
#endif
  return 2.0 * bytes / Median(times);
}

#ifdef USE_CUDNN
// Batch normalisation as cuDNN has it; no layer of Caffe uses that.
class CudnnBatchNorm {
 public:
  explicit CudnnBatchNorm(const vector<int>& shape) : x_(shape), y_(shape) {
    CUDNN_CHECK(cudnnCreate(&handle_));
    caffe::cudnn::createTensor4dDesc<float>(&values_);
    caffe::cudnn::setTensor4dDesc<float>(&values_, shape[0], shape[1],
        shape[2], shape[3]);
    CUDNN_CHECK(cudnnCreateTensorDescriptor(&channels_));
    CUDNN_CHECK(cudnnDeriveBNTensorDescriptor(channels_, values_, kMode));
    const vector<int> channels(1, shape[1]);
    for (Blob<float>* blob : {&slope_, &bias_, &moving_mean_, &moving_var_,
        &mean_, &inv_std_}) {
      blob->Reshape(channels);
      Fill(blob, 1.f, false);
    }
    Fill(&x_, 1.f, false);
    Fill(&y_, 1.f, true);
  }
  ~CudnnBatchNorm() {
    cudnnDestroyTensorDescriptor(channels_);
    cudnnDestroyTensorDescriptor(values_);
    cudnnDestroy(handle_);
  }
  void Run() {
    const float one = 1, zero = 0;
    const double eps = 1e-5;
    CUDNN_CHECK(cudnnBatchNormalizationForwardTraining(handle_, kMode, &one,
        &zero, values_, x_.gpu_data(), values_, y_.mutable_gpu_data(),
        channels_, slope_.gpu_data(), bias_.gpu_data(), 0.1,
        moving_mean_.mutable_gpu_data(), moving_var_.mutable_gpu_data(), eps,
        mean_.mutable_gpu_data(), inv_std_.mutable_gpu_data()));
    CUDNN_CHECK(cudnnBatchNormalizationBackward(handle_, kMode, &one, &zero,
        &one, &one, values_, x_.gpu_data(), values_, y_.gpu_diff(), values_,
        x_.mutable_gpu_diff(), channels_, slope_.gpu_data(),
        slope_.mutable_gpu_diff(), bias_.mutable_gpu_diff(), eps,
        mean_.gpu_data(), inv_std_.gpu_data()));
  }

 private:
  static const cudnnBatchNormMode_t kMode = CUDNN_BATCHNORM_SPATIAL;
  cudnnHandle_t handle_;
  cudnnTensorDescriptor_t values_, channels_;
  Blob<float> x_, y_, slope_, bias_, moving_mean_, moving_var_, mean_,
      inv_std_;
};

#endif  // USE_CUDNN

void TimeCudnnBatchNorm(const vector<int>& shape, int rounds) {
#ifdef USE_CUDNN
  Rig<float> ours("type: 'BN' phase: TRAIN", shape, 0);
  CudnnBatchNorm theirs(shape);
  PrintTimes(Alternate(rounds, [&] { ours.Run(); }, [&] { theirs.Run(); }),
      rounds, "");
#else
  std::fprintf(stderr, "gpu_check: Caffe is built without cuDNN\n");
  std::exit(2);
#endif
}

void TimeBatchNorm(const vector<int>& shape, bool in_place, int rounds) {
  const double copy_speed = CopySpeed();
  Rig<float> ours("type: 'BN' phase: TRAIN", shape, 0, in_place);
  Rig<float> norm("type: 'BatchNorm' phase: TRAIN", shape, 0, in_place);
  const caffe::shared_ptr<caffe::Layer<float> > scale = NewLayer<float>(
      "type: 'Scale' phase: TRAIN scale_param { bias_term: true }");
  const vector<bool> down(1, true);
  scale->SetUp(norm.top, norm.top);
  const Times times = Alternate(rounds, [&] { ours.Run(); }, [&] {
    norm.layer->Forward(norm.bottom, norm.top);
    scale->Forward(norm.top, norm.top);
    scale->Backward(norm.top, down, norm.top);
    norm.layer->Backward(norm.top, down, norm.bottom);
  });
  // Forward reads twice and writes once, in place x_hat as well; backward
  // reads two blobs twice and writes one.
  const double passes = in_place ? 9 : 8;
  const double speed = passes * sizeof(float) * ours.x.count() / times.ours;
  char rest[128];
  std::snprintf(rest, sizeof(rest),
      ", \"gb_per_s\": %.6g, \"copy_gb_per_s\": %.6g, "
      "\"share_of_copy\": %.6g", speed / 1e6, copy_speed / 1e6,
      speed / copy_speed);
  PrintTimes(times, rounds, rest);
}

// What a profiler that starts when it is told to sees: one pass of a layer,
// after passes that warm up.
void Profile(const string& layer, const vector<int>& shape) {
  const bool is_margin = layer == "margin";
  const string text =
      is_margin ? MarginOf(shape[2]) : "type: 'BN' phase: TRAIN";
  Rig<float> rig(text, is_margin ? Shape(shape[0], shape[1]) : shape,
      is_margin ? shape[2] : 0, layer == "bn_in_place");
  for (int i = 0; i < 3; ++i) { rig.Run(); }
#ifndef CPU_ONLY
  CUDA_CHECK(cudaDeviceSynchronize());
  CUDA_CHECK(cudaProfilerStart());
#endif
  rig.Run();
#ifndef CPU_ONLY
  CUDA_CHECK(cudaDeviceSynchronize());
  CUDA_CHECK(cudaProfilerStop());
#endif
}

void PrintDevice() {
#ifdef CPU_ONLY
  std::printf("{\"name\": \"the CPU\", \"capability\": \"none\", "
      "\"cuda\": \"none\", \"cudnn\": false}\n");
#else
  cudaDeviceProp device;
  CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  int driver;
  CUDA_CHECK(cudaDriverGetVersion(&driver));
#ifdef USE_CUDNN
  const char* const cudnn = "true";
#else
  const char* const cudnn = "false";
#endif
  std::printf("{\"name\": \"%s\", \"capability\": \"%d.%d\", "
      "\"cuda\": \"%d.%d\", \"multiprocessors\": %d, \"cudnn\": %s}\n",
      device.name, device.major, device.minor, driver / 1000,
      driver % 1000 / 10, device.multiProcessorCount, cudnn);
#endif
}

int Usage() {
  std::fprintf(stderr, "usage: gpu_check device\n"
      "       gpu_check parity margin|bn float|double\n"
      "       gpu_check repeat margin float|double\n"
      "       gpu_check time margin M K N [ROUNDS]\n"
      "       gpu_check time bn|bn_in_place|cudnn N C H W [ROUNDS]\n"
      "       gpu_check profile margin M K N\n"
      "       gpu_check profile bn|bn_in_place N C H W\n");
  return 2;
}

int Parity(const vector<string>& words) {
  if (words.size() != 3 || (words[1] != "margin" && words[1] != "bn")
      || (words[2] != "float" && words[2] != "double")) {
    return Usage();
  }
  if (words[2] == "float") {
    ParityOf<float>(words[1]);
  } else {
    ParityOf<double>(words[1]);
  }
  std::printf("parity: %s\n", failures ? "FAILED" : "GPU = CPU");
  return failures ? 1 : 0;
}

int Repeat(const vector<string>& words) {
  if (words.size() != 3 || words[1] != "margin"
      || (words[2] != "float" && words[2] != "double")) {
    return Usage();
  }
  if (words[2] == "float") {
    MarginRepeat<float>();
  } else {
    MarginRepeat<double>();
  }
  std::printf("repeat: %s\n", failures ? "FAILED" : "the same bits");
  return failures ? 1 : 0;
}

// time or profile, the layer and its sizes; for time the rounds may follow.
int Measure(const vector<string>& words) {
  if (words.size() < 2) { return Usage(); }
  const bool is_time = words[0] == "time";
  const string& layer = words[1];
  const bool is_bn = layer == "bn" || layer == "bn_in_place";
  if (!is_bn && layer != "margin" && !(is_time && layer == "cudnn")) {
    return Usage();
  }
  const size_t dims = layer == "margin" ? 3 : 4;
  vector<int> shape;
  for (size_t i = 2; i < words.size(); ++i) {
    shape.push_back(std::atoi(words[i].c_str()));
    if (shape.back() < 1) { return Usage(); }
  }
  int rounds = 15;
  if (is_time && shape.size() == dims + 1) {
    rounds = shape.back();
    shape.pop_back();
  }
  if (shape.size() != dims) { return Usage(); }
  if (!is_time) {
    Profile(layer, shape);
  } else if (layer == "margin") {
    TimeMargin(shape[0], shape[1], shape[2], rounds);
  } else if (layer == "cudnn") {
    TimeCudnnBatchNorm(shape, rounds);
  } else {
    TimeBatchNorm(shape, layer == "bn_in_place", rounds);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  FLAGS_minloglevel = google::WARNING;
  FLAGS_logtostderr = true;
  google::InitGoogleLogging(argv[0]);
  const vector<string> words(argv + 1, argv + argc);
  if (words.empty()) { return Usage(); }
#ifndef CPU_ONLY
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "gpu_check: no usable GPU: %s\n",
        cudaGetErrorString(cudaGetLastError()));
    return 3;
  }
#endif
  if (words[0] == "device" && words.size() == 1) {
    PrintDevice();
    return 0;
  }
  Caffe::set_random_seed(1701);
#ifndef CPU_ONLY
  Caffe::SetDevice(0);
#endif
  Caffe::set_mode(kMode);
  if (words[0] == "parity") { return Parity(words); }
  if (words[0] == "repeat") { return Repeat(words); }
  if (words[0] == "time" || words[0] == "profile") { return Measure(words); }
  return Usage();
}
