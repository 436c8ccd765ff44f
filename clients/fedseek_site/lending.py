"""What a site lends to a courier under an account of its own: three files in ``run/courier``, open to its group.

    site      lend               join.json, ca.pem, node.key: mode 0640, of the courier's group; anew when keys were renewed
    courier   borrow             copies of its own, mode 0600
              end_when_changed   and started again, it borrows the new ones

The node key proves to the coordinator's gate who calls, and nothing else; no other secret of the site's is lent.
"""

from __future__ import annotations

import grp
import os
import shutil
import signal
import stat
import threading
import time
from pathlib import Path
from typing import Final

from fedseek.errors import InvalidConfig
from fedseek.identity.enrolment import MAX_JOIN_FILE_BYTES
from fedseek.identity.secret_files import read_file, refusing, write_secret_file
from fedseek_site.enrol import CA_FILE, JOIN_FILE, NODE_KEY_FILE, JoinedFolder, open_public

LENT_FILES: Final = (JOIN_FILE, CA_FILE, NODE_KEY_FILE)
LOOK_SECONDS: Final = 5.0


def group_number(name: str) -> int | None:
    """Number of an operating system's group; None for "".

    Raises:
        InvalidConfig: there is no such group.
    """
    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise InvalidConfig([f"group {name!r}: no such group"], source="sockets", hint="groupadd makes one") from None


def lend(site: JoinedFolder, lent: Path, group: int | None) -> None:
    """Put what a courier needs into ``lent``, a folder in ``run/``; a file that is there with this content stays.

    Raises:
        CustodyError: the disk refuses, or this account may not give files to the group.
    """
    with refusing(lent, "made"):
        lent.mkdir(mode=0o750, exist_ok=True)
        lent.parent.chmod(stat.S_IMODE(lent.parent.stat().st_mode) | 0o011)  # others may pass through, and see nothing
        _open_to(lent, group, 0o750)
    for name in LENT_FILES:
        content, file = read_file(site.folder / name, limit=MAX_JOIN_FILE_BYTES), lent / name
        if not file.exists() or read_file(file, limit=MAX_JOIN_FILE_BYTES) != content:
            write_secret_file(file, content)
        with refusing(file, "lent"):
            _open_to(file, group, 0o640)


def borrow(lent: Path, own: Path) -> JoinedFolder:
    """Copies of what is lent, in a folder of the courier's own.

    Raises:
        CustodyError: nothing is lent, or this account is not in the group it is lent to.
        Malformed, TooLarge, WrongKey: a file cannot be used.
    """
    with refusing(own, "made"):
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in LENT_FILES:
        write_secret_file(own / name, read_file(lent / name, limit=MAX_JOIN_FILE_BYTES))
    return open_public(own)


def end_when_changed(lent: Path, *, every: float = LOOK_SECONDS) -> None:
    """From now on, end this process when other files are lent; whoever keeps it alive starts it with the new ones."""
    threading.Thread(target=_watch, args=(lent, _stamp(lent), every), name="lent files", daemon=True).start()


def _watch(lent: Path, before: object, every: float) -> None:
    while _stamp(lent) in (before, None):
        time.sleep(every)
    os.kill(os.getpid(), signal.SIGTERM)


def _stamp(lent: Path) -> object:
    """Another one when a file was replaced; None while one is missing, as between two steps of lending."""
    try:
        return tuple((lent / name).stat().st_ino for name in LENT_FILES)
    except OSError:
        return None


def _open_to(path: Path, group: int | None, mode: int) -> None:
    if group is not None:
        shutil.chown(path, group=group)
        path.chmod(mode)
