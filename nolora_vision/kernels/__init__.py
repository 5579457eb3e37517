"""The math of one adapter, no modules, no timm; `low_rank_delta` is the one door."""

from nolora_vision.kernels.backends import BACKENDS as BACKENDS
from nolora_vision.kernels.backends import TritonUnavailable as TritonUnavailable
from nolora_vision.kernels.backends import low_rank_delta as low_rank_delta
from nolora_vision.kernels.backends import select_backend as select_backend
from nolora_vision.kernels.backends import use_backend as use_backend
from nolora_vision.kernels.eager import FORMULAS as FORMULAS
from nolora_vision.kernels.eager import Frozen as Frozen
from nolora_vision.kernels.eager import LowRank as LowRank
