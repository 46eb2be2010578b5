"""System calls that fail as they are told to, for tests of the installed command.

A library that is loaded before libc's own. Which calls fail comes from the environment:
`FAIL_RENAMEAT2=ENOSYS` for a system without it, `FAIL_LINK=EPERM` for a file system without hard
links, `FAIL_SYNC=EIO` with `FAIL_SYNC_INODE=N` for a directory that cannot be flushed,
`FAIL_UNLINKAT=EPERM` with `FAIL_UNLINKAT_NAME=NAME` for a file that cannot be removed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static int told(const char *name) {
    const char *value = getenv(name);
    if (!value) return 0;
    if (!strcmp(value, "ENOSYS")) return ENOSYS;
    if (!strcmp(value, "EINVAL")) return EINVAL;
    if (!strcmp(value, "EPERM")) return EPERM;
    return EIO;
}

int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    int error = told("FAIL_RENAMEAT2");
    if (error) { errno = error; return -1; }
    int (*real)(int, const char *, int, const char *, unsigned) = dlsym(RTLD_NEXT, "renameat2");
    return real(a, from, b, to, flags);
}

int link(const char *from, const char *to) {
    int error = told("FAIL_LINK");
    if (error) { errno = error; return -1; }
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "link");
    return real(from, to);
}

int fsync(int file) {
    int error = told("FAIL_SYNC");
    const char *marker = getenv("FAIL_SYNC_INODE");
    struct stat found;
    if (error && marker && !fstat(file, &found) && found.st_ino == strtoul(marker, 0, 10)) {
        errno = error;
        return -1;
    }
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    return real(file);
}

int unlinkat(int at, const char *path, int flags) {
    int error = told("FAIL_UNLINKAT");
    const char *only = getenv("FAIL_UNLINKAT_NAME");
    if (error && only && !strcmp(path, only)) { errno = error; return -1; }
    int (*real)(int, const char *, int) = dlsym(RTLD_NEXT, "unlinkat");
    return real(at, path, flags);
}
"""


_PLACE = TemporaryDirectory(prefix="safeproj-faults-")
"""Where it is built; gone when the tests end."""


@lru_cache(maxsize=1)
def _library() -> Path | None:
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    place = Path(_PLACE.name)
    (place / "faults.c").write_text(_SOURCE)
    made = place / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-o", str(made), str(place / "faults.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return made


def failing(**calls: str) -> dict[str, str]:
    """Return the environment in which these calls fail, such as `FAIL_RENAMEAT2="ENOSYS"`."""
    library = _library()
    if library is None:
        pytest.skip("needs Linux and a C compiler")
    return {"LD_PRELOAD": str(library), **calls}
