"""README, "When things go wrong": each message has its row, or is generic."""
import os
import re

import pytest

from conftest import ROOT
import messages

# What needs no row, and why.
GENERIC = [
    (r"(?i)\brun this (again|as root)\b|: run \S|\binstall \S|\bmove it\b"
     r"|write to another file|remove that folder|add --bn|write one that does"
     r"|go on with --|go on from there|upgrade it with|convert it with"
     r"|; wait for it|\bset \S+ to\b|CAFFE_ROOT to|or name another folder"
     r"|is not installed$",
     "says itself what to do"),
    (r"^(\.\.\.: )?(error: )?cannot (write|read|unpack|make|start)\b"
     r"|cannot be read|is the disk full|is there already; --force"
     r"|^no such (image|file)|no such directory|is a folder$|is empty$"
     r"|(, which|file \.\.\.) is not there$|is missing$|cannot run protoc",
     "names the file, and the system's reason where there is one"),
    (r"^(-m|--[a-z.-]+|margins|seeds|unknown|more than one|one DEST|OUT is"
     r"|no command|which library|CAFFE_ROOT is|[A-Z_]+(=|: '\.\.\.' is no ))|^[^:]*--[a-z-]+ .* exclude each other"
     r"|needs a (field )?number|--revert takes no|is no range like"
     r"|: give --|[:;] (give|name|say) |\bis to be a |give it such a name"
     r"|Give it with",
     "names the option or the argument, and what it takes"),
    (r"^(error|protoc|pycaffe|layer '\.\.\.'|\.\.\.):( \.\.\.)?$",
     "hands another program's or another function's words on"),
    (r"^\.\.\.: \.\.\. is \.\.\.$", "names the solver's field and its value"),
    (r"^Caffe takes no name with a newline", "says all that there is to say"),
]

# Words of Caffe, protobuf and others, and warnings and news of ours, which
# the tables have as well.
NOT_ERRORS = {
    "loss = 87.3365", "loss = nan",
    "has a margin: Accuracy by its first top ...",
    "never gets the weights that are trained",
    "all values of channel 3 of a batch are the same",
    "Unknown layer type: LargeMarginInnerProduct",
    'Message type "caffe.LayerParameter" has no field named '
    '"largemargin_inner_product_param"',
    "Couldn't build proto file into descriptor pool",
    "... is already defined in file ...",
    "Error parsing text-format caffe.NetParameter: 12:30: Expected "
    "identifier, got: /",
    "Too many params specified for layer ip2",
    "Incompatible number of blobs for layer ip2",
}


def plain(text):
    """Words with "..." for all names and values."""
    text = re.sub(r"(['\"])[\w.]+\1", r"\1...\1", text)
    text = re.sub(r"-?\b\d[\d.]*\b", messages.HOLE, text)
    text = re.sub(r"\[(\.\.\.(, )?)+\]", messages.HOLE, text)
    return messages.tidy(text)


def pattern(span):
    """What a code span of the tables says, whatever its names and values."""
    parts = [re.escape(part.strip())
             for part in plain(span).split(messages.HOLE)]
    if sum(map(len, parts)) < 8:
        return None
    return re.compile(r"\s*\.\.\.\s*".join(parts))


def rows():
    """The code spans in the first column of the section's tables."""
    with open(os.path.join(ROOT, "README.md")) as file:
        section = file.read().split("\n## When things go wrong\n")[1]
    for line in section.split("\n## ")[0].splitlines():
        if line.startswith("|"):
            yield from re.findall(r"`([^`]+)`", line.split(" | ")[0])


EVERY = messages.every()
SPANS = [(span, pattern(span)) for span in rows()]


def has_row(message):
    """Whether a row of the tables has that message."""
    return any(found and found.search(plain(message)) for _, found in SPANS)


def is_generic(message):
    """Whether a message needs no row."""
    return any(re.search(found, message) for found, _ in GENERIC)


def test_every_message_has_its_row():
    missing = ["%s: %s" % (path, message) for path, message in EVERY
               if not has_row(message) and not is_generic(message)]
    assert not missing, (
        "messages without a row:\n  %s\n\nIn README.md, \"When things go "
        "wrong\", put each in backticks into the first column of a row, a "
        "fitting one or a new one: some of its words in a piece are enough, "
        "with values as a user sees them or ... in their place. One that "
        "tells by itself what to do needs none, if GENERIC in %s has it."
        % ("\n  ".join(missing), os.path.relpath(__file__, ROOT)))


def test_every_row_is_of_a_message():
    """So that the tables go with the messages."""
    said = [plain(message) for _, message in EVERY]
    stale = [span for span, found in SPANS
             if found and span not in NOT_ERRORS
             and not any(found.search(message) for message in said)]
    assert not stale, (
        "rows of README.md, \"When things go wrong\", whose words nothing "
        "says any more:\n  %s" % "\n  ".join(stale))
    assert NOT_ERRORS <= {span for span, _ in SPANS}


@pytest.mark.parametrize("found", [found for found, _ in GENERIC])
def test_every_generic_pattern_is_needed(found):
    others = [re.compile(other) for other, _ in GENERIC if other != found]
    assert any(re.search(found, message) and not has_row(message)
               and not any(other.search(message) for other in others)
               for _, message in EVERY)


@pytest.mark.parametrize("read, text, said", [
    (messages.of_rust,
     'Err(Error::new(format!(\n "num_output: {n} is \\\n  outside {:?}", x)))',
     ["num_output: ... is outside ..."]),
    (messages.of_rust, '// Error::new("not me, a comment")\nlet a = 1;', []),
    (messages.of_cpp, 'Fail(*this, "the top " + format_int(i) + " is "\n'
     '    "one of them");', ["the top ... is one of them"]),
    (messages.of_cpp, 'CHECK_GE(id, 0) << "Error saving " << what;',
     ["Error saving"]),
    (messages.of_python, 'raise UserError("%s has %d of 5 %%" % (a, 3))',
     ["... has ... of 5 %"]),
    (messages.of_python, 'parser.error(f"--size {size} is small")',
     ["--size ... is small"]),
    (messages.of_shell, '[ -e "$1" ] ||\n  die "$(rel "$1") is not in\\\n'
     ' ${2:-"a b"}: oh" "more"', ["... is not in ...: oh more"]),
    (messages.of_shell, '# die "in a comment"\n', []),
])
def test_messages_are_read(read, text, said):
    assert list(read(text)) == said


def test_messages_are_found_everywhere():
    files = {path for path, _ in EVERY}
    assert {"src/large_margin/mod.rs", "src/param.rs", "cmake/shell.sh",
            "src/caffe/layers/large_margin_inner_product_layer.cpp",
            "caffe_patch/apply.sh", "myexamples/common.sh",
            "myexamples/caffe_proto.py"} <= files
    assert len(EVERY) > 200
