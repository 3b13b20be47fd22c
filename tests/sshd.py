"""A real sshd on loopback with keys, a port and a configuration of its own: the tests' box."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/sbin:/usr/local/sbin")
TOOLS = ("ssh", "ssh-keygen", "rsync", "flock", "setsid", "sha256sum", "timeout")


def missing() -> str:
    """Why there can be no such machine here; "" if there can."""
    lacking = [tool for tool in TOOLS if not shutil.which(tool)] + ([] if SSHD else ["sshd"])
    if lacking:
        return f"not installed: {', '.join(lacking)} (Debian: openssh-server rsync)"
    if os.geteuid() == 0:  # where sshd runs as root it wants this folder
        Path("/run/sshd").mkdir(exist_ok=True)
    return ""


@dataclass
class Machine:
    """One "machine": sshd with its own host key; `path`: the PATH of what is run there."""

    folder: Path
    path: str = ""
    port: int = 0
    process: subprocess.Popen | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        for key in ("host", "user"):
            self.new_key(key)
        shutil.copy(self.folder / "user.pub", self.folder / "authorized")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (self.folder / "ssh_config").write_text(
            f"Host *\n IdentityFile {self.folder}/user\n IdentitiesOnly yes\n"
            f" UserKnownHostsFile {self.folder}/known_hosts\n GlobalKnownHostsFile /dev/null\n"
        )
        self.start()
        self.trust()

    def new_key(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True
        )

    def trust(self) -> None:
        key = (self.folder / "host.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {key}")

    def start(self) -> None:
        boot = self.folder / "boot"
        boot.write_text(f"boot-{time.time_ns()}\n")
        slurm = os.environ.get("SLURM_CONF")
        settings = [
            f"FRESNEL_BOOT_ID={boot}",
            *([f"SLURM_CONF={slurm}"] if slurm else []),
            *(
                # the home folder's shell settings would add to the PATH
                [f"PATH={self.path}", f"HOME={self.folder}"] if self.path else []
            ),
        ]
        (self.folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.folder}/host\n"
            f"AuthorizedKeysFile {self.folder}/authorized\nPidFile none\nUsePAM no\n"
            f"StrictModes no\nPasswordAuthentication no\nMaxStartups 50\n"
            f"SetEnv {' '.join(settings)}\n"
        )
        self.process = subprocess.Popen(
            [SSHD or "sshd", "-D", "-e", "-f", self.folder / "sshd_config"],
            stderr=(self.folder / "sshd.log").open("ab"),
        )
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise RuntimeError((self.folder / "sshd.log").read_text())

    def sessions(self) -> list[int]:
        """The processes of its open connections."""
        assert self.process is not None
        done = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        )
        return [int(pid) for pid in done.stdout.split()]

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def address(self, place: Path) -> str:
        return f"ssh://127.0.0.1:{self.port}{place}"
