"""How a model is fine-tuned: every method, ours and the peers', on the same layers; `apply_method` is the one door."""

from nolora_vision.methods.apply import apply_method as apply_method
from nolora_vision.methods.catalogue import METHODS as METHODS
from nolora_vision.methods.catalogue import Method as Method
from nolora_vision.methods.catalogue import MethodError as MethodError
from nolora_vision.methods.matching import match_parameters as match_parameters
from nolora_vision.methods.merging import merge_for_inference as merge_for_inference
from nolora_vision.methods.trained import load_trained as load_trained
