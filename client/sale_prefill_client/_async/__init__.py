"""The client over grpc. `_async` is written by hand; `_sync` is generated from it, all but `_io.py`."""
