#!/usr/bin/python3
"""Moves what CMake has installed below a folder to where it belongs.

    install.py STAGE PREFIX

STAGE has the files as they are to be below PREFIX, which is there. All of them
are moved, or none; a file that is not of an earlier installation is never
overwritten, and what that had and this has not goes. They are listed in
PREFIX/share/caffe-lsoftmax/files.
"""
import argparse
import errno
import os
import shutil
import sys

RECORD = "share/caffe-lsoftmax/files"


def files_below(folder):
    """The files and links in a folder, as paths of it, sorted."""
    return sorted(os.path.relpath(os.path.join(where, name), folder)
                  for where, folders, files in os.walk(folder)
                  for name in files + [one for one in folders
                                       if os.path.islink(
                                           os.path.join(where, one))])


def read_record(prefix):
    """What earlier installations have put below prefix."""
    try:
        with open(os.path.join(prefix, RECORD)) as file:
            return set(file.read().splitlines())
    except FileNotFoundError:
        return set()


def write_record(folder, files):
    path = os.path.join(folder, RECORD)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".new", "w") as file:
        file.writelines(name + "\n" for name in sorted(files))
    os.replace(path + ".new", path)


def remove(prefix, name):
    """Removes a file, and the folders that are empty then."""
    try:
        os.remove(os.path.join(prefix, name))
        folder = os.path.dirname(name)
        while folder:
            os.rmdir(os.path.join(prefix, folder))
            folder = os.path.dirname(folder)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
            raise


def install(stage, prefix):
    """Moves the files; raises OSError."""
    files = files_below(stage)
    ours = read_record(prefix)
    foreign = [name for name in files if name not in ours
               and os.path.lexists(os.path.join(prefix, name))]
    if foreign:
        sys.exit("error: %s/%s is there, and is not of an installation by "
                 "this script (%d such files). Nothing was installed: choose "
                 "another PREFIX, or move it away"
                 % (prefix, foreign[0], len(foreign)))
    # Beside their places first: a disk that is full leaves all as it was.
    new = os.path.join(prefix, ".caffe-lsoftmax.new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        shutil.copytree(stage, new, symlinks=True)
        for folder in sorted({os.path.dirname(name) for name in files}):
            os.makedirs(os.path.join(prefix, folder), exist_ok=True)
        # One that is killed from here on is one that knows these files.
        write_record(prefix, ours.union(files, [RECORD]))
        for name in files:
            os.replace(os.path.join(new, name), os.path.join(prefix, name))
    finally:
        shutil.rmtree(new, ignore_errors=True)
    for name in ours.difference(files, [RECORD]):
        remove(prefix, name)
    write_record(prefix, {*files, RECORD})


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", metavar="STAGE")
    parser.add_argument("prefix", metavar="PREFIX")
    args = parser.parse_args()
    try:
        install(args.stage, args.prefix)
    except (OSError, shutil.Error) as error:
        full = "No space left" in str(error) or "quota" in str(error)
        sys.exit("error: cannot write to %s: %s" % (
            args.prefix, "its disk is full" if full else error))


if __name__ == "__main__":
    main()
