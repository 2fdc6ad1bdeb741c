"""`python -m qlora_dpo` is `qlora-dpo`."""

import sys

from qlora_dpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
