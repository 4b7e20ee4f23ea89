"""Faults at exactly known calls to the file system.

Inside `with Shim(root, at, act)` every call that changes something below `root` is counted: opening for writing, each write that reaches
the system, fsync, mkdir, rename and replace, unlink, rmdir, truncate, and the writers in other languages that Python does not see into
(safetensors, `torch.save`, tokenizers), which count as an opening and as a write that can be torn. At call number `at` one of these happens:

- `full`: from there on no call that needs room succeeds (ENOSPC); a write puts half of its bytes there first. Deleting works.
- `error`: this call alone fails (EIO); half of a write is there.
- `exit`: the process ends before the call; half of a write is there.
- `power`: as `exit`, and what had not been flushed to the disk is lost: files are empty, renames undone.
"""
import builtins
import errno
import io
import os
import threading
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from transformers import PreTrainedTokenizerFast

ACTS = ("full", "error", "exit", "power")
ENDED = 77  # exit status of a process that a shim ended
NEEDS_ROOM = {"open", "write", "mkdir", "fsync", "rename"}


class _File(io.FileIO):
    "A file whose writes are counted."

    shim = None

    def write(self, data):
        half = lambda: io.FileIO.write(self, memoryview(data).cast("B")[: len(memoryview(data).cast("B")) // 2])
        self.shim.call("write", self.name, half)
        self.shim.unflushed.add(self.shim.path(self.name))
        return super().write(data)


class Shim:
    "See above. `at=0` only counts; `calls` then lists (call, path)."

    def __init__(self, root, at: int = 0, act: str | None = None):
        self.root, self.at, self.act = os.path.realpath(root), at, act
        self.calls, self.unflushed, self.renames, self.lock, self.is_full = [], set(), [], threading.RLock(), False

    def path(self, name, dir_fd=None) -> str:
        "The whole path of a name or of a file descriptor."
        if isinstance(name, int):
            return os.readlink(f"/proc/self/fd/{name}")
        base = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
        return os.path.normpath(os.path.join(base, os.fsdecode(name)))

    def is_inside(self, path: str) -> bool:
        return path == self.root or path.startswith(self.root + os.sep)

    def call(self, kind: str, name, half=None, dir_fd=None):
        "Count a call; let the fault happen if it is its turn."
        path = self.path(name, dir_fd)
        if not self.is_inside(path):
            return
        with self.lock:
            self.calls.append((kind, os.path.relpath(path, self.root)))
            if self.is_full and kind in NEEDS_ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            if self.act is None or len(self.calls) != self.at:
                return
            self.happen(kind, path, half)

    def happen(self, kind, path, half):
        if self.act == "full":
            self.is_full = True
            if kind not in NEEDS_ROOM:
                return
        if half is not None:
            half()
        if self.act in ("full", "error"):
            code = errno.ENOSPC if self.act == "full" else errno.EIO
            raise OSError(code, os.strerror(code), path)
        if self.act == "power":
            self.lose(path if half is not None else None)
        os._exit(ENDED)

    def lose(self, torn):
        "What a power cut takes: the contents that were not flushed, the newest first the renames whose folder was not."
        for path in self.unflushed | ({torn} if torn else set()):
            if os.path.isfile(path):
                real["truncate"](path, 0)
        for source, target in reversed(self.renames):
            if os.path.lexists(target) and not os.path.lexists(source) and os.path.isdir(os.path.dirname(source)):
                real["rename"](target, source)

    def flushed(self, path: str):
        self.unflushed.discard(path)
        self.renames = [pair for pair in self.renames if os.path.dirname(pair[1]) != path]

    def renamed(self, source: str, target: str):
        moved = {path for path in self.unflushed if path == source or path.startswith(source + os.sep)}
        self.unflushed = (self.unflushed - moved) | {target + path[len(source):] for path in moved}
        self.renames.append((source, target))

    def __enter__(self):
        self.saved = []
        for module, name, make in PATCHES:
            original = getattr(module, name)
            self.saved.append((module, name, original))
            setattr(module, name, make(self, original))
        return self

    def __exit__(self, *_):
        for module, name, original in reversed(self.saved):
            setattr(module, name, original)


real = dict(rename=os.rename, truncate=os.truncate)


def _open(shim, original):
    file_class = type("ShimFile", (_File,), {"shim": shim})

    def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        changes = set(mode) & set("wax+")
        if not changes or opener is not None or isinstance(file, int) or not shim.is_inside(shim.path(file)):
            return original(file, mode, buffering, encoding, errors, newline, closefd, opener)
        shim.call("open", file)
        raw = file_class(file, mode.replace("b", "").replace("t", ""))
        shim.unflushed.add(shim.path(file)) if set(mode) & set("wx") else None
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    return opened


def _plain(kind, dir_fd="dir_fd"):
    def make(shim, original):
        def called(path, *args, **options):
            shim.call(kind, path, dir_fd=options.get(dir_fd))
            return original(path, *args, **options)
        return called
    return make


def _os_open(shim, original):
    def called(path, flags, *args, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            shim.call("open", path, dir_fd=options.get("dir_fd"))
        return original(path, flags, *args, **options)
    return called


def _os_write(shim, original):
    def called(descriptor, data):
        if os.path.isabs(shim.path(descriptor)) and shim.is_inside(shim.path(descriptor)):
            shim.call("write", descriptor, lambda: original(descriptor, bytes(data)[: len(data) // 2]))
            shim.unflushed.add(shim.path(descriptor))
        return original(descriptor, data)
    return called


def _fsync(shim, original):
    def called(descriptor):
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        path = shim.path(number)
        shim.call("fsync", number)
        original(number)
        shim.flushed(path)
    return called


def _rename(shim, original):
    def called(source, target, **options):
        shim.call("rename", source)
        original(source, target, **options)
        if shim.is_inside(shim.path(source)):
            shim.renamed(shim.path(source), shim.path(target))
    return called


def _foreign(place, convert=None):
    "A writer of another language: its file is opened, written (half of it, if that is the fault), and not flushed."
    def make(shim, original):
        def called(*args, **options):
            target = place(*args, **options)
            if target is None or not shim.is_inside(shim.path(target)):
                return original(*args, **options)
            target, half = os.fspath(target), lambda: (original(*args, **options), real["truncate"](target, os.path.getsize(target) // 2))
            try:
                shim.call("open", target)
                shim.call("write", target, half)
            except OSError as error:
                raise (convert(error) if convert else error) from None
            result = original(*args, **options)
            shim.unflushed.add(shim.path(target))
            return result
        return called
    return make


def _as_safetensors(error: OSError):
    return safetensors.SafetensorError(f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})")


def _torch_place(obj, f, *args, **options):
    return f if isinstance(f, (str, os.PathLike)) else None


def _tokenizer_place(self, save_directory, *args, **options):
    return os.path.join(save_directory, "tokenizer.json")


PATCHES = [
    (builtins, "open", _open), (io, "open", _open), (os, "open", _os_open), (os, "write", _os_write), (os, "fsync", _fsync),
    (os, "rename", _rename), (os, "replace", _rename), (os, "mkdir", _plain("mkdir")), (os, "unlink", _plain("unlink")),
    (os, "remove", _plain("unlink")), (os, "rmdir", _plain("unlink")), (os, "truncate", _plain("write")),
    (safetensors.torch, "serialize_file", _foreign(lambda tensors, filename, *args, **options: filename, _as_safetensors)),
    (torch, "save", _foreign(_torch_place)),
    (PreTrainedTokenizerFast, "_save_pretrained", _foreign(_tokenizer_place)),
]


@contextmanager
def counting(root):
    "Only count."
    with Shim(root) as shim:
        yield shim


def below(folder) -> set[str]:
    "Every file below a folder, for a look at what is left."
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*")}
