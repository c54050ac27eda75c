// What a GPU is asked beyond the gtests: do the layers compute what they
// compute on the CPU, and how long do they take beside Caffe's own?
//
//   gpu_check device      names the GPU, or says what is wrong with it
//   gpu_check parity      CPU against GPU, float and double
//   gpu_check benchmark   a table of times, ratios and bandwidths

#include <cuda_runtime.h>
#include <google/protobuf/text_format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "caffe/caffe.hpp"

namespace {

using caffe::Blob;
using caffe::Caffe;
using std::string;
using std::vector;

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
  Caffe::set_mode(Caffe::GPU);
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
void AllParity() {
  const int sizes[][3] = {{1, 1, 1}, {3, 2, 5}, {129, 33, 17}, {7, 700, 3},
      {64, 128, 1}, {300, 40, 10}};
  for (const auto& s : sizes) {
    for (int margin = 1; margin <= 5; ++margin) {
      Parity<Dtype>(Format(kMargin, "num_output: " + caffe::format_int(s[2])
          + " margin: " + caffe::format_int(margin)
          + " base: 3 weight_filler { type: 'xavier' }"),
          Shape(s[0], s[1]), s[2]);
    }
  }
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

// ---- Benchmark ----

// Milliseconds of `repeats` calls of run, by the device's clock.
template <typename Run>
float Milliseconds(int repeats, const Run& run) {
  cudaEvent_t start, stop;
  CUDA_CHECK(cudaEventCreate(&start));
  CUDA_CHECK(cudaEventCreate(&stop));
  CUDA_CHECK(cudaEventRecord(start, 0));
  for (int i = 0; i < repeats; ++i) { run(); }
  CUDA_CHECK(cudaEventRecord(stop, 0));
  CUDA_CHECK(cudaEventSynchronize(stop));
  float ms;
  CUDA_CHECK(cudaEventElapsedTime(&ms, start, stop));
  CUDA_CHECK(cudaEventDestroy(start));
  CUDA_CHECK(cudaEventDestroy(stop));
  return ms;
}

double Median(vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

struct Ratio {
  double ours, theirs;  // medians, in milliseconds a call
  double ratio, least, most;
};

// Turns of one and the other, so that both see the same clocks. A ratio is
// that of neighbours.
template <typename Ours, typename Theirs>
Ratio Alternate(const Ours& ours, const Theirs& theirs) {
  const int kRounds = 15;
  const float kRoundMs = 40;
  Milliseconds(3, ours);
  Milliseconds(3, theirs);
  const float once = Milliseconds(5, theirs) / 5;
  const int repeats = std::max(3, std::min(2000,
      static_cast<int>(kRoundMs / once)));
  vector<double> a, b, ratios;
  for (int i = 0; i < kRounds; ++i) {
    a.push_back(Milliseconds(repeats, ours) / repeats);
    b.push_back(Milliseconds(repeats, theirs) / repeats);
    ratios.push_back(a.back() / b.back());
  }
  Ratio r;
  r.ours = Median(a);
  r.theirs = Median(b);
  r.ratio = Median(ratios);
  r.least = *std::min_element(ratios.begin(), ratios.end());
  r.most = *std::max_element(ratios.begin(), ratios.end());
  return r;
}

const char* Verdict(bool met) {
  if (!met) { ++failures; }
  return met ? "met" : "MISSED";
}

void PrintRow(const string& name, const Ratio& r, const string& rest) {
  std::printf("%-52s %9.4f %9.4f  %5.3f [%5.3f, %5.3f]  %s\n", name.c_str(),
      r.ours, r.theirs, r.ratio, r.least, r.most, rest.c_str());
  std::fflush(stdout);
}

void BenchmarkMargin(int samples, int features, int classes, double budget) {
  const string n = caffe::format_int(classes);
  const string filler = " weight_filler { type: 'xavier' }";
  Rig<float> ours(Format(kMargin, "num_output: " + n
      + " type: QUADRUPLE base: 10" + filler), Shape(samples, features),
      classes);
  Rig<float> theirs("type: 'InnerProduct' phase: TRAIN inner_product_param { "
      "bias_term: false num_output: " + n + filler + " }",
      Shape(samples, features), 0);
  const Ratio r = Alternate([&] { ours.Run(); }, [&] { theirs.Run(); });
  char rest[64] = "";
  if (budget > 0) {
    std::snprintf(rest, sizeof(rest), "budget %.2f %s", budget,
        Verdict(r.ratio <= budget));
  }
  PrintRow("margin / InnerProduct (" + caffe::format_int(samples) + ", "
      + caffe::format_int(features) + ", " + n + ")", r, rest);
}

// Bytes a millisecond, read and written, of a copy on the device.
double CopySpeed() {
  const size_t bytes = 256 << 20;
  void *from, *to;
  CUDA_CHECK(cudaMalloc(&from, bytes));
  CUDA_CHECK(cudaMalloc(&to, bytes));
  CUDA_CHECK(cudaMemset(from, 0, bytes));
  const auto copy = [&] {
    CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, 0));
  };
  Milliseconds(5, copy);
  vector<double> times;
  for (int i = 0; i < 15; ++i) { times.push_back(Milliseconds(5, copy) / 5); }
  CUDA_CHECK(cudaFree(from));
  CUDA_CHECK(cudaFree(to));
  return 2.0 * bytes / Median(times);
}

string Name(const string& what, const vector<int>& shape, bool in_place) {
  string name = what + " (";
  for (const int size : shape) { name += caffe::format_int(size) + ", "; }
  return name.replace(name.size() - 2, 2, in_place ? "), in place" : ")");
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

void BenchmarkCudnnBatchNorm(const vector<int>& shape) {
  Rig<float> ours("type: 'BN' phase: TRAIN", shape, 0);
  CudnnBatchNorm theirs(shape);
  PrintRow(Name("BN / cuDNN's", shape, false),
      Alternate([&] { ours.Run(); }, [&] { theirs.Run(); }), "");
}
#endif  // USE_CUDNN

void BenchmarkBatchNorm(const vector<int>& shape, bool in_place,
    double copy_speed) {
  Rig<float> ours("type: 'BN' phase: TRAIN", shape, 0, in_place);
  Rig<float> norm("type: 'BatchNorm' phase: TRAIN", shape, 0, in_place);
  const caffe::shared_ptr<caffe::Layer<float> > scale = NewLayer<float>(
      "type: 'Scale' phase: TRAIN scale_param { bias_term: true }");
  const vector<bool> down(1, true);
  scale->SetUp(norm.top, norm.top);
  const Ratio r = Alternate([&] { ours.Run(); }, [&] {
    norm.layer->Forward(norm.bottom, norm.top);
    scale->Forward(norm.top, norm.top);
    scale->Backward(norm.top, down, norm.top);
    norm.layer->Backward(norm.top, down, norm.bottom);
  });
  // Forward reads twice and writes once, in place x_hat as well; backward
  // reads two blobs twice and writes one.
  const double passes = in_place ? 9 : 8;
  const double speed = passes * sizeof(float) * ours.x.count() / r.ours;
  char rest[128];
  std::snprintf(rest, sizeof(rest),
      "budget 0.33 %s; %.0f GB/s, %.0f %% of a copy, budget 70 %% %s",
      Verdict(r.ratio <= 0.33), speed / 1e6, 100 * speed / copy_speed,
      Verdict(speed >= 0.7 * copy_speed));
  PrintRow(Name("BN / BatchNorm + Scale", shape, in_place), r, rest);
}

void PrintDevice() {
  cudaDeviceProp device;
  CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  int driver;
  CUDA_CHECK(cudaDriverGetVersion(&driver));
  std::printf("%s, compute capability %d.%d, driver for CUDA %d.%d\n",
      device.name, device.major, device.minor, driver / 1000,
      driver % 1000 / 10);
}

void Benchmark() {
  PrintDevice();
  const double copy_speed = CopySpeed();
  std::printf("a copy on the device: %.0f GB/s, read and written\n",
      copy_speed / 1e6);
  std::printf("float, forward + backward; medians of 15 alternating runs\n");
  std::printf("%-52s %9s %9s  %s\n", "", "ours ms", "theirs ms",
      "ratio [range]");
  BenchmarkMargin(128, 512, 10, 0);
  BenchmarkMargin(128, 512, 1000, 1.05);
  BenchmarkMargin(512, 512, 10572, 1.05);
  BenchmarkMargin(512, 512, 100000, 1.05);
  // The second is too large for any cache.
  for (const vector<int>& shape : {Shape(128, 64, 28, 28),
      Shape(128, 64, 112, 112)}) {
    BenchmarkBatchNorm(shape, false, copy_speed);
    BenchmarkBatchNorm(shape, true, copy_speed);
#ifdef USE_CUDNN
    BenchmarkCudnnBatchNorm(shape);
#endif
  }
}

}  // namespace

int main(int argc, char** argv) {
  FLAGS_minloglevel = google::WARNING;
  FLAGS_logtostderr = true;
  google::InitGoogleLogging(argv[0]);
  const string what = argc == 2 ? argv[1] : "";
  int devices = 0;
  if (what != "device" && what != "parity" && what != "benchmark") {
    std::fprintf(stderr, "usage: gpu_check device|parity|benchmark\n");
    return 2;
  }
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "gpu_check: no usable GPU: %s\n",
        cudaGetErrorString(cudaGetLastError()));
    return 3;
  }
  if (what == "device") {
    PrintDevice();
    return 0;
  }
  Caffe::set_random_seed(1701);
  Caffe::SetDevice(0);
  Caffe::set_mode(Caffe::GPU);
  if (what == "parity") {
    AllParity<float>();
    AllParity<double>();
    std::printf("parity: %s\n", failures ? "FAILED" : "GPU = CPU");
  } else {
    Benchmark();
    std::printf("benchmark: %d budgets missed\n", failures);
  }
  return failures ? 1 : 0;
}
