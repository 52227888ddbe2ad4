"""The account that the agent runs as, and what the modes of files allow it."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from petals_agent.config.places import SYSTEM_FOLDER

SERVICE_USER = "petals-agent"


@dataclass(frozen=True)
class Account:
    """A user with its groups."""

    name: str
    uid: int
    gids: frozenset[int]

    def may_read(self, status: os.stat_result) -> bool:
        """By owner, group and mode; the folders above are another matter."""
        return self._may(status, stat.S_IRUSR, stat.S_IRGRP, stat.S_IROTH)

    def may_write(self, status: os.stat_result) -> bool:
        return self._may(status, stat.S_IWUSR, stat.S_IWGRP, stat.S_IWOTH)

    def may_enter(self, status: os.stat_result) -> bool:
        """Whether it may look up names in that folder."""
        return self._may(status, stat.S_IXUSR, stat.S_IXGRP, stat.S_IXOTH)

    def _may(self, status: os.stat_result, owner: int, group: int, other: int) -> bool:
        if self.uid == 0:
            return True
        if status.st_uid == self.uid:
            return bool(status.st_mode & owner)
        return bool(status.st_mode & (group if status.st_gid in self.gids else other))


def agent_account(config_file: Path | None, socket: Path | None) -> Account:
    """Who owns the control socket, if an agent made one; else the service's user for a file in /etc/petals-agent.

    Else who asks; if that is root, the owner of the configuration.
    """
    account = _owner_of(socket)
    if account is None and config_file is not None and config_file.parent == SYSTEM_FOLDER:
        with suppress(KeyError):
            account = _of(pwd.getpwnam(SERVICE_USER))
    if account is None and os.geteuid() == 0:
        account = _owner_of(config_file)
    return account or current_account()


def _owner_of(path: Path | None) -> Account | None:
    try:
        return _of(pwd.getpwuid(path.stat().st_uid)) if path is not None else None
    except (KeyError, OSError):  # a number without a name; no such file, or none that we may look at
        return None


def current_account() -> Account:
    """Who runs this process."""
    uid = os.geteuid()
    groups = frozenset({os.getegid(), *os.getgroups()})
    try:
        return Account(pwd.getpwuid(uid).pw_name, uid, groups)
    except KeyError:  # a user without a name, as in containers
        return Account(str(uid), uid, groups)


def _of(entry: pwd.struct_passwd) -> Account:
    gids = {entry.pw_gid, *(group.gr_gid for group in grp.getgrall() if entry.pw_name in group.gr_mem)}
    return Account(entry.pw_name, entry.pw_uid, frozenset(gids))


def owner_name(uid: int) -> str:
    """The name of a user, or its number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
