"""Every figure and panel: `from mimdet.viz import show_detections, TokenLab`.

A name is imported when it is first used, so `import mimdet.viz` loads neither matplotlib nor
ipywidgets, and figures can be drawn where no widgets are installed.
"""

import importlib
from typing import Any

_NAMES_OF = {
    "attention": "nearest_sampled show_attention show_rollout",
    "charts": (
        "group_rates loaded_by_part show_forecast show_loaded show_positions show_profile "
        "show_ratios show_reliance show_schedule show_sizes show_stacked show_training"
    ),
    "draw": "to_pixels",
    "errors": "show_comparison show_error_gallery show_errors show_precision_recall",
    "experiments": "save_figures show_arms show_learning_curves show_matrix",
    "features": (
        "compare_pyramids largest_difference pyramid_of show_channels show_planes show_pyramid"
    ),
    "figures": (
        "contact_sheet padding_factor show_batches show_bitmaps show_data show_detections "
        "show_sample show_stages small_picture"
    ),
    "reconstruction": ("draw_sample fit_to_mae paint show_pictures show_reconstruction to_uint8"),
    "record": "attention_names rollout",
    "style": "new_figure save_figure",
    "widgets.attention_explorer": "AttentionExplorer",
    "widgets.canvas": "PatchCanvas",
    "widgets.panel": "Panel",
    "widgets.pyramid_viewer": "PyramidViewer",
    "widgets.ratio_dial": "RatioDial",
    "widgets.result_browser": "ResultBrowser",
    "widgets.sample_browser": "SampleBrowser",
    "widgets.token_lab": "TokenLab",
    "widgets.training_dashboard": "TrainingDashboard",
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names.split()}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"mimdet.viz has no {name!r}; its public names are {sorted(__all__)}")
    value = getattr(importlib.import_module(f"mimdet.viz.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
