# Generated from _async/__init__.py by tools/generate_sync_client.py. Do not edit.
"""The client over grpc. `_async` is written by hand; `_sync` is generated from it, all but `_io.py`."""
