"""A machine behind OpenSSH, as the user has configured it: commands, files there, files back.

An unknown host key is refused with its fingerprint, `trust_new` takes it once, a changed one is
always refused. Files go by rsync, and what arrived is compared by sha256.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from fresnel.host.files import inside, sha256

BOX = Path(__file__).with_name("box.sh")
_DROPPED = {10, 12, 20, 30, 35, 255}  # how rsync ends when the connection did


class RemoteError(OSError):
    """The machine could not be reached, or did not do what it was asked; says what to do."""


class Box:
    """A run's place on a machine, connected to within a `with`. `address`: ssh://[user@]host[:port]
    [/dir] or slurm://..., else ValueError; /~/dir is below the home folder, as is dir's default."""

    def __init__(self, address: str, run: str, *, trust_new: bool = False) -> None:
        form = r"(ssh|slurm)://(\w[\w.-]*@)?[\w.][\w.-]*(:\d+)?(/[\w./~-]*)?"
        if not re.fullmatch(form, address):
            raise ValueError(f"--on: got {address!r}, want sky, or e.g. ssh://user@host:22/dir")
        parts = urlsplit(address)
        self.host, self.port = parts.netloc.partition(":")[0], parts.port
        self.folder = parts.path.removeprefix("/~/").rstrip("/") or "fresnel-box"
        self.run, self.trust_new = run, trust_new
        self.home = f"{self.folder}/runs/{run}"
        self.timeout_s = int(os.environ.get("FRESNEL_SSH_TIMEOUT", 30))  # of a peer that is silent

    def __enter__(self) -> Self:
        self._control = tempfile.TemporaryDirectory(prefix="fresnel-ssh-")
        return self

    def __exit__(self, *_: object) -> None:
        if any(Path(self._control.name).iterdir()):
            subprocess.run([*self.ssh(), "-O", "exit", self.host], capture_output=True)
        self._control.cleanup()

    def ssh(self) -> list[str]:
        """The command that connects; FRESNEL_SSH="ssh -F FILE" gives it another configuration."""
        words = [*shlex.split(os.environ.get("FRESNEL_SSH") or "ssh"), "-oBatchMode=yes"]
        words += [f"-oControlPath={self._control.name}/%C", "-oControlMaster=auto"]
        words += [f"-oConnectTimeout={self.timeout_s}", "-oControlPersist=60"]
        words += [f"-oServerAliveInterval={max(1, self.timeout_s // 3)}", "-oServerAliveCountMax=3"]
        words += [f"-oStrictHostKeyChecking={'accept-new' if self.trust_new else 'yes'}"]
        return words + ([f"-p{self.port}"] if self.port else [])

    def command(self, verb: str, *more: str) -> str:
        """A call of the run's supervisor, for the shell there."""
        return shlex.join(["sh", f"{self.home}/box.sh", verb, self.folder, self.run, *more])

    def call(self, verb: str, *, statuses: tuple[int, ...] = (0,)) -> dict[str, str]:
        """Call the run's supervisor; what it prints as NAME=VALUE."""
        lines = self.shell(self.command(verb), statuses=statuses).splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def shell(self, command: str, *, send: bytes = b"", statuses: tuple[int, ...] = (0,)) -> str:
        """What a command prints there; RemoteError if it ends with another status."""
        limit_s = 20 * self.timeout_s
        words = [*self.ssh(), self.host, command]
        try:
            done = subprocess.run(words, input=send, capture_output=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise RemoteError(f"{self.host} has not answered for {limit_s} s") from None
        said = (done.stderr.strip() or done.stdout.strip()).decode("utf-8", "replace")
        if done.returncode not in statuses:
            why = self._refused(said) if done.returncode == 255 else said
            raise RemoteError(f"{self.host}: {why or f'exit status {done.returncode}'}")
        return done.stdout.decode("utf-8", "surrogateescape")

    def _refused(self, said: str) -> str:
        """Why ssh did not connect, in plain words."""
        if "Host key verification failed" not in said:
            return f"no connection: {said.splitlines()[-1] if said else 'not a word'}"
        words = [*self.ssh(), "-v", "-o", "ControlPath=none", self.host, "true"]
        log = subprocess.run(words, capture_output=True).stderr.decode("utf-8", "replace")
        key = (re.findall(r"Server host key: (\S+ \S+)", log) or ["no fingerprint seen"])[0]
        if "IDENTIFICATION HAS CHANGED" in said:
            why = "The machine was made anew (then: ssh-keygen -R), or somebody stands in between"
            return f"its host key is not the one that it had: {key}. {why}"
        why = "Compare it with what the provider shows; --trust-new then accepts it once"
        return f"its host key is unknown: {key}. {why}"

    def probe(self, python: str, needed_mb: int) -> None:
        """Refuse a machine that has another run, or lacks tools, Python or space. The first
        connection, so that a host key is decided on here."""
        words = ["sh", "-s", "--", "probe", self.folder, self.run, python, str(needed_mb)]
        said = self.shell(shlex.join(words), send=BOX.read_bytes(), statuses=(0, 1))
        self.trust_new = False
        if against := re.findall("^no: (.+)", said, re.M):  # its shell may greet
            raise RemoteError(f"{self.host} {'; '.join(against)}")

    def put(self, folder: Path) -> None:
        """Send the run's small files, which lie in `folder`."""
        self.shell(shlex.join(["mkdir", "-p", self.home]))
        self._send(f"{folder}/", f"{self.host}:{self.home}/")

    def upload(self, root: Path) -> None:
        """Send what is not in the folder's tree yet, byte for byte, of the files in sent.sha256."""

        def wrong() -> list[str]:
            return self.shell(self.command("verify"), statuses=(0, 1)).splitlines()

        self._send(f"{root}/", f"{self.host}:{self.folder}/tree/", wrong)

    def download(self, target: Path) -> None:
        """Fetch the run's results into `target` and compare every byte with the sums made there."""
        lines = self.shell(shlex.join(["cat", f"{self.home}/results.sha256"])).splitlines()
        places = {line[66:]: (inside(target, line[66:]), line[:64]) for line in lines}
        target.mkdir(parents=True, exist_ok=True)

        def wrong() -> list[str]:
            return [n for n, (p, d) in places.items() if not p.is_file() or sha256(p) != d]

        self._send(f"{self.host}:{self.home}/", f"{target}/", wrong)

    def _send(self, source: str, target: str, wrong: Callable[[], list[str]] | None = None) -> None:
        """Send a folder, or those of its files that are `wrong` until none is: again where the
        connection broke off, by checksum, as size and time may be those of other bytes. RemoteError
        says why that is in vain; what has arrived stays for the next try."""
        command = ["rsync", "-rLtpz", "--checksum", "--partial-dir=.rsync-partial"]
        command += [f"--timeout={self.timeout_s}", "-e", shlex.join(self.ssh()), source, target]
        command += ["--from0", "--files-from=-"] if wrong else []
        names, problem = wrong() if wrong else ["all"], ""
        for attempt in range(1, 5):
            if not names:
                return
            send = "\0".join(names).encode("utf-8", "surrogateescape")
            done = subprocess.run(command, input=send, capture_output=True)
            said = done.stderr.decode("utf-8", "replace").strip()
            if full := re.search(".*(No space left|quota exceeded).*", said):
                raise RemoteError(f"the disk is full: {full[0]}")
            if done.returncode == 0:
                names = wrong() if wrong else []
                problem = f"not as planned (changed, damaged?): {', '.join(names[:5])}"
            elif done.returncode in _DROPPED:
                problem = "the connection broke off"
                time.sleep(attempt)
            else:
                raise RemoteError(f"{self.host}: rsync ended with {done.returncode}: {said}")
            if names:
                print(f"{target}: {problem}; going on", file=sys.stderr, flush=True)
        if names:
            raise RemoteError(f"{target}: {problem}, though sent four times")
