"""The images of the paper's nets: brought along, checked, made into LMDBs."""
import gzip
import hashlib
import os
import shutil
import struct
import tarfile

from checks import say
from results import UserError

FILES = {"mnist": ["train-images-idx3-ubyte", "train-labels-idx1-ubyte",
                   "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"],
         "cifar10": ["data_batch_%d.bin" % i for i in range(1, 6)]
                    + ["test_batch.bin"]}
ARCHIVE = "cifar-10-binary.tar.gz"
CIFAR_RECORD = 1 + 3 * 32 * 32


def folder_of(results_folder, net):
    """Where files that came by `run.sh data` lie."""
    return os.path.join(results_folder, "data", net + "-files")


def find(run, net, name):
    """The path of a file of the images, gzipped or not, or None."""
    for folder in (folder_of(run.results.folder, net),
                   os.path.join(run.bundle_folder, net)):
        for end in ("", ".gz"):
            path = os.path.join(folder, name + end)
            if os.path.exists(path):
                return path
    return None


def missing(run, net):
    """The names of the net's files that are not here; none with its LMDBs."""
    if all(os.path.exists(path) for path in made(run, net)):
        return []
    return [name for name in FILES[net] if find(run, net, name) is None]


def made(run, net):
    """The paths of what is made of the net's files."""
    data = os.path.join(run.results.folder, "data")
    names = [net + "_train_lmdb", net + "_test_lmdb"]
    if net == "cifar10":
        names.append("cifar10_mean.binaryproto")
    return [os.path.join(data, name) for name in names]


def _open(path):
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


# ---- Files that a user brings ----

def _checksums(bundle_folder):
    sums = {}
    for net in FILES:
        path = os.path.join(bundle_folder, "myexamples", net, net + ".sha256")
        with open(path) as file:
            for line in file:
                digest, name = line.split()
                sums[name] = digest
    return sums


def _take(stream, dest, name, digest):
    """Writes a stream to the file dest if it is the official one."""
    hashed = hashlib.sha256()
    with open(dest + ".new", "wb") as file:
        for block in iter(lambda: stream.read(1 << 20), b""):
            hashed.update(block)
            file.write(block)
    if hashed.hexdigest() != digest:
        os.remove(dest + ".new")
        raise UserError("%s is not the official file (its SHA-256 is %s)"
                        % (name, hashed.hexdigest()))
    os.replace(dest + ".new", dest)
    say("data: took %s" % name)


def take(run, paths):
    """Takes what is of MNIST and CIFAR-10 in files and folders."""
    sums = _checksums(run.bundle_folder)
    known = {name: net for net in FILES for name in FILES[net]}
    files = []
    for path in paths:
        if os.path.isdir(path):
            files += [os.path.join(path, name)
                      for name in sorted(os.listdir(path))]
        else:
            files.append(path)
    taken = 0
    for path in files:
        base = os.path.basename(path)
        name = base[:-3] if base.endswith(".gz") else base
        try:
            if base == ARCHIVE:
                with tarfile.open(path) as archive:
                    for member in archive:
                        name = os.path.basename(member.name)
                        if name in known:
                            _take_for(run, known, sums, name,
                                      archive.extractfile(member))
                            taken += 1
            elif name in known:
                with _open(path) as stream:
                    _take_for(run, known, sums, name, stream)
                taken += 1
        except (OSError, EOFError, tarfile.TarError) as error:
            raise UserError("%s cannot be read: %s" % (path, error))
    if not taken:
        raise UserError("there is no file of MNIST or CIFAR-10 in %s: the "
                        "names are %s, plain or .gz, and %s" % (
                            ", ".join(paths), ", ".join(sorted(known)),
                            ARCHIVE))
    for net in sorted(FILES):
        lacking = missing(run, net)
        say("data: %s: %s" % (net, "all there" if not lacking else
                              "without " + ", ".join(lacking)))


def _take_for(run, known, sums, name, stream):
    folder = folder_of(run.results.folder, known[name])
    os.makedirs(folder, exist_ok=True)
    _take(stream, os.path.join(folder, name), name, sums[name])


# ---- LMDBs ----

def make(run, net):
    """Makes the net's LMDBs, and what else it reads, where they are not."""
    if all(os.path.exists(path) for path in made(run, net)):
        return
    data = os.path.join(run.results.folder, "data")
    part = os.path.join(data, net + ".part")
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    log = run.fresh_log("data " + net)
    try:
        for name in FILES[net]:
            with _open(find(run, net, name)) as packed, \
                    open(os.path.join(part, name), "wb") as plain:
                shutil.copyfileobj(packed, plain)
        say("data: making the LMDBs of %s" % net)
        if net == "mnist":
            commands = [["convert_mnist_data",
                         part + "/%s-images-idx3-ubyte" % which,
                         part + "/%s-labels-idx1-ubyte" % which,
                         part + "/mnist_%s_lmdb" % phase]
                        for which, phase in (("train", "train"),
                                             ("t10k", "test"))]
        else:
            commands = [["convert_cifar_data", part, part, "lmdb"]]
            write_mean(part, os.path.join(part, "cifar10_mean.binaryproto"))
        for command in commands:
            if run.run(run.host.command(*command), log) != 0:
                raise UserError("%s failed; its log is %s" % (command[0], log))
        for path in made(run, net):
            shutil.rmtree(path, ignore_errors=True)
            os.replace(os.path.join(part, os.path.basename(path)), path)
    except (OSError, EOFError) as error:
        raise UserError("the images of %s cannot be made: %s" % (net, error))
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_mean(folder, path):
    """The mean of CIFAR-10's training images, as Caffe's BlobProto."""
    sums, count = [0] * (CIFAR_RECORD - 1), 0
    for name in FILES["cifar10"][:-1]:
        with open(os.path.join(folder, name), "rb") as file:
            batch = file.read()
        count += len(batch) // CIFAR_RECORD
        for pixel in range(CIFAR_RECORD - 1):
            sums[pixel] += sum(batch[1 + pixel::CIFAR_RECORD])
    values = struct.pack("<%df" % len(sums), *[s / count for s in sums])
    # Fields 1 to 4 are the shape (1, 3, 32, 32), 5 the values, packed.
    with open(path, "wb") as file:
        file.write(b"\x08\x01\x10\x03\x18\x20\x20\x20\x2a" + _varint(
            len(values)) + values)


def _varint(value):
    encoded = b""
    while value > 127:
        encoded += bytes([value & 127 | 128])
        value >>= 7
    return encoded + bytes([value])
