"""The messages that the layers and the scripts end with, read from sources.

A message is its words with "..." for what a run puts in.
"""
import ast
import os
import re

from conftest import ROOT

HOLE = "..."


def sources(*folders, ends):
    """The project's files in folders with one of the endings, sorted."""
    found = []
    for folder in folders:
        for where, names, files in os.walk(os.path.join(ROOT, folder)):
            names[:] = [name for name in names if name != "__pycache__"]
            found += [os.path.join(where, name) for name in files
                      if name.endswith(ends)]
    return sorted(found)


def tidy(text):
    """A message on one line, with one hole where several meet."""
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(?:\.\.\.\s*){2,}", HOLE + " ", text).strip()


# ---- C++ and Rust ----

_LITERAL = re.compile(r'"((?:[^"\\]|\\.|\\\n)*)"', re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", '"': '"', "\\": "\\"}


def _unescape(text):
    text = re.sub(r"\\\n\s*", "", text)
    return re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), text)


def _call(text, start):
    """The text between the parenthesis at start and the one that closes it."""
    depth, at = 0, start
    while True:
        literal = _LITERAL.match(text, at)
        if literal:
            at = literal.end()
            continue
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
        if not depth:
            return text[start + 1:at - 1]


def _without_comments(text):
    return re.sub(r"(?m)(^|\s)//.*$", r"\1", text)


def of_rust(text):
    """What Error::new says, up to the tests of the file."""
    text = _without_comments(text.split("#[cfg(test)]")[0])
    for match in re.finditer(r"\bError::new\(", text):
        for literal in _LITERAL.findall(_call(text, match.end() - 1)):
            words = re.sub(r"\{[^{}]*\}", HOLE, _unescape(literal))
            # A word alone is a value, which another message takes in.
            if " " in words:
                yield tidy(words)


def _joined(statement):
    """The literals of a C++ expression, with holes for what is between."""
    words, end = "", None
    for literal in _LITERAL.finditer(statement):
        if end is not None and statement[end:literal.start()].strip():
            words += HOLE
        words += _unescape(literal[1])
        end = literal.end()
    return words


def of_cpp(text):
    """What Fail, LOG(FATAL) and CHECK say."""
    text = _without_comments(text)
    for match in re.finditer(
            r"(?:\bFail\(|\bLOG\(FATAL\)|\bD?CHECK\w*\(|\bmessage <<)[^;]*;",
            text):
        words = _joined(match[0])
        if " " in words:
            yield tidy(words)


# ---- Python ----

_ENDS = {"UserError", "SystemExit", "exit", "error"}


def _python_words(node):
    """The possible texts of an expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return ["".join(part.value if isinstance(part, ast.Constant) else HOLE
                        for part in node.values)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
        return [re.sub(r"%[-+#0-9.]*[a-zA-Z]", HOLE, text).replace("%%", "%")
                for text in _python_words(node.left)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [left + right for left in _python_words(node.left)
                for right in _python_words(node.right)]
    if isinstance(node, ast.IfExp):
        return _python_words(node.body) + _python_words(node.orelse)
    if (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            and node.func.attr == "format"):
        return [re.sub(r"\{[^{}]*\}", HOLE, text)
                for text in _python_words(node.func.value)]
    return [HOLE]


def of_python(text):
    """What UserError, parser.error and sys.exit say."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        if name in _ENDS:
            for words in _python_words(node.args[0]):
                if " " in words.replace(HOLE, ""):
                    yield tidy(words)


# ---- Shell ----

def _shell_word(text, at):
    """The word at a place in a script, and where it ends."""
    words = ""
    quoted = False
    while at < len(text):
        one = text[at]
        if one == '"':
            quoted = not quoted
        elif one == "\\":
            at += 1
            if text[at] != "\n":
                words += text[at]
        elif one == "$" and text[at + 1] in "({":
            opened, closed = text[at + 1], {"(": ")", "{": "}"}[text[at + 1]]
            depth = 0
            while True:
                at += 1
                depth += {opened: 1, closed: -1}.get(text[at], 0)
                if not depth:
                    break
            words += HOLE
        elif one == "$":
            at += re.match(r"\$(\w+|[*@#?!])?", text[at:]).end() - 1
            words += HOLE
        elif not quoted and one in " \t\n;)}&|":
            break
        else:
            words += one
        at += 1
    return words, at


def of_shell(text):
    """What die and the functions that end in it say, all of its lines."""
    text = re.sub(r"(?m)^\s*#.*$", "", text)
    for match in re.finditer(
            r"\b(?:die|bad_usage|failed|half_patched)[ \t]+(?=[\"$\w])", text):
        lines, at = [], match.end()
        while True:
            words, at = _shell_word(text, at)
            lines.append(words)
            more = re.match(r"(?:[ \t]|\\\n)+(?=[\"$\w])", text[at:])
            if not more:
                break
            at += more.end()
        # What begins with a value alone hands a function's argument on.
        if " " in lines[0].replace(HOLE, "").strip():
            yield tidy(" ".join(lines))


def every():
    """(file, message) of all of them, each once."""
    found = {}
    for paths, read in (
            (sources("src", ends=".rs"), of_rust),
            (sources("src", "include", ends=(".cpp", ".hpp")), of_cpp),
            (sources("myexamples", "cmake", ends=".py"), of_python),
            (sources("myexamples", "cmake", "caffe_patch",
                     ends=".sh"), of_shell)):
        for path in paths:
            with open(path) as file:
                for message in read(file.read()):
                    found.setdefault(message, os.path.relpath(path, ROOT))
    return sorted((path, message) for message, path in found.items())
