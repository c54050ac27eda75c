"""Nets for deployment in OpenCV's dnn, in a process of their own.

OpenCV brings a protobuf that may not bear Python's beside it.
"""
import os
import pickle
import subprocess
import sys

# Characters of an error of OpenCV's.
_LONGEST = 200


def outputs(net, model, inputs, names):
    """What OpenCV makes of a net; None where its Python module is missing or
    it can be asked for none of the blobs.

    net is a NetParameter and model the bytes of a .caffemodel. inputs is a
    list of dicts of arrays. Returns OpenCV's version, and a list of dicts of
    those of the blobs `names` that it can be asked for, or in its place a
    string: why it does not run the net.
    """
    # OpenCV knows outputs by the last layer that makes them.
    makers = {}
    for layer in net.layer:
        for i, top in enumerate(layer.top):
            makers[top] = layer.name if i == 0 else None
    asked = {name: makers[name] for name in names if makers.get(name)}
    if not asked:
        return None
    done = subprocess.run(
        [sys.executable, os.path.abspath(__file__)], stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        input=pickle.dumps((str(net).encode(), model, inputs, asked)))
    try:
        return pickle.loads(done.stdout)
    except (EOFError, pickle.UnpicklingError):
        words = done.stderr.decode(errors="replace").strip().splitlines()
        return "?", "ended with %d: %s" % (done.returncode,
                                           (words or ["no word"])[-1])


# ---- In the process ----

def _run(text, model, inputs, asked):
    try:
        import cv2
    except ImportError:
        return None
    try:
        net = cv2.dnn.readNetFromCaffe(bytearray(text), bytearray(model))
        found = []
        for arrays in inputs:
            for name, array in arrays.items():
                net.setInput(array, name)
            made = net.forward(list(asked.values()))
            found.append({name: array.copy()
                          for name, array in zip(asked, made)})
    except (cv2.error, AttributeError) as error:
        # Not where in OpenCV's source.
        words = " ".join(str(error).split()).split(" error: ", 1)[-1]
        return cv2.__version__, words[:_LONGEST]
    return cv2.__version__, found


def _serve():
    # OpenCV may print.
    answer = os.dup(1)
    os.dup2(2, 1)
    given = pickle.load(sys.stdin.buffer)
    with os.fdopen(answer, "wb") as file:
        pickle.dump(_run(*given), file)


if __name__ == "__main__":
    _serve()
