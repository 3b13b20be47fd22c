"""Notebook in, report out: papermill's engine, parameters, record, cache, page, index."""
