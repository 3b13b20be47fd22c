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
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from fresnel.host.files import inside, sha256

BOX = Path(__file__).with_name("box.sh")
_DROPPED = {10, 12, 20, 30, 35, 255}
"""How rsync ends when the connection did."""


class RemoteError(OSError):
    """The machine could not be reached, or did not do what it was asked; says what to do."""


class Box:
    """A folder on a machine, connected to within a `with`.

    Args:
        host: as ssh takes it ("user@name").
        folder: relative to the home folder there, or absolute.
    """

    def __init__(
        self, host: str, folder: str = "fresnel-box", port: int | None = None, *,
        trust_new: bool = False,
    ) -> None:  # fmt: skip
        self.host, self.folder, self.port, self.trust_new = host, folder, port, trust_new
        self.timeout_s = int(os.environ.get("FRESNEL_SSH_TIMEOUT", 30))  # of a peer that is silent

    @classmethod
    def parse(cls, address: str, *, trust_new: bool = False) -> Box:
        """Of ssh://[user@]host[:port][/dir] or slurm://...; /~/dir is below the home folder.

        Raises ValueError if it is none."""
        parts = urlsplit(address)
        form = r"(ssh|slurm)://(\w[\w.-]*@)?[\w.][\w.-]*(:\d+)?(/[\w./~-]*)?"
        if not re.fullmatch(form, address):
            raise ValueError(f"--on: got {address!r}, want sky, or e.g. ssh://user@host:22/dir")
        folder = parts.path.removeprefix("/~/").rstrip("/") or "fresnel-box"
        return cls(parts.netloc.partition(":")[0], folder, parts.port, trust_new=trust_new)

    def __enter__(self) -> Box:
        self._control = tempfile.TemporaryDirectory(prefix="fresnel-ssh-")
        return self

    def __exit__(self, *_: object) -> None:
        if any(Path(self._control.name).iterdir()):
            subprocess.run([*self.ssh(), "-O", "exit", self.host], capture_output=True)
        self._control.cleanup()

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

    def run(self, command: str, *, send: bytes = b"", statuses: tuple[int, ...] = (0,)) -> str:
        """What a shell command prints there; RemoteError if it ends with another status."""
        limit_s = 20 * self.timeout_s
        words = [*self.ssh(), self.host, command]
        try:
            done = subprocess.run(words, input=send, capture_output=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise RemoteError(f"{self.host} has not answered for {limit_s} s") from None
        said = (done.stderr.strip() or done.stdout.strip()).decode("utf-8", "replace")
        if done.returncode == 255:
            raise RemoteError(self._refused(said))
        if done.returncode not in statuses:
            raise RemoteError(f"{self.host}: {said or f'exit status {done.returncode}'}")
        return done.stdout.decode("utf-8", "surrogateescape")

    def command(self, verb: str, run: str, *more: str) -> str:
        """A call of the run's supervisor."""
        return shlex.join(["sh", f"{self.folder}/runs/{run}/box.sh", verb, self.folder, run, *more])

    def box(self, verb: str, run: str, *, statuses: tuple[int, ...] = (0,)) -> dict[str, str]:
        """Call the run's supervisor; what it prints as NAME=VALUE."""
        return _values(self.run(self.command(verb, run), statuses=statuses))

    def probe(self, python: str = "") -> dict[str, str]:
        """What is there: tools, Python, space, GPU, and whether a run has the box. The first
        connection, so that a host key is decided on here."""
        words = ["sh", "-s", "--", "probe", self.folder, *([python] if python else [])]
        found = _values(self.run(shlex.join(words), send=BOX.read_bytes()))
        self.trust_new = False
        return found

    def put(self, run: str, folder: Path) -> None:
        """Send a run's small files, which lie in `folder`."""
        self.run(shlex.join(["mkdir", "-p", f"{self.folder}/runs/{run}", f"{self.folder}/tree"]))
        self._rsync([f"{folder}/", f"{self.host}:{self.folder}/runs/{run}/"])

    def upload(self, run: str, root: Path) -> None:
        """Send what is not in the folder's tree yet, byte for byte, of the files in sent.sha256.

        Raises RemoteError that says why; what has arrived stays for the next try."""

        def wrong() -> list[str]:
            return self.run(self.command("verify", run), statuses=(0, 3)).splitlines()

        self._send(f"{root}/", f"{self.host}:{self.folder}/tree/", wrong(), wrong)

    def download(self, run: str, target: Path) -> None:
        """Fetch a run's results into `target` and compare every byte with the sums made there.

        Raises RemoteError that names the files that are not what they were."""
        text = self.run(f"cat {shlex.quote(f'{self.folder}/runs/{run}/results.sha256')}")
        sums = {name: digest for digest, name in (s.split("  ", 1) for s in text.splitlines())}
        target.mkdir(parents=True, exist_ok=True)
        places = {name: inside(target, name) for name in sums}

        def wrong() -> list[str]:
            return [n for n, p in places.items() if not p.is_file() or sha256(p) != sums[n]]

        self._send(f"{self.host}:{self.folder}/runs/{run}/", f"{target}/", list(sums), wrong)

    def _send(
        self, source: str, target: str, names: list[str], wrong: Callable[[], list[str]]
    ) -> None:
        """Send files until none is wrong, at most twice."""
        for _ in range(2 if names else 0):
            self._rsync([source, target], names)
            names = wrong()
            if not names:
                return
            print(f"arrived damaged: {', '.join(names[:5])}", file=sys.stderr)
        if names:
            raise RemoteError(
                f"{target}: not as planned, though sent twice (changed?): {', '.join(names[:5])}"
            )

    def _rsync(self, words: list[str], names: list[str] | None = None) -> None:
        """rsync, of these files alone, tried again where the connection broke off; by checksum, as
        size and time may be those of other bytes."""
        command = ["rsync", "-rLtpz", "--checksum", "--partial-dir=.rsync-partial"]
        command += [f"--timeout={self.timeout_s}", "-e", shlex.join(self.ssh())]
        command += [] if names is None else ["--from0", "--files-from=-"]
        send = "\0".join(names or []).encode("utf-8", "surrogateescape")
        for attempt in range(1, 5):
            done = subprocess.run([*command, *words], input=send, capture_output=True)
            said = done.stderr.decode("utf-8", "replace").strip()
            if done.returncode == 0:
                return
            if full := re.search(".*(No space left|quota exceeded).*", said):
                raise RemoteError(f"the disk is full: {full[0]}")
            if done.returncode not in _DROPPED or attempt == 4:
                raise RemoteError(f"{self.host}: rsync ended with {done.returncode}: {said}")
            print(f"{self.host}: the connection broke off; going on", file=sys.stderr, flush=True)
            time.sleep(attempt)

    def _refused(self, said: str) -> str:
        """Why ssh did not connect, in plain words."""
        changed = "IDENTIFICATION HAS CHANGED" in said
        if not changed and "Host key verification failed" not in said:
            return f"{self.host}: no connection: {said.splitlines()[-1] if said else 'not a word'}"
        words = [*self.ssh(), "-v", "-o", "ControlPath=none", self.host, "true"]
        log = subprocess.run(words, capture_output=True).stderr.decode("utf-8", "replace")
        key = (re.findall(r"Server host key: (\S+ \S+)", log) or ["no fingerprint seen"])[0]
        if changed:
            return (
                f"{self.host}: its host key is not the one that it had: {key}. The machine was "
                "made anew, or somebody stands in between. If you know that it was: ssh-keygen -R"
            )
        return (
            f"{self.host}: its host key is unknown: {key}. Compare it with what the provider "
            "shows; --trust-new then accepts it once and keeps it in known_hosts"
        )


def _values(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
