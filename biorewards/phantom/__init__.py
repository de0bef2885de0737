"""The phantom assay: drawn fluorescent cells with exact masks, as stand-ins for a BBBC021-like experiment."""

from biorewards.phantom.classes import CLASSES, COMPOUNDS, Compound, Effect
from biorewards.phantom.dataset import PIXEL_SIZE_UM, Crops, iterate, render_dataset, write_dataset
from biorewards.phantom.field import Field, render_field
from biorewards.phantom.optics import Plate, draw_plate

__all__ = [
    "CLASSES",
    "COMPOUNDS",
    "PIXEL_SIZE_UM",
    "Compound",
    "Crops",
    "Effect",
    "Field",
    "Plate",
    "draw_plate",
    "iterate",
    "render_dataset",
    "render_field",
    "write_dataset",
]
