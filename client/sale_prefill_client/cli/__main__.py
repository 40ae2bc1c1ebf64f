"""`python -m sale_prefill_client.cli`."""

import sys

from ._main import main

sys.exit(main())
