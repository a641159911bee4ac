"""Loading rulesets into a namespace, and reading what their sets have learned.

libnftables is used in this process where it can be (0.3 ms for a ruleset), else the `nft`
program. The library aborts the whole process when its own descriptor is 1024 or more, so that
is checked before each call.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess

from netlab.kernel.namespaces import NetworkNamespace

# FD_SETSIZE, less the few descriptors that the library may open.
_HIGHEST_SAFE_DESCRIPTOR = 1000


class NftError(Exception):
    """nftables is missing or refused a ruleset; the message carries its own words."""


class _Library:
    """libnftables, loaded once. A context belongs to the namespace that it was made in."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_new.argtypes = [ctypes.c_uint32]
        library.nft_ctx_free.argtypes = [ctypes.c_void_p]
        library.nft_ctx_buffer_error.argtypes = [ctypes.c_void_p]
        library.nft_ctx_buffer_output.argtypes = [ctypes.c_void_p]
        library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        library.nft_ctx_get_error_buffer.argtypes = [ctypes.c_void_p]
        library.nft_ctx_get_output_buffer.restype = ctypes.c_char_p
        library.nft_ctx_get_output_buffer.argtypes = [ctypes.c_void_p]
        library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        self._library = library

    def run(self, text: str) -> str:
        """Run commands in the calling thread's namespace; return what they print.

        Raises:
            NftError: they were refused.
        """
        library = self._library
        context = library.nft_ctx_new(0)
        if not context:
            raise NftError("libnftables could not start")
        try:
            library.nft_ctx_buffer_error(context)
            library.nft_ctx_buffer_output(context)
            if library.nft_run_cmd_from_buffer(context, text.encode()) == 0:
                printed: bytes = library.nft_ctx_get_output_buffer(context) or b""
                return printed.decode(errors="replace")
            words: bytes = library.nft_ctx_get_error_buffer(context) or b"no reason given"
            raise NftError(f"nftables refused a ruleset: {words.decode(errors='replace').strip()}")
        finally:
            library.nft_ctx_free(context)


@functools.cache
def _library() -> _Library | None:
    try:
        return _Library(ctypes.CDLL("libnftables.so.1"))
    except (OSError, AttributeError):
        return None


@functools.cache
def nft_program() -> str | None:
    """Return the path of the `nft` program, also from where ordinary users don't look."""
    return shutil.which("nft") or shutil.which("nft", path="/usr/sbin:/sbin:/usr/local/sbin")


def nft_way() -> str | None:
    """Return how rulesets are loaded here: "libnftables", "nft" or None for not at all."""
    if _library() is not None:
        return "libnftables"
    return "nft" if nft_program() is not None else None


def _library_is_safe() -> bool:
    probe = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.close(probe)
    return probe < _HIGHEST_SAFE_DESCRIPTOR


def load_ruleset(namespace: NetworkNamespace, text: str) -> str:
    """Run nft commands in a namespace, all of them or none; return what they print.

    Raises:
        NftError: nftables isn't installed, or refused the commands.
    """
    library = _library()
    with namespace.entered():
        if library is not None and _library_is_safe():
            return library.run(text)
        return _run_program(text)


def _run_program(text: str) -> str:
    program = nft_program()
    if program is None:
        raise NftError("nftables is not installed; install the package nftables")
    done = subprocess.run([program, "-f", "-"], input=text, capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.strip() or f"status {done.returncode}"
        raise NftError(f"nftables refused a ruleset: {words}")
    return done.stdout


def list_elements(namespace: NetworkNamespace, table: str, kind: str, name: str) -> list[str]:
    """Return the elements of a set or map, each as nft's text.

    Raises:
        NftError: there is no such set.
    """
    text = load_ruleset(namespace, f"list {kind} {table} {name}\n")
    _, found, rest = text.partition("elements = {")
    if not found:
        return []
    return [element.strip() for element in rest[: rest.index("}")].split(",")]
