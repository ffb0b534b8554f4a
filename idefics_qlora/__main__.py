"""``python -m idefics_qlora`` is the command line."""

import sys

from idefics_qlora.cli import main

if __name__ == "__main__":
    sys.exit(main())
