"""Opening a data file and reading it line by line in bounded memory: plain or gzip, UTF-8 or UTF-16.

The content decides whether a file is packed and how it is encoded, its name which kind of data it is.
"""

import codecs
import gzip
import io
import stat
import zlib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path, PurePath

from graft.errors import DataError
from graft.reading.faults import BadRow, snippet_of

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
"""Endings of data files; `.gz` may stand behind all but `.parquet`."""

MAX_LINE = 20_000_000
"""Bytes of the longest line that is read; a file without line ends would otherwise fill the memory."""

MAX_RATIO = 200
"""The most bytes that a byte of gzip may become: texts stay below 20, a bomb reaches 1,000."""

BOMB_BYTES = 100_000_000
"""Unpacked bytes from which `MAX_RATIO` holds."""

AS_JSONL = "write one JSON object per line (.jsonl)"

_CHUNK = 1 << 16
_GZIP = b"\x1f\x8b"
_PACKED = {
    _GZIP: "gzip",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "Parquet",
    b"BZh": "bzip2",
    b"\xfd7zX": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


def suffix_of(path: Path) -> str:
    """The ending that says what a file is, in small letters and without a last `.gz`."""
    return PurePath(path.name.lower().removesuffix(".gz")).suffix


def check_file(path: Path) -> None:
    """Raise `DataError` unless `path` is a plain file of a known kind; opens nothing."""
    allowed = ", ".join(SUFFIXES)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise DataError(f"{path} is a link to a missing file", "restore the file or the link") from None
        raise DataError(f"{path}: no such data file", _neighbours(path)) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", "check its path and permissions") from None
    if stat.S_ISDIR(mode):
        raise DataError(f"{path} is a folder", f"give one file in it ({allowed})")
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} is a pipe or device", f"give a plain file ({allowed})")
    if suffix_of(path) not in SUFFIXES:
        raise DataError(
            f"{path} ends in {path.suffix or 'nothing'!r}, allowed are {allowed}, packed with gzip or not",
            "convert it or correct its name",
        )


def _neighbours(path: Path) -> str:
    """What could have been meant instead of the missing `path`."""
    try:
        names = [item.name for item in path.parent.iterdir() if suffix_of(item) in SUFFIXES]
    except OSError:
        return f"the folder {path.parent} does not exist either: check the path"
    close = get_close_matches(path.name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {path.parent / close[0]}?"
    listed = ", ".join(sorted(names)[:5]) or "none"
    return f"check the path; data files in {path.parent}: {listed}"


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its end in UTF-8) of a text file; the bytes may still be no UTF-8.

    Raises `DataError` for packed content other than gzip, a line of more than `MAX_LINE` bytes, damaged
    gzip or UTF-16, and gzip that grows beyond `MAX_RATIO`.
    """
    number = 0
    with path.open("rb") as file:
        try:
            stream = _unpacked(file)
            while line := stream.readline(MAX_LINE + 1):
                number += 1
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if len(line) > MAX_LINE:
                    raise _BrokenError(f"a line of more than {MAX_LINE // 10**6} MB, the most allowed", AS_JSONL, 0)
                yield number, line
        except _BrokenError as broken:
            raise DataError(f"{path}:{number + broken.ahead}: {broken}", broken.remedy) from None


def text_of(path: Path, number: int, line: bytes) -> str:
    """A line as text; raises `BadRow` for bytes that are no UTF-8 and for NUL."""
    if b"\0" in line:
        raise BadRow(f"{path}:{number}", "a NUL byte, so this is no text", "save the file as UTF-8 without NUL bytes")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = snippet_of(line[: error.start].decode("utf-8"), error.start) if error.start else ""
        raise BadRow(
            f"{path}:{number}",
            f"byte 0x{line[error.start]:02x} at position {error.start + 1} is not UTF-8",
            "save the file as UTF-8, for example with iconv",
            f"after {shown}" if shown else "",
        ) from None


class _BrokenError(Exception):
    """Content that cannot be read further; `ahead` is how many lines after the last one it is."""

    def __init__(self, reason: str, remedy: str, ahead: int = 1) -> None:
        super().__init__(reason)
        self.remedy = remedy
        self.ahead = ahead


class _Chunks(io.RawIOBase):
    """Pieces of bytes as a file, so that the line reader of the standard library can be used on them."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the beginning of `buffer`; 0 at the end."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _unpacked(file: io.BufferedReader) -> io.BufferedReader:
    """The content of a file as UTF-8, unpacked."""
    stream = file
    if stream.peek(4).startswith(_GZIP):
        stream = io.BufferedReader(_Chunks(_gunzip(stream)), _CHUNK)
    start = stream.peek(4)[:4]
    for magic, kind in _PACKED.items():
        if start.startswith(magic):
            as_parquet = ", or name it .parquet" if kind == "Parquet" else ""
            raise _BrokenError(f"the file is {kind}", f"unpack or convert it{as_parquet}: {AS_JSONL}")
    for mark, codec in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if start.startswith(mark):
            stream.read(len(mark))
            return io.BufferedReader(_Chunks(_from_utf16(stream, codec)), _CHUNK)
    return stream


def _gunzip(file: io.BufferedReader) -> Iterator[bytes]:
    size = 0
    try:
        with gzip.GzipFile(fileobj=file) as packed:
            while chunk := packed.read1(_CHUNK):
                size += len(chunk)
                if size > BOMB_BYTES and size > MAX_RATIO * file.tell():
                    reason = f"gzip that unpacks to more than {MAX_RATIO} times its size ({size // 10**6} MB so far)"
                    raise _BrokenError(reason, "unpack the file yourself if you trust it")
                yield chunk
    except EOFError:
        raise _BrokenError("the gzip content is cut off", "fetch or pack the file again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        reason = str(error).partition(":")[0] or "unknown"
        raise _BrokenError(f"damaged gzip ({reason})", "fetch or pack the file again") from None


def _from_utf16(file: io.BufferedReader, codec: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(codec)()
    chunk = b"start"
    while chunk:
        chunk = file.read(_CHUNK)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            yield error.object[: error.start].decode(codec).encode()  # so that the line number is right
            raise _BrokenError(f"damaged UTF-16 ({error.reason})", "save the file as UTF-8") from None
        yield text.encode()
