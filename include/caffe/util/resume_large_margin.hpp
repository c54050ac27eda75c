#ifndef CAFFE_UTIL_RESUME_LARGE_MARGIN_HPP_
#define CAFFE_UTIL_RESUME_LARGE_MARGIN_HPP_

#include <string>

#include "caffe/net.hpp"
#include "caffe/solver.hpp"
#include "caffe/util/hdf5.hpp"

namespace caffe {

/// @brief Called when a solver has its nets: tells the layers of this project
///        what they cannot see of them, and warns where a test net has another
///        layer of the training net's weights, which it never gets.
template <typename Dtype>
void PrepareLayers(Solver<Dtype>* solver);

/**
 * @brief Called at the end of Solver::Restore: the layers of this project in
 *        the solver's nets go on where the snapshot left them.
 *
 * @param state_file the .solverstate or .solverstate.h5 file restored from
 */
template <typename Dtype>
void ResumeLargeMargin(Solver<Dtype>* solver, const string& state_file);

/// @brief Called where an old Caffe (rc3) makes the solver of a further GPU,
///        which restores nothing: its layers go on where those of the root
///        solver do.
template <typename Dtype>
void ResumeLargeMargin(Solver<Dtype>* worker, Solver<Dtype>* root);

/// @brief Called by `caffe test`: goes on after the passes of the model, and
///        has BN keep nothing for a backward pass.
template <typename Dtype>
void ResumeLargeMargin(Net<Dtype>* net, const string& model_file);

#ifdef H5_VERS_MAJOR
/**
 * @brief Called while a .solverstate.h5 is written: puts the passes of the
 *        net's layers in. A binary snapshot has them in its .caffemodel.
 */
template <typename Dtype>
void SaveLargeMargin(const Net<Dtype>& net, hid_t state_file);
#endif  // H5_VERS_MAJOR

}  // namespace caffe

#endif  // CAFFE_UTIL_RESUME_LARGE_MARGIN_HPP_
