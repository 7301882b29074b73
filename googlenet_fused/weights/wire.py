"""The wire format of Protocol Buffers, read from bytes that nobody vouches for.

Source: the encoding as protobuf.dev describes it. Nothing here allocates by a size that the bytes state, descends by itself, or
reads more fields than it was allowed.
"""

from __future__ import annotations

from typing import NamedTuple

VARINT, FIXED64, BYTES, START_GROUP, END_GROUP, FIXED32 = range(6)
"""The wire types."""

MAX_VARINT_BYTES = 10
MAX_FIELD_NUMBER = 2**29 - 1

_SIZES = {FIXED64: 8, FIXED32: 4}


class WireError(ValueError):
    """The bytes are no message; ``at`` is the offset of the byte where that shows."""

    def __init__(self, at: int, reason: str) -> None:
        super().__init__(reason)
        self.at = at


class Field(NamedTuple):
    """One field of a message: its tag is ``content[at:start]`` and its payload ``content[start:end]``.

    ``value`` is a varint's number, unsigned, else 0. Of a field with a length the payload begins after the length, which then
    lies between ``start`` and the tag.
    """

    number: int
    wire: int
    at: int
    start: int
    end: int
    value: int


class Reader:
    """Reads the fields of ``content``, at most ``fields_left`` in all: ``read`` gives one, the caller goes on at its end."""

    def __init__(self, content: bytes, fields_left: int) -> None:
        self.content = content
        self.fields_left = fields_left
        self._allowed = fields_left

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """The number at ``at`` and the offset after it.

        Raises:
            WireError: it passes ``end``, or is longer than 10 bytes or 64 bits.
        """
        value = 0
        for index, byte in enumerate(self.content[at : min(at + MAX_VARINT_BYTES, end)]):
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                if value >= 2**64:
                    break
                return value, at + index + 1
        if at + MAX_VARINT_BYTES > end:
            raise WireError(at, "a number passes the end of its message")
        raise WireError(at, "a number is longer than 64 bits")

    def read(self, at: int, end: int) -> Field:
        """The field at ``at`` of a message that ends at ``end``.

        Raises:
            WireError: it passes ``end``, is a group or has another wire type that no message of today has, has a field number
                that there is not, or is one more than were allowed.
        """
        if not self.fields_left:
            raise WireError(at, f"it has more than {self._allowed} fields")
        self.fields_left -= 1
        tag, start = self.varint(at, end)
        number, wire = tag >> 3, tag & 7
        if not 1 <= number <= MAX_FIELD_NUMBER:
            raise WireError(at, f"there is no field {number}")
        if wire == VARINT:
            value, stop = self.varint(start, end)
            return Field(number, wire, at, start, stop, value)
        if wire == BYTES:
            size, start = self.varint(start, end)
        elif wire in _SIZES:
            size = _SIZES[wire]
        else:
            raise WireError(at, f"field {number} has wire type {wire}, {'a group' if wire < FIXED32 else 'which there is not'}")
        if size > end - start:
            raise WireError(at, f"field {number} has {size} bytes, and its message only {end - start} more")
        return Field(number, wire, at, start, start + size, 0)

    def run_end(self, field: Field, end: int) -> int:
        """Where the run of fields ends that begins with ``field``, of fixed size, and repeats its one-byte tag."""
        stride = field.end - field.at
        if field.start - field.at != 1:
            return field.end
        tag = self.content[field.at : field.start]
        at, ahead = field.end, 64
        while at + stride <= end:
            tags = self.content[at : min(at + ahead * stride, end - stride + 1) : stride]
            same = len(tags) - len(tags.lstrip(tag))
            at += same * stride
            if same < len(tags):
                break
            ahead *= 2
        return at
