"""First on the path of ``build.environment``: every Python there runs on the stand-in."""

import tests.stand_in.start  # noqa: F401
