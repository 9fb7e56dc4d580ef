"""Structure of MATLAB files, versions 4 to 7.2, checked before SciPy reads them.

SciPy indexes tables by the type numbers in the file without a check of their range, and allocates what the headers
claim: a flipped bit can end the process. The format is described in MathWorks' "MAT-File Format".
"""

import math
import struct
import zlib
from collections.abc import Iterable, Iterator

MAX_BYTES = 1 << 30  # of the file, and of its uncompressed content
_MAX_DEPTH = 32  # of nested structures

# Types of data elements (MathWorks' table 1-1): number -> bytes per value.
_ITEMSIZE = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 9: 8, 12: 8, 13: 8, 16: 1, 17: 2, 18: 4}
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR, _FIRST_NUMERIC, _LAST_NUMERIC = 1, 2, 4, 6, 15
_COMPLEX, _LOGICAL = 0x800, 0x200
_DOUBLE, _SMALL_BYTE = 9, 0x10002  # tags of a double, and of one byte within the tag
_DOUBLE_CLASS, _BYTE_CLASS = 6, 9
_HEADER_BYTES = 1 << 16  # more than the header of a variable has


class _Damaged(ValueError):
    """The structure is damaged; becomes a DataError that names the file."""


def check_mat(data: bytes, wanted: Iterable[str]) -> list[str]:
    """Checks the structure of a MATLAB file: the headers of all variables, and the content of some.

    Args:
        data: content of the file.
        wanted: names of the variables that are to be read.

    Returns:
        Names of all variables.

    Raises:
        ValueError: a damaged file, one with more than :data:`MAX_BYTES`, or a wanted variable that is or contains
            anything but numbers, text, cells and structures.
        NotImplementedError: version 7.3, which is HDF5.
    """
    if len(data) < 20:
        raise _Damaged("too short")
    if 0 in data[:4]:
        return list(_check_version_4(data, wanted))
    if len(data) < 128 or data[126:128] not in (b"IM", b"MI"):
        raise _Damaged("no header")
    order = "<" if data[126:128] == b"IM" else ">"
    major = data[125 if order == "<" else 124]
    if major == 2:
        raise NotImplementedError
    if major != 1:
        raise _Damaged(f"format version {major}")
    names: list[str] = []
    position, budget = 128, MAX_BYTES
    while position < len(data):
        kind, begin, end, following = _Elements(data, order).element(position, len(data))
        if kind == _COMPRESSED:
            # Not padded; SciPy reads no more than the header of a variable that is not wanted.
            following = end
            plain = _decompress(data[begin:end], min(budget, _HEADER_BYTES))
            matrix = _Elements(plain, order)
            name = matrix.header(*matrix.span(0))[0]
            if name in wanted:
                plain = _decompress(data[begin:end], budget, whole=True)
                budget -= len(plain)
                matrix = _Elements(plain, order)
                matrix.check(*matrix.element(0, len(plain))[1:3])
        elif kind == _MATRIX:
            matrix = _Elements(data, order)
            name = matrix.header(begin, end)[0]
            if name in wanted:
                matrix.check(begin, end)
        else:
            raise _Damaged(f"type {kind} of a variable")
        names.append(name)
        position = following
    return names


def _decompress(content, limit, whole=False):
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(content, limit)
    except zlib.error as error:
        raise _Damaged(str(error)) from None
    if whole and not stream.eof:
        raise _Damaged("a truncated or too large compressed variable")
    return plain


def _check_version_4(data, wanted) -> Iterator[str]:
    position = 0
    while position < len(data):
        if len(data) - position < 20:
            raise _Damaged("no header")
        header = struct.unpack_from("<5i", data, position)
        if not 0 <= header[0] <= 5000:
            header = struct.unpack_from(">5i", data, position)
        code, rows, columns, is_complex, name_size = header
        order, reserved, kind, layout = code // 1000, code // 100 % 10, code // 10 % 10, code % 10
        if not (0 <= code < 2000 and order in (0, 1) and reserved == 0 and kind <= 5 and layout <= 2):
            raise _Damaged("no header")
        if is_complex not in (0, 1) or rows < 0 or columns < 0 or not 0 < name_size <= 256:
            raise _Damaged("a header with invalid sizes")
        size = rows * columns * (8, 4, 4, 2, 2, 1)[kind] * (1 + is_complex)
        name_at = position + 20
        position = name_at + name_size + size
        if position > len(data):
            raise _Damaged(f"a variable of {size} bytes at byte {name_at}, the file has {len(data)}")
        name = data[name_at : name_at + name_size].rstrip(b"\0").decode("latin-1")
        if layout == 2 and name in wanted:
            raise _Damaged("expected numbers or text, got a sparse matrix")
        yield name


class _Elements:
    """Data elements in a buffer."""

    def __init__(self, data: bytes, order: str):
        self.data, self.order = data, order
        self._tag, self._scalar = struct.Struct(order + "II"), struct.Struct(order + "12I")

    def element(self, position: int, end: int) -> tuple[int, int, int, int]:
        """``(type, begin, end, next position)`` of the element at ``position``; small ones stand in the tag itself."""
        if end - position < 8:
            raise _Damaged("an element beyond the end of its variable")
        kind, size = self._tag.unpack_from(self.data, position)
        if kind >> 16:
            size, kind = kind >> 16, kind & 0xFFFF
            if size > 4:
                raise _Damaged(f"{size} bytes in a tag")
            return kind, position + 4, position + 4 + size, position + 8
        stop = position + 8 + size
        if stop > end:
            raise _Damaged(f"an element of {size} bytes with {end - position - 8}")
        return kind, position + 8, stop, min(stop + -size % 8, end)

    def span(self, position: int) -> tuple[int, int]:
        """Begin and end of the matrix at ``position``, of which the buffer may contain the beginning only."""
        if len(self.data) - position < 8 or self._tag.unpack_from(self.data, position)[0] != _MATRIX:
            raise _Damaged("a variable of another type")
        size = self._tag.unpack_from(self.data, position)[1]
        return position + 8, min(len(self.data), position + 8 + size)

    def header(self, begin: int, end: int) -> tuple[str, int, bool, int, int]:
        """``(name, class, is complex, number of values, position of the content)`` of a matrix."""
        flags, position = self._integers(begin, end, (6,), 2)
        dims, position = self._integers(position, end, (5, 6))
        if not 2 <= len(dims) <= 32 or min(dims) < 0:
            raise _Damaged(f"dimensions {dims[:8]}")
        kind, first, stop, position = self.element(position, end)
        if kind not in (1, 2, 16):
            raise _Damaged(f"type {kind} of a name")
        name = bytes(self.data[first:stop]).decode("latin-1")
        return name, flags[0] & 0xFF, bool(flags[0] & _COMPLEX), math.prod(dims), position

    def check(self, begin: int, end: int, depth: int = 0) -> None:
        """Checks a matrix and all that it contains."""
        if depth > _MAX_DEPTH:
            raise _Damaged(f"structures nested deeper than {_MAX_DEPTH}")
        if begin == end:  # an empty field
            return
        _, matrix_class, is_complex, count, position = self.header(begin, end)
        if _FIRST_NUMERIC <= matrix_class <= _LAST_NUMERIC:
            for _ in range(1 + is_complex):
                position = self._values(position, end, count)
        elif matrix_class == _CHAR:
            position = self._values(position, end, count, text=True)
        elif matrix_class == _CELL:
            position = self._matrices(position, end, count, depth)
        elif matrix_class == _STRUCT:
            (length,), position = self._integers(position, end, (5, 6), 1)
            kind, first, stop, position = self.element(position, end)
            if kind not in (1, 2) or length < 1 or (stop - first) % length:
                raise _Damaged(f"field names of {length} in {stop - first} bytes")
            number = (stop - first) // length
            if not number and count > 1:
                raise _Damaged(f"{count} structures without fields")
            position = self._matrices(position, end, count * number, depth)
        else:
            raise _Damaged("expected numbers, text, cells and structures, got a sparse matrix, an object or a function")
        if end - position >= 8:
            raise _Damaged(f"{end - position} bytes after a variable")

    def _matrices(self, position, end, count, depth):
        if count > (end - position) // 8:
            raise _Damaged(f"{count} elements in {end - position} bytes")
        data, scalar = self.data, self._scalar
        for _ in range(count):
            kind, first, stop, position = self.element(position, end)
            if kind != _MATRIX:
                raise _Damaged(f"type {kind} of an element")
            # Data sets hold millions of scalars without a name: one comparison instead of five elements.
            if stop - first >= 48:
                six, eight, flags, _, five, also, rows, columns, one, name, kind, size = scalar.unpack_from(data, first)
                plain = (six, eight, five, also, rows, columns, one, name) == (6, 8, 5, 8, 1, 1, 1, 0)
                if plain and kind in (_DOUBLE, _SMALL_BYTE) and flags & ~_LOGICAL in (_DOUBLE_CLASS, _BYTE_CLASS):
                    inline = kind == _SMALL_BYTE
                    if (inline or size == 8) and stop - first == (48 if inline else 56):
                        continue
            self.check(first, stop, depth + 1)
        return position

    def _values(self, position, end, count, text=False):
        kind, first, stop, position = self.element(position, end)
        if kind not in _ITEMSIZE or (kind in (16, 17, 18) and not text):
            raise _Damaged(f"type {kind} of values")
        size = stop - first
        # UTF-8 and UTF-16 have a variable number of bytes per character; text without bytes is blank.
        flexible = text and (not size or (kind >= 16 and size <= 4 * count))
        if size != count * _ITEMSIZE[kind] and not flexible:
            raise _Damaged(f"{size} bytes for {count} values of type {kind}")
        return position

    def _integers(self, position, end, kinds, number=None):
        kind, first, stop, position = self.element(position, end)
        size = stop - first
        if kind not in kinds or size % 4 or (number is not None and size != 4 * number):
            raise _Damaged(f"type {kind} of {size} bytes for sizes")
        return struct.unpack_from(f"{self.order}{size // 4}{'I' if kind == 6 else 'i'}", self.data, first), position
