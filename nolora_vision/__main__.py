"""python -m nolora_vision: the same as the command nolora-vision."""

import sys

from nolora_vision.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
