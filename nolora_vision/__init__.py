"""nolora_vision: fine-tune timm's vision transformers with NoLoRA, nonlinear low-rank adapters.

y = W x + b + s · B (v ⊙ f(A x)), W frozen. `inject(model)` does the surgery, in place.
"""

from nolora_vision.adapters.adapter_files import AdapterMismatchError as AdapterMismatchError
from nolora_vision.adapters.adapter_files import AdapterNotFoundError as AdapterNotFoundError
from nolora_vision.adapters.adapter_files import AdapterVersionError as AdapterVersionError
from nolora_vision.adapters.adapter_files import CheckpointError as CheckpointError
from nolora_vision.adapters.adapter_files import CorruptAdapterError as CorruptAdapterError
from nolora_vision.adapters.adapter_files import read_adapter_config as read_adapter_config
from nolora_vision.adapters.checkpoint import load_adapter as load_adapter
from nolora_vision.adapters.checkpoint import save_adapter as save_adapter
from nolora_vision.adapters.export import ExportError as ExportError
from nolora_vision.adapters.export import ExportReport as ExportReport
from nolora_vision.adapters.export import export as export
from nolora_vision.adapters.export import read_export_metadata as read_export_metadata
from nolora_vision.adapters.hub import push_to_hub as push_to_hub
from nolora_vision.adapters.mixing import mixed as mixed
from nolora_vision.adapters.peft_format import PeftFormatError as PeftFormatError
from nolora_vision.adapters.pretrained import class_names as class_names
from nolora_vision.adapters.pretrained import eval_transform as eval_transform
from nolora_vision.adapters.pretrained import from_pretrained as from_pretrained
from nolora_vision.adapters.pretrained import preprocessing_of as preprocessing_of
from nolora_vision.adapters.switch import active_adapter as active_adapter
from nolora_vision.adapters.switch import adapter_names as adapter_names
from nolora_vision.adapters.switch import add_adapter as add_adapter
from nolora_vision.adapters.switch import remove_adapter as remove_adapter
from nolora_vision.adapters.switch import set_adapter as set_adapter
from nolora_vision.config import AdapterConfig as AdapterConfig
from nolora_vision.config import ConfigError as ConfigError
from nolora_vision.kernels import low_rank_delta as low_rank_delta
from nolora_vision.kernels import use_backend as use_backend
from nolora_vision.surgery.adapter import NoLoRAConv2d as NoLoRAConv2d
from nolora_vision.surgery.adapter import NoLoRALinear as NoLoRALinear
from nolora_vision.surgery.fold import fold as fold
from nolora_vision.surgery.frozen_dtype import hold_frozen as hold_frozen
from nolora_vision.surgery.frozen_dtype import release_frozen as release_frozen
from nolora_vision.surgery.groups import adapter_parameters as adapter_parameters
from nolora_vision.surgery.groups import head_parameters as head_parameters
from nolora_vision.surgery.groups import param_groups as param_groups
from nolora_vision.surgery.inject import disabled as disabled
from nolora_vision.surgery.inject import eject as eject
from nolora_vision.surgery.inject import freeze_backbone as freeze_backbone
from nolora_vision.surgery.inject import inject as inject
from nolora_vision.surgery.low_rank_adapter import LowRankAdapter as LowRankAdapter
from nolora_vision.surgery.plan import InjectionError as InjectionError
from nolora_vision.surgery.summary import Summary as Summary
from nolora_vision.surgery.summary import print_trainable_parameters as print_trainable_parameters
from nolora_vision.surgery.summary import summary as summary

__version__ = "0.1.0"
