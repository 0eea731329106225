"""The guest's root file system: built once into build/dax, and again when what goes into it changes."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

#: Debian of the guest, and the Python that it brings: compiled packages are copied from the running environment.
SUITE, PYTHON = "bookworm", (3, 11)
#: The suite's own kernel is 6.1; PAGEMAP_SCAN, by which pages are counted, needs 6.7.
KERNEL_SUITE = f"{SUITE}-backports"
INCLUDE = "python3,ndctl,dmsetup,e2fsprogs,xfsprogs,kmod,util-linux,procps,ca-certificates"
#: What the tests need beyond what memodb itself does.
TOOLS = ("pytest", "hypothesis")
#: The initial RAM disk has no more than this, or unpacking it takes longer than the rest of the boot.
MODULES = "virtio_pci\nvirtio_blk\next4\n"
#: Nothing in the guest reads these.
NEEDLESS = ("usr/share/doc", "usr/share/locale", "usr/share/man", "var/cache/apt", "var/lib/apt/lists")

INIT = """#!/bin/sh
# The guest's first process: mount what a system needs, run the program that the host named, switch off.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LANG=C.UTF-8
for kind in proc sysfs devtmpfs; do
    case $kind in sysfs) at=/sys;; devtmpfs) at=/dev;; *) at=/proc;; esac
    mountpoint -q $at || mount -t $kind $kind $at
done
mkdir -p /dev/shm; mount -t tmpfs tmpfs /dev/shm; mount -t tmpfs tmpfs /tmp
modprobe -a nfit nd_pmem dax_pmem ext4 xfs
mkdir -p /tmp/tree && tar -C /tmp/tree -xf /dev/vdb
cd /tmp/tree
words=$(tr ' ' '\\n' < /proc/cmdline | sed -n 's/^guest\\.//p')
PYTHONPATH=/tmp/tree:/opt/packages python3 $words
sync; echo o > /proc/sysrq-trigger; sleep 60
"""


class Missing(Exception):
    """Something that this machine lacks, and what to do about it."""


def require() -> None:
    """Raise `Missing` where the virtual machine cannot be made or run here."""
    missing = [
        package
        for program, package in (
            ("qemu-system-x86_64", "qemu-system-x86"),
            ("debootstrap", "debootstrap"),
            ("mkfs.ext4", "e2fsprogs"),
        )
        if shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None
    ]
    if missing:
        raise Missing(f"programs are missing: apt-get install {' '.join(missing)}")
    if os.geteuid() != 0:
        raise Missing("the guest's root file system is made by debootstrap and chroot: run this as root")
    if sys.version_info[:2] != PYTHON or os.uname().machine != "x86_64":
        raise Missing(
            f"compiled packages are copied into a guest of Python {PYTHON[0]}.{PYTHON[1]} on x86-64; this is Python "
            f"{sys.version.split()[0]} on {os.uname().machine}: make the environment with python3.11"
        )


def mirror() -> str:
    """Return the address that this machine's own apt takes Debian from."""
    sources = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for source in sources:
        if not source.is_file():
            continue
        text = source.read_text(errors="replace")
        for found in re.finditer(r"^(?:URIs:|deb(?:\s+\[[^\]]*\])?)\s+(\S+/debian)/?(?:\s|$)", text, re.MULTILINE):
            return found[1]
    raise Missing(f"no Debian mirror is named in {', '.join(map(str, sources))}: add one")


def packages() -> dict[str, Distribution]:
    """Return the installed distributions that memodb and its tests need, by name, and theirs."""
    found: dict[str, Distribution] = {}
    wanted = [*TOOLS, *_requirements("memodb")]
    while wanted:
        name = wanted.pop().lower()
        if name not in found:
            try:
                found[name] = distribution(name)
            except PackageNotFoundError:
                raise Missing(f"{name} is not installed in {sys.prefix}: pip install -e '.[dev]'") from None
            wanted += _requirements(name)
    return found


def _requirements(name: str) -> Iterator[str]:
    for text in distribution(name).requires or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name


def build(at: Path) -> tuple[Path, Path, Path]:
    """Return kernel, initial RAM disk and root image in the directory `at`, made now where they are not up to date."""
    copied = packages()
    versions = "\n".join(f"{name} {found.version}" for name, found in sorted(copied.items()))
    recipe = "\n".join([SUITE, KERNEL_SUITE, INCLUDE, MODULES, INIT, sys.version, versions])
    stamp, made = at / "stamp", hashlib.sha256(recipe.encode()).hexdigest()
    kernel, ramdisk, image = at / "vmlinuz", at / "initrd.img", at / "root.ext4"
    if stamp.is_file() and stamp.read_text() == made:
        return kernel, ramdisk, image
    stamp.unlink(missing_ok=True)
    root = at / "root"
    system = "\n".join([SUITE, KERNEL_SUITE, INCLUDE, MODULES])
    if not (at / "system").is_file() or (at / "system").read_text() != system:
        (at / "system").unlink(missing_ok=True)
        shutil.rmtree(root, ignore_errors=True)
        _install(at, root)
        (at / "system").write_text(system)
    target = root / "opt" / "packages"
    shutil.rmtree(target, ignore_errors=True)
    for found in copied.values():
        for file in found.files or []:
            source = Path(str(found.locate_file(file)))
            if ".." not in file.parts and "__pycache__" not in file.parts and source.is_file():
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target / file)
    run(at, "chroot", root, "python3", "-m", "compileall", "-q", "-j", "0", "/opt/packages", "/usr/lib/python3.11")
    (root / "init.sh").write_text(INIT)
    (root / "init.sh").chmod(0o755)
    image.unlink(missing_ok=True)
    run(at, "mkfs.ext4", "-q", "-d", root, image, "1800M")
    for part, name in ((kernel, "vmlinuz-*"), (ramdisk, "initrd.img-*")):
        shutil.copy(next((root / "boot").glob(name)), part)
    stamp.write_text(made)
    return kernel, ramdisk, image


def _install(at: Path, root: Path) -> None:
    source = mirror()
    print(f"building the guest's root file system in {root}, once: 2 to 3 minutes", flush=True)
    run(at, "debootstrap", "--variant=minbase", f"--include={INCLUDE}", SUITE, root, source)
    (root / "etc/apt/sources.list").write_text(f"deb {source} {SUITE} main\ndeb {source} {KERNEL_SUITE} main\n")
    if Path("/etc/resolv.conf").is_file():
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    run(at, "chroot", root, "apt-get", "update")
    install = ("chroot", root, "apt-get", "install", "-y", "--no-install-recommends", "-t", KERNEL_SUITE)
    # initramfs-tools first: the kernel's own installation then makes the small RAM disk.
    run(at, *install, "initramfs-tools")
    (root / "etc/initramfs-tools/modules").write_text(MODULES)
    (root / "etc/initramfs-tools/conf.d/list").write_text("MODULES=list\n")
    run(at, *install, "linux-image-amd64")
    for needless in NEEDLESS:
        shutil.rmtree(root / needless, ignore_errors=True)


def run(at: Path, *command: str | Path) -> None:
    """Run a command, its output into build.log; raise `Missing` with the end of that where it fails."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    environment["PATH"] = environment.get("PATH", "") + ":/usr/sbin:/sbin"
    for name in [name for name in environment if name.startswith("PYTHON")]:
        del environment[name]
    with (at / "build.log").open("ab") as log:
        try:
            subprocess.run([str(part) for part in command], check=True, stdout=log, stderr=log, env=environment)
        except subprocess.CalledProcessError as error:
            tail = "\n".join((at / "build.log").read_text(errors="replace").splitlines()[-15:])
            raise Missing(f"{' '.join(map(str, command))} failed (status {error.returncode}):\n{tail}") from None
