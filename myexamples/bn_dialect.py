"""The two dialects of the layer BN, and upstream's BatchNorm + Scale.

Their statistics of the training are, in the fourth blob of BN, the moving
inverse standard deviation (the L-Softmax authors' Caffe, and this project's)
or the moving variance (yjxiong's Caffe from 2016 on and PSPNet's); in
BatchNorm, sums of means and variances and the factor to divide them by.
"""
import numpy as np

from caffe_proto import UserError

# As BN's and BatchNorm's parameters have it.
EPS = 1e-5
# Beyond it, a variance would not survive its way through float.
LARGEST_VARIANCE = 1e30
# In trained nets, means are some half a standard deviation away from 0: by a
# factor of ten more or less is unusual.
USUAL = 0.5
# With fewer channels, that says nothing.
MINIMUM = 8
SAID = ("moving variances", "moving inverse standard deviations")


def check_statistics(where, values):
    """Raises UserError where statistics cannot be used."""
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise UserError("%s: its moving statistics are not finite (channel "
                        "%d: %g)" % (where, bad[0], values[bad[0]]))


def moving_variance(inv_std, slope, eps):
    """(variance, slope) that do with eps what inv_std does, in double.

    The slope is another one only where no variance gives that inverse
    standard deviation: above eps^(-1/2), at 0 and below.
    """
    with np.errstate(divide="ignore", over="ignore"):
        variance = np.clip(1 / np.square(inv_std) - eps, 0, LARGEST_VARIANCE)
    # What is written is float.
    variance = variance.astype(np.float32).astype(np.float64)
    factor = inv_std * np.sqrt(variance + eps)
    odd = (inv_std <= 0) | (variance == 0) | (variance >= LARGEST_VARIANCE)
    return variance, np.where(odd, slope * factor, slope)


def inverse_std(where, variance, eps):
    """The inverse standard deviation of a moving variance, in double."""
    check_statistics(where, variance)
    bad = np.flatnonzero(variance + eps <= 0)
    if bad.size:
        raise UserError("%s: channel %d has the variance %g, which with eps "
                        "%g is not above 0" % (where, bad[0],
                                               variance[bad[0]], eps))
    return (variance + eps) ** -0.5


def speaks_against(dialect, layers):
    """Why the fourth blobs of BN layers hardly are of a dialect, or None.

    dialect: "inverse-std" or "variance". layers: (name, moving mean, fourth
    blob, eps) each. That nothing is found proves nothing: where the standard
    deviations are about 1, the dialects look alike.
    """
    inverse = dialect == "inverse-std"
    by_variance, by_inverse = [], []
    for name, mean, values, eps in layers:
        mean = np.abs(np.asarray(mean, np.float64).ravel())
        values = np.asarray(values, np.float64).ravel()
        limit = eps ** -0.5 if eps > 0 else np.inf
        if inverse and (values <= 0).any():
            return ("layer '%s' has %.4g among its moving inverse standard "
                    "deviations, which cannot be" % (name, values.min()))
        if inverse and values.max() > 1.001 * limit:
            return ("layer '%s' has %.4g among its moving inverse standard "
                    "deviations, which cannot be above eps^(-1/2) = %.4g"
                    % (name, values.max(), limit))
        if not inverse and (values < 0).any():
            return ("layer '%s' has %.4g among its moving variances, which "
                    "cannot be" % (name, values.min()))
        # What a channel that is always the same has as its inverse.
        dead = int((np.abs(values / limit - 1) < 1e-4).sum())
        if not inverse and dead > 1:
            return ("layer '%s' has eps^(-1/2) = %.4g in %d channels, which "
                    "channels that never change have as their inverse "
                    "standard deviation" % (name, limit, dead))
        used = (mean > 0) & (values > 0)
        by_variance.append(mean[used] / np.sqrt(values[used] + eps))
        by_inverse.append(mean[used] * values[used])
    if sum(map(len, by_inverse)) < MINIMUM:
        return None
    ratios = [float(np.median(np.concatenate(found)))
              for found in (by_variance, by_inverse)]
    if inverse:
        ratios.reverse()
    asked, other = (abs(np.log10(ratio / USUAL)) for ratio in ratios)
    if asked > 1 and asked - other > 0.5:
        return ("read as %s, the moving means are %.2g standard deviations "
                "away from 0 (the median), which is unusual; read as %s, "
                "%.2g" % ((SAID[inverse], ratios[0], SAID[not inverse],
                           ratios[1])))
    return None
