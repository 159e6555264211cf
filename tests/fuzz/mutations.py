"""Hypothesis strategies for JSON documents and bytes that are almost valid for a reader."""

import copy
import json

from hypothesis import strategies as st

NUMBERS = (
    0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 1024, 65_535, 2**31 - 1, 2**31, 2**32, 10**9, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**30, 0.0, -0.0, 0.5, 1e-300, 1e300, 1e-5, float("nan"), float("inf"),
)  # fmt: skip
TEXTS = (
    "", " ", "a", "\x00", "\n", "é", "\ud800", "🙂", "..", "../model.safetensors", "/etc/passwd", "a/b", "a\\b", "default", "F32", "F64", "BF16",
    "I8", "F4", "null", "true", "1", "a" * 300, "b" * 20_000, "%s", "{{ x }}", "(a+)+$", "[", "\\p{L}+", "▁", "__class__", "auto", "gelu", "silu",
    "full_attention", "llama3", "dynamic",
)  # fmt: skip
OTHERS = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": None},
    [0] * 300,
    [[[[[[[[[[1]]]]]]]]]],
    {"a": {"a": {"a": {}}}},
)
VALUES = (*NUMBERS, *TEXTS, *OTHERS)
# Bytes that no JSON writer writes or that may disturb a reader. They are inserted anywhere.
TOKENS = (
    b"", b"\x00", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 2000, b'{"a":' * 2000, b'"', b"\\", b"\\ud800",
    b",", b"}", b"]", b"{", b"//", b"\r", b"\n", b'"a":1,"a":2,', b"\xe2\x80\xa8",
)  # fmt: skip


def below(draw, count):
    return draw(st.integers(0, count - 1))


def pick(draw, choices):
    return choices[below(draw, len(choices))]


@st.composite
def documents(draw, base, keys=(), values=()):
    """Draws a JSON document as bytes: the base with changed values and keys, one time in five with changed bytes."""
    document = copy.deepcopy(base)
    for _ in range(below(draw, 4)):
        document = _changed(draw, document, keys, (*values, *values, *VALUES))
    text = json.dumps(document, ensure_ascii=bool(below(draw, 2))).encode("utf-8", "surrogatepass")
    return text if below(draw, 5) else changed_bytes(draw, text)


def changed_bytes(draw, content, times=2):
    """Draws truncated, flipped, repeated or inserted bytes."""
    for _ in range(1 + below(draw, times)):
        at, what = below(draw, len(content) + 1), below(draw, 6)
        to = min(len(content), at + below(draw, 40))
        if what == 0:
            content = content[:at]
        elif what == 1 and at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << below(draw, 8))]) + content[at + 1 :]
        elif what == 2:
            content = content[:at] + content[to:]
        elif what == 3:
            content = content[:to] + content[at:to] * below(draw, 4) + content[to:]
        elif what == 4:
            content = content[:at] + draw(st.binary(max_size=8)) + content[to:]
        else:
            content = content[:at] + pick(draw, TOKENS) + content[at:]
    return content


def _nodes(document):
    """Returns every (container, key) of a document."""
    left, found = [document], []
    while left:
        node = left.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            found.append((node, key))
            left.append(value)
    return found


def _changed(draw, document, keys, values):
    nodes = _nodes(document)
    if not nodes or below(draw, 100) == 0:
        return copy.deepcopy(pick(draw, values))
    node, key = pick(draw, nodes)
    what = below(draw, 8)
    if what < 3:
        node[key] = copy.deepcopy(pick(draw, values))
    elif what == 3:
        del node[key]
    elif what == 4:
        other, place = pick(draw, nodes)
        if isinstance(other, list) or place in other:
            node[key] = copy.deepcopy(other[place]) if not isinstance(other, list) or place < len(other) else None
    elif what == 5:
        value = node[key]
        if isinstance(value, int | float) and not isinstance(value, bool):
            node[key] = pick(draw, (value + 1, value - 1, -value, value * 2, value * 10**6, float(value), value == 1))
        else:
            node[key] = [value] * (1 + below(draw, 3))
    elif isinstance(node, dict):
        name = pick(draw, keys or tuple(node)) if below(draw, 3) else pick(draw, TEXTS)
        node[name] = copy.deepcopy(pick(draw, values)) if what == 6 else node.pop(key)
    else:
        node.insert(key, copy.deepcopy(pick(draw, values)))
    return document
