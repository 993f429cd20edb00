"""Models, data and transforms by name, as the command line takes them and stores remember them.

A model is ``torchvision:resnet50[:WEIGHTS]``, ``timm:NAME`` or ``package.module:factory``, with a
state dict beside it if wanted; data are a folder of class folders, ``torchvision:CIFAR10:root`` or
``package.module:factory``. What is written down of them is text, so that it can be built again; no
pickled code is ever loaded.
"""

from __future__ import annotations

from nad_attr.specs.data import LoadedData, load_data
from nad_attr.specs.models import LoadedModel, is_plain_model, load_model, load_weights, n_outputs
from nad_attr.specs.names import SpecError, import_object
from nad_attr.specs.tasks import parse_tasks
from nad_attr.specs.transforms import Transform, make_transform

__all__ = [
    "LoadedData",
    "LoadedModel",
    "SpecError",
    "Transform",
    "import_object",
    "is_plain_model",
    "load_data",
    "load_model",
    "load_weights",
    "make_transform",
    "n_outputs",
    "parse_tasks",
]
