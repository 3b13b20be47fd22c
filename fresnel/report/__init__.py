"""Notebook in, report out: papermill's engine, parameters, record, cache, page, index."""

import sys

# nbformat needs jsonschema, which builds a grammar of international addresses where it finds the
# package for it (JupyterLab brings that): three seconds of every start, for what no notebook holds.
if "jsonschema" not in sys.modules and "rfc3987_syntax" not in sys.modules:
    sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]
    import nbformat  # noqa: F401

    del sys.modules["rfc3987_syntax"]
