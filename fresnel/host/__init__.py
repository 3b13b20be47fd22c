"""The machine under us: files, locks, cores, processes, what a run takes."""
