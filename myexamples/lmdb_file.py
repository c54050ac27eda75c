"""LMDBs, by the library that Caffe uses."""
import ctypes
import os

from caffe_proto import UserError

# Of lmdb.h. To read, nothing is written, no lock file either.
MDB_RDONLY, MDB_NOLOCK, MDB_APPEND = 0x20000, 0x400000, 0x20000
# As large as the file may grow.
MAP_SIZE = 1 << 32


class MdbStat(ctypes.Structure):
    """MDB_stat of lmdb.h."""
    _fields_ = ([(name, ctypes.c_uint) for name in ("psize", "depth")]
                + [(name, ctypes.c_size_t) for name in (
                    "branch_pages", "leaf_pages", "overflow_pages",
                    "entries")])


class MdbVal(ctypes.Structure):
    """MDB_val of lmdb.h."""
    _fields_ = [("size", ctypes.c_size_t), ("data", ctypes.c_char_p)]


def load():
    """liblmdb."""
    try:
        mdb = ctypes.CDLL("liblmdb.so.0")
    except OSError:
        raise UserError("liblmdb is not installed")
    mdb.mdb_strerror.restype = ctypes.c_char_p
    mdb.mdb_env_set_mapsize.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    mdb.mdb_txn_begin.argtypes = [ctypes.c_void_p, ctypes.c_void_p,
                                  ctypes.c_uint, ctypes.c_void_p]
    return mdb


def entries(path):
    """The entries of the LMDB at path."""
    mdb = load()
    env, stat = ctypes.c_void_p(), MdbStat()
    mdb.mdb_env_create(ctypes.byref(env))
    try:
        error = mdb.mdb_env_open(env, os.fsencode(path),
                                 MDB_RDONLY | MDB_NOLOCK, 0)
        if error:
            raise UserError("%s: %s" % (path, mdb.mdb_strerror(
                error).decode()))
        mdb.mdb_env_stat(env, ctypes.byref(stat))
        return stat.entries
    finally:
        mdb.mdb_env_close(env)


def write(path, values):
    """Makes an LMDB of values, bytes each, in the new folder path."""
    mdb = load()
    os.mkdir(path)
    env, transaction = ctypes.c_void_p(), ctypes.c_void_p()

    def check(error):
        if error:
            raise UserError("cannot write %s: %s" % (
                path, mdb.mdb_strerror(error).decode()))

    mdb.mdb_env_create(ctypes.byref(env))
    try:
        check(mdb.mdb_env_set_mapsize(env, MAP_SIZE))
        check(mdb.mdb_env_open(env, os.fsencode(path), 0, 0o644))
        check(mdb.mdb_txn_begin(env, None, 0, ctypes.byref(transaction)))
        try:
            _put_all(mdb, transaction, values, check)
        except BaseException:
            mdb.mdb_txn_abort(transaction)
            raise
        check(mdb.mdb_txn_commit(transaction))
    finally:
        mdb.mdb_env_close(env)


def _put_all(mdb, transaction, values, check):
    """Puts values under rising keys, as Caffe's own converters do."""
    database = ctypes.c_uint()
    check(mdb.mdb_dbi_open(transaction, None, 0, ctypes.byref(database)))
    for number, value in enumerate(values):
        key = b"%08d" % number
        check(mdb.mdb_put(
            transaction, database, ctypes.byref(MdbVal(len(key), key)),
            ctypes.byref(MdbVal(len(value), value)), MDB_APPEND))
