"""`python -m fresnel COMMAND`: see `fresnel.cli`."""

import os
import signal
import sys

for stream in (0, 1, 2):  # closed ones: else the next file that is opened takes their place
    try:
        os.fstat(stream)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the kernel's, too
sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
status = 130
try:
    from fresnel.host.stopping import stop

    signal.signal(signal.SIGTERM, stop)  # so that a report is still written
    signal.signal(signal.SIGINT, stop)
    from fresnel.cli import main

    status = main()
    sys.stdout.flush()
except KeyboardInterrupt:  # outside of the command itself
    pass
except BrokenPipeError:  # its reader has gone, as `head` does
    status = 128 + signal.SIGPIPE
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for number in (signal.SIGTERM, signal.SIGINT):  # too late to stop anything
    signal.signal(number, signal.SIG_IGN)
sys.exit(status)
