#include <cmath>
#include <cstring>
#include <fstream>  // NOLINT(readability/streams)
#include <string>
#include <vector>

#include "boost/thread.hpp"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"

#include "caffe/blob.hpp"
#include "caffe/common.hpp"
#include "caffe/sgd_solvers.hpp"
#include "caffe/util/format.hpp"
#include "caffe/util/io.hpp"
#include "caffe/util/resume_large_margin.hpp"

#include "caffe/test/test_caffe_main.hpp"

namespace caffe {

// Data parallel training as Caffe's NCCL and its workers do it, without NCCL
// and on one device: a thread and a solver a rank, each with layers of its own
// and data of its own; the first one's weights at the start, the ranks' mean
// gradient at each update.

static const int kIterations = 24;
static const int kIterSize = 2;

// Softmax's engine: cuDNN's needs a GPU even in CPU mode.
static const char kSolver[] =
    "base_lr: 0.05 momentum: 0.9 weight_decay: 0.001 lr_policy: 'fixed' "
    "snapshot_after_train: false test_interval: 5 test_iter: 3 "
    "net_param { "
    "layer { name: 'data' type: 'DummyData' top: 'x' top: 'y' "
    "  dummy_data_param { shape { dim: 12 dim: 10 } shape { dim: 12 } "
    "    data_filler { type: 'constant' value: 1 } "
    "    data_filler { type: 'constant' value: 1 } } } "
    "layer { name: 'ip' type: 'InnerProduct' bottom: 'x' top: 'ip' "
    "  inner_product_param { num_output: 7 "
    "    weight_filler { type: 'xavier' } } } "
    "layer { name: 'bn' type: 'BN' bottom: 'ip' top: 'bn' } "
    "layer { name: 'lm' type: 'LargeMarginInnerProduct' bottom: 'bn' "
    "  bottom: 'y' top: 'lm' top: 'lambda' "
    "  largemargin_inner_product_param { num_output: 3 type: QUADRUPLE "
    "    base: 100 gamma: 0.5 weight_filler { type: 'xavier' } } } "
    "layer { name: 'loss' type: 'SoftmaxWithLoss' bottom: 'lm' bottom: 'y' "
    "  top: 'loss' softmax_param { engine: CAFFE } } }";

// lambda of the last pass of an iteration, from 0.
static double LambdaAfter(const int iteration) {
  return 100 / (1 + 0.5 * kIterSize * (iteration + 1));
}

// rc3 knows which solver is the root, but no ranks.
template <typename C>
static auto SetRank(const int rank, int) -> decltype(C::set_solver_rank(rank)) {
  C::set_solver_rank(rank);
}
template <typename C>
static void SetRank(const int rank, long) {}  // NOLINT(runtime/int)

template <typename Dtype>
static vector<Dtype> Values(const vector<Blob<Dtype>*>& blobs,
    const bool diff) {
  vector<Dtype> values;
  for (int i = 0; i < blobs.size(); ++i) {
    const Dtype* const data = diff ? blobs[i]->cpu_diff()
        : blobs[i]->cpu_data();
    values.insert(values.end(), data, data + blobs[i]->count());
  }
  return values;
}

template <typename Dtype>
static void SetValues(const vector<Dtype>& values, const bool diff,
    const vector<Blob<Dtype>*>& blobs) {
  const Dtype* from = &values[0];
  for (int i = 0; i < blobs.size(); ++i) {
    caffe_copy(blobs[i]->count(), from, diff ? blobs[i]->mutable_cpu_diff()
        : blobs[i]->mutable_cpu_data());
    from += blobs[i]->count();
  }
}

// What a rank did, by iteration.
template <typename Dtype>
struct Record {
  vector<Dtype> first_weights;
  vector<vector<Dtype> > gradients;  // its own
  vector<vector<Dtype> > means;      // what it got for them
  vector<Dtype> lambdas;
  vector<Dtype> weights;  // that the solver moves, at the end
  vector<Dtype> statistics;  // BN's moving ones, at the end
};

// What the ranks of a training share.
template <typename Dtype>
struct Ranks {
  explicit Ranks(const int size) : barrier(size), values(size) {}
  boost::barrier barrier;
  vector<vector<Dtype> > values;
};

// Without ranks, it replays a record: a rank's training, alone.
template <typename Dtype>
class Exchange : public Solver<Dtype>::Callback {
 public:
  Exchange(Solver<Dtype>* solver, const int rank, Ranks<Dtype>* ranks,
      const Record<Dtype>* replayed, Record<Dtype>* record)
      : solver_(solver), rank_(rank), ranks_(ranks), replayed_(replayed),
        record_(record), first_iteration_(solver->iter()) {
    const vector<Blob<Dtype>*>& params = solver->net()->learnable_params();
    record->first_weights = ranks ? Share(Values(params, false))[0]
        : replayed->first_weights;
    SetValues(record->first_weights, false, params);
  }

 protected:
  virtual void on_start() {
    Blob<Dtype>* const x = solver_->net()->blob_by_name("x").get();
    Blob<Dtype>* const y = solver_->net()->blob_by_name("y").get();
    for (int i = 0; i < x->count(); ++i) {
      x->mutable_cpu_data()[i] =
          cos(1.7 * i + 0.9 * solver_->iter() + 2.3 * rank_);
    }
    for (int i = 0; i < y->count(); ++i) {
      y->mutable_cpu_data()[i] = (i + solver_->iter() + rank_) % 3;
    }
  }
  virtual void on_gradients_ready() {
    const vector<Blob<Dtype>*>& params = solver_->net()->learnable_params();
    record_->gradients.push_back(Values(params, true));
    vector<Dtype> mean;
    if (ranks_) {
      const vector<vector<Dtype> > all = Share(record_->gradients.back());
      mean.resize(all[0].size());
      for (int i = 0; i < mean.size(); ++i) {
        for (int r = 0; r < all.size(); ++r) { mean[i] += all[r][i]; }
        mean[i] /= all.size();
      }
    } else {
      mean = replayed_->means[solver_->iter() - first_iteration_];
    }
    SetValues(mean, true, params);
    record_->means.push_back(mean);
    record_->lambdas.push_back(
        solver_->net()->blob_by_name("lambda")->cpu_data()[0]);
  }

 private:
  // What all ranks have here.
  vector<vector<Dtype> > Share(const vector<Dtype>& own) {
    ranks_->values[rank_] = own;
    ranks_->barrier.wait();
    const vector<vector<Dtype> > all = ranks_->values;
    ranks_->barrier.wait();
    return all;
  }

  Solver<Dtype>* const solver_;
  const int rank_;
  Ranks<Dtype>* const ranks_;
  const Record<Dtype>* const replayed_;
  Record<Dtype>* const record_;
  const int first_iteration_;
};

template <typename Dtype>
struct Job {
  Caffe::Brew mode;
  int size;
  SolverParameter param;
  string state_file;  // to go on from, or ""
};

// The thread of a rank.
template <typename Dtype>
static void Work(const Job<Dtype>* job, const int rank, Ranks<Dtype>* ranks,
    const Record<Dtype>* replayed, Record<Dtype>* record) {
  Caffe::set_mode(job->mode);
  Caffe::set_solver_count(job->size);
  SetRank<Caffe>(rank, 0);
  SolverParameter param(job->param);
  if (rank > 0) { param.clear_snapshot(); }  // for rc3, without ranks
  SGDSolver<Dtype> solver(param);
  if (job->state_file.size()) { solver.Restore(job->state_file.c_str()); }
  Exchange<Dtype> exchange(&solver, rank, ranks, replayed, record);
  solver.add_callback(&exchange);
  solver.Step(kIterations - solver.iter());
  const Net<Dtype>& net = *solver.net();
  for (int i = 0; i < net.learnable_params().size(); ++i) {
    const vector<Blob<Dtype>*> blob(1, net.learnable_params()[i]);
    const vector<Dtype> values = Values(blob, false);
    vector<Dtype>* const kept = net.params_lr()[i] > 0 ? &record->weights
        : &record->statistics;
    kept->insert(kept->end(), values.begin(), values.end());
  }
}

template <typename Dtype>
static vector<Record<Dtype> > TrainTogether(const Job<Dtype>& job) {
  vector<Record<Dtype> > records(job.size);
  Ranks<Dtype> ranks(job.size);
  boost::thread_group group;
  for (int rank = 0; rank < job.size; ++rank) {
    group.add_thread(new boost::thread(&Work<Dtype>, &job, rank, &ranks,
        static_cast<const Record<Dtype>*>(NULL), &records[rank]));
  }
  group.join_all();
  return records;
}

template <typename TypeParam>
class LargeMarginInnerProductLayerDataParallelTest
    : public MultiDeviceTest<TypeParam> {
  typedef typename TypeParam::Dtype Dtype;

 protected:
  LargeMarginInnerProductLayerDataParallelTest() {
    job_.mode = Caffe::mode();
    job_.size = 2;
    CHECK(google::protobuf::TextFormat::ParseFromString(kSolver,
        &job_.param));
    job_.param.set_iter_size(kIterSize);
    job_.param.set_random_seed(1701);
  }

  static void ExpectSameBits(const vector<Dtype>& a, const vector<Dtype>& b,
      const string& what) {
    ASSERT_EQ(a.size(), b.size()) << what;
    ASSERT_FALSE(a.empty()) << what;
    EXPECT_EQ(0, memcmp(&a[0], &b[0], a.size() * sizeof(Dtype))) << what;
    for (int i = 0; i < a.size(); ++i) {
      ASSERT_TRUE(std::isfinite(a[i])) << what << " " << i;
    }
  }

  static void ExpectSame(const Record<Dtype>& a, const Record<Dtype>& b) {
    ASSERT_EQ(a.gradients.size(), b.gradients.size());
    for (int i = 0; i < a.gradients.size(); ++i) {
      ExpectSameBits(a.gradients[i], b.gradients[i],
          "gradients of iteration " + format_int(i));
      ExpectSameBits(a.means[i], b.means[i],
          "mean gradients of iteration " + format_int(i));
    }
    ExpectSameBits(a.lambdas, b.lambdas, "lambda");
    ExpectSameBits(a.weights, b.weights, "weights");
    ExpectSameBits(a.statistics, b.statistics, "BN's moving statistics");
  }

  // Stopped at a snapshot, and gone on from there by every rank.
  void TestRestore(const SolverParameter_SnapshotFormat format,
      const string& extension) {
    string folder;
    MakeTempDir(&folder);
    job_.param.set_snapshot(10);
    job_.param.set_snapshot_format(format);
    job_.param.set_snapshot_prefix(folder + "/model");
    const vector<Record<Dtype> > whole = TrainTogether(job_);
    job_.param.clear_snapshot();
    job_.state_file = folder + "/model_iter_10.solverstate" + extension;
    ASSERT_TRUE(std::ifstream(job_.state_file.c_str()).good());
    const vector<Record<Dtype> > rest = TrainTogether(job_);
    for (int rank = 0; rank < job_.size; ++rank) {
      ASSERT_EQ(kIterations - 10, rest[rank].lambdas.size());
      for (int i = 0; i < rest[rank].lambdas.size(); ++i) {
        EXPECT_EQ(whole[rank].lambdas[10 + i], rest[rank].lambdas[i])
            << "rank " << rank << " iteration " << 10 + i;
        ExpectSameBits(whole[rank].gradients[10 + i], rest[rank].gradients[i],
            "gradients of iteration " + format_int(10 + i));
      }
      ExpectSameBits(whole[rank].weights, rest[rank].weights, "weights");
    }
    // A snapshot has the first rank's.
    ExpectSameBits(whole[0].statistics, rest[0].statistics,
        "BN's moving statistics");
  }

  Job<Dtype> job_;
};

TYPED_TEST_CASE(LargeMarginInnerProductLayerDataParallelTest,
    TestDtypesAndDevices);

// Lambda counts the passes of a rank, whatever the others do: iterations, not
// samples. The first rank's tests do not move it.
TYPED_TEST(LargeMarginInnerProductLayerDataParallelTest, TestLambda) {
  typedef typename TypeParam::Dtype Dtype;
  for (int size = 1; size <= 3; ++size) {
    this->job_.size = size;
    const vector<Record<Dtype> > records = TrainTogether(this->job_);
    for (int rank = 0; rank < size; ++rank) {
      SCOPED_TRACE(::testing::Message() << "rank " << rank << " of " << size);
      const Record<Dtype>& record = records[rank];
      ASSERT_EQ(kIterations, record.lambdas.size());
      for (int i = 0; i < kIterations; ++i) {
        EXPECT_NEAR(LambdaAfter(i), record.lambdas[i], 1e-5 * LambdaAfter(i));
      }
      // Each has data of its own, and all have the same weights.
      this->ExpectSameBits(records[0].weights, record.weights, "weights");
      if (rank > 0) {
        EXPECT_TRUE(records[0].gradients[0] != record.gradients[0]);
      }
    }
  }
}

TYPED_TEST(LargeMarginInnerProductLayerDataParallelTest, TestDeterministic) {
  typedef typename TypeParam::Dtype Dtype;
  const vector<Record<Dtype> > records = TrainTogether(this->job_);
  for (int run = 0; run < 2; ++run) {
    const vector<Record<Dtype> > again = TrainTogether(this->job_);
    for (int rank = 0; rank < this->job_.size; ++rank) {
      SCOPED_TRACE(::testing::Message() << "run " << run << " rank " << rank);
      this->ExpectSame(records[rank], again[rank]);
      Record<Dtype> alone;
      boost::thread(&Work<Dtype>, &this->job_, rank,
          static_cast<Ranks<Dtype>*>(NULL), &records[rank], &alone).join();
      this->ExpectSame(records[rank], alone);
    }
  }
}

TYPED_TEST(LargeMarginInnerProductLayerDataParallelTest, TestRestoreBinary) {
  this->TestRestore(SolverParameter_SnapshotFormat_BINARYPROTO, "");
}

TYPED_TEST(LargeMarginInnerProductLayerDataParallelTest, TestRestoreHDF5) {
  this->TestRestore(SolverParameter_SnapshotFormat_HDF5, ".h5");
}

// rc3 restores the root's solver alone, and makes the others behind it.
TYPED_TEST(LargeMarginInnerProductLayerDataParallelTest,
    TestWorkersGoOnWithTheRoot) {
  typedef typename TypeParam::Dtype Dtype;
  SGDSolver<Dtype> root(this->job_.param), worker(this->job_.param);
  root.Step(5);
  ResumeLargeMargin<Dtype>(&worker, &root);
  Solver<Dtype>* const solvers[] = {&root, &worker};
  for (int i = 0; i < 2; ++i) {
    solvers[i]->Step(1);
    EXPECT_NEAR(LambdaAfter(5),
        solvers[i]->net()->blob_by_name("lambda")->cpu_data()[0],
        1e-5 * LambdaAfter(5)) << "solver " << i;
  }
}

}  // namespace caffe
