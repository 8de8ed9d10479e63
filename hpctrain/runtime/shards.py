"""One checkpoint file at a time: is it whole? Only its first bytes and its last 64 KiB are read, never all of it."""

import io
import json
import os
import pickle
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, List, Optional, Tuple

TAIL_BYTES = 65536
READERS = 8  # enough to hide the latency of a parallel file system, too few to disturb it
_END_OF_DIRECTORY = b"PK\x05\x06"
_LOCATOR_64 = b"PK\x06\x07"
_MAX_PICKLE = 64 * 1024 * 1024


def damaged(folder: str, files: Dict[str, int]) -> List[str]:
    """What is wrong with the files (relative path: size in bytes) of `folder`, in their order; empty when all open."""
    names = sorted(files)
    with ThreadPoolExecutor(max_workers=READERS) as pool:
        found = pool.map(lambda name: damage(os.path.join(folder, name), files[name]), names)
        return ["`{}` {}".format(name, fault) for name, fault in zip(names, found) if fault]


def damage(path: str, size: int) -> Optional[str]:
    """Why a file cannot be whole, or None.

    `torch.save` writes a zip archive since torch 1.6; its directory is written last, so an archive without one was cut
    (APPNOTE.TXT 4.3.16 and 4.3.6). A safetensors file says in its first bytes how long it must be
    (huggingface/safetensors, "Format"). Other formats are judged by their size alone, by the caller.
    """
    if size < 0:
        return "is a link to nothing"
    if size == 0:
        return "is empty"
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        return "cannot be opened: {}".format(error.strerror)
    try:
        head = os.pread(fd, 8, 0)
        if len(head) == 0:
            return "became empty"
        if head[:4] == b"PK\x03\x04":
            return _zip_damage(fd, size)
        if path.endswith(".safetensors"):
            return _safetensors_damage(fd, size, head)
    except OSError as error:
        return "cannot be read: {}".format(error.strerror)
    finally:
        os.close(fd)
    return None


def _zip_damage(fd: int, size: int) -> Optional[str]:
    tail_start = max(0, size - TAIL_BYTES)
    tail = os.pread(fd, TAIL_BYTES, tail_start)
    found = tail.rfind(_END_OF_DIRECTORY)
    if found < 0 or found + 22 > len(tail):
        return "is cut short: the directory that torch writes last is missing"
    (directory_size, directory_start, comment) = struct.unpack_from("<IIH", tail, found + 12)
    if tail_start + found + 22 + comment != size:
        return "is damaged at its end"
    if directory_start != 0xFFFFFFFF and directory_start + directory_size > tail_start + found:
        return "is damaged: its directory does not lie inside the file"
    if directory_start == 0xFFFFFFFF and tail[max(0, found - 20) : found][:4] != _LOCATOR_64:
        return "is damaged: its 64-bit directory is missing"
    return None


def _safetensors_damage(fd: int, size: int, head: bytes) -> Optional[str]:
    if len(head) < 8:
        return "is cut short"
    (header_size,) = struct.unpack("<Q", head)
    if header_size + 8 > size:
        return "is cut short: its header is not all there"
    try:
        header = json.loads(os.pread(fd, header_size, 8).decode("utf-8"))
        ends = [item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return "has a damaged header"
    wanted = 8 + header_size + max(ends + [0])
    return None if size == wanted else "has {} bytes, its header says {}".format(size, wanted)


def top_values(path: str, keys: Tuple[str, ...]) -> Dict[str, Any]:
    """The plain values at the top of a torch file's dictionary, for example its `dp_world_size`; {} when unreadable.

    Reads the archive's directory and its small `data.pkl` (which holds no tensor data), and builds nothing but plain
    values: every class named in the pickle is replaced by an empty one, so no code of the file is run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
            if not names or archive.getinfo(names[0]).file_size > _MAX_PICKLE:
                return {}
            found = _PlainUnpickler(io.BytesIO(archive.read(names[0]))).load()
    except Exception:
        # A pickle can fail in any way; what it would have told us is then inferred from the file names.
        return {}
    return {key: found[key] for key in keys if key in found} if isinstance(found, dict) else {}


class _Nothing:
    """Stands in for every class and function that a pickle names."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Nothing":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _Nothing

    def persistent_load(self, pid: Any) -> Any:
        return None
