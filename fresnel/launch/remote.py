"""A machine behind OpenSSH, as the user has configured it: commands, files there, files back.

Host keys are never waved through: an unknown one is refused with its fingerprint, `trust_new` takes
it once, a changed one is always refused. Connections share one master, files go by rsync (what is
there already is not sent again, what broke off goes on), and what arrived is compared by sha256.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from fresnel.host.files import inside, sha256

BOX = Path(__file__).with_name("box.sh")
_TRIES = 4
_DROPPED = {10, 12, 20, 30, 35, 255}
"""How rsync ends when the connection did."""


class RemoteError(OSError):
    """The machine could not be reached, or did not do what it was asked; says what to do."""


@dataclass
class Box:
    """A folder on a machine. `host`: as ssh takes it ("user@name"); `folder`: relative to the home
    folder there, or absolute; `timeout_s`: of a peer that has stopped answering."""

    host: str
    folder: str = "fresnel-box"
    port: int | None = None
    trust_new: bool = False
    timeout_s: int = field(default_factory=lambda: int(os.environ.get("FRESNEL_SSH_TIMEOUT", 30)))
    _control: tempfile.TemporaryDirectory = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="fresnel-ssh-")
    )

    @classmethod
    def parse(cls, address: str, *, trust_new: bool = False) -> Box:
        """Of ssh://[user@]host[:port][/dir] or slurm://...; /~/dir is below the home folder.

        Raises ValueError if it is none."""
        parts = urlsplit(address)
        if not re.fullmatch(
            r"(ssh|slurm)://(\w[\w.-]*@)?[\w.][\w.-]*(:\d+)?(/[\w./~-]*)?", address
        ):
            raise ValueError(f"--on: got {address!r}, want sky, or e.g. ssh://user@host:22/dir")
        folder = parts.path.removeprefix("/~/").rstrip("/") or "fresnel-box"
        return cls(parts.netloc.partition(":")[0], folder, parts.port, trust_new)

    def ssh(self) -> list[str]:
        """The command that connects; FRESNEL_SSH="ssh -F FILE" gives it another configuration."""
        options = {
            "BatchMode": "yes",
            "ControlMaster": "auto",
            "ControlPath": f"{self._control.name}/%C",
            "ControlPersist": 60,
            "ConnectTimeout": self.timeout_s,
            "ServerAliveInterval": max(1, self.timeout_s // 3),
            "ServerAliveCountMax": 3,
            "StrictHostKeyChecking": "accept-new" if self.trust_new else "yes",
        }
        words = shlex.split(os.environ.get("FRESNEL_SSH") or "ssh")
        words += [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return words + (["-p", str(self.port)] if self.port else [])

    def run(
        self, command: str, *, send: bytes = b"", check: bool = True
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a shell command there; with `check` any status but 0 raises RemoteError."""
        limit_s = 20 * self.timeout_s
        words = [*self.ssh(), self.host, command]
        try:
            done = subprocess.run(words, input=send, capture_output=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise RemoteError(f"{self.host} has not answered for {limit_s} s") from None
        said = (done.stderr.strip() or done.stdout.strip()).decode("utf-8", "replace")
        if done.returncode == 255:
            raise RemoteError(self._refused(said))
        if check and done.returncode:
            raise RemoteError(f"{self.host}: {said or f'exit status {done.returncode}'}")
        return done

    def box(self, verb: str, run: str, *, check: bool = True) -> dict[str, str]:
        """Call the run's supervisor; what it prints as NAME=VALUE."""
        return _values(self.run(self.command(verb, run), check=check).stdout)

    def command(self, verb: str, run: str, *more: str) -> str:
        place = f"{self.folder}/runs/{run}/box.sh"
        return shlex.join(["sh", place, verb, self.folder, run, *more])

    def probe(self, python: str = "") -> dict[str, str]:
        """What is there: tools, Python, space, GPU, and whether a run has the box. The first
        connection, so that a host key is decided on here."""
        words = ["sh", "-s", "--", "probe", self.folder, *([python] if python else [])]
        found = _values(self.run(shlex.join(words), send=BOX.read_bytes()).stdout)
        self.trust_new = False
        return found

    def put(self, run: str, folder: Path) -> None:
        """Send a run's small files, which lie in `folder`."""
        self.run(shlex.join(["mkdir", "-p", f"{self.folder}/runs/{run}", f"{self.folder}/tree"]))
        self._rsync(["--checksum", f"{folder}/", self._there(f"runs/{run}/")])

    def upload(self, run: str, root: Path) -> None:
        """Send what is not in the folder's tree yet, byte for byte, of the files in sent.sha256.

        Raises RemoteError that says why; what has arrived stays for the next try."""
        for attempt in range(3):
            bad = self.run(self.command("verify", run), check=False).stdout.decode().splitlines()
            if not bad:
                return
            if attempt:
                print(f"arrived damaged, sent again: {', '.join(bad[:5])}", file=sys.stderr)
            # by checksum, as size and time may be those of other bytes
            words = ["--checksum", "--from0", "--files-from=-", f"{root}/", self._there("tree/")]
            self._rsync(words, "\0".join(bad).encode())
        raise RemoteError(
            f"{self.host}: not as planned, though sent twice (changed here?): {', '.join(bad[:5])}"
        )

    def download(self, run: str, target: Path) -> None:
        """Fetch a run's results into `target` and compare every byte with the sums made there.

        Raises RemoteError that names the files that are not what they were."""
        text = self.run(f"cat {shlex.quote(f'{self.folder}/runs/{run}/results.sha256')}").stdout
        lines = text.decode("utf-8", "surrogateescape").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        target.mkdir(parents=True, exist_ok=True)
        places = {name: inside(target, name) for name in sums}
        bad = list(sums)
        for option in ("--times", "--checksum"):
            words = [option, "--from0", "--files-from=-", self._there(f"runs/{run}/"), f"{target}/"]
            self._rsync(words, "\0".join(bad).encode())
            bad = [n for n, p in places.items() if not p.is_file() or sha256(p) != sums[n]]
            if not bad:
                return
            print(f"arrived damaged: {', '.join(bad[:5])}", file=sys.stderr)
        raise RemoteError(f"{target}: not what was made there: {', '.join(bad[:5])}")

    def _there(self, name: str) -> str:
        return f"{self.host}:{self.folder}/{name}"

    def _rsync(self, words: Sequence[str], send: bytes = b"") -> None:
        """rsync, tried again where the connection broke off."""
        command = ["rsync", "-rLtpz", "--partial-dir=.rsync-partial", f"--timeout={self.timeout_s}"]
        command += ["-e", shlex.join(self.ssh()), *words]
        for attempt in range(1, _TRIES + 1):
            done = subprocess.run(command, input=send, capture_output=True)
            said = done.stderr.decode("utf-8", "replace").strip()
            if done.returncode == 0:
                return
            if full := re.search(".*(No space left|quota exceeded).*", said):
                raise RemoteError(f"the disk is full: {full[0]}")
            if done.returncode not in _DROPPED or attempt == _TRIES:
                raise RemoteError(f"{self.host}: rsync ended with {done.returncode}: {said}")
            print(f"{self.host}: the connection broke off; going on", file=sys.stderr, flush=True)
            time.sleep(attempt)

    def _refused(self, said: str) -> str:
        """Why ssh did not connect, in plain words."""
        changed = "IDENTIFICATION HAS CHANGED" in said
        if not changed and "Host key verification failed" not in said:
            return f"{self.host}: no connection: {said.splitlines()[-1] if said else 'not a word'}"
        done = subprocess.run(
            [*self.ssh(), "-v", "-o", "ControlPath=none", self.host, "true"], capture_output=True
        )
        found = re.search(rb"Server host key: (\S+ \S+)", done.stderr)
        key = found[1].decode() if found else "no fingerprint seen"
        if changed:
            return (
                f"{self.host}: its host key is not the one that it had: {key}. The machine was "
                "made anew, or somebody stands in between. If you know that it was: ssh-keygen -R"
            )
        return (
            f"{self.host}: its host key is unknown: {key}. Compare it with what the provider "
            "shows; --trust-new then accepts it once and keeps it in known_hosts"
        )

    def close(self) -> None:
        if any(Path(self._control.name).iterdir()):
            subprocess.run([*self.ssh(), "-O", "exit", self.host], capture_output=True)
        self._control.cleanup()


def _values(text: bytes) -> dict[str, str]:
    lines = text.decode("utf-8", "replace").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)
