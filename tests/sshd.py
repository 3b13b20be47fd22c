"""A real sshd on loopback with keys, a port and a configuration of its own: the tests' box."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin:/usr/local/sbin"
SSHD = shutil.which("sshd", path=PATH)
TOOLS = ("ssh", "ssh-keygen", "rsync", "flock", "setsid", "sha256sum", "timeout")


def missing() -> str:
    """Why there can be no such machine here; "" if there can."""
    lacking = [tool for tool in TOOLS if not shutil.which(tool)] + ([] if SSHD else ["sshd"])
    if lacking:
        return f"not installed: {', '.join(lacking)} (Debian: openssh-server rsync)"
    if os.geteuid() == 0:  # where sshd runs as root it wants this folder
        Path("/run/sshd").mkdir(exist_ok=True)
    return ""


class Machine:
    """One "machine": sshd with its own host key; `ssh`: the command that knows it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        for key in ("host", "user"):
            self.new_key(key)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (folder / "ssh_config").write_text(
            f"Host *\n IdentityFile {folder}/user\n IdentitiesOnly yes\n"
            f" UserKnownHostsFile {folder}/known_hosts\n GlobalKnownHostsFile /dev/null\n"
        )
        self.ssh = f"ssh -F {folder / 'ssh_config'}"
        key = (folder / "host.pub").read_text()
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {key}")
        self.start()

    def new_key(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name]
        subprocess.run(words, check=True)

    def start(self) -> None:
        """Boot: another boot id."""
        boot = self.folder / "boot"
        boot.write_text(f"boot-{time.time_ns()}\n")
        slurm = os.environ.get("SLURM_CONF")
        settings = f"FRESNEL_BOOT_ID={boot}" + (f" SLURM_CONF={slurm}" if slurm else "")
        (self.folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.folder}/host\n"
            f"AuthorizedKeysFile {self.folder}/user.pub\nPidFile none\nUsePAM no\n"
            f"StrictModes no\nPasswordAuthentication no\nMaxStartups 50\nSetEnv {settings}\n"
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
        words = ["ps", "-o", "pid=", "--ppid", str(self.process.pid)]
        done = subprocess.run(words, capture_output=True, text=True)
        return [int(pid) for pid in done.stdout.split()]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


SLURM = ("slurmctld", "slurmd", "munged", "sbatch")


def no_slurm() -> str:
    """Why a Slurm of one node can't be started here; "" if it can."""
    lacking = [tool for tool in SLURM if not shutil.which(tool, path=PATH)]
    if lacking:
        return f"not installed: {', '.join(lacking)} (Debian: slurmctld slurmd munge)"
    if os.geteuid() or len(socket.if_nameindex()) > 1:
        return "Slurm wants root in a network of its own: see slurm() in tests/sshd.py"
    return ""


def slurm(folder: Path) -> list[subprocess.Popen[bytes]]:
    """The daemons of a Slurm whose only node is this machine; SLURM_CONF names it. It wants root, a
    network of its own, and there another address than 127.0.0.1, or it looks up no name:

        unshare -n sh -c 'ip link set lo up; ip addr add 10.0.0.1 dev lo; pytest -k slurm'
    """
    folder.mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    host = socket.gethostname()
    conf = folder / "slurm.conf"
    conf.write_text(
        f"ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmUser=root\n"
        f"AuthType=auth/munge\nAuthInfo=socket={folder}/munge\nCredType=cred/munge\n"
        f"StateSaveLocation={folder}\nSlurmdSpoolDir={folder}/spool\nMpiDefault=none\n"
        f"SlurmctldPidFile={folder}/ctld.pid\nSlurmdPidFile={folder}/slurmd.pid\n"
        "ProctrackType=proctrack/pgid\nTaskPlugin=task/none\nReturnToService=2\n"
        f"NodeName={host} NodeAddr=127.0.0.1 CPUs=1\n"
        "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
    )
    munge = [
        "munged",
        "-F",
        "--force",
        "--key-file",
        f"{folder}/key",
        "--socket",
        f"{folder}/munge",
    ]
    munge += [f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/seed"]
    with (folder / "log").open("ab") as log:
        commands = munge, ["slurmctld", "-D", "-f", conf], ["slurmd", "-D", "-f", conf]
        env = {**os.environ, "PATH": PATH}
        return [subprocess.Popen(words, env=env, stdout=log, stderr=log) for words in commands]
