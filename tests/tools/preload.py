"""What the server process of batches.py imports before it forks: all that `distill-fid batch` loads when it works."""

import tests.distill.preload  # noqa: F401
