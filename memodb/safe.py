"""Every file and directory of a store is made and opened here, so that nothing else is taken for one of them.

The rule (docs/security.md): a store's directory belongs to the user who opens it, to root, or to somebody whom the
caller trusts by name. What lies in a directory of the store belongs to the owner of that directory or to root, is a
regular file with one name or a directory, never a link, FIFO, socket or device, and nobody may write it who may not
write the directory: by default that is its owner alone. Files are looked at through the descriptor that they will be
used by, so nothing can be exchanged in between, and they are opened without waiting, so that no FIFO can hold anybody
up.
"""

from __future__ import annotations

import errno
import os
import pwd
import secrets
import stat as st
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from memodb.errors import InvalidOptionError, UnsafePathError

#: Users whose stores may be opened besides one's own and root's: names or ids, with commas between them.
TRUSTED = "MEMODB_TRUSTED_OWNERS"
#: What a store may be created with: for its owner alone, read by a group, written by a group.
PERMISSIONS = (0o700, 0o750, 0o770)

_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_LOOK = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: What open(2) says of a symbolic link, of a socket or a device without a driver, and of a directory.
_NO_FILE = {errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EISDIR}
_KINDS = {
    st.S_IFLNK: "a symbolic link",
    st.S_IFIFO: "a FIFO",
    st.S_IFSOCK: "a socket",
    st.S_IFBLK: "a block device",
    st.S_IFCHR: "a character device",
    st.S_IFDIR: "a directory",
    st.S_IFREG: "a file",
}
_REMEDY = "nothing of it was used: find out who put it there, and restore the store from a copy"


@dataclass(frozen=True, slots=True)
class Guard:
    """What a directory of a store says about those that may own and write what lies in it.

    Parameters
    ----------
    uid, gid
        Owner and group of the directory.
    mode
        Its permissions.
    """

    uid: int
    gid: int
    mode: int

    @classmethod
    def of(cls, directory: str | os.PathLike[str]) -> Guard:
        """Return the guard of a directory that was checked already (by `trusted`, or by `Guard.directory`).

        Raises
        ------
        UnsafePathError
            If it is no directory any more.
        FileNotFoundError
            If it is not there.
        """
        stat = os.stat(directory)  # the path of a store may be a link
        if not st.S_ISDIR(stat.st_mode):
            raise _wrong(directory, stat, "a directory")
        return cls(stat.st_uid, stat.st_gid, stat.st_mode)

    @property
    def is_foreign(self) -> bool:
        """Whether the directory belongs neither to this process's user nor to root."""
        return self.uid not in (0, os.geteuid())

    @property
    def directory_mode(self) -> int:
        """Permissions of a new directory inside."""
        return self.mode & 0o777

    @property
    def file_mode(self) -> int:
        """Permissions of a new file inside."""
        return self.mode & 0o666

    @property
    def shared_mode(self) -> int:
        """Permissions of a new file that readers write as well (LMDB's table of readers)."""
        readers = self.mode & 0o040 and not self.mode & 0o007
        return self.file_mode | (0o020 if readers else 0)

    def check(self, path: str | os.PathLike[str], stat: os.stat_result, *, shared: bool = False) -> None:
        """See that a file inside is one of the store's, by the ``fstat`` of its open descriptor.

        Parameters
        ----------
        path
            What the message calls it.
        stat
            What it is.
        shared
            Whether a group that may read the directory may write the file (LMDB's table of readers).

        Raises
        ------
        UnsafePathError
            If it is not.
        """
        # An open file that compaction removed at this moment has no name left.
        if not st.S_ISREG(stat.st_mode) or stat.st_nlink > 1:
            raise _wrong(path, stat, "a regular file with one name")
        self._check_owner(path, stat, shared=shared)

    def _check_owner(self, path: str | os.PathLike[str], stat: os.stat_result, *, shared: bool = False) -> None:
        writers = self.mode & 0o022
        if stat.st_uid not in (self.uid, 0) and not (writers and stat.st_gid == self.gid):
            raise UnsafePathError(
                f"{os.fspath(path)} belongs to {user(stat.st_uid)}, the directory that it is in to {user(self.uid)}; "
                f"{_REMEDY}, or, if you know how it came there, give it to {user(self.uid)} (chown)"
            )
        if shared and self.mode & 0o040:
            writers |= 0o020
        if stat.st_mode & 0o022 & ~writers or (stat.st_mode & 0o020 and stat.st_gid != self.gid):
            raise UnsafePathError(
                f"{os.fspath(path)} may be written by others than the directory that it is in (permissions "
                f"{st.S_IMODE(stat.st_mode):o}, group {stat.st_gid}; the directory's are "
                f"{st.S_IMODE(self.mode):o}, group {self.gid}): it may hold anything; verify() tells more once "
                f"'chmod go-w' took that permission away"
            )

    def open(self, path: str | os.PathLike[str], flags: int, *, shared: bool = False) -> int:
        """Return a descriptor of a file inside, opened by open(2) with `flags`; a new one has `file_mode`.

        Raises
        ------
        UnsafePathError
            If what is there is none of the store's files.
        OSError
            As open(2) says.
        """
        mode = self.shared_mode if shared else self.file_mode
        if flags & os.O_CREAT and not flags & os.O_EXCL:
            while True:  # two steps, so that it is known whether the file is new
                with suppress(FileNotFoundError):
                    return self.open(path, flags & ~os.O_CREAT, shared=shared)
                with suppress(FileExistsError):
                    return self.open(path, flags | os.O_EXCL, shared=shared)
        fd = open_no_wait(path, flags, mode)
        try:
            stat = os.fstat(fd)
            self.check(path, stat, shared=shared)
            if flags & os.O_EXCL and st.S_IMODE(stat.st_mode) != mode:
                os.fchmod(fd, mode)  # whatever the umask
        except BaseException:
            os.close(fd)
            raise
        return fd

    def read(self, path: str | os.PathLike[str], most: int = 1 << 40) -> bytes:
        """Return what is in a file inside, but no more than `most` bytes and one (errors as `open`)."""
        with os.fdopen(self.open(path, os.O_RDONLY), "rb") as file:
            return file.read(min(os.fstat(file.fileno()).st_size, most) + 1)

    def write(self, path: str | os.PathLike[str], data: bytes | memoryview) -> None:
        """Make a new file inside with `data` in it (errors as `open`)."""
        with os.fdopen(self.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(data)

    def look(self, path: str | os.PathLike[str]) -> bool:
        """Check a file inside that somebody else will open, by its name; return whether it is there.

        That is as good as checking the open file: whoever could exchange it may write it anyway.
        """
        try:
            self.check(path, os.lstat(path))
        except FileNotFoundError:
            return False
        return True

    def directory(self, path: str | os.PathLike[str]) -> Guard:
        """Check a directory inside, and return its guard.

        Raises
        ------
        UnsafePathError
            If it is none of the store's directories.
        FileNotFoundError
            If it is not there.
        """
        stat = os.lstat(path)
        if not st.S_ISDIR(stat.st_mode):
            raise _wrong(path, stat, "a directory")
        self._check_owner(path, stat)
        return Guard(stat.st_uid, stat.st_gid, stat.st_mode)

    def make_directory(self, path: str | os.PathLike[str]) -> Guard:
        """Make a directory inside, unless it is there, and return its guard (errors as `directory`)."""
        with suppress(FileExistsError):
            make_directory(path, self.directory_mode)
        return self.directory(path)


def open_no_wait(path: str | os.PathLike[str], flags: int, mode: int = 0o600) -> int:
    """Return a descriptor by open(2), of no link and without waiting; the caller has yet to `Guard.check` it.

    Raises
    ------
    UnsafePathError
        If it is something that cannot be opened as a file.
    OSError
        As open(2) says.
    """
    try:
        return os.open(path, flags | _FLAGS, mode)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        with suppress(OSError):
            raise _wrong(path, os.lstat(path), "a regular file with one name") from error
        raise UnsafePathError(f"{os.fspath(path)} cannot be opened as a file: {error.strerror}; {_REMEDY}") from error


def make_directory(path: str | os.PathLike[str], mode: int) -> None:
    """Make a directory with these permissions, whatever the umask (see `set_permissions`).

    Raises
    ------
    OSError
        As mkdir(2) says.
    """
    os.mkdir(path, mode)
    set_permissions(path, mode)


def set_permissions(path: str | os.PathLike[str], mode: int) -> None:
    """Give a directory of this user's these permissions, through no link.

    What a group may write hands that group on to whatever is made inside: a member whose own group is another one would
    make files that are refused, by that member first.
    """
    fd = os.open(path, _LOOK)
    try:
        found = os.fstat(fd).st_mode
        wanted = mode | (st.S_ISGID if mode & 0o020 else found & st.S_ISGID)
        if found & (0o777 | st.S_ISGID) != wanted:
            # fchmod(2) refuses such a descriptor, and any other cannot be had of a directory that may not be read.
            os.chmod(f"/proc/self/fd/{fd}", wanted)
    finally:
        os.close(fd)


def trusted(path: Path, owner: int | str | None = None) -> Guard:
    """Check a store's own directory, and return its guard.

    The path may be a symbolic link, if it is this user's or that of somebody trusted: the caller named it.

    Parameters
    ----------
    path
        The directory.
    owner
        User, by name or id, whose store this may be, besides this process's user and root.

    Raises
    ------
    UnsafePathError
        If it belongs to somebody else, or anybody may write it.
    InvalidOptionError
        If there is no user of that name.
    OSError
        If there is no such directory, or it may not be reached.
    """
    users = _trusted_users(owner)
    link = os.lstat(path)
    if st.S_ISLNK(link.st_mode) and link.st_uid not in users:
        raise UnsafePathError(
            f"{path} is a symbolic link of {user(link.st_uid)}: it may lead anywhere; name the directory itself"
        )
    fd = os.open(os.path.realpath(path), _LOOK)
    try:
        stat = os.fstat(fd)
    finally:
        os.close(fd)
    if stat.st_uid not in users:
        raise UnsafePathError(
            f"{path} belongs to {user(stat.st_uid)}, expected {user(os.geteuid())} or root: a store tells memodb what "
            f"to do, so open only those of people whom you trust; if you trust this user, say so by open(..., "
            f"owner={stat.st_uid}) or {TRUSTED}={stat.st_uid}"
        )
    if stat.st_mode & 0o002:
        raise UnsafePathError(
            f"{path} may be written by everybody (permissions {st.S_IMODE(stat.st_mode):o}): what is in it may be "
            "anybody's; find out who made it so, and restore the store from a copy into a directory of its own"
        )
    return Guard(stat.st_uid, stat.st_gid, stat.st_mode)


def read_own(path: Path) -> bytes:
    """Return what is in a file of this user's or root's that lies outside of any store.

    Raises
    ------
    UnsafePathError
        If it is no regular file, belongs to somebody else, or others may write it.
    OSError
        If it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # its user named it: a link is fine
    with os.fdopen(fd, "rb") as file:
        stat = os.fstat(file.fileno())
        if not st.S_ISREG(stat.st_mode):
            raise _wrong(path, stat, "a regular file")
        if stat.st_uid not in (0, os.geteuid()) or stat.st_mode & 0o002:
            raise UnsafePathError(
                f"{path} belongs to {user(stat.st_uid)} (permissions {st.S_IMODE(stat.st_mode):o}), expected a file of "
                f"{user(os.geteuid())} or root that not everybody may write; remove it, or name another"
            )
        return file.read()


def write_own(path: Path, data: bytes) -> None:
    """Put a file of this user's in place, outside of any store, as a whole (errors as open(2) says)."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with os.fdopen(open_no_wait(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(data)
        draft.replace(path)
    except BaseException:  # its name never comes again, so nobody would remove it
        draft.unlink(missing_ok=True)
        raise


def _trusted_users(owner: int | str | None) -> set[int]:
    named = [name.strip() for name in os.environ.get(TRUSTED, "").split(",") if name.strip()]
    return {0, os.geteuid(), *(_uid(name) for name in ([] if owner is None else [owner]) + named)}


def _uid(name: int | str) -> int:
    if isinstance(name, int) and not isinstance(name, bool) and name >= 0:
        return name
    if isinstance(name, str):
        if name.isdecimal():
            return int(name)
        with suppress(KeyError, ValueError):
            return pwd.getpwnam(name).pw_uid
    raise InvalidOptionError(f"owner {name!r}: expected the name or the id of a user of this machine")


def user(uid: int) -> str:
    """Return what people call a user."""
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


def _wrong(path: str | os.PathLike[str], stat: os.stat_result, expected: str) -> UnsafePathError:
    found = _KINDS.get(st.S_IFMT(stat.st_mode), "something else")
    if st.S_ISREG(stat.st_mode):
        found = f"a file with {stat.st_nlink} names (hard links), one of which may be anywhere"
    return UnsafePathError(f"{os.fspath(path)} is {found}, expected {expected}; {_REMEDY}")
