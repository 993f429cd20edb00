"""Pictures of what a sub-architecture sees: heat-maps, contrasts, the images its channels prefer.

:func:`heat_maps` runs any input attribution inside the sub-architecture of each image's class.
:func:`contrast_maps` says where an image holds what one class needs and another does not,
:func:`class_mosaics` colours mosaics by class, and :func:`top_images` finds the images that drive
the kept channels most. All of them leave the network as it was; figures need matplotlib (the extra
``plot``).
"""

from nad_attr.pictures.class_mosaics import ClassMosaics, class_mosaics
from nad_attr.pictures.contrast import ContrastMaps, contrast_maps
from nad_attr.pictures.heat_maps import HeatMapMethod, gradient_times_input, heat_maps
from nad_attr.pictures.pixels import as_pixels
from nad_attr.pictures.top_images import TopImages, top_images

__all__ = [
    "ClassMosaics",
    "ContrastMaps",
    "HeatMapMethod",
    "TopImages",
    "as_pixels",
    "class_mosaics",
    "contrast_maps",
    "gradient_times_input",
    "heat_maps",
    "top_images",
]
