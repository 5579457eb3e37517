"""Fine-tune a timm model: `python train.py --help`; also under `accelerate launch`."""

import sys

from nolora_vision.training.run import main

if __name__ == "__main__":
    sys.exit(main())
