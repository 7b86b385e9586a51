"""Each file needs its framework, and is collected where that is installed."""

import importlib.util

import torch

collect_ignore = [
    f"test_{name}.py"
    for name in ("transformers", "lightning")
    if importlib.util.find_spec(name) is None
]

if torch.version.cuda is None and importlib.util.find_spec("torchvision") is not None:
    # torchvision's wheels on PyPI are made for CUDA builds of torch. With others their operators are
    # missing, and its import asks for these two; nothing here calls them.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
