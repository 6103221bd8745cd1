"""A file's bytes, unpacked on the way where it is gzip or Zstandard, in constant memory."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, TYPE_CHECKING

from luthier.data.rawrow import Broken
from luthier.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["BOM", "GZIP", "ZSTD", "open_bytes"]

BOM = b"\xef\xbb\xbf"
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BLOCK = 2**18
_ZSTD_FEED = 4096
"""What the decompressor is given at once. Four bytes can stand for 128 KiB, so this also bounds what comes out."""
_DAMAGED = ("the compressed file is {} here: nothing after this can be read", "pack or download it again")


@contextmanager
def open_bytes(path: str) -> Iterator[io.BufferedReader]:
    """The file's content, unpacked. Reading from it raises `Broken` where packed data is cut off or damaged.

    Raises:
        OSError: it cannot be opened.
        DataError: it is Zstandard and the library for that is not installed.
    """
    with ExitStack() as stack:
        # Unbuffered below, so that one buffer is filled and not two.
        file = stack.enter_context(open(path, "rb", buffering=0))
        magic = file.read(4)
        file.seek(0)
        if magic.startswith(GZIP):
            raw: io.RawIOBase = _Gzip(stack.enter_context(io.BufferedReader(file, _BLOCK)))
        elif magic == ZSTD:
            raw = _Zstd(path, file)
        else:
            raw = file
        yield stack.enter_context(io.BufferedReader(raw, _BLOCK))


class _Unpacker(io.RawIOBase):
    """A stream that a `BufferedReader` can read from: it asks `unpack` for at most so many bytes, none at the end."""

    def readable(self) -> bool:
        return True

    def unpack(self, most: int) -> bytes:
        raise NotImplementedError

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        found = self.unpack(len(view))
        view[: len(found)] = found
        return len(found)


class _Gzip(_Unpacker):
    def __init__(self, file: IO[bytes]) -> None:
        self._file = gzip.GzipFile(fileobj=file, mode="rb")

    def unpack(self, most: int) -> bytes:
        try:
            return self._file.read1(most)
        except EOFError as error:
            raise Broken(_DAMAGED[0].format("cut off"), _DAMAGED[1]) from error
        except (zlib.error, gzip.BadGzipFile) as error:
            raise Broken(_DAMAGED[0].format(f"damaged ({error})"), _DAMAGED[1]) from error


class _Zstd(_Unpacker):
    def __init__(self, path: str, file: io.RawIOBase) -> None:
        try:
            import zstandard
        except ImportError as error:
            message = f"{path} is packed with Zstandard, which needs the library zstandard"
            raise DataError(message, 'pip install "luthier[data]", or unpack it first: zstd -d') from error
        self._file, self._library = file, zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ready, self._begun = b"", False

    def unpack(self, most: int) -> bytes:
        while not self._ready:
            if self._frame.eof:  # several frames may follow each other
                fed = self._frame.unused_data
                self._frame = self._library.ZstdDecompressor().decompressobj()
                self._begun = False
            else:
                fed = b""
            fed = fed or self._file.read(_ZSTD_FEED) or b""
            if not fed:
                if self._begun:
                    raise Broken(_DAMAGED[0].format("cut off"), _DAMAGED[1])
                return b""
            self._begun = True
            try:
                self._ready = self._frame.decompress(fed)
            except self._library.ZstdError as error:
                raise Broken(_DAMAGED[0].format(f"damaged ({error})"), _DAMAGED[1]) from error
            self._begun = not self._frame.eof
        found, self._ready = self._ready[:most], self._ready[most:]
        return found
