"""`python -m fresnel COMMAND`: see `fresnel.cli`."""

import sys

from fresnel.cli import main

sys.exit(main())
