"""Prints what ``idefics_qlora.environment()`` reports: ``python -m idefics_qlora.environment``."""

import json

from idefics_qlora.machine import environment

if __name__ == "__main__":
    print(json.dumps(environment(), indent=2))
